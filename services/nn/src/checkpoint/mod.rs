//! A model, opened: its configuration, its tokenizer and its weights by name, none of which are read yet.
//!
//! | module | holds |
//! |---|---|
//! | `layout` | what a folder is, and its configurations as the same sections |
//! | `names` | the one table of names |
//! | `files` | which files are the model's weights: indexes and variants |
//! | `folder` | opens them all |
//! | `compare` | whether two hold the same weights |
//! | `error` | why a model cannot be served |
//! | `json` | a configuration's file of bounded size |
//! | `mapped` | a memory-mapped weights file |
//! | `progress` | how far loading is |
//!
//! Every name is translated once, when its file is opened, to its part and its canonical name; models never see a
//! layout. In place of a folder, `random:emu2-37b` is a model of that size with weights out of a seed; see
//! [`crate::random`].

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    rc::Rc,
};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use tch::{Device, Kind};

use crate::{
    device,
    random::{self, Random, Spec},
};

mod compare;
mod error;
mod files;
mod folder;
mod json;
mod layout;
mod mapped;
mod names;
mod progress;
#[cfg(test)]
mod tests;

pub use error::CheckpointError;
pub use layout::Layout;
pub(crate) use mapped::{Entry, Files};
pub use names::{Part, canonical};
pub use progress::Progress;

/// Largest tokenizer file that is read; LLaMA's has half a megabyte.
const MAX_TOKENIZER_BYTES: u64 = 16 << 20;
/// Largest added_tokens.json that is read; Emu2's has some 300 tokens.
const MAX_ADDED_TOKENS_BYTES: u64 = 1 << 20;

/// How much of the weights is read while a model is built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reading {
    /// All values are read: the model can be used.
    #[default]
    Values,
    /// All values are read, hashed and let go of, so that a model that fits no memory has its digest.
    Digest,
    /// No values are read: only names, dtypes and shapes are checked.
    Names,
}

/// Where a model's weights come from.
#[derive(Debug)]
pub(crate) enum Source {
    Files(Files),
    Random(Random),
}

/// A model, opened: names are known, no weights are read yet.
#[derive(Debug)]
pub struct ModelDir {
    path: PathBuf,
    layout: Layout,
    /// Sections and top-level values.
    config: Map<String, Value>,
    tokenizer: Option<PathBuf>,
    source: Source,
    entries: BTreeMap<(Part, String), Entry>,
    /// Names that belong to no part and are no known extras.
    unknown: Vec<String>,
    reading: Reading,
    progress: Progress,
    /// Parts that the progress counts on.
    expected: RefCell<BTreeSet<Part>>,
}

/// What a model's files hold of one part.
#[derive(Clone, Debug, PartialEq)]
pub struct Contents {
    /// The part that this counts.
    pub part: Part,
    /// How many tensors the part has.
    pub tensors: usize,
    /// How many values all its tensors have together.
    pub values: u64,
    /// How many bytes they take in the files.
    pub bytes: u64,
    /// The dtypes that stand in the files, as safetensors names them, such as BF16.
    pub dtypes: BTreeSet<String>,
}

impl ModelDir {
    /// Opens a model folder in any layout, or random weights of a named size (`random:emu2-37b`).
    ///
    /// # Errors
    ///
    /// A file cannot be read or breaks its format, the folder holds no weights or those of another model, a shard
    /// contradicts its index, or the random weights' size or setting is not known.
    pub fn open(path: &Path) -> Result<Rc<Self>, CheckpointError> {
        Self::open_with(path, Progress::default())
    }

    /// Opens a model as [`Self::open`] does, and keeps `progress` at how far its loading is.
    ///
    /// # Errors
    ///
    /// Those of [`Self::open`].
    pub fn open_with(path: &Path, progress: Progress) -> Result<Rc<Self>, CheckpointError> {
        Self::open_for(path, Reading::Values, progress)
    }

    /// Opens a model as [`Self::open_with`] does, and sets how much of its weights is read. Unless that is all values,
    /// a model that is built of it only tells whether it could be built.
    ///
    /// # Errors
    ///
    /// Those of [`Self::open`].
    pub fn open_for(path: &Path, reading: Reading, progress: Progress) -> Result<Rc<Self>, CheckpointError> {
        let wrong = |reason| CheckpointError::Random { path: path.to_owned(), reason };
        let mut dir = match path.to_str().and_then(|path| path.strip_prefix(random::PREFIX)) {
            Some(spec) => Self::of_random(path, Spec::parse(spec).map_err(wrong)?, progress),
            None => Self::of_folder(path, progress)?,
        };
        dir.reading = reading;
        Ok(Rc::new(dir))
    }

    /// Makes a model of these sections with random weights out of a seed: what training starts from.
    pub fn random(config: Map<String, Value>, seed: u64) -> Rc<Self> {
        let spec = Spec { config, random: Random::new(seed), tokenizer: None };
        Rc::new(Self::of_random(Path::new(random::PREFIX), spec, Progress::default()))
    }

    /// Returns the path that the model was opened by: a folder, or `random:…`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the layout that was recognised.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Returns the model's name as configured, or the published one: `emu2`, `emu2-chat` or `emu2-gen`.
    pub fn name(&self) -> &str {
        let published = match (self.has(Part::Unet), self.instruct()) {
            (true, _) => "emu2-gen",
            (false, true) => "emu2-chat",
            (false, false) => "emu2",
        };
        self.config.get("name").and_then(Value::as_str).unwrap_or(published)
    }

    /// Whether the model was tuned to chat, with the tokens that this takes.
    pub fn instruct(&self) -> bool {
        self.config.get("instruct").and_then(Value::as_bool).unwrap_or(false)
    }

    /// Reads a section of the configuration. Absent sections and keys take `T`'s defaults; unknown keys are ignored,
    /// since published configurations carry many that do not matter here.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Unsupported`]: a key's value is not of its type.
    pub fn section<T: DeserializeOwned>(&self, name: &str) -> Result<T, CheckpointError> {
        let empty = Value::Object(Map::new());
        let section = self.config.get(name).unwrap_or(&empty);
        T::deserialize(section).map_err(|error| self.unsupported(format!("`{name}`: {error}")))
    }

    /// Reads a value at the top of the configuration, such as `name`; none where it is absent.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Unsupported`]: the value is not of the type.
    pub fn value<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, CheckpointError> {
        let value = self.config.get(name).map(T::deserialize).transpose();
        value.map_err(|error| self.unsupported(format!("`{name}`: {error}")))
    }

    /// Makes the error of a configuration that contradicts itself or asks for what is not built.
    pub fn unsupported(&self, reason: impl Into<String>) -> CheckpointError {
        CheckpointError::Unsupported { path: self.path.clone(), reason: reason.into() }
    }

    /// Returns the path at which tokenizer.model must be. Random weights have none, unless one was named.
    pub fn tokenizer_path(&self) -> Option<&Path> {
        self.tokenizer.as_deref()
    }

    /// Reads the sentencepiece file. Random weights of a named size have a made-up one of the right number of pieces.
    ///
    /// # Errors
    ///
    /// The file cannot be read or has more than 16 MiB, or the model has no tokenizer.
    pub fn tokenizer_bytes(&self) -> Result<Vec<u8>, CheckpointError> {
        let wrong =
            |path: &Path, reason: String| CheckpointError::Tokenizer { path: path.to_owned(), reason };
        let Some(path) = self.tokenizer_path() else {
            let made_up = match &self.source {
                Source::Random(random) => random.tokenizer(),
                Source::Files(_) => None,
            };
            return made_up.ok_or_else(|| wrong(&self.path, "has no tokenizer".to_owned()));
        };
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| file.take(MAX_TOKENIZER_BYTES + 1).read_to_end(&mut bytes))
            .map_err(|source| CheckpointError::Io { path: path.to_owned(), source })?;
        if bytes.len() as u64 > MAX_TOKENIZER_BYTES {
            return Err(wrong(path, format!("must be at most {MAX_TOKENIZER_BYTES} bytes")));
        }
        Ok(bytes)
    }

    /// Reads the ids that added_tokens.json beside the tokenizer gives to tokens, by token; none without such a file.
    /// They must be those that the llm appends.
    ///
    /// # Errors
    ///
    /// The file cannot be read, has more than 1 MiB or is not an object of ids.
    pub fn added_tokens(&self) -> Result<Option<BTreeMap<String, u32>>, CheckpointError> {
        let Some(path) = self.tokenizer_path().map(|path| path.with_file_name("added_tokens.json")) else {
            return Ok(None);
        };
        if !path.exists() {
            return Ok(None);
        }
        let tokens = BTreeMap::deserialize(json::read_json(&path, MAX_ADDED_TOKENS_BYTES)?);
        tokens.map(Some).map_err(|error| CheckpointError::Tokenizer { path, reason: error.to_string() })
    }

    /// Whether the model has any weight of this part.
    pub fn has(&self, part: Part) -> bool {
        match &self.source {
            Source::Files(_) => self.entries_of(part).next().is_some(),
            Source::Random(_) => self.config.contains_key(part.section()),
        }
    }

    /// Counts what the files hold of each part, without parts that they hold nothing of.
    pub fn contents(&self) -> Vec<Contents> {
        let contents = |part| {
            let mut sum = Contents { part, tensors: 0, values: 0, bytes: 0, dtypes: BTreeSet::new() };
            for (_, entry) in self.entries_of(part) {
                sum.tensors += 1;
                sum.values += entry.values();
                sum.bytes += entry.range.len() as u64;
                sum.dtypes.insert(format!("{:?}", entry.dtype));
            }
            sum
        };
        Part::ALL.map(contents).into_iter().filter(|sum| sum.tensors > 0).collect()
    }

    /// Returns the names in the files that are none of Emu2's.
    pub fn unknown(&self) -> &[String] {
        &self.unknown
    }

    /// Returns the bytes that a part takes up in memory in this kind.
    pub fn bytes(&self, part: Part, kind: Kind) -> u64 {
        let values = match &self.source {
            Source::Files(_) => self.entries_of(part).map(|(_, entry)| entry.values()).sum(),
            Source::Random(random) => random.values(part),
        };
        values * kind.elt_size_in_bytes() as u64
    }

    /// Returns the count of how far loading is.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Announces that these parts are loaded to one device: refuses what does not fit it together, and lets the
    /// progress count all of it from the start. Parts loaded without this are checked one by one, on the CPU only.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::NoRoom`]: the device has less memory free than the parts take.
    pub fn prepare(&self, parts: &[Part], device: Device, kind: Kind) -> Result<(), CheckpointError> {
        let needed = parts.iter().map(|&part| self.bytes(part, kind)).sum();
        self.prepare_spread(parts, &[(device, needed)], kind)
    }

    /// Announces as [`Self::prepare`] does that these parts are loaded to several devices, each of which takes so many
    /// bytes.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::NoRoom`]: a device has less memory free than its share takes.
    pub fn prepare_spread(
        &self,
        parts: &[Part],
        shares: &[(Device, u64)],
        kind: Kind,
    ) -> Result<(), CheckpointError> {
        // Of what is only hashed, nothing stays.
        if self.reading != Reading::Digest {
            self.check_room(shares)?;
        }
        for &part in parts {
            self.expect(part, kind);
        }
        Ok(())
    }

    pub(crate) fn reading(&self) -> Reading {
        self.reading
    }

    pub(crate) fn source(&self) -> &Source {
        &self.source
    }

    pub(crate) fn entry(&self, part: Part, name: &str) -> Option<&Entry> {
        self.entries.get(&(part, name.to_owned()))
    }

    pub(crate) fn names(&self, part: Part) -> impl Iterator<Item = &str> {
        self.entries_of(part).map(|(name, _)| name)
    }

    /// Lets the progress count on a part; returns whether that is new.
    pub(crate) fn expect(&self, part: Part, kind: Kind) -> bool {
        let new = self.expected.borrow_mut().insert(part);
        if new {
            self.progress.expect(self.bytes(part, kind));
        }
        new
    }

    pub(crate) fn check_room(&self, needed: &[(Device, u64)]) -> Result<(), CheckpointError> {
        device::check_room(needed)
            .map_err(|source| CheckpointError::NoRoom { path: self.path.clone(), source })
    }

    fn entries_of(&self, part: Part) -> impl Iterator<Item = (&str, &Entry)> {
        let entries = self.entries.range((part, String::new())..);
        entries.take_while(move |((of, _), _)| *of == part).map(|((_, name), entry)| (name.as_str(), entry))
    }

    fn of_random(path: &Path, spec: Spec, progress: Progress) -> Self {
        let dir = Self {
            path: path.to_owned(),
            layout: Layout::Random,
            config: spec.config,
            tokenizer: spec.tokenizer,
            source: Source::Random(spec.random),
            entries: BTreeMap::new(),
            unknown: Vec::new(),
            reading: Reading::default(),
            progress,
            expected: RefCell::default(),
        };
        tracing::info!(model = dir.name(), "random weights: good for sizes and times, not for answers");
        dir
    }
}
