//! EVA-02-CLIP-E-plus: the ViT that reads images for Emu2 (arXiv 2303.15389; upstream Emu2/emu/eva_vit.py and
//! `encode_image` of emu/emu.py, github.com/baaivision/Emu at 13c395e).
//!
//! As published, and unlike most ViTs: blocks are post-norm (the norm sits on the branch, after attention or mlp),
//! nothing normalises the last block's output, and k has no bias. What upstream's file can also be (rotary embeddings,
//! SwiGLU, sub-layer norms, layer scale, relative positions) no published Emu2 uses; a configuration that asks for it
//! is refused.

use std::rc::Rc;

use emu2_nn::{
    attention::attend,
    checkpoint::{CheckpointError, ModelDir, Part},
    layers::{Conv2d, LayerNorm, Linear},
    weights::Weights,
};
use emu2_proto::pooling;
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

#[cfg(test)]
mod tests;

/// Section `vision` of a model's configuration; the defaults are those of the published models.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct VisionConfig {
    /// The side of the square input, in pixels, 1 to 4096.
    pub image_size: i64,
    /// The side of a patch, in pixels, 1 to `image_size`.
    pub patch_size: i64,
    /// The width of the features of a token, 1 to 65,536.
    pub width: i64,
    /// How many blocks the model has, 1 to 1024.
    pub layers: i64,
    /// The width of one head of attention; it divides `width`.
    pub head_width: i64,
    /// How many times `width` the hidden layer of an mlp is, at most 64; the product is truncated, as published to
    /// 15,360.
    pub mlp_ratio: f64,
    /// What layer normalisation adds to the variance, above 0.
    pub layer_norm_eps: f64,
    /// How many embeddings an image becomes unless a request says otherwise.
    pub n_query: u32,
    /// How many embeddings a video frame becomes unless a request says otherwise.
    pub v_query: u32,
    // Switches of upstream's file with the one setting that is built here.
    qkv_bias: bool,
    postnorm: bool,
    rope: bool,
    naiveswiglu: bool,
    subln: bool,
    init_value: Option<f64>,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            image_size: 448,
            patch_size: 14,
            width: 1792,
            layers: 64,
            head_width: 112,
            mlp_ratio: 8.571428571428571,
            layer_norm_eps: 1e-6,
            n_query: 64,
            v_query: 64,
            qkv_bias: true,
            postnorm: true,
            rope: false,
            naiveswiglu: false,
            subln: false,
            init_value: None,
        }
    }
}

impl VisionConfig {
    /// Returns how many patches lie along a side of the input.
    pub fn grid_side(&self) -> i64 {
        self.image_size / self.patch_size
    }

    fn heads(&self) -> i64 {
        self.width / self.head_width
    }

    /// Returns how many tokens the blocks see: the patches and the class token.
    fn tokens(&self) -> i64 {
        self.grid_side() * self.grid_side() + 1
    }

    fn mlp_width(&self) -> i64 {
        (self.width as f64 * self.mlp_ratio) as i64
    }

    /// Lists what contradicts itself or is not built, all at once.
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut check = |holds: bool, problem: String| {
            if !holds {
                problems.push(problem);
            }
        };
        check(self.qkv_bias, "qkv_bias must be true".to_owned());
        check(self.postnorm, "postnorm must be true".to_owned());
        check(!self.rope, "rope must be false".to_owned());
        check(!self.naiveswiglu, "naiveswiglu must be false".to_owned());
        check(!self.subln, "subln must be false".to_owned());
        // Upstream reads zero and below as no layer scale.
        check(
            self.init_value.is_none_or(|value| value <= 0.0),
            format!("init_value must be null, is {:?}", self.init_value),
        );
        let Self { image_size, patch_size, width, layers, head_width, .. } = *self;
        check((1..=4096).contains(&image_size), format!("image_size must be 1 to 4096, is {image_size}"));
        check(
            (1..=image_size).contains(&patch_size),
            format!("patch_size must be 1 to image_size, is {patch_size}"),
        );
        check((1..=65_536).contains(&width), format!("width must be 1 to 65536, is {width}"));
        check((1..=1024).contains(&layers), format!("layers must be 1 to 1024, is {layers}"));
        check(
            head_width >= 1 && width % head_width == 0,
            format!("head_width must divide width, is {head_width}"),
        );
        check(
            (1.0 / width.max(1) as f64..=64.0).contains(&self.mlp_ratio),
            format!("mlp_ratio must give a width and be at most 64, is {}", self.mlp_ratio),
        );
        check(
            self.layer_norm_eps > 0.0,
            format!("layer_norm_eps must be above 0, is {}", self.layer_norm_eps),
        );
        if (1..=4096).contains(&image_size) && (1..=image_size).contains(&patch_size) {
            let side = self.grid_side() as u32;
            for (name, queries) in [("n_query", self.n_query), ("v_query", self.v_query)] {
                problems.extend(pooling::problem(side, queries).map(|problem| format!("{name} {problem}")));
            }
        }
        problems
    }
}

/// The visual encoder: a ViT over patches of an image, loaded to one device.
#[derive(Debug)]
pub struct EvaVit {
    /// The model's sizes.
    pub config: VisionConfig,
    patch_embed: PatchEmbed,
    /// The class token, [1, 1, width].
    cls_token: Tensor,
    /// The embeddings of positions, [1, tokens, width].
    pos_embed: Tensor,
    blocks: Vec<Block>,
}

impl EvaVit {
    /// Loads the model to a device, computing in `kind`; also returns its weights digest.
    ///
    /// # Errors
    ///
    /// The configuration contradicts itself or asks for what is not built, or the weights do not fit it.
    pub fn load(dir: &Rc<ModelDir>, device: Device, kind: Kind) -> Result<(Self, String), CheckpointError> {
        Self::build(dir, dir.weights(Part::Visual, device, kind))
    }

    /// Builds the model as [`Self::load`] does, out of a ledger whose weights may be trainable.
    ///
    /// # Errors
    ///
    /// Those of [`Self::load`].
    pub fn build(dir: &ModelDir, w: Weights) -> Result<(Self, String), CheckpointError> {
        let config: VisionConfig = dir.section("vision")?;
        let problems = config.problems();
        if !problems.is_empty() {
            return Err(dir.unsupported(format!("`vision`: {}", problems.join("; "))));
        }
        let model = Self {
            patch_embed: PatchEmbed::load(&w.at("patch_embed"), &config),
            cls_token: w.get("cls_token", &[1, 1, config.width]),
            pos_embed: w.get("pos_embed", &[1, config.tokens(), config.width]),
            blocks: (0..config.layers).map(|i| Block::load(&w.at("blocks").at(i), &config)).collect(),
            config,
        };
        Ok((model, w.finish()?))
    }

    /// Encodes normalised pixels to embeddings: [batch, 3, height, width_px] -> [batch, queries, width]; see [`pool`].
    ///
    /// # Panics
    ///
    /// `n_query` has no pooling stride.
    pub fn encode_image(&self, pixels: &Tensor, n_query: u32) -> Tensor {
        pool(&self.forward(pixels), self.config.grid_side(), n_query)
    }

    /// Computes the features of normalised pixels: [batch, 3, height, width_px] -> [batch, tokens, width], the class
    /// token first. They are the last block's output as it is, without a final norm.
    pub fn forward(&self, pixels: &Tensor) -> Tensor {
        self.blocks.iter().fold(self.embed(pixels), |x, block| block.forward(&x))
    }

    /// [batch, 3, height, width_px] -> [batch, tokens, width]
    fn embed(&self, pixels: &Tensor) -> Tensor {
        let patches = self.patch_embed.forward(pixels);
        let (batch, _, width) = patches.size3().expect("patches have three dimensions");
        let cls = self.cls_token.expand([batch, 1, width], false);
        Tensor::cat(&[cls, patches], 1) + &self.pos_embed
    }

    /// Returns the device that the model is loaded to.
    pub fn device(&self) -> Device {
        self.pos_embed.device()
    }

    /// Returns the kind that the model computes in.
    pub fn kind(&self) -> Kind {
        self.pos_embed.kind()
    }
}

#[derive(Debug)]
struct PatchEmbed {
    proj: Conv2d,
}

impl PatchEmbed {
    fn load(w: &Weights, config: &VisionConfig) -> Self {
        let patch = config.patch_size;
        Self { proj: Conv2d::load(&w.at("proj"), 3, config.width, patch, patch, 0) }
    }

    /// [batch, 3, height, width_px] -> [batch, tokens, width]
    fn forward(&self, pixels: &Tensor) -> Tensor {
        // [batch, width, rows, columns] -> [batch, (rows columns), width]
        self.proj.forward(pixels).flatten(2, 3).transpose(1, 2)
    }
}

#[derive(Debug)]
struct Block {
    norm1: LayerNorm,
    attn: Attention,
    norm2: LayerNorm,
    mlp: Mlp,
}

impl Block {
    fn load(w: &Weights, config: &VisionConfig) -> Self {
        Self {
            norm1: LayerNorm::load(&w.at("norm1"), config.width, config.layer_norm_eps),
            attn: Attention::load(&w.at("attn"), config),
            norm2: LayerNorm::load(&w.at("norm2"), config.width, config.layer_norm_eps),
            mlp: Mlp::load(&w.at("mlp"), config),
        }
    }

    /// [batch, tokens, width] -> [batch, tokens, width]
    fn forward(&self, x: &Tensor) -> Tensor {
        let x = x + self.norm1.forward(&self.attn.forward(x));
        &x + self.norm2.forward(&self.mlp.forward(&x))
    }
}

#[derive(Debug)]
struct Attention {
    /// The projections to q, k and v as one, [3 × width, width].
    qkv: Linear,
    /// The bias of q. Upstream gives q and v a bias but never k, whose third of the fused bias is zero. The three are
    /// put together in every forward, which is nothing beside the product: put together at load, only one backward
    /// could pass through.
    q_bias: Tensor,
    k_bias: Tensor,
    v_bias: Tensor,
    proj: Linear,
    heads: i64,
}

impl Attention {
    fn load(w: &Weights, config: &VisionConfig) -> Self {
        let width = config.width;
        Self {
            qkv: Linear::load_no_bias(&w.at("qkv"), width, 3 * width),
            q_bias: w.get("q_bias", &[width]),
            k_bias: Tensor::zeros([width], (w.kind(), w.device())),
            v_bias: w.get("v_bias", &[width]),
            proj: Linear::load(&w.at("proj"), width, width),
            heads: config.heads(),
        }
    }

    /// [batch, tokens, width] -> [batch, tokens, width]
    fn forward(&self, x: &Tensor) -> Tensor {
        let (batch, tokens, width) = x.size3().expect("x has three dimensions");
        let bias = Tensor::cat(&[&self.q_bias, &self.k_bias, &self.v_bias], 0);
        // [batch, tokens, (3 heads head_width)] -> 3 × [batch, heads, tokens, head_width]
        let qkv = x
            .linear(&self.qkv.weight, Some(&bias))
            .view([batch, tokens, 3, self.heads, -1])
            .permute([2, 0, 3, 1, 4]);
        let attended = attend(&qkv.get(0), &qkv.get(1), &qkv.get(2), false);
        // [batch, heads, tokens, head_width] -> [batch, tokens, (heads head_width)]
        self.proj.forward(&attended.transpose(1, 2).reshape([batch, tokens, width]))
    }
}

#[derive(Debug)]
struct Mlp {
    fc1: Linear,
    fc2: Linear,
}

impl Mlp {
    fn load(w: &Weights, config: &VisionConfig) -> Self {
        let (width, hidden) = (config.width, config.mlp_width());
        Self {
            fc1: Linear::load(&w.at("fc1"), width, hidden),
            fc2: Linear::load(&w.at("fc2"), hidden, width),
        }
    }

    /// [batch, tokens, width] -> [batch, tokens, width]
    fn forward(&self, x: &Tensor) -> Tensor {
        // The exact gelu, by erf.
        self.fc2.forward(&self.fc1.forward(x).gelu("none"))
    }
}

/// Pools the features of patches to embeddings, as means over squares of patches: [batch, tokens, width]
/// -> [batch, queries, width]. The class token is dropped.
///
/// There are ⌊grid_side / stride⌋² queries, which is `n_query` only where [`pooling::problem`] finds none; patches
/// beyond the last whole square are left out, as upstream does.
///
/// # Panics
///
/// `n_query` has no pooling stride.
pub fn pool(features: &Tensor, grid_side: i64, n_query: u32) -> Tensor {
    // A grid's side is at most 4096.
    let stride = pooling::stride(grid_side as u32, n_query).expect("n_query has been checked").into();
    let (batch, tokens, width) = features.size3().expect("features have three dimensions");
    let patches = features.narrow(1, 1, tokens - 1).transpose(1, 2);
    // [batch, width, (rows columns)] -> [batch, width, rows, columns]
    let grid = patches.reshape([batch, width, grid_side, grid_side]);
    let pooled = grid.avg_pool2d([stride; 2], [stride; 2], [0; 2], false, true, None::<i64>);
    // [batch, width, rows, columns] -> [batch, (rows columns), width]
    pooled.flatten(2, 3).transpose(1, 2).contiguous()
}
