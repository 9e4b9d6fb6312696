//! Between latents and pixels: the variational autoencoder of Stable Diffusion XL.
//!
//! Upstream is diffusers 0.24 `AutoencoderKL`. It computes in the kind of its weights: its configuration asks for
//! float32 (`force_upcast`), but upstream's Emu2 code never reads that. [`Decoder`] is what serving needs; the
//! encoder is for training.

use emu2_nn::{
    attention::attend,
    layers::{Conv2d, GroupNorm, Linear},
    weights::Weights,
};
use serde::Deserialize;
use tch::{Kind, Tensor};

use crate::{
    blocks::{ResnetBlock, ResnetShape, Upsampler, spatial_size},
    error::LoadError,
    switches::{Settings, Supported, unsupported},
};

#[cfg(test)]
mod tests;

/// Section `vae` of a model's configuration; the defaults are Emu2's.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct VaeConfig {
    /// The channels of the images that the encoder reads: 3.
    pub in_channels: i64,
    /// The channels of the images that the decoder makes: 3.
    pub out_channels: i64,
    /// The channels of latents.
    pub latent_channels: i64,
    /// The channels of each level's feature maps, the largest maps first; 1 to 8 levels.
    pub block_out_channels: Vec<i64>,
    /// How many residual blocks a level of the encoder has; one of the decoder has one more.
    pub layers_per_block: usize,
    /// How many groups each group norm has; it divides every level's channels.
    pub norm_num_groups: i64,
    /// What the encoder's latents are multiplied by to become those of the UNet, which have about unit variance.
    pub scaling_factor: f64,
    down_block_types: Option<Vec<DownBlockType>>,
    up_block_types: Option<Vec<UpBlockType>>,
    #[serde(flatten)]
    settings: Settings,
}

/// The one type of block on the way down.
#[derive(Clone, Copy, Debug, Deserialize)]
enum DownBlockType {
    #[serde(rename = "DownEncoderBlock2D")]
    Convolution,
}

/// The one type of block on the way up.
#[derive(Clone, Copy, Debug, Deserialize)]
enum UpBlockType {
    #[serde(rename = "UpDecoderBlock2D")]
    Convolution,
}

const SUPPORTED: &[(&str, Supported)] = &[
    ("act_fn", Supported::Text("silu")),
    ("latents_mean", Supported::Off),
    ("latents_std", Supported::Off),
    ("shift_factor", Supported::Off),
];

/// What every group norm adds to the variance, which no configuration names.
const EPS: f64 = 1e-6;

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            latent_channels: 4,
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            norm_num_groups: 32,
            scaling_factor: 0.13025,
            down_block_types: None,
            up_block_types: None,
            settings: Settings::new(),
        }
    }
}

impl VaeConfig {
    /// Returns how many pixels, in height and in width, one position of the latents becomes: all levels but one halve.
    pub fn scale_factor(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    fn levels(&self) -> usize {
        self.block_out_channels.len()
    }

    fn resnet(&self, in_: i64, out: i64) -> ResnetShape {
        ResnetShape { in_, out, groups: self.norm_num_groups, eps: EPS, time_width: None }
    }

    pub(crate) fn check(&self) -> Result<(), LoadError> {
        let mut problems = unsupported(&self.settings, SUPPORTED);
        let mut require = |holds: bool, text: String| {
            if !holds {
                problems.push(text);
            }
        };
        let levels = self.levels();
        // More would be more pixels per latent than an image has.
        require(
            (1..=8).contains(&levels),
            format!("`block_out_channels` must have 1 to 8 levels, got {levels}"),
        );
        let down = self.down_block_types.as_ref().map_or(levels, Vec::len);
        require(
            down == levels,
            format!("`down_block_types` has {down} levels, `block_out_channels` {levels}"),
        );
        let up = self.up_block_types.as_ref().map_or(levels, Vec::len);
        require(up == levels, format!("`up_block_types` has {up} levels, `block_out_channels` {levels}"));
        let groups = self.norm_num_groups;
        for &channels in &self.block_out_channels {
            require(
                groups > 0 && channels > 0 && channels % groups == 0,
                format!("{channels} channels do not divide into {groups} groups (`norm_num_groups`)"),
            );
        }
        let (in_, out) = (self.in_channels, self.out_channels);
        require(in_ == 3 && out == 3, format!("pixels have 3 channels, got {in_} in and {out} out"));
        let scale = self.scaling_factor;
        require(scale > 0.0 && scale.is_finite(), format!("`scaling_factor` must be above 0, got {scale}"));
        LoadError::check("vae", problems)
    }
}

/// The decoder of the VAE, from latents to pixels.
#[derive(Debug)]
pub struct Decoder {
    /// What the encoder's latents are multiplied by to become those of the UNet.
    pub scaling_factor: f64,
    pub(crate) post_quant_conv: Conv2d,
    pub(crate) conv_in: Conv2d,
    pub(crate) mid_block: MidBlock,
    /// The levels, from the smallest feature maps to the largest; all but the last double height and width.
    pub up_blocks: Vec<UpBlock>,
    pub(crate) conv_norm_out: GroupNorm,
    pub(crate) conv_out: Conv2d,
}

impl Decoder {
    /// Builds the decoder of these sizes out of a ledger at the root of the VAE's names.
    ///
    /// # Errors
    ///
    /// [`LoadError::Config`]: the configuration contradicts itself or asks for what is not built. Weights that do not
    /// fit are told by the ledger's `finish`.
    pub fn load(w: &Weights, config: &VaeConfig) -> Result<Self, LoadError> {
        config.check()?;
        let (first, last) = (config.block_out_channels[0], config.block_out_channels[config.levels() - 1]);
        let latents = config.latent_channels;
        let post_quant_conv = Conv2d::load(&w.at("post_quant_conv"), latents, latents, 1, 1, 0);
        let w = w.at("decoder");
        Ok(Self {
            scaling_factor: config.scaling_factor,
            post_quant_conv,
            conv_in: Conv2d::load(&w.at("conv_in"), latents, last, 3, 1, 1),
            mid_block: MidBlock::load(&w.at("mid_block"), config),
            up_blocks: (0..config.levels()).rev().map(|level| UpBlock::load(&w, config, level)).collect(),
            conv_norm_out: GroupNorm::load(&w.at("conv_norm_out"), config.norm_num_groups, first, EPS),
            conv_out: Conv2d::load(&w.at("conv_out"), first, config.out_channels, 3, 1, 1),
        })
    }

    /// Decodes the UNet's latents to colours: [batch, channels, height, width_px]
    /// -> [batch, 3, height × scale, width_px × scale], in 0..=1, float32.
    pub fn image(&self, latents: &Tensor) -> Tensor {
        // Upstream multiplies by the reciprocal; dividing would flip a few of the image's levels.
        let latents = (latents * (1.0 / self.scaling_factor)).to_kind(self.conv_in.weight.kind());
        let decoded = self.forward(&latents);
        (decoded / 2 + 0.5).clamp(0.0, 1.0).to_kind(Kind::Float)
    }

    /// Decodes the encoder's latents to pixels of about -1..=1: [batch, channels, height, width_px]
    /// -> [batch, 3, height × scale, width_px × scale], in the kind of the weights.
    pub fn forward(&self, latents: &Tensor) -> Tensor {
        let mut x = self.mid_block.forward(&self.conv_in.forward(&self.post_quant_conv.forward(latents)));
        for block in &self.up_blocks {
            x = block.forward(x);
        }
        self.conv_out.forward(&self.conv_norm_out.forward(&x).silu())
    }
}

/// Converts colours in 0..=1 to bytes, rounded half to even as upstream: [batch, 3, height, width_px]
/// -> [batch, height, width_px, 3], u8.
pub fn levels(image: &Tensor) -> Tensor {
    (image * 255.0).round().to_kind(Kind::Uint8).permute([0, 2, 3, 1]).contiguous()
}

/// The encoder of the VAE, from pixels to the distribution of their latents, for training.
#[derive(Debug)]
pub struct Encoder {
    pub(crate) conv_in: Conv2d,
    pub(crate) down_blocks: Vec<DownBlock>,
    pub(crate) mid_block: MidBlock,
    pub(crate) conv_norm_out: GroupNorm,
    pub(crate) conv_out: Conv2d,
    pub(crate) quant_conv: Conv2d,
}

/// A normal distribution of latents; the UNet learns its samples times the scaling factor.
#[derive(Debug)]
pub struct LatentDistribution {
    /// The mean, [batch, channels, height, width_px].
    pub mean: Tensor,
    /// The logarithm of the variance, [batch, channels, height, width_px].
    pub log_variance: Tensor,
}

impl Encoder {
    /// The names of the encoder's weights, at the root of the VAE's names, which serving leaves out.
    pub const NAMES: [&str; 2] = ["encoder", "quant_conv"];

    /// Builds the encoder of these sizes out of a ledger at the root of the VAE's names.
    ///
    /// # Errors
    ///
    /// [`LoadError::Config`]: the configuration contradicts itself or asks for what is not built. Weights that do not
    /// fit are told by the ledger's `finish`.
    pub fn load(w: &Weights, config: &VaeConfig) -> Result<Self, LoadError> {
        config.check()?;
        let (first, last) = (config.block_out_channels[0], config.block_out_channels[config.levels() - 1]);
        // Mean and log-variance.
        let moments = 2 * config.latent_channels;
        let quant_conv = Conv2d::load(&w.at("quant_conv"), moments, moments, 1, 1, 0);
        let w = w.at("encoder");
        Ok(Self {
            conv_in: Conv2d::load(&w.at("conv_in"), config.in_channels, first, 3, 1, 1),
            down_blocks: (0..config.levels()).map(|level| DownBlock::load(&w, config, level)).collect(),
            mid_block: MidBlock::load(&w.at("mid_block"), config),
            conv_norm_out: GroupNorm::load(&w.at("conv_norm_out"), config.norm_num_groups, last, EPS),
            conv_out: Conv2d::load(&w.at("conv_out"), last, moments, 3, 1, 1),
            quant_conv,
        })
    }

    /// Encodes pixels in -1..=1: [batch, 3, height, width_px] -> mean and log-variance, each
    /// [batch, channels, height / scale, width_px / scale].
    pub fn forward(&self, pixels: &Tensor) -> LatentDistribution {
        let mut x = self.conv_in.forward(pixels);
        for block in &self.down_blocks {
            x = block.forward(x);
        }
        let x = self.conv_norm_out.forward(&self.mid_block.forward(&x)).silu();
        let moments = self.quant_conv.forward(&self.conv_out.forward(&x));
        let [mean, log_variance] =
            <[Tensor; 2]>::try_from(moments.chunk(2, 1)).expect("moments are even in number");
        // Upstream's bounds keep the exponential finite.
        LatentDistribution { mean, log_variance: log_variance.clamp(-30.0, 20.0) }
    }
}

/// One level of the decoder: residual blocks, then twice the size on all levels but the last.
#[derive(Debug)]
pub struct UpBlock {
    pub(crate) resnets: Vec<ResnetBlock>,
    pub(crate) upsampler: Option<Upsampler>,
}

impl UpBlock {
    /// Loads a level, which is counted as on the way down; the names in the checkpoint count from the bottom.
    fn load(w: &Weights, config: &VaeConfig, level: usize) -> Self {
        let from_bottom = config.levels() - 1 - level;
        let w = w.at("up_blocks").at(from_bottom);
        let out = config.block_out_channels[level];
        let below = config.block_out_channels[(level + 1).min(config.levels() - 1)];
        let resnet = |layer| {
            let in_ = if layer == 0 { below } else { out };
            ResnetBlock::load(&w.at("resnets").at(layer), config.resnet(in_, out))
        };
        // One more than on the way down, as in the UNet.
        Self {
            resnets: (0..=config.layers_per_block).map(resnet).collect(),
            upsampler: (level > 0).then(|| Upsampler::load(&w.at("upsamplers").at(0), out)),
        }
    }

    /// [batch, in, height, width_px] -> [batch, out, 2 · height, 2 · width_px]
    fn forward(&self, mut x: Tensor) -> Tensor {
        for resnet in &self.resnets {
            x = resnet.forward(&x, None);
        }
        match &self.upsampler {
            Some(upsampler) => upsampler.forward(&x, spatial_size(&x).map(|side| 2 * side)),
            None => x,
        }
    }
}

/// One level of the encoder: residual blocks, then half the size on all levels but the last.
#[derive(Debug)]
pub(crate) struct DownBlock {
    pub(crate) resnets: Vec<ResnetBlock>,
    pub(crate) downsampler: Option<Conv2d>,
}

impl DownBlock {
    fn load(w: &Weights, config: &VaeConfig, level: usize) -> Self {
        let w = w.at("down_blocks").at(level);
        let out = config.block_out_channels[level];
        let above = config.block_out_channels[level.saturating_sub(1)];
        let resnet = |layer| {
            let in_ = if layer == 0 { above } else { out };
            ResnetBlock::load(&w.at("resnets").at(layer), config.resnet(in_, out))
        };
        let is_last = level + 1 == config.levels();
        let conv = || Conv2d::load(&w.at("downsamplers").at(0).at("conv"), out, out, 3, 2, 0);
        Self {
            resnets: (0..config.layers_per_block).map(resnet).collect(),
            downsampler: (!is_last).then(conv),
        }
    }

    /// [batch, in, height, width_px] -> [batch, out, ⌊height / 2⌋, ⌊width_px / 2⌋]
    fn forward(&self, mut x: Tensor) -> Tensor {
        for resnet in &self.resnets {
            x = resnet.forward(&x, None);
        }
        match &self.downsampler {
            // Unlike the UNet's, padded on the right and at the bottom only.
            Some(conv) => conv.forward(&x.constant_pad_nd([0, 1, 0, 1])),
            None => x,
        }
    }
}

/// The bottom of encoder and decoder: residual block, attention over all positions, residual block.
#[derive(Debug)]
pub(crate) struct MidBlock {
    pub(crate) resnets: [ResnetBlock; 2],
    pub(crate) attention: Attention,
}

impl MidBlock {
    fn load(w: &Weights, config: &VaeConfig) -> Self {
        let channels = config.block_out_channels[config.levels() - 1];
        let resnet = |i| ResnetBlock::load(&w.at("resnets").at(i), config.resnet(channels, channels));
        Self {
            resnets: [resnet(0), resnet(1)],
            attention: Attention::load(&w.at("attentions").at(0), channels, config.norm_num_groups),
        }
    }

    /// [batch, channels, height, width_px] -> [batch, channels, height, width_px]
    fn forward(&self, x: &Tensor) -> Tensor {
        let x = self.resnets[0].forward(x, None);
        self.resnets[1].forward(&self.attention.forward(&x), None)
    }
}

/// Attention of one head over all positions, as residual.
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) group_norm: GroupNorm,
    pub(crate) to_q: Linear,
    pub(crate) to_k: Linear,
    pub(crate) to_v: Linear,
    pub(crate) to_out: Linear,
}

impl Attention {
    fn load(w: &Weights, channels: i64, groups: i64) -> Self {
        let linear = |w: &Weights| Linear::load(w, channels, channels);
        Self {
            group_norm: GroupNorm::load(&w.at("group_norm"), groups, channels, EPS),
            to_q: linear(&w.at("to_q")),
            to_k: linear(&w.at("to_k")),
            to_v: linear(&w.at("to_v")),
            to_out: linear(&w.at("to_out").at(0)),
        }
    }

    /// [batch, channels, height, width_px] -> [batch, channels, height, width_px]
    fn forward(&self, x: &Tensor) -> Tensor {
        // [batch, channels, height, width_px] -> [batch, (height width_px), channels]
        let tokens = self.group_norm.forward(x).flatten(2, 3).transpose(1, 2);
        // One head: [batch, tokens, channels] -> [batch, 1, tokens, channels]
        let [q, k, v] =
            [&self.to_q, &self.to_k, &self.to_v].map(|linear| linear.forward(&tokens).unsqueeze(1));
        let tokens = self.to_out.forward(&attend(&q, &k, &v, false).squeeze_dim(1));
        // [batch, (height width_px), channels] -> [batch, channels, height, width_px]
        x + tokens.transpose(1, 2).reshape_as(x)
    }
}
