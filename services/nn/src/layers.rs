//! Layers built from loaded tensors, with the checkpoint's names; tch's own cannot be.

use tch::{Kind, Tensor};

use crate::weights::Weights;

/// `y = x Wᵀ (+ b)`
#[derive(Debug)]
pub struct Linear {
    /// [out, in]
    pub weight: Tensor,
    /// [out]
    pub bias: Option<Tensor>,
}

impl Linear {
    pub fn load(w: &Weights, in_: i64, out: i64) -> Self {
        Self { bias: Some(w.get("bias", &[out])), ..Self::load_no_bias(w, in_, out) }
    }

    pub fn load_no_bias(w: &Weights, in_: i64, out: i64) -> Self {
        Self { weight: w.get("weight", &[out, in_]), bias: None }
    }

    /// [.., in] -> [.., out]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }
}

/// Normalises the last dimension to mean 0 and variance 1.
#[derive(Debug)]
pub struct LayerNorm {
    pub weight: Tensor,
    pub bias: Tensor,
    pub eps: f64,
}

impl LayerNorm {
    pub fn load(w: &Weights, width: i64, eps: f64) -> Self {
        Self { weight: w.get("weight", &[width]), bias: w.get("bias", &[width]), eps }
    }

    /// [.., width] -> [.., width]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.eps, false)
    }
}

/// Divides the last dimension by its root mean square, in float32 as upstream; the gain is applied in the input's
/// own kind, after rounding back.
#[derive(Debug)]
pub struct RmsNorm {
    pub weight: Tensor,
    pub eps: f64,
}

impl RmsNorm {
    pub fn load(w: &Weights, width: i64, eps: f64) -> Self {
        Self { weight: w.get("weight", &[width]), eps }
    }

    /// [.., width] -> [.., width]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let wide = x.to_kind(Kind::Float);
        let mean_square = wide.square().mean_dim(-1, true, Kind::Float);
        (wide * (mean_square + self.eps).rsqrt()).to_kind(x.kind()) * &self.weight
    }
}

/// Rows of a table by id.
#[derive(Debug)]
pub struct Embedding {
    /// [rows, width]
    pub weight: Tensor,
}

impl Embedding {
    pub fn load(w: &Weights, rows: i64, width: i64) -> Self {
        Self { weight: w.get("weight", &[rows, width]) }
    }

    /// ids [..] -> [.., width]
    pub fn forward(&self, ids: &Tensor) -> Tensor {
        Tensor::embedding(&self.weight, ids, -1, false, false)
    }
}

/// A square convolution with the same padding on all sides.
#[derive(Debug)]
pub struct Conv2d {
    /// [out, in, kernel, kernel]
    pub weight: Tensor,
    pub bias: Tensor,
    pub stride: i64,
    pub padding: i64,
}

impl Conv2d {
    pub fn load(w: &Weights, in_: i64, out: i64, kernel: i64, stride: i64, padding: i64) -> Self {
        let weight = w.get("weight", &[out, in_, kernel, kernel]);
        Self { weight, bias: w.get("bias", &[out]), stride, padding }
    }

    /// [batch, in, height, width_px] -> [batch, out, height', width_px']
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        x.conv2d(&self.weight, Some(&self.bias), stride, padding, [1, 1], 1)
    }
}

/// Normalises groups of channels to mean 0 and variance 1.
#[derive(Debug)]
pub struct GroupNorm {
    pub groups: i64,
    pub weight: Tensor,
    pub bias: Tensor,
    pub eps: f64,
}

impl GroupNorm {
    pub fn load(w: &Weights, groups: i64, channels: i64, eps: f64) -> Self {
        Self { groups, weight: w.get("weight", &[channels]), bias: w.get("bias", &[channels]), eps }
    }

    /// [batch, channels, ..] -> [batch, channels, ..]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.group_norm(self.groups, Some(&self.weight), Some(&self.bias), self.eps, false)
    }
}
