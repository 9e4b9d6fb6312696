//! From a model folder to a warm model.

use std::{path::PathBuf, rc::Rc, sync::Arc};

use emu2_engine::error::guarded;
use emu2_nn::{
    array,
    checkpoint::{ModelDir, Part, Progress},
    device,
};
use emu2_proto::{array::Dtype, pooling};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use crate::{
    budget,
    error::LoadError,
    kv::Append,
    llama::{Llama, LlamaConfig, Rows},
    search::TextIds,
    tokenizer::{Special, Tokenizer},
};

#[cfg(test)]
mod tests;

/// What the engine needs of the service's configuration; see [`crate::config::Config`].
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// The folder of the model, or the name of random weights.
    pub model_dir: PathBuf,
    /// The devices by name; layers are spread over several.
    pub devices: Vec<String>,
    /// How many threads one torch operation takes; 0 is as many as the process may use.
    pub cores: usize,
    /// The bytes of keys and values of all running sequences, over all devices.
    pub kv_budget_bytes: u64,
    /// How many positions of prompts one step computes.
    pub prefill_chunk: usize,
    /// How many sequences may wait; one more is refused.
    pub max_waiting: usize,
    /// The count of how far loading is.
    pub progress: Progress,
}

/// What the service and its clients have to know of the loaded model.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The ids that begin and end a text.
    pub text_ids: TextIds,
    /// The digest of the weights as they are computed with, 64 hexadecimal digits.
    pub weights_digest: String,
    /// The dtype of embeddings.
    pub dtype: Dtype,
    /// The width of one embedding outside the projections.
    pub embedding_width: usize,
    /// How many embeddings an image has.
    pub n_query: usize,
    /// How many embeddings a video frame has.
    pub v_query: usize,
    /// The most positions that prompt and output take together.
    pub max_positions: usize,
    /// How many entries the budget for keys and values holds.
    pub kv_entries: usize,
}

/// What the language model needs to know of section `vision`.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct Vision {
    image_size: u32,
    patch_size: u32,
    width: i64,
    n_query: u32,
    v_query: u32,
}

impl Default for Vision {
    fn default() -> Self {
        Self { image_size: 448, patch_size: 14, width: 1792, n_query: 64, v_query: 64 }
    }
}

/// Loads and warms the model; runs on the engine's thread.
///
/// # Errors
///
/// A device cannot be opened, the folder does not fit the model, the weights have no room, one forward fails, or keys
/// and values of one whole context do not fit.
pub fn load(config: &ModelConfig) -> Result<(Llama, Loaded), LoadError> {
    let devices = device::open(&config.devices)?;
    let kind = device::compute_kind(devices[0]);
    let dir = ModelDir::open_with(&config.model_dir, config.progress.clone())?;
    let (llama, vision, tokenizer) = described(&dir)?;
    dir.prepare_spread(&[Part::Llm], &shares(&llama, &vision, &devices, kind), kind)?;
    let (model, weights_digest) = Llama::load(&dir, llama, vision.width, &devices, kind)?;

    let text_ids = TextIds { begin: tokenizer.special(Special::Bos), end: tokenizer.special(Special::Eos) };
    guarded(|| warm_up(&model, text_ids)).map_err(LoadError::WarmUp)?;
    let kv_entries = budget::entries(&model, config.kv_budget_bytes)?;
    let loaded = Loaded {
        tokenizer: Arc::new(tokenizer),
        text_ids,
        weights_digest,
        dtype: array::dtype(kind),
        embedding_width: vision.width as usize,
        n_query: vision.n_query as usize,
        v_query: vision.v_query as usize,
        max_positions: model.config().max_position_embeddings as usize,
        kv_entries,
    };
    Ok((model, loaded))
}

/// Returns the bytes of weights that each device takes when layers are spread over `devices`.
///
/// # Errors
///
/// A section of the configuration is not of its form.
pub fn room(dir: &ModelDir, devices: &[Device], kind: Kind) -> Result<Vec<(Device, u64)>, LoadError> {
    Ok(shares(&dir.section("llama")?, &dir.section("vision")?, devices, kind))
}

fn shares(llama: &LlamaConfig, vision: &Vision, devices: &[Device], kind: Kind) -> Vec<(Device, u64)> {
    let parameters = llama.spread_parameters(vision.width, devices.len());
    let bytes = parameters.into_iter().map(|count| count * kind.elt_size_in_bytes() as u64);
    devices.iter().copied().zip(bytes).collect()
}

/// Builds the model on the CPU out of what of its weights is read, which the folder was opened for; returns the weights
/// digest that it has or would have.
///
/// # Errors
///
/// The folder does not fit the model.
pub fn verify(dir: &Rc<ModelDir>, kind: Kind) -> Result<String, LoadError> {
    let (llama, vision, _) = described(dir)?;
    let (_, weights_digest) = Llama::load(dir, llama, vision.width, &[Device::Cpu], kind)?;
    Ok(weights_digest)
}

/// Reads what is said beside the weights, which must agree.
fn described(dir: &ModelDir) -> Result<(LlamaConfig, Vision, Tokenizer), LoadError> {
    let llama: LlamaConfig = dir.section("llama")?;
    let vision: Vision = dir.section("vision")?;
    let tokenizer = tokenizer(dir)?;
    check(dir, &llama, &vision, &tokenizer)?;
    Ok((llama, vision, tokenizer))
}

/// Reads the folder's tokenizer; an added_tokens.json beside it must give its tokens the ids that are appended here.
fn tokenizer(dir: &ModelDir) -> Result<Tokenizer, LoadError> {
    let tokenizer = Tokenizer::parse(&dir.tokenizer_bytes()?, dir.instruct()).map_err(|source| {
        let path = dir.tokenizer_path().unwrap_or(dir.path()).to_owned();
        LoadError::Tokenizer { path, source }
    })?;
    for (name, id) in dir.added_tokens()?.unwrap_or_default() {
        let appended = tokenizer.special_named(&name);
        if appended != Some(id) {
            let expected = appended.map_or("no id".to_owned(), |id| id.to_string());
            let text = format!("added_tokens.json gives `{name}` the id {id}, Emu2 gives it {expected}");
            return Err(dir.unsupported(text).into());
        }
    }
    Ok(tokenizer)
}

/// Checks that config.json's sections and the tokenizer agree.
fn check(
    dir: &ModelDir,
    llama: &LlamaConfig,
    vision: &Vision,
    tokenizer: &Tokenizer,
) -> Result<(), LoadError> {
    let problem = |text: String| Err(dir.unsupported(text).into());
    if let Some(text) = llama.problem() {
        return problem(text);
    }
    if tokenizer.vocab_size() as i64 != llama.vocab_size {
        let (config, tokenizer) = (llama.vocab_size, tokenizer.vocab_size());
        return problem(format!("llama.vocab_size is {config}, but the tokenizer has {tokenizer} ids"));
    }
    if vision.width < 1 {
        return problem(format!("vision.width must be at least 1, is {}", vision.width));
    }
    let Some(side) = vision.image_size.checked_div(vision.patch_size) else {
        return problem("vision.patch_size must be at least 1, is 0".to_owned());
    };
    for (name, queries) in [("n_query", vision.n_query), ("v_query", vision.v_query)] {
        let most = llama.max_position_embeddings;
        if i64::from(queries) >= most {
            return problem(format!("vision.{name} must be 1 to {}, is {queries}", most - 1));
        }
        // Slots that the encoder could never fill.
        if let Some(text) = pooling::problem(side, queries) {
            return problem(format!("vision.{name} {text}"));
        }
    }
    Ok(())
}

/// Computes a prompt and one more token: what is allocated or compiled at first use is, before anyone waits for it.
fn warm_up(model: &Llama, ids: TextIds) {
    let prompt = Tensor::from_slice(&[i64::from(ids.begin); 8]);
    let mut kv = model.kv_cache(9);
    for (x, rows) in [(model.embed(&prompt), 8), (model.embed(&prompt.narrow(0, 0, 1)), 1)] {
        let hidden = model.forward(&x, &mut [Rows { kv: &mut kv, append: Append::Sequential(rows) }]);
        let embedding = model.project_down(&hidden);
        let _ =
            (model.logits(&hidden).double_value(&[0, 0]), model.project_up(&embedding).double_value(&[0, 0]));
    }
}
