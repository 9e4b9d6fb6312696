//! What the UNet and the VAE are both built from: residual blocks of convolutions, and resampling by two.
//!
//! Upstream's are diffusers 0.24 `ResnetBlock2D`, `Downsample2D` and `Upsample2D`.

use emu2_nn::{
    layers::{Conv2d, GroupNorm, Linear},
    weights::Weights,
};
use tch::Tensor;

/// The channels into and out of a residual block, and what normalises them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ResnetShape {
    pub(crate) in_: i64,
    pub(crate) out: i64,
    pub(crate) groups: i64,
    pub(crate) eps: f64,
    /// The width of the time embedding, where the block has one.
    pub(crate) time_width: Option<i64>,
}

/// A residual block: two convolutions around which the input goes on by itself.
#[derive(Debug)]
pub(crate) struct ResnetBlock {
    pub(crate) norm1: GroupNorm,
    pub(crate) conv1: Conv2d,
    /// The projection of the time embedding, in the UNet only: the VAE knows no time.
    pub(crate) time_emb_proj: Option<Linear>,
    pub(crate) norm2: GroupNorm,
    pub(crate) conv2: Conv2d,
    /// The convolution that the input goes through where the number of channels changes.
    pub(crate) conv_shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    pub(crate) fn load(w: &Weights, shape: ResnetShape) -> Self {
        let ResnetShape { in_, out, groups, eps, time_width } = shape;
        Self {
            norm1: GroupNorm::load(&w.at("norm1"), groups, in_, eps),
            conv1: Conv2d::load(&w.at("conv1"), in_, out, 3, 1, 1),
            time_emb_proj: time_width.map(|width| Linear::load(&w.at("time_emb_proj"), width, out)),
            norm2: GroupNorm::load(&w.at("norm2"), groups, out, eps),
            conv2: Conv2d::load(&w.at("conv2"), out, out, 3, 1, 1),
            conv_shortcut: (in_ != out).then(|| Conv2d::load(&w.at("conv_shortcut"), in_, out, 1, 1, 0)),
        }
    }

    /// Applies the block to `x`: [batch, in, height, width_px] -> [batch, out, height, width_px].
    ///
    /// `time`: [batch, width], already through its activation, which is the same for all blocks.
    pub(crate) fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Tensor {
        let mut h = self.conv1.forward(&self.norm1.forward(x).silu());
        if let (Some(project), Some(time)) = (&self.time_emb_proj, time) {
            // [batch, channels] -> [batch, channels, 1, 1]
            h += project.forward(time).unsqueeze(-1).unsqueeze(-1);
        }
        let h = self.conv2.forward(&self.norm2.forward(&h).silu());
        match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward(x) + h,
            None => x + h,
        }
    }
}

/// A convolution that halves height and width, rounding up.
#[derive(Debug)]
pub(crate) struct Downsampler {
    pub(crate) conv: Conv2d,
}

impl Downsampler {
    /// Loads a convolution that is padded on all sides, as in the UNet.
    pub(crate) fn load(w: &Weights, channels: i64) -> Self {
        Self { conv: Conv2d::load(&w.at("conv"), channels, channels, 3, 2, 1) }
    }

    /// Shrinks feature maps: [batch, channels, height, width_px] -> [batch, channels, ⌈height / 2⌉, ⌈width_px / 2⌉].
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        self.conv.forward(x)
    }
}

/// A layer that repeats pixels up to a size, then smooths them.
#[derive(Debug)]
pub(crate) struct Upsampler {
    pub(crate) conv: Conv2d,
}

impl Upsampler {
    pub(crate) fn load(w: &Weights, channels: i64) -> Self {
        Self { conv: Conv2d::load(&w.at("conv"), channels, channels, 3, 1, 1) }
    }

    /// Enlarges feature maps to `size` = [height', width_px']: [batch, channels, height, width_px]
    /// -> [batch, channels, height', width_px'].
    pub(crate) fn forward(&self, x: &Tensor, size: [i64; 2]) -> Tensor {
        self.conv.forward(&x.upsample_nearest2d(size, None, None))
    }
}

/// Returns height and width of feature maps [batch, channels, height, width_px].
pub(crate) fn spatial_size(x: &Tensor) -> [i64; 2] {
    let (_, _, height, width_px) = x.size4().expect("feature maps have four dimensions");
    [height, width_px]
}
