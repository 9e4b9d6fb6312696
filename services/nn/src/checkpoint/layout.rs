//! What a model folder is, told by what it holds, and how each layout's configurations become the same sections.
//!
//! | layout | recognised by | its parts |
//! |---|---|---|
//! | native | config.json of our own sections, or none at all beside upstream's published files | `*.safetensors` here |
//! | Hugging Face | config.json with model_type "Emu" | `model*.safetensors` here |
//! | diffusers | model_index.json with a multimodal_encoder | multimodal_encoder/ (Hugging Face), unet/, vae/ |
//!
//! Sections: `name`, `instruct`, `vision`, `llama`, `unet`, `vae`, `scheduler`.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use super::{error::CheckpointError, files::file_names, json::read_json};

/// Largest configuration that is read; published ones have a few kilobytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
const CONFIG: &str = "config.json";
const MODEL_INDEX: &str = "model_index.json";
const SCHEDULER: &str = "scheduler/scheduler_config.json";
/// What Emu2's Hugging Face configurations call themselves.
const MODEL_TYPE: &str = "Emu";
/// Vocabulary of the chat model: two tokens more than the others'.
const CHAT_VOCABULARY: i64 = 32_274;
/// Embeddings of an image, and of a video frame, in the chat model; the others have 64 of both, which is what
/// sections default to.
const CHAT_QUERIES: (u32, u32) = (256, 64);

/// How a model's files are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Files named as upstream's state dicts.
    Native,
    /// A folder as published at BAAI/Emu2 and BAAI/Emu2-Chat.
    HuggingFace,
    /// A folder as published at BAAI/Emu2-Gen.
    Diffusers,
    /// No files: random weights of a named size.
    Random,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::HuggingFace => "Hugging Face",
            Self::Diffusers => "diffusers",
            Self::Random => "random",
        })
    }
}

/// A folder of known layout, none of its weights opened yet.
#[derive(Debug)]
pub(super) struct Recognised {
    pub(super) layout: Layout,
    /// The sections; none where published native files stand alone, and their sizes tell which model it is; see
    /// [`published`].
    pub(super) config: Option<Map<String, Value>>,
    pub(super) components: Vec<Component>,
    /// Folder of tokenizer.model.
    pub(super) tokenizer: PathBuf,
}

/// A folder of weights, and what goes before its names in the table of names.
#[derive(Debug)]
pub(super) struct Component {
    pub(super) folder: PathBuf,
    pub(super) prefix: &'static str,
    /// How its weights files begin; none takes all there are.
    pub(super) stem: Option<&'static str>,
}

pub(super) fn recognise(path: &Path) -> Result<Recognised, CheckpointError> {
    let names = file_names(path).map_err(|source| CheckpointError::Io { path: path.to_owned(), source })?;
    if names.contains(MODEL_INDEX) {
        return diffusers(path);
    }
    let here = |stem| vec![Component { folder: path.to_owned(), prefix: "", stem }];
    let tokenizer = path.to_owned();
    if !names.contains(CONFIG) {
        // `Pickled` says more where there are weights of that kind.
        let holds_weights =
            [".safetensors", ".bin", ".pth"].iter().any(|end| names.iter().any(|name| name.ends_with(end)));
        if !holds_weights {
            return Err(CheckpointError::NotAModel(path.to_owned()));
        }
        return Ok(Recognised { layout: Layout::Native, config: None, components: here(None), tokenizer });
    }
    let config = read_object(&path.join(CONFIG))?;
    if ["model_type", "architectures", "_class_name"].iter().any(|key| config.contains_key(*key)) {
        let config = Some(hugging_face(path, config)?);
        let components = here(Some("model"));
        return Ok(Recognised { layout: Layout::HuggingFace, config, components, tokenizer });
    }
    Ok(Recognised { layout: Layout::Native, config: Some(config), components: here(None), tokenizer })
}

/// The sections of a model that comes without config.json: one of the published, told by its vocabulary's rows.
pub(super) fn published(vocabulary: Option<i64>) -> Map<String, Value> {
    let instruct = vocabulary == Some(CHAT_VOCABULARY);
    let mut config = Map::from_iter([("instruct".to_owned(), json!(instruct))]);
    if let Some(rows) = vocabulary {
        config.insert("llama".to_owned(), json!({ "vocab_size": rows }));
    }
    if instruct {
        config.insert("vision".to_owned(), json!({ "n_query": CHAT_QUERIES.0, "v_query": CHAT_QUERIES.1 }));
    }
    config
}

/// One object with LLaMA's keys at the top, the tower's in `vision_config`, and which model it is in `model_version`.
fn hugging_face(path: &Path, mut config: Map<String, Value>) -> Result<Map<String, Value>, CheckpointError> {
    if !is_emu(&config) {
        return Err(CheckpointError::Foreign { path: path.to_owned(), family: family(&config) });
    }
    let wrong = |reason: String| CheckpointError::Unsupported { path: path.join(CONFIG), reason };
    let instruct = match config.get("model_version").map(Value::as_str) {
        None | Some(Some("base")) => false,
        Some(Some("chat")) => true,
        Some(other) => return Err(wrong(format!("`model_version` must be base or chat, is {other:?}"))),
    };
    let mut vision = match config.remove("vision_config") {
        None => Map::new(),
        Some(Value::Object(vision)) => vision,
        Some(_) => return Err(wrong("`vision_config` is not an object".to_owned())),
    };
    if instruct {
        for (key, queries) in [("n_query", CHAT_QUERIES.0), ("v_query", CHAT_QUERIES.1)] {
            vision.entry(key).or_insert_with(|| json!(queries));
        }
    }
    let sections = [("instruct", json!(instruct)), ("vision", Value::Object(vision))];
    let mut sections = Map::from_iter(sections.map(|(key, value)| (key.to_owned(), value)));
    if let Some(name) = config.get("name") {
        sections.insert("name".to_owned(), name.clone());
    }
    sections.insert("llama".to_owned(), Value::Object(config));
    Ok(sections)
}

/// A folder for each part; those that are absent are parts that this folder cannot serve.
fn diffusers(path: &Path) -> Result<Recognised, CheckpointError> {
    let index = read_object(&path.join(MODEL_INDEX))?;
    if !index.contains_key("multimodal_encoder") {
        return Err(CheckpointError::Foreign { path: path.to_owned(), family: family(&index) });
    }
    let mut config = Map::new();
    let mut components = Vec::new();
    let mut component = |name: &str, prefix, stem| {
        let folder = path.join(name);
        let found = folder.is_dir();
        if found {
            components.push(Component { folder: folder.clone(), prefix, stem: Some(stem) });
        }
        found.then_some(folder)
    };
    if let Some(folder) = component("multimodal_encoder", "multimodal_encoder.", "model") {
        config = hugging_face(&folder, read_object(&folder.join(CONFIG))?)?;
    }
    for (section, prefix) in [("unet", "unet."), ("vae", "vae.")] {
        if let Some(folder) = component(section, prefix, "diffusion_pytorch_model") {
            config.insert(section.to_owned(), Value::Object(read_object(&folder.join(CONFIG))?));
        }
    }
    if components.is_empty() {
        return Err(CheckpointError::NoWeights(path.to_owned()));
    }
    let scheduler = path.join(SCHEDULER);
    if scheduler.exists() {
        config.insert("scheduler".to_owned(), Value::Object(read_object(&scheduler)?));
    }
    let tokenizer = path.join("tokenizer");
    Ok(Recognised { layout: Layout::Diffusers, config: Some(config), components, tokenizer })
}

fn is_emu(config: &Map<String, Value>) -> bool {
    match config.get("model_type") {
        Some(model_type) => model_type.as_str() == Some(MODEL_TYPE),
        None => classes(config, "architectures").iter().any(|class| class.starts_with("EmuFor")),
    }
}

/// What a configuration that is not Emu2's says of itself.
fn family(config: &Map<String, Value>) -> String {
    let model_type = config.get("model_type").and_then(Value::as_str);
    let classes = [classes(config, "architectures"), classes(config, "_class_name")].concat();
    match (model_type, classes.is_empty()) {
        (Some(model_type), true) => model_type.to_owned(),
        (Some(model_type), false) => format!("{model_type} ({})", classes.join(", ")),
        (None, false) => classes.join(", "),
        (None, true) => "nothing that it names".to_owned(),
    }
}

/// A text or a list of texts.
fn classes<'a>(config: &'a Map<String, Value>, key: &str) -> Vec<&'a str> {
    match config.get(key) {
        Some(Value::Array(classes)) => classes.iter().filter_map(Value::as_str).collect(),
        Some(class) => class.as_str().into_iter().collect(),
        None => Vec::new(),
    }
}

fn read_object(path: &Path) -> Result<Map<String, Value>, CheckpointError> {
    match read_json(path, MAX_CONFIG_BYTES)? {
        Value::Object(object) => Ok(object),
        _ => Err(CheckpointError::Config { path: path.to_owned(), reason: "not an object".to_owned() }),
    }
}
