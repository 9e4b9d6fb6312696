//! Layers that are built from loaded tensors and keep the checkpoint's names; the layers of tch can only be built from
//! random values.
//!
//! `load` of a layer asks the ledger for its tensors. It never fails: see [`Weights::get`].

use tch::{Kind, Tensor};

use crate::weights::Weights;

/// A linear layer, `y = x Wᵀ + b`, or without the bias `y = x Wᵀ`.
#[derive(Debug)]
pub struct Linear {
    /// The matrix W, [out, in].
    pub weight: Tensor,
    /// The bias b, `[out]`; none in a layer without one.
    pub bias: Option<Tensor>,
}

impl Linear {
    /// Loads a layer from `in_` to `out` features, from the tensors `weight` and `bias`.
    pub fn load(w: &Weights, in_: i64, out: i64) -> Self {
        Self { bias: Some(w.get("bias", &[out])), ..Self::load_no_bias(w, in_, out) }
    }

    /// Loads a layer without a bias from `in_` to `out` features, from the tensor `weight`.
    pub fn load_no_bias(w: &Weights, in_: i64, out: i64) -> Self {
        Self { weight: w.get("weight", &[out, in_]), bias: None }
    }

    /// Applies the layer to the last dimension: [.., in] -> [.., out].
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }
}

/// Layer normalisation: brings the last dimension to mean 0 and variance 1, then scales and shifts each of its
/// features.
#[derive(Debug)]
pub struct LayerNorm {
    /// The scale of each feature, `[width]`.
    pub weight: Tensor,
    /// The shift of each feature, `[width]`.
    pub bias: Tensor,
    /// What is added to the variance, so that constant inputs do not divide by zero.
    pub eps: f64,
}

impl LayerNorm {
    /// Loads a normalisation over `width` features, from the tensors `weight` and `bias`.
    pub fn load(w: &Weights, width: i64, eps: f64) -> Self {
        Self { weight: w.get("weight", &[width]), bias: w.get("bias", &[width]), eps }
    }

    /// Normalises each vector of features: [.., width] -> [.., width].
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.eps, false)
    }
}

/// Root mean square normalisation: divides the last dimension by its root mean square, in float32 as upstream. The
/// scale is applied in the input's own kind, after rounding back.
#[derive(Debug)]
pub struct RmsNorm {
    /// The scale of each feature, `[width]`.
    pub weight: Tensor,
    /// What is added to the mean square, so that zeros do not divide by zero.
    pub eps: f64,
}

impl RmsNorm {
    /// Loads a normalisation over `width` features, from the tensor `weight`.
    pub fn load(w: &Weights, width: i64, eps: f64) -> Self {
        Self { weight: w.get("weight", &[width]), eps }
    }

    /// Normalises each vector of features: [.., width] -> [.., width].
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let wide = x.to_kind(Kind::Float);
        let mean_square = wide.square().mean_dim(-1, true, Kind::Float);
        (wide * (mean_square + self.eps).rsqrt()).to_kind(x.kind()) * &self.weight
    }
}

/// An embedding table: one row of features for each id.
#[derive(Debug)]
pub struct Embedding {
    /// The table, [rows, width].
    pub weight: Tensor,
}

impl Embedding {
    /// Loads a table of `rows` ids with `width` features each, from the tensor `weight`.
    pub fn load(w: &Weights, rows: i64, width: i64) -> Self {
        Self { weight: w.get("weight", &[rows, width]) }
    }

    /// Looks rows up by their ids (int64, each below `rows`): [..] -> [.., width].
    pub fn forward(&self, ids: &Tensor) -> Tensor {
        Tensor::embedding(&self.weight, ids, -1, false, false)
    }
}

/// A convolution over height and width with a square kernel and the same padding of zeros on all sides.
#[derive(Debug)]
pub struct Conv2d {
    /// The kernels, [out, in, kernel, kernel].
    pub weight: Tensor,
    /// The bias of each output channel, `[out]`.
    pub bias: Tensor,
    /// How many pixels the kernel moves at a time, in both directions.
    pub stride: i64,
    /// How many pixels of zeros are added on each side.
    pub padding: i64,
}

impl Conv2d {
    /// Loads a convolution from `in_` to `out` channels with a kernel of `kernel` × `kernel` pixels, from the tensors
    /// `weight` and `bias`; `stride` and `padding` are in pixels.
    pub fn load(w: &Weights, in_: i64, out: i64, kernel: i64, stride: i64, padding: i64) -> Self {
        let weight = w.get("weight", &[out, in_, kernel, kernel]);
        Self { weight, bias: w.get("bias", &[out]), stride, padding }
    }

    /// Convolves images: [batch, in, height, width_px] -> [batch, out, height', width_px'], where `height'` is
    /// `(height + 2 × padding - kernel) / stride + 1`, rounded down, and `width_px'` likewise.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        x.conv2d(&self.weight, Some(&self.bias), stride, padding, [1, 1], 1)
    }
}

/// Group normalisation: brings each group of neighbouring channels of an image to mean 0 and variance 1, then scales
/// and shifts each channel.
#[derive(Debug)]
pub struct GroupNorm {
    /// How many groups the channels are divided into; it divides their number.
    pub groups: i64,
    /// The scale of each channel, `[channels]`.
    pub weight: Tensor,
    /// The shift of each channel, `[channels]`.
    pub bias: Tensor,
    /// What is added to the variance, so that constant inputs do not divide by zero.
    pub eps: f64,
}

impl GroupNorm {
    /// Loads a normalisation of `channels` channels in `groups` groups, from the tensors `weight` and `bias`.
    pub fn load(w: &Weights, groups: i64, channels: i64, eps: f64) -> Self {
        Self { groups, weight: w.get("weight", &[channels]), bias: w.get("bias", &[channels]), eps }
    }

    /// Normalises each group of each element of the batch: [batch, channels, ..] -> [batch, channels, ..].
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.group_norm(self.groups, Some(&self.weight), Some(&self.bias), self.eps, false)
    }
}
