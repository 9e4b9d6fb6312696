//! LLaMA (Touvron et al., arXiv 2302.13971) as Emu2's language model, over text and embeddings alike
//! (arXiv 2312.13286, section 2.1), with the projections between it and the visual encoder's space.
//!
//! Upstream: baaivision/Emu at 13c395e, Emu2/emu/{lm,emu}.py, over `LlamaForCausalLM` of transformers 4.31.0.
//! What differs: there is no batch dimension and no padding. A forward takes the rows of all sequences of a step,
//! one after the other, [tokens, width]: prompts' chunks, single tokens, beams and embeddings alike. Linear layers
//! see all rows at once; attention goes sequence by sequence over that sequence's own cache (`kv.rs`). With an empty
//! cache and a whole prompt the same function is the uncached forward.

#[cfg(test)]
mod tests;

use std::rc::Rc;

use emu2_nn::{
    attention::{attend, attend_masked},
    checkpoint::{CheckpointError, ModelDir, Part},
    layers::{Embedding, Linear, RmsNorm},
    weights::Weights,
};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use crate::kv::{Append, Appended, AttentionMask, KvCache, LayerKv};

/// Section `llama` of a model's configuration; the defaults are the full model's values.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct LlamaConfig {
    /// The width of the model's states; a multiple of twice `num_attention_heads`.
    pub hidden_size: i64,
    /// The width of the feed-forward layers' inner rows.
    pub intermediate_size: i64,
    /// How many layers the model has.
    pub num_hidden_layers: i64,
    /// How many heads attention has.
    pub num_attention_heads: i64,
    /// How many rows the vocabulary has with all special tokens: 32,272, and two more in the chat model.
    pub vocab_size: i64,
    /// What the norms add to the mean square.
    pub rms_norm_eps: f64,
    /// The most positions of prompt and output together.
    pub max_position_embeddings: i64,
}

impl Default for LlamaConfig {
    fn default() -> Self {
        Self {
            hidden_size: 6656,
            intermediate_size: 17920,
            num_hidden_layers: 60,
            num_attention_heads: 52,
            vocab_size: 32272,
            rms_norm_eps: 1e-6,
            max_position_embeddings: 2048,
        }
    }
}

impl LlamaConfig {
    /// Returns the width of one head of attention.
    pub fn head_width(&self) -> i64 {
        self.hidden_size / self.num_attention_heads
    }

    /// Returns the bytes that keys and values of one entry take in all layers.
    pub fn kv_bytes(&self, kind: Kind) -> usize {
        (2 * self.num_hidden_layers * self.hidden_size) as usize * kind.elt_size_in_bytes()
    }

    fn layer_parameters(&self) -> i64 {
        let (hidden, intermediate) = (self.hidden_size, self.intermediate_size);
        4 * hidden * hidden + 3 * hidden * intermediate + 2 * hidden
    }

    fn outside_layers(&self, embedding_width: i64) -> i64 {
        let (hidden, vocab) = (self.hidden_size, self.vocab_size);
        2 * hidden * vocab + hidden + 2 * hidden * embedding_width
    }

    /// Returns how many parameters each of so many devices holds.
    pub(crate) fn spread_parameters(&self, embedding_width: i64, devices: usize) -> Vec<u64> {
        let outside_layers = self.outside_layers(embedding_width);
        let mut held = vec![0; devices];
        held[0] = outside_layers as u64;
        for place in spread_layers(self, outside_layers, devices) {
            held[place] += self.layer_parameters() as u64;
        }
        held
    }

    pub(crate) fn problem(&self) -> Option<String> {
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        if let Some((name, size)) = sizes.into_iter().find(|&(_, size)| size < 1) {
            return Some(format!("llama.{name} must be at least 1, is {size}"));
        }
        let even_heads = self.hidden_size % (2 * self.num_attention_heads) == 0;
        let text =
            "llama.hidden_size must be a multiple of twice num_attention_heads (rotations take pairs), is";
        (!even_heads).then(|| format!("{text} {} for {}", self.hidden_size, self.num_attention_heads))
    }
}

/// The rows that a sequence adds to a step, and the cache that they go to.
#[derive(Debug)]
pub struct Rows<'a> {
    /// The sequence's cache.
    pub kv: &'a mut KvCache,
    /// How many rows, and which rows they continue.
    pub append: Append<'a>,
}

/// The language model with both projections, loaded to one or several devices.
#[derive(Debug)]
pub struct Llama {
    config: LlamaConfig,
    kind: Kind,
    places: Vec<Place>,
    embed_tokens: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    lm_head: Linear,
    project_up: Linear,
    project_down: Linear,
}

/// A device that holds layers, with its rotation tables, each [max_positions, 1, head_width].
#[derive(Debug)]
struct Place {
    device: Device,
    cos: Tensor,
    sin: Tensor,
}

impl Llama {
    /// Loads the model; also returns the digest of its weights. Embeddings, head and projections go to the first
    /// device, layers to all. `embedding_width` is that of the visual encoder.
    ///
    /// # Errors
    ///
    /// The configuration contradicts itself, or the weights do not fit it.
    pub fn load(
        dir: &Rc<ModelDir>,
        config: LlamaConfig,
        embedding_width: i64,
        devices: &[Device],
        kind: Kind,
    ) -> Result<(Self, String), CheckpointError> {
        Self::build(dir, config, embedding_width, devices, dir.weights(Part::Llm, devices[0], kind))
    }

    /// Builds the model as [`Self::load`] does, out of a ledger whose weights may be trainable.
    ///
    /// # Errors
    ///
    /// Those of [`Self::load`].
    pub fn build(
        dir: &ModelDir,
        config: LlamaConfig,
        embedding_width: i64,
        devices: &[Device],
        root: Weights,
    ) -> Result<(Self, String), CheckpointError> {
        if let Some(problem) = config.problem() {
            return Err(dir.unsupported(problem));
        }
        let kind = root.kind();
        let lm = root.at("decoder").at("lm");
        let model = lm.at("model");
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let spread = spread_layers(&config, config.outside_layers(embedding_width), devices.len());
        let layer = |(index, &place): (usize, &usize)| {
            Layer::load(&model.at("layers").at(index).on(devices[place]), &config, place)
        };
        let llama = Self {
            kind,
            places: devices.iter().map(|&device| Place::new(&config, kind, device)).collect(),
            embed_tokens: Embedding::load(&model.at("embed_tokens"), vocab, hidden),
            layers: spread.iter().enumerate().map(layer).collect(),
            norm: RmsNorm::load(&model.at("norm"), hidden, config.rms_norm_eps),
            lm_head: Linear::load_no_bias(&lm.at("lm_head"), hidden, vocab),
            project_up: Linear::load_no_bias(&root.at("project_up"), embedding_width, hidden),
            project_down: Linear::load_no_bias(&root.at("project_down"), hidden, embedding_width),
            config,
        };
        Ok((llama, root.finish()?))
    }

    /// Returns the model's sizes.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Returns the device where rows come in and go out.
    pub fn device(&self) -> Device {
        self.places[0].device
    }

    /// Returns the kind that the model computes in.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the devices that hold layers, and how many each holds.
    pub fn layers_by_device(&self) -> Vec<(Device, usize)> {
        let mut held: Vec<(Device, usize)> = Vec::new();
        for layer in &self.layers {
            let device = self.places[layer.place].device;
            match held.iter_mut().find(|(known, _)| *known == device) {
                Some((_, layers)) => *layers += 1,
                None => held.push((device, 1)),
            }
        }
        held
    }

    /// Allocates a cache with room for `capacity` entries in every layer.
    pub fn kv_cache(&self, capacity: i64) -> KvCache {
        let (heads, head_width) = (self.config.num_attention_heads, self.config.head_width());
        let layer = |layer: &Layer| {
            LayerKv::new(heads, capacity, head_width, self.kind, self.places[layer.place].device)
        };
        KvCache::new(self.layers.iter().map(layer).collect(), capacity)
    }

    /// Embeds ids: `[tokens]` -> [tokens, width].
    pub fn embed(&self, ids: &Tensor) -> Tensor {
        self.embed_tokens.forward(&ids.to_device(self.device()))
    }

    /// Projects embeddings of images into the language model's space: [rows, embedding_width] -> [rows, width].
    pub fn project_up(&self, embeddings: &Tensor) -> Tensor {
        self.project_up.forward(embeddings)
    }

    /// Regresses the next embedding from each state, the first embedding of an image from the state at `[IMG]`:
    /// [rows, width] -> [rows, embedding_width].
    pub fn project_down(&self, hidden: &Tensor) -> Tensor {
        self.project_down.forward(hidden)
    }

    /// Computes the logits of the next token after each state: [rows, width] -> [rows, vocabulary], float32.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        self.lm_head.forward(hidden).to_kind(Kind::Float)
    }

    /// Computes one step. `x`: the rows of all sequences in the order of `batch`, [tokens, width] -> states after the
    /// last norm, [tokens, width].
    ///
    /// # Panics
    ///
    /// A sequence has more rows than its cache has room for.
    pub fn forward(&self, x: &Tensor, batch: &mut [Rows<'_>]) -> Tensor {
        let appended: Vec<Appended> =
            batch.iter_mut().map(|rows| rows.kv.append(rows.append, self.kind, self.device())).collect();
        let steps: Vec<Step> = self.places.iter().map(|place| place.step(&appended)).collect();
        let mut x = x.shallow_clone();
        for (index, layer) in self.layers.iter().enumerate() {
            let caches: Vec<&LayerKv> = batch.iter().map(|rows| &rows.kv.layers[index]).collect();
            let (step, x_here) = (&steps[layer.place], x.to_device(self.places[layer.place].device));
            x = layer.forward(&x_here, |attention, x| attention.forward(x, step, &caches));
        }
        self.norm.forward(&x.to_device(self.device()))
    }

    /// Computes whole sequences of one length and without caches, for training: [batch, tokens, width]
    /// -> [batch, tokens, width]. Shorter ones are padded at their ends, which no row before sees.
    pub fn forward_whole(&self, x: &Tensor) -> Tensor {
        let (batch, tokens, _) = x.size3().expect("x has three dimensions");
        let line = Appended {
            start: 0,
            rows: tokens,
            positions: (0..tokens).collect(),
            mask: AttentionMask::Causal,
        };
        let places = self.places.iter().map(|place| place.step(std::slice::from_ref(&line)));
        let steps: Vec<Step> = places.map(|step| step.repeated(batch)).collect();
        // [batch, tokens, width] -> [(batch tokens), width]
        let mut rows = x.flatten(0, 1);
        for layer in &self.layers {
            let (step, here) = (&steps[layer.place], rows.to_device(self.places[layer.place].device));
            rows = layer.forward(&here, |attention, x| attention.forward_whole(x, step, batch));
        }
        self.norm.forward(&rows.to_device(self.device())).view_as(x)
    }
}

/// What all layers of a device need to know of a step.
#[derive(Debug)]
struct Step {
    /// The rotation of each row, [tokens, 1, head_width].
    cos: Tensor,
    sin: Tensor,
    spans: Vec<Span>,
}

impl Step {
    /// Repeats the rotations for so many sequences alike, one after the other.
    fn repeated(self, times: i64) -> Self {
        let repeat = |table: &Tensor| table.repeat([times, 1, 1]);
        Self { cos: repeat(&self.cos), sin: repeat(&self.sin), ..self }
    }
}

/// The rows of one sequence, which lie next to each other.
#[derive(Debug)]
struct Span {
    rows: i64,
    /// How many entries lie before them.
    start: i64,
    mask: AttentionMask,
}

impl Place {
    fn new(config: &LlamaConfig, kind: Kind, device: Device) -> Self {
        let angles = rotary_angles(config.max_position_embeddings, config.head_width()).unsqueeze(1);
        // Computed in float32 and only then rounded: the buffers in bfloat16 checkpoints have lost precision.
        let table = |table: Tensor| table.to_kind(kind).to_device(device);
        Self { device, cos: table(angles.cos()), sin: table(angles.sin()) }
    }

    fn step(&self, appended: &[Appended]) -> Step {
        let positions: Vec<i64> = appended.iter().flat_map(|rows| rows.positions.iter().copied()).collect();
        let positions = Tensor::from_slice(&positions).to_device(self.device);
        let span =
            |new: &Appended| Span { rows: new.rows, start: new.start, mask: new.mask.to_device(self.device) };
        Step {
            cos: self.cos.index_select(0, &positions),
            sin: self.sin.index_select(0, &positions),
            spans: appended.iter().map(span).collect(),
        }
    }
}

#[derive(Debug)]
struct Layer {
    /// The index of the device that holds the layer.
    place: usize,
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

impl Layer {
    fn load(w: &Weights, config: &LlamaConfig, place: usize) -> Self {
        let norm = |name| RmsNorm::load(&w.at(name), config.hidden_size, config.rms_norm_eps);
        Self {
            place,
            input_layernorm: norm("input_layernorm"),
            self_attn: Attention::load(&w.at("self_attn"), config),
            post_attention_layernorm: norm("post_attention_layernorm"),
            mlp: Mlp::load(&w.at("mlp"), config),
        }
    }

    /// [tokens, width] -> [tokens, width]
    fn forward(&self, x: &Tensor, attend: impl Fn(&Attention, &Tensor) -> Tensor) -> Tensor {
        let x = x + attend(&self.self_attn, &self.input_layernorm.forward(x));
        &x + self.mlp.forward(&self.post_attention_layernorm.forward(&x))
    }
}

#[derive(Debug)]
struct Attention {
    heads: i64,
    head_width: i64,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
}

impl Attention {
    fn load(w: &Weights, config: &LlamaConfig) -> Self {
        let width = config.hidden_size;
        let linear = |name| Linear::load_no_bias(&w.at(name), width, width);
        Self {
            heads: config.num_attention_heads,
            head_width: config.head_width(),
            q_proj: linear("q_proj"),
            k_proj: linear("k_proj"),
            v_proj: linear("v_proj"),
            o_proj: linear("o_proj"),
        }
    }

    /// [tokens, width] -> [tokens, width]
    fn forward(&self, x: &Tensor, step: &Step, caches: &[&LayerKv]) -> Tensor {
        // [tokens, heads, head_width] -> [heads, tokens, head_width]
        let [q, k, v] = self.project(x, step).map(|x| x.transpose(0, 1));
        let mut outputs = Vec::with_capacity(caches.len());
        let mut first = 0;
        for (span, cache) in step.spans.iter().zip(caches) {
            let of_span = |rows: &Tensor| rows.narrow(1, first, span.rows);
            outputs.push(attend_span(&of_span(&q), &of_span(&k), &of_span(&v), span, cache));
            first += span.rows;
        }
        // [tokens, heads, head_width] -> [tokens, (heads head_width)]
        self.o_proj.forward(&Tensor::cat(&outputs, 0).flatten(1, 2))
    }

    /// Attends within sequences of one length, one after the other: [(batch tokens), width] -> [(batch tokens), width].
    fn forward_whole(&self, x: &Tensor, step: &Step, batch: i64) -> Tensor {
        // [(batch tokens), heads, head_width] -> [batch, heads, tokens, head_width]
        let [q, k, v] = self.project(x, step).map(|x| x.unflatten(0, [batch, -1]).transpose(1, 2));
        // [batch, heads, tokens, head_width] -> [(batch tokens), (heads head_width)]
        self.o_proj.forward(&attend(&q, &k, &v, true).transpose(1, 2).flatten(2, 3).flatten(0, 1))
    }

    /// Projects to q and k, rotated, and v: [tokens, width] -> 3 × [tokens, heads, head_width].
    fn project(&self, x: &Tensor, step: &Step) -> [Tensor; 3] {
        // [tokens, (heads head_width)] -> [tokens, heads, head_width]
        let split = |x: Tensor| x.view([-1, self.heads, self.head_width]);
        [
            rotate(&split(self.q_proj.forward(x)), step),
            rotate(&split(self.k_proj.forward(x)), step),
            split(self.v_proj.forward(x)),
        ]
    }
}

/// Attends with the new rows of one sequence to its whole cache, themselves included. q, k and v:
/// [heads, rows, head_width] -> [rows, heads, head_width].
fn attend_span(q: &Tensor, k: &Tensor, v: &Tensor, span: &Span, cache: &LayerKv) -> Tensor {
    let (keys, values) = cache.append(span.start, k, v);
    let q = q.unsqueeze(0);
    let output = match &span.mask {
        AttentionMask::Causal => attend(&q, &keys, &values, true),
        AttentionMask::All => attend(&q, &keys, &values, false),
        AttentionMask::Mask(mask) => attend_masked(&q, &keys, &values, mask),
    };
    output.squeeze_dim(0).transpose(0, 1)
}

#[derive(Debug)]
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    fn load(w: &Weights, config: &LlamaConfig) -> Self {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        Self {
            gate_proj: Linear::load_no_bias(&w.at("gate_proj"), width, inner),
            up_proj: Linear::load_no_bias(&w.at("up_proj"), width, inner),
            down_proj: Linear::load_no_bias(&w.at("down_proj"), inner, width),
        }
    }

    /// [tokens, width] -> [tokens, width]
    fn forward(&self, x: &Tensor) -> Tensor {
        self.down_proj.forward(&(self.gate_proj.forward(x).silu() * self.up_proj.forward(x)))
    }
}

/// Rotates positions (rotary position embedding, arXiv 2104.09864): dimension i turns with dimension i + head_width /
/// 2. [tokens, heads, head_width] -> [tokens, heads, head_width]
fn rotate(x: &Tensor, step: &Step) -> Tensor {
    let halves = x.chunk(2, -1);
    let turned = Tensor::cat(&[-&halves[1], halves[0].shallow_clone()], -1);
    x * &step.cos + turned * &step.sin
}

/// Returns the angles position × 10000^(-2i / head_width), both halves alike: [positions, head_width].
fn rotary_angles(positions: i64, head_width: i64) -> Tensor {
    let options = (Kind::Float, Device::Cpu);
    let exponents = Tensor::arange_start_step(0, head_width, 2, options) / head_width as f64;
    let frequencies = Tensor::from(10_000.0_f32).pow(&exponents).reciprocal();
    let angles = Tensor::arange(positions, options).outer(&frequencies);
    Tensor::cat(&[&angles, &angles], -1)
}

/// Returns the device of each layer, as upstream's `multicuda`: every device gets an equal share of all parameters, the
/// first one's share reduced by what it holds besides layers.
fn spread_layers(config: &LlamaConfig, outside_layers: i64, devices: usize) -> Vec<usize> {
    let per_layer = config.layer_parameters() as f64;
    let total = outside_layers as f64 + per_layer * config.num_hidden_layers as f64;
    let share = total / devices as f64;
    let (mut place, mut held) = (0, outside_layers as f64);
    let mut spread = Vec::with_capacity(config.num_hidden_layers as usize);
    for _ in 0..config.num_hidden_layers {
        if held + per_layer > share && place + 1 < devices {
            place += 1;
            held = 0.0;
        }
        spread.push(place);
        held += per_layer;
    }
    spread
}
