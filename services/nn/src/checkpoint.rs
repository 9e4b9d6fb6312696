//! A model folder: `config.json`, memory-mapped `*.safetensors`, and the one table of names.
//!
//! Layout served now: upstream's native state dicts (`visual.*`, `decoder.lm.*`, `project_*`; for Emu2-Gen the same
//! under `multimodal_encoder.`, beside `unet.*` and `vae.*`), in one file or several. Every name is translated once,
//! here, to its part and its canonical name; models never see a layout.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    ops::Range,
    path::{Path, PathBuf},
    rc::Rc,
};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;
use tch::{Device, Kind};

use crate::weights::Weights;

/// Largest config.json that is read; published ones have a few kilobytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Largest header of a weights file; the published single-file checkpoint's has a few hundred kilobytes.
const MAX_HEADER_BYTES: usize = 64 << 20;

/// The parts of Emu2 that services load on their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// EVA-CLIP ViT; canonical names without `visual.`.
    Visual,
    /// LLaMA and both projections; canonical names as in the native state dict of Emu2.
    Llm,
    /// Canonical names without `unet.`.
    Unet,
    /// Canonical names without `vae.`.
    Vae,
}

/// The table of names: how a name in a file begins, its part, and how its canonical name begins.
const NAMES: [(&str, Part, &str); 6] = [
    ("visual.", Part::Visual, ""),
    ("decoder.lm.", Part::Llm, "decoder.lm."),
    ("project_up.", Part::Llm, "project_up."),
    ("project_down.", Part::Llm, "project_down."),
    ("unet.", Part::Unet, ""),
    ("vae.", Part::Vae, ""),
];
/// Emu2-Gen's native file holds the multimodal model under this prefix.
const WRAPPER: &str = "multimodal_encoder.";

/// Names that published files hold and nothing needs: rotary buffers that old transformers versions kept (lossy in
/// bfloat16: the tables are rebuilt), and Stable Diffusion's safety checker.
fn is_known_extra(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || name.starts_with("safety_checker.")
}

fn canonical(name: &str) -> Option<(Part, String)> {
    let name = name.strip_prefix(WRAPPER).unwrap_or(name);
    NAMES.iter().find_map(|&(prefix, part, canonical)| {
        name.strip_prefix(prefix).map(|rest| (part, format!("{canonical}{rest}")))
    })
}

/// Why a model folder cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path}: not a model's config.json: {reason}")]
    Config { path: PathBuf, reason: String },
    #[error("{path}: not a safetensors file: {reason}")]
    Weights { path: PathBuf, reason: String },
    #[error("{0}: holds no *.safetensors")]
    NoWeights(PathBuf),
    #[error("{path}: `{name}` stands in more than one file")]
    Duplicate { path: PathBuf, name: String },
    #[error("{path} does not fit the model: {}", .problems.join("; "))]
    Mismatch { path: PathBuf, problems: Vec<String> },
    /// A configuration that contradicts itself or asks for what is not built.
    #[error("{path}: config.json: {reason}")]
    Unsupported { path: PathBuf, reason: String },
}

/// A tensor in a mapped file.
#[derive(Debug)]
pub(crate) struct Entry {
    file: usize,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<i64>,
    range: Range<usize>,
}

/// A model folder, opened: names are known, no weights are read yet.
#[derive(Debug)]
pub struct ModelDir {
    path: PathBuf,
    config: serde_json::Value,
    files: Vec<Mmap>,
    entries: BTreeMap<(Part, String), Entry>,
    /// Names that belong to no part and are no known extras.
    unknown: Vec<String>,
}

impl ModelDir {
    pub fn open(path: &Path) -> Result<Rc<Self>, CheckpointError> {
        let config = read_config(&path.join("config.json"))?;
        let mut dir = Self {
            path: path.to_owned(),
            config,
            files: Vec::new(),
            entries: BTreeMap::new(),
            unknown: Vec::new(),
        };
        let files = weight_files(path)?;
        if files.is_empty() {
            return Err(CheckpointError::NoWeights(path.to_owned()));
        }
        for file in files {
            dir.add_file(&file)?;
        }
        Ok(Rc::new(dir))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A section of config.json; absent sections and keys take `T`'s defaults, unknown keys are ignored, since
    /// published configurations carry many that do not matter here.
    pub fn section<T: DeserializeOwned>(&self, name: &str) -> Result<T, CheckpointError> {
        let empty = serde_json::Value::Object(Default::default());
        let section = self.config.get(name).unwrap_or(&empty);
        T::deserialize(section).map_err(|error| self.unsupported(format!("`{name}`: {error}")))
    }

    /// A value at the top of config.json, such as `name` or `instruct`.
    pub fn value<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, CheckpointError> {
        let value = self.config.get(name).map(T::deserialize).transpose();
        value.map_err(|error| self.unsupported(format!("`{name}`: {error}")))
    }

    /// A configuration that contradicts itself or asks for what is not built.
    pub fn unsupported(&self, reason: impl Into<String>) -> CheckpointError {
        CheckpointError::Unsupported { path: self.path.clone(), reason: reason.into() }
    }

    /// Whether any weight of this part is here.
    pub fn has(&self, part: Part) -> bool {
        self.entries.range((part, String::new())..).next().is_some_and(|((found, _), _)| *found == part)
    }

    /// The ledger that a model is built from; see [`Weights`].
    pub fn weights(self: &Rc<Self>, part: Part, device: Device, kind: Kind) -> Weights {
        Weights::new(self.clone(), part, device, kind)
    }

    pub(crate) fn entry(&self, part: Part, name: &str) -> Option<&Entry> {
        self.entries.get(&(part, name.to_owned()))
    }

    pub(crate) fn names(&self, part: Part) -> impl Iterator<Item = &str> {
        self.entries.keys().filter(move |(of, _)| *of == part).map(|(_, name)| name.as_str())
    }

    pub(crate) fn unknown(&self) -> &[String] {
        &self.unknown
    }

    /// The tensor's bytes in the mapped file.
    pub(crate) fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.files[entry.file][entry.range.clone()]
    }

    fn add_file(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let bad = |reason: String| CheckpointError::Weights { path: path.to_owned(), reason };
        let file =
            File::open(path).map_err(|source| CheckpointError::Io { path: path.to_owned(), source })?;
        // SAFETY: the mapping is read-only; a file cut short under a running service ends it with SIGBUS, as any
        // program that maps its weights.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| bad(error.to_string()))?;
        check_header_length(&map).map_err(bad)?;
        // Also checks that offsets are in order, without gaps, and end with the file.
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|error| bad(error.to_string()))?;
        let data = header + 8;
        if map.len() != data + metadata.data_len() {
            return Err(bad(format!(
                "{} bytes, but its header speaks of {}",
                map.len(),
                data + metadata.data_len()
            )));
        }
        for (name, info) in metadata.tensors() {
            let Some(key) = canonical(&name) else {
                if !is_known_extra(&name) {
                    self.unknown.push(name);
                }
                continue;
            };
            if is_known_extra(&name) {
                continue;
            }
            let shape = info.shape.iter().map(|&side| side as i64).collect();
            let range = data + info.data_offsets.0..data + info.data_offsets.1;
            let entry = Entry { file: self.files.len(), dtype: info.dtype, shape, range };
            if self.entries.insert(key, entry).is_some() {
                return Err(CheckpointError::Duplicate { path: path.to_owned(), name });
            }
        }
        self.files.push(map);
        Ok(())
    }
}

fn check_header_length(bytes: &[u8]) -> Result<(), String> {
    let length = bytes.first_chunk::<8>().ok_or("shorter than its header's length")?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES as u64 {
        return Err(format!("header must be at most {MAX_HEADER_BYTES} bytes, got {length}"));
    }
    Ok(())
}

fn read_config(path: &Path) -> Result<serde_json::Value, CheckpointError> {
    let io = |source| CheckpointError::Io { path: path.to_owned(), source };
    let bytes = fs::metadata(path).map_err(io)?.len();
    let bad = |reason| CheckpointError::Config { path: path.to_owned(), reason };
    if bytes > MAX_CONFIG_BYTES {
        return Err(bad(format!("must be at most {MAX_CONFIG_BYTES} bytes, got {bytes}")));
    }
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(path).map_err(io)?).map_err(|error| bad(error.to_string()))?;
    if !config.is_object() {
        return Err(bad("not an object".to_owned()));
    }
    Ok(config)
}

/// Sorted, so that loading does not depend on the file system's order.
fn weight_files(path: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let io = |source| CheckpointError::Io { path: path.to_owned(), source };
    let mut files = Vec::new();
    for entry in fs::read_dir(path).map_err(io)? {
        let file = entry.map_err(io)?.path();
        if file.extension().is_some_and(|extension| extension == "safetensors") {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}
