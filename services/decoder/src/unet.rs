//! The denoiser: a UNet of the shape of Stable Diffusion XL (arXiv 2307.01952), conditioned on Emu2's embeddings.
//!
//! Upstream is diffusers 0.24 `UNet2DConditionModel` under the settings of baaivision/Emu@13c395e
//! `Emu2/emu/conf/diffusion_config/unet/config.json`. What differs from SDXL: no text encoder. Cross attention reads
//! the image's embeddings, and their mean stands in for the pooled text. What differs from upstream's code: every
//! sample of a batch has its own timestep and its own sizes, and the activation of the time embedding, the same in
//! all residual blocks, is computed once.

use emu2_nn::{
    attention::attend,
    layers::{Conv2d, GroupNorm, LayerNorm, Linear},
    weights::Weights,
};
use serde::Deserialize;
use tch::{Kind, Tensor};

use crate::{
    blocks::{Downsampler, ResnetBlock, ResnetShape, Upsampler, spatial_size},
    error::LoadError,
    switches::{Settings, Supported, unsupported},
};

#[cfg(test)]
mod tests;

/// How many size conditions SDXL has: original height and width, crop top and left, target height and width.
pub const TIME_IDS: i64 = 6;

/// Section `unet` of a model's configuration; the defaults are Emu2's.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct UnetConfig {
    /// The side of the latents of an image when no size is asked for.
    pub sample_size: i64,
    /// The channels of latents.
    pub in_channels: i64,
    /// The channels of the predicted noise, as many as `in_channels`.
    pub out_channels: i64,
    /// The channels of each level's feature maps, the largest maps first.
    pub block_out_channels: Vec<i64>,
    /// The type of each level's block on the way down, the first level first.
    pub down_block_types: Vec<DownBlockType>,
    /// The type of each level's block on the way up, the last level first.
    pub up_block_types: Vec<UpBlockType>,
    /// How many residual blocks a level has on the way down; on the way up it has one more.
    pub layers_per_block: usize,
    /// How many blocks each transformer of a level has, by level.
    pub transformer_layers_per_block: Vec<usize>,
    /// The number of attention heads by level. The checkpoint's name, `attention_head_dim`, is upstream's misnomer: it
    /// is not their width.
    #[serde(rename = "attention_head_dim")]
    pub heads: Vec<i64>,
    /// The width of one embedding, which cross attention reads.
    pub cross_attention_dim: i64,
    /// How many sinusoids each size condition becomes; even.
    pub addition_time_embed_dim: i64,
    /// The width of pooled embeddings and size conditions together: `cross_attention_dim` + 6 ×
    /// `addition_time_embed_dim`.
    pub projection_class_embeddings_input_dim: i64,
    /// How many groups each group norm has; it divides every level's channels.
    pub norm_num_groups: i64,
    /// What the group norms add to the variance.
    pub norm_eps: f64,
    #[serde(flatten)]
    settings: Settings,
}

/// The type of a level's block on the way down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum DownBlockType {
    /// Residual blocks alone.
    #[serde(rename = "DownBlock2D")]
    Convolution,
    /// Residual blocks, each followed by a transformer that reads the embeddings.
    #[serde(rename = "CrossAttnDownBlock2D")]
    CrossAttention,
}

/// The type of a level's block on the way up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum UpBlockType {
    /// Residual blocks alone.
    #[serde(rename = "UpBlock2D")]
    Convolution,
    /// Residual blocks, each followed by a transformer that reads the embeddings.
    #[serde(rename = "CrossAttnUpBlock2D")]
    CrossAttention,
}

/// What published configurations may say of the settings that no field reads.
const SUPPORTED: &[(&str, Supported)] = &[
    ("act_fn", Supported::Text("silu")),
    ("addition_embed_type", Supported::Text("text_time")),
    ("attention_type", Supported::Text("default")),
    ("center_input_sample", Supported::Off),
    ("class_embed_type", Supported::Off),
    ("class_embeddings_concat", Supported::Off),
    ("conv_in_kernel", Supported::Number(3.0)),
    ("conv_out_kernel", Supported::Number(3.0)),
    ("cross_attention_norm", Supported::Off),
    ("downsample_padding", Supported::Number(1.0)),
    ("dual_cross_attention", Supported::Off),
    ("encoder_hid_dim", Supported::Off),
    ("encoder_hid_dim_type", Supported::Off),
    ("flip_sin_to_cos", Supported::On),
    ("freq_shift", Supported::Number(0.0)),
    ("mid_block_only_cross_attention", Supported::Off),
    ("mid_block_scale_factor", Supported::Number(1.0)),
    ("mid_block_type", Supported::Text("UNetMidBlock2DCrossAttn")),
    ("num_attention_heads", Supported::Off),
    ("num_class_embeds", Supported::Off),
    ("only_cross_attention", Supported::Off),
    ("resnet_out_scale_factor", Supported::Number(1.0)),
    ("resnet_skip_time_act", Supported::Off),
    ("resnet_time_scale_shift", Supported::Text("default")),
    ("time_cond_proj_dim", Supported::Off),
    ("time_embedding_act_fn", Supported::Off),
    ("time_embedding_dim", Supported::Off),
    ("time_embedding_type", Supported::Text("positional")),
    ("timestep_post_act", Supported::Off),
    ("upcast_attention", Supported::Off),
    ("use_linear_projection", Supported::On),
];

/// What the group norm of a transformer adds to the variance, which no configuration names.
const TRANSFORMER_GROUP_NORM_EPS: f64 = 1e-6;
/// What the layer norms of a transformer add to the variance, which no configuration names.
const LAYER_NORM_EPS: f64 = 1e-5;

impl Default for UnetConfig {
    fn default() -> Self {
        Self {
            sample_size: 128,
            in_channels: 4,
            out_channels: 4,
            block_out_channels: vec![320, 640, 1280],
            down_block_types: vec![
                DownBlockType::Convolution,
                DownBlockType::CrossAttention,
                DownBlockType::CrossAttention,
            ],
            up_block_types: vec![
                UpBlockType::CrossAttention,
                UpBlockType::CrossAttention,
                UpBlockType::Convolution,
            ],
            layers_per_block: 2,
            transformer_layers_per_block: vec![1, 2, 10],
            heads: vec![5, 10, 20],
            cross_attention_dim: 1792,
            addition_time_embed_dim: 256,
            projection_class_embeddings_input_dim: 3328,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            settings: Settings::new(),
        }
    }
}

impl UnetConfig {
    fn levels(&self) -> usize {
        self.block_out_channels.len()
    }

    /// Returns the width of the time embedding; upstream fixes the factor.
    fn time_width(&self) -> i64 {
        4 * self.block_out_channels[0]
    }

    fn resnet(&self, in_: i64, out: i64) -> ResnetShape {
        let (groups, eps) = (self.norm_num_groups, self.norm_eps);
        ResnetShape { in_, out, groups, eps, time_width: Some(self.time_width()) }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = unsupported(&self.settings, SUPPORTED);
        let mut require = |holds: bool, text: String| {
            if !holds {
                problems.push(text);
            }
        };
        let levels = self.levels();
        require(levels > 0, "`block_out_channels` is empty".to_owned());
        for (name, count) in [
            ("down_block_types", self.down_block_types.len()),
            ("up_block_types", self.up_block_types.len()),
            ("transformer_layers_per_block", self.transformer_layers_per_block.len()),
            ("attention_head_dim", self.heads.len()),
        ] {
            require(count == levels, format!("`{name}` has {count} levels, `block_out_channels` {levels}"));
        }
        let groups = self.norm_num_groups;
        for (&channels, &heads) in self.block_out_channels.iter().zip(&self.heads) {
            require(
                groups > 0 && channels > 0 && channels % groups == 0,
                format!("{channels} channels do not divide into {groups} groups (`norm_num_groups`)"),
            );
            require(
                heads > 0 && channels % heads == 0,
                format!("{channels} channels do not divide into {heads} heads (`attention_head_dim`)"),
            );
        }
        let (sizes, width) = (self.addition_time_embed_dim, self.cross_attention_dim);
        let (expected, got) = (width + TIME_IDS * sizes, self.projection_class_embeddings_input_dim);
        require(
            expected == got,
            format!(
                "`projection_class_embeddings_input_dim` must be cross_attention_dim + {TIME_IDS} × \
                 addition_time_embed_dim = {expected}, got {got}"
            ),
        );
        require(sizes % 2 == 0, format!("`addition_time_embed_dim` must be even, got {sizes}"));
        let (in_, out) = (self.in_channels, self.out_channels);
        require(in_ == out, format!("the predicted noise must have the latents' {in_} channels, got {out}"));
        require(self.layers_per_block > 0, "`layers_per_block` must not be 0".to_owned());
        problems
    }
}

/// The denoiser, which predicts the noise in latents.
#[derive(Debug)]
pub struct Unet {
    /// The model's sizes.
    pub config: UnetConfig,
    pub(crate) time_embedding: TimestepEmbedding,
    pub(crate) add_embedding: TimestepEmbedding,
    pub(crate) conv_in: Conv2d,
    pub(crate) down_blocks: Vec<DownBlock>,
    pub(crate) mid_block: MidBlock,
    pub(crate) up_blocks: Vec<UpBlock>,
    pub(crate) conv_norm_out: GroupNorm,
    pub(crate) conv_out: Conv2d,
}

impl Unet {
    /// Builds the denoiser of these sizes out of the ledger of its part.
    ///
    /// # Errors
    ///
    /// [`LoadError::Config`]: the configuration contradicts itself or asks for what is not built. Weights that do not
    /// fit are told by the ledger's `finish`.
    pub fn load(w: &Weights, config: UnetConfig) -> Result<Self, LoadError> {
        LoadError::check("unet", config.problems())?;
        let (first, width) = (config.block_out_channels[0], config.time_width());
        // Channels of what each layer on the way down leaves for its counterpart on the way up.
        let mut skips = vec![first];
        let down_blocks =
            (0..config.levels()).map(|level| DownBlock::load(w, &config, level, &mut skips)).collect();
        let up_blocks =
            (0..config.levels()).rev().map(|level| UpBlock::load(w, &config, level, &mut skips)).collect();
        Ok(Self {
            time_embedding: TimestepEmbedding::load(&w.at("time_embedding"), first, width),
            add_embedding: TimestepEmbedding::load(
                &w.at("add_embedding"),
                config.projection_class_embeddings_input_dim,
                width,
            ),
            conv_in: Conv2d::load(&w.at("conv_in"), config.in_channels, first, 3, 1, 1),
            down_blocks,
            mid_block: MidBlock::load(&w.at("mid_block"), &config),
            up_blocks,
            conv_norm_out: GroupNorm::load(
                &w.at("conv_norm_out"),
                config.norm_num_groups,
                first,
                config.norm_eps,
            ),
            conv_out: Conv2d::load(&w.at("conv_out"), first, config.out_channels, 3, 1, 1),
            config,
        })
    }

    /// Predicts the noise in `latents`: [batch, channels, height, width_px] -> [batch, channels, height, width_px].
    ///
    /// `timesteps`: `[batch]`; `embeddings`: [batch, queries, width], in the kind of the weights as the latents;
    /// `time_ids`: [batch, 6], in pixels, in the order of [`TIME_IDS`].
    pub fn forward(
        &self,
        latents: &Tensor,
        timesteps: &Tensor,
        embeddings: &Tensor,
        time_ids: &Tensor,
    ) -> Tensor {
        let time = self.embed(timesteps, embeddings, time_ids).silu();
        let mut x = self.conv_in.forward(latents);
        let mut skips = vec![x.shallow_clone()];
        for block in &self.down_blocks {
            x = block.forward(x, &time, embeddings, &mut skips);
        }
        x = self.mid_block.forward(&x, &time, embeddings);
        for block in &self.up_blocks {
            x = block.forward(x, &time, embeddings, &mut skips);
        }
        self.conv_out.forward(&self.conv_norm_out.forward(&x).silu())
    }

    /// Embeds what every residual block is told: when, of which sizes, and of what on the whole.
    ///
    /// timesteps `[batch]`, embeddings [batch, queries, width], time_ids [batch, 6] -> [batch, time_width]
    fn embed(&self, timesteps: &Tensor, embeddings: &Tensor, time_ids: &Tensor) -> Tensor {
        let kind = embeddings.kind();
        let timesteps = sinusoids(timesteps, self.config.block_out_channels[0]).to_kind(kind);
        // [batch, ids, frequencies] -> [batch, (ids frequencies)]
        let sizes = sinusoids(time_ids, self.config.addition_time_embed_dim).flatten(1, 2).to_kind(kind);
        let pooled = embeddings.mean_dim(1, false, None);
        self.time_embedding.forward(&timesteps)
            + self.add_embedding.forward(&Tensor::cat(&[pooled, sizes], 1))
    }
}

/// One level of the way down: residual blocks, each with its transformer where the level has them, then half the
/// size on all levels but the last.
#[derive(Debug)]
pub(crate) struct DownBlock {
    pub(crate) resnets: Vec<ResnetBlock>,
    pub(crate) attentions: Vec<Transformer2d>,
    pub(crate) downsampler: Option<Downsampler>,
}

impl DownBlock {
    fn load(w: &Weights, config: &UnetConfig, level: usize, skips: &mut Vec<i64>) -> Self {
        let w = w.at("down_blocks").at(level);
        let channels = config.block_out_channels[level];
        let mut in_ = config.block_out_channels[level.saturating_sub(1)];
        let (mut resnets, mut attentions) = (Vec::new(), Vec::new());
        for layer in 0..config.layers_per_block {
            resnets.push(ResnetBlock::load(&w.at("resnets").at(layer), config.resnet(in_, channels)));
            if config.down_block_types[level] == DownBlockType::CrossAttention {
                attentions.push(Transformer2d::load(&w.at("attentions").at(layer), config, level));
            }
            skips.push(channels);
            in_ = channels;
        }
        let is_last = level + 1 == config.levels();
        let downsampler = (!is_last).then(|| Downsampler::load(&w.at("downsamplers").at(0), channels));
        skips.extend(downsampler.is_some().then_some(channels));
        Self { resnets, attentions, downsampler }
    }

    /// [batch, in, height, width_px] -> [batch, out, ⌈height / 2⌉, ⌈width_px / 2⌉]; what it passes is left in `skips`
    fn forward(&self, mut x: Tensor, time: &Tensor, embeddings: &Tensor, skips: &mut Vec<Tensor>) -> Tensor {
        for (layer, resnet) in self.resnets.iter().enumerate() {
            x = resnet.forward(&x, Some(time));
            if let Some(attention) = self.attentions.get(layer) {
                x = attention.forward(&x, embeddings);
            }
            skips.push(x.shallow_clone());
        }
        if let Some(downsampler) = &self.downsampler {
            x = downsampler.forward(&x);
            skips.push(x.shallow_clone());
        }
        x
    }
}

/// The bottom of the UNet: residual block, transformer, residual block.
#[derive(Debug)]
pub(crate) struct MidBlock {
    pub(crate) resnets: [ResnetBlock; 2],
    pub(crate) attention: Transformer2d,
}

impl MidBlock {
    fn load(w: &Weights, config: &UnetConfig) -> Self {
        let last = config.levels() - 1;
        let channels = config.block_out_channels[last];
        let resnet = |i| ResnetBlock::load(&w.at("resnets").at(i), config.resnet(channels, channels));
        Self {
            resnets: [resnet(0), resnet(1)],
            attention: Transformer2d::load(&w.at("attentions").at(0), config, last),
        }
    }

    /// [batch, channels, height, width_px] -> [batch, channels, height, width_px]
    fn forward(&self, x: &Tensor, time: &Tensor, embeddings: &Tensor) -> Tensor {
        let x = self.resnets[0].forward(x, Some(time));
        let x = self.attention.forward(&x, embeddings);
        self.resnets[1].forward(&x, Some(time))
    }
}

/// One level of the way up: each residual block also reads what the way down left, one more than on the way down.
#[derive(Debug)]
pub(crate) struct UpBlock {
    pub(crate) resnets: Vec<ResnetBlock>,
    pub(crate) attentions: Vec<Transformer2d>,
    pub(crate) upsampler: Option<Upsampler>,
}

impl UpBlock {
    /// Loads a level, which is counted as on the way down; the names in the checkpoint count from the bottom.
    fn load(w: &Weights, config: &UnetConfig, level: usize, skips: &mut Vec<i64>) -> Self {
        let from_bottom = config.levels() - 1 - level;
        let w = w.at("up_blocks").at(from_bottom);
        let channels = config.block_out_channels[level];
        let mut in_ = config.block_out_channels[(level + 1).min(config.levels() - 1)];
        let (mut resnets, mut attentions) = (Vec::new(), Vec::new());
        for layer in 0..=config.layers_per_block {
            let skip = skips.pop().expect("the way down leaves as many as the way up reads");
            resnets.push(ResnetBlock::load(&w.at("resnets").at(layer), config.resnet(in_ + skip, channels)));
            if config.up_block_types[from_bottom] == UpBlockType::CrossAttention {
                attentions.push(Transformer2d::load(&w.at("attentions").at(layer), config, level));
            }
            in_ = channels;
        }
        let upsampler = (level > 0).then(|| Upsampler::load(&w.at("upsamplers").at(0), channels));
        Self { resnets, attentions, upsampler }
    }

    /// [batch, in, height, width_px] -> [batch, out, height', width_px'], of the size of the next skip
    fn forward(&self, mut x: Tensor, time: &Tensor, embeddings: &Tensor, skips: &mut Vec<Tensor>) -> Tensor {
        for (layer, resnet) in self.resnets.iter().enumerate() {
            let skip = skips.pop().expect("the way down leaves as many as the way up reads");
            x = resnet.forward(&Tensor::cat(&[x, skip], 1), Some(time));
            if let Some(attention) = self.attentions.get(layer) {
                x = attention.forward(&x, embeddings);
            }
        }
        match (&self.upsampler, skips.last()) {
            // Twice the size, or one less where halving has rounded up.
            (Some(upsampler), Some(skip)) => upsampler.forward(&x, spatial_size(skip)),
            _ => x,
        }
    }
}

/// Attention over the pixels of a feature map, as residual.
#[derive(Debug)]
pub(crate) struct Transformer2d {
    pub(crate) norm: GroupNorm,
    pub(crate) proj_in: Linear,
    pub(crate) transformer_blocks: Vec<TransformerBlock>,
    pub(crate) proj_out: Linear,
}

impl Transformer2d {
    fn load(w: &Weights, config: &UnetConfig, level: usize) -> Self {
        let channels = config.block_out_channels[level];
        let depth = config.transformer_layers_per_block[level];
        let block = |i| TransformerBlock::load(&w.at("transformer_blocks").at(i), config, level);
        Self {
            norm: GroupNorm::load(
                &w.at("norm"),
                config.norm_num_groups,
                channels,
                TRANSFORMER_GROUP_NORM_EPS,
            ),
            proj_in: Linear::load(&w.at("proj_in"), channels, channels),
            transformer_blocks: (0..depth).map(block).collect(),
            proj_out: Linear::load(&w.at("proj_out"), channels, channels),
        }
    }

    /// [batch, channels, height, width_px] -> [batch, channels, height, width_px]
    fn forward(&self, x: &Tensor, embeddings: &Tensor) -> Tensor {
        // [batch, channels, height, width_px] -> [batch, (height width_px), channels]
        let mut tokens = self.proj_in.forward(&self.norm.forward(x).flatten(2, 3).transpose(1, 2));
        for block in &self.transformer_blocks {
            tokens = block.forward(&tokens, embeddings);
        }
        // [batch, (height width_px), channels] -> [batch, channels, height, width_px]
        x + self.proj_out.forward(&tokens).transpose(1, 2).reshape_as(x)
    }
}

/// A pre-norm block: self attention, cross attention to the embeddings, feed-forward.
#[derive(Debug)]
pub(crate) struct TransformerBlock {
    pub(crate) norm1: LayerNorm,
    pub(crate) attn1: Attention,
    pub(crate) norm2: LayerNorm,
    pub(crate) attn2: Attention,
    pub(crate) norm3: LayerNorm,
    pub(crate) ff: FeedForward,
}

impl TransformerBlock {
    fn load(w: &Weights, config: &UnetConfig, level: usize) -> Self {
        let (width, heads) = (config.block_out_channels[level], config.heads[level]);
        let norm = |name| LayerNorm::load(&w.at(name), width, LAYER_NORM_EPS);
        Self {
            norm1: norm("norm1"),
            attn1: Attention::load(&w.at("attn1"), width, width, heads),
            norm2: norm("norm2"),
            attn2: Attention::load(&w.at("attn2"), width, config.cross_attention_dim, heads),
            norm3: norm("norm3"),
            ff: FeedForward::load(&w.at("ff"), width),
        }
    }

    /// [batch, tokens, width] -> [batch, tokens, width]
    fn forward(&self, x: &Tensor, embeddings: &Tensor) -> Tensor {
        let normed = self.norm1.forward(x);
        let x = x + self.attn1.forward(&normed, &normed);
        let x = &x + self.attn2.forward(&self.norm2.forward(&x), embeddings);
        &x + self.ff.forward(&self.norm3.forward(&x))
    }
}

/// Attention of several heads from tokens to a context.
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) to_q: Linear,
    pub(crate) to_k: Linear,
    pub(crate) to_v: Linear,
    pub(crate) to_out: Linear,
    heads: i64,
}

impl Attention {
    fn load(w: &Weights, width: i64, context_width: i64, heads: i64) -> Self {
        Self {
            to_q: Linear::load_no_bias(&w.at("to_q"), width, width),
            to_k: Linear::load_no_bias(&w.at("to_k"), context_width, width),
            to_v: Linear::load_no_bias(&w.at("to_v"), context_width, width),
            // A list of two upstream, of which the other is dropout.
            to_out: Linear::load(&w.at("to_out").at(0), width, width),
            heads,
        }
    }

    /// `x`: [batch, tokens, width], `context`: [batch, context_tokens, context_width] -> [batch, tokens, width]
    fn forward(&self, x: &Tensor, context: &Tensor) -> Tensor {
        let q = self.split_heads(&self.to_q.forward(x));
        let k = self.split_heads(&self.to_k.forward(context));
        let v = self.split_heads(&self.to_v.forward(context));
        // [batch, heads, tokens, head_width] -> [batch, tokens, (heads head_width)]
        self.to_out.forward(&attend(&q, &k, &v, false).transpose(1, 2).flatten(2, 3))
    }

    /// [batch, tokens, (heads head_width)] -> [batch, heads, tokens, head_width]
    fn split_heads(&self, x: &Tensor) -> Tensor {
        x.unflatten(-1, [self.heads, -1]).transpose(1, 2)
    }
}

/// A GEGLU feed-forward layer: half of a four times wider layer, gated by the exact GELU of its other half.
#[derive(Debug)]
pub(crate) struct FeedForward {
    pub(crate) proj: Linear,
    pub(crate) out: Linear,
}

impl FeedForward {
    fn load(w: &Weights, width: i64) -> Self {
        // A list of three upstream, of which the middle one is dropout.
        Self {
            proj: Linear::load(&w.at("net").at(0).at("proj"), width, 8 * width),
            out: Linear::load(&w.at("net").at(2), 4 * width, width),
        }
    }

    /// [batch, tokens, width] -> [batch, tokens, width]
    fn forward(&self, x: &Tensor) -> Tensor {
        let wide = self.proj.forward(x);
        let (_, _, width) = wide.size3().expect("tokens have three dimensions");
        let (value, gate) = (wide.narrow(-1, 0, width / 2), wide.narrow(-1, width / 2, width / 2));
        self.out.forward(&(value * gate.gelu("none")))
    }
}

/// Two layers that turn sinusoids into what residual blocks are told.
#[derive(Debug)]
pub(crate) struct TimestepEmbedding {
    pub(crate) linear_1: Linear,
    pub(crate) linear_2: Linear,
}

impl TimestepEmbedding {
    fn load(w: &Weights, in_: i64, width: i64) -> Self {
        Self {
            linear_1: Linear::load(&w.at("linear_1"), in_, width),
            linear_2: Linear::load(&w.at("linear_2"), width, width),
        }
    }

    /// [batch, in] -> [batch, width]
    fn forward(&self, x: &Tensor) -> Tensor {
        self.linear_2.forward(&self.linear_1.forward(x).silu())
    }
}

/// Embeds numbers as waves, cosines first, then sines, of frequencies that fall from 1 towards 1/10000: [..]
/// -> [.., width], float32.
fn sinusoids(numbers: &Tensor, width: i64) -> Tensor {
    let half = width / 2;
    let exponents = Tensor::arange(half, (Kind::Float, numbers.device())) * -f64::ln(10_000.0) / half;
    let angles = numbers.to_kind(Kind::Float).unsqueeze(-1) * exponents.exp();
    Tensor::cat(&[angles.cos(), angles.sin()], -1)
}
