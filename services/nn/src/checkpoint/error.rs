//! Why a model cannot be served, in words for whoever put its files there.

use std::path::PathBuf;

use crate::device::NoRoom;

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file could not be opened or read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A configuration is not JSON of the expected shape, or is too large.
    #[error("{path}: not a model's configuration: {reason}")]
    Config {
        /// The configuration's file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of weights breaks the format of safetensors.
    #[error("{path}: not a safetensors file: {reason}")]
    Weights {
        /// The file of weights.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A folder holds nothing by which a model is recognised.
    #[error("{0}: not a model folder: no config.json, no model_index.json, no *.safetensors")]
    NotAModel(PathBuf),
    /// A folder has a configuration and no weights.
    #[error("{0}: holds no *.safetensors")]
    NoWeights(PathBuf),
    /// The weights are pickled; reading them as Python does would run whatever code they hold.
    #[error("{path}: pickled weights are not served: `emu2 convert` makes safetensors of them")]
    Pickled {
        /// One of the pickled files.
        path: PathBuf,
    },
    /// The folder holds a model of another family.
    #[error("{path}: not Emu2: it looks like {family}")]
    Foreign {
        /// The folder.
        path: PathBuf,
        /// The family as its configuration names it.
        family: String,
    },
    /// An index of shards contradicts the shards beside it.
    #[error("{path} does not fit its files: {}", .problems.join("; "))]
    Index {
        /// The index.
        path: PathBuf,
        /// Every contradiction.
        problems: Vec<String>,
    },
    /// Two files hold a tensor of the same name.
    #[error("{path}: `{name}` stands in more than one file")]
    Duplicate {
        /// The second of the files.
        path: PathBuf,
        /// The tensor's name.
        name: String,
    },
    /// Tensors are missing, misshapen or unused by the model that the configuration describes.
    #[error("{path} does not fit the model: {}", .problems.join("; "))]
    Mismatch {
        /// The model's folder.
        path: PathBuf,
        /// Every missing, misshapen and unused name.
        problems: Vec<String>,
    },
    /// A configuration contradicts itself or asks for what is not built.
    #[error("{path}: configuration: {reason}")]
    Unsupported {
        /// The model's folder.
        path: PathBuf,
        /// The contradiction.
        reason: String,
    },
    /// A device has less memory free than the weights take.
    #[error("{path}: {source}")]
    NoRoom {
        /// The model's folder.
        path: PathBuf,
        /// The device, and how much it lacks.
        source: NoRoom,
    },
    /// The tokenizer is absent, too large or not one of sentencepiece.
    #[error("{path}: {reason}")]
    Tokenizer {
        /// The tokenizer's file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The text after `random:` names no known size.
    #[error("{path}: {reason}")]
    Random {
        /// The whole name, `random:` included.
        path: PathBuf,
        /// What is not known in it.
        reason: String,
    },
}
