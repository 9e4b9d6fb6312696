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

/// How much of the weights those see who build a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reading {
    /// All: the model can be used.
    #[default]
    Values,
    /// They are hashed and let go of: a model that fits no memory has its digest.
    Digest,
    /// None: only names, dtypes and shapes are checked.
    Names,
}

/// Where weights come from.
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

/// What a model holds of one part.
#[derive(Clone, Debug, PartialEq)]
pub struct Contents {
    pub part: Part,
    pub tensors: usize,
    pub values: u64,
    /// In the files.
    pub bytes: u64,
    /// As the files call them, such as BF16.
    pub dtypes: BTreeSet<String>,
}

impl ModelDir {
    /// A folder in any layout, or random weights (`random:emu2-37b`).
    pub fn open(path: &Path) -> Result<Rc<Self>, CheckpointError> {
        Self::open_with(path, Progress::default())
    }

    /// As [`Self::open`], and `progress` is told how far loading is.
    pub fn open_with(path: &Path, progress: Progress) -> Result<Rc<Self>, CheckpointError> {
        Self::open_for(path, Reading::Values, progress)
    }

    /// As [`Self::open_with`]; unless it reads all values, what is built of it only tells whether it could be.
    pub fn open_for(path: &Path, reading: Reading, progress: Progress) -> Result<Rc<Self>, CheckpointError> {
        let wrong = |reason| CheckpointError::Random { path: path.to_owned(), reason };
        let mut dir = match path.to_str().and_then(|path| path.strip_prefix(random::PREFIX)) {
            Some(spec) => Self::of_random(path, Spec::parse(spec).map_err(wrong)?, progress),
            None => Self::of_folder(path, progress)?,
        };
        dir.reading = reading;
        Ok(Rc::new(dir))
    }

    /// A model of these sections with weights out of a seed: what training starts from.
    pub fn random(config: Map<String, Value>, seed: u64) -> Rc<Self> {
        let spec = Spec { config, random: Random::new(seed), tokenizer: None };
        Rc::new(Self::of_random(Path::new(random::PREFIX), spec, Progress::default()))
    }

    /// The folder, or `random:…`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What was recognised.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// As configured, or as published: `emu2`, `emu2-chat`, `emu2-gen`.
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

    /// A section of the configuration; absent sections and keys take `T`'s defaults, unknown keys are ignored, since
    /// published configurations carry many that do not matter here.
    pub fn section<T: DeserializeOwned>(&self, name: &str) -> Result<T, CheckpointError> {
        let empty = Value::Object(Map::new());
        let section = self.config.get(name).unwrap_or(&empty);
        T::deserialize(section).map_err(|error| self.unsupported(format!("`{name}`: {error}")))
    }

    /// A value at the top of the configuration, such as `name` or `instruct`.
    pub fn value<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, CheckpointError> {
        let value = self.config.get(name).map(T::deserialize).transpose();
        value.map_err(|error| self.unsupported(format!("`{name}`: {error}")))
    }

    /// A configuration that contradicts itself or asks for what is not built.
    pub fn unsupported(&self, reason: impl Into<String>) -> CheckpointError {
        CheckpointError::Unsupported { path: self.path.clone(), reason: reason.into() }
    }

    /// Where tokenizer.model must be. Random weights have none, unless one was named.
    pub fn tokenizer_path(&self) -> Option<&Path> {
        self.tokenizer.as_deref()
    }

    /// The sentencepiece file; for random weights of a named size a made-up one of the right number of pieces.
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

    /// Ids that added_tokens.json beside the tokenizer gives to tokens, if there is one: they must be those that code
    /// appends.
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

    /// Whether any weight of this part is here.
    pub fn has(&self, part: Part) -> bool {
        match &self.source {
            Source::Files(_) => self.entries_of(part).next().is_some(),
            Source::Random(_) => self.config.contains_key(part.section()),
        }
    }

    /// What the files hold, part by part.
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

    /// Names in the files that are none of Emu2's.
    pub fn unknown(&self) -> &[String] {
        &self.unknown
    }

    /// What a part takes up in a kind.
    pub fn bytes(&self, part: Part, kind: Kind) -> u64 {
        let values = match &self.source {
            Source::Files(_) => self.entries_of(part).map(|(_, entry)| entry.values()).sum(),
            Source::Random(random) => random.values(part),
        };
        values * kind.elt_size_in_bytes() as u64
    }

    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// To be called before parts are loaded to one device: refuses what does not fit it together, and lets the
    /// progress count all of it from the start. Parts loaded without this are checked one by one, on the CPU only.
    pub fn prepare(&self, parts: &[Part], device: Device, kind: Kind) -> Result<(), CheckpointError> {
        let needed = parts.iter().map(|&part| self.bytes(part, kind)).sum();
        self.prepare_spread(parts, &[(device, needed)], kind)
    }

    /// As [`Self::prepare`], for parts of which each device takes so many bytes.
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

    /// Lets the progress count on a part; says whether that is new.
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
