//! What is to be written: which files of IN are weights, how their tensors are cut into shards, what is copied.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, mem,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use anyhow::{Context, Result, bail, ensure};
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    record,
    source::{Source, Tensor, width},
};

/// Bytes that a copied file may have: tokenizers have half a megabyte, in JSON two.
const MAX_COPIED_BYTES: u64 = 16 << 20;
/// Bytes that an index may have; Emu2's has 129 kB.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Contradictions of an index that are spelled out at most.
const MAX_PROBLEMS: usize = 10;
const PICKLED: [&str; 3] = ["bin", "pth", "pt"];
const SAFETENSORS: [&str; 1] = ["safetensors"];
/// Extensions of files that belong to a model beside its weights. Python files do not: they are code.
const COPIED: [&str; 4] = ["json", "model", "txt", "md"];
const LICENCES: [&str; 2] = ["LICENSE", "NOTICE"];
/// Files that are copied where IN is one file of a folder.
const COPIED_WITH_FILE: [&str; 3] = ["config.json", "tokenizer.model", "added_tokens.json"];
/// The file by which a diffusers folder is recognised; such a folder has a subfolder for each part.
const MODEL_INDEX: &str = "model_index.json";

/// The folder or file that is converted. Links on the way to it are resolved, but a link to the file itself is not:
/// download caches keep files under names that say nothing.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) folder: PathBuf,
    /// The name of the only file of the folder that is converted, if one was named.
    pub(super) file: Option<String>,
}

/// Everything that a conversion writes, and what it is made of.
pub(super) struct Plan {
    pub(super) sources: Vec<Source>,
    pub(super) shards: Vec<Shard>,
    /// The index of each folder's shards, by its path in OUT.
    pub(super) indexes: BTreeMap<PathBuf, Value>,
    /// The files that are copied, by their path in IN, which is the same in OUT.
    pub(super) copied: Vec<PathBuf>,
    pub(super) copied_bytes: u64,
    /// A blake3 hash over the sources' names, lengths and times and over the shard size, in hex.
    pub(super) fingerprint: String,
}

/// A safetensors file that is written.
pub(super) struct Shard {
    /// The file's path in OUT.
    pub(super) path: PathBuf,
    /// The index in [`Plan::sources`] of the file that holds its tensors.
    pub(super) source: usize,
    /// The names of its tensors, in the order in which they are written.
    pub(super) names: Vec<String>,
    /// The bytes of its values, without the header.
    pub(super) bytes: u64,
}

impl Input {
    pub(super) fn find(path: &Path) -> Result<Self> {
        let shown = || path.display().to_string();
        if fs::metadata(path).with_context(shown)?.is_dir() {
            return Ok(Self { folder: path.canonicalize().with_context(shown)?, file: None });
        }
        let file = path.file_name().and_then(|name| name.to_str()).with_context(shown)?;
        let folder = path.parent().filter(|folder| *folder != "").unwrap_or(Path::new("."));
        Ok(Self { folder: folder.canonicalize().with_context(shown)?, file: Some(file.to_owned()) })
    }

    fn is_copied(&self, name: &str) -> bool {
        match &self.file {
            Some(_) => COPIED_WITH_FILE.contains(&name),
            None => is_copied(name),
        }
    }
}

impl Plan {
    /// Opens all weights of IN, without reading values, and cuts them into shards of at most `shard_bytes`.
    pub(super) fn make(input: &Input, output: &Path, shard_bytes: u64) -> Result<Self> {
        let mut plan = Self {
            sources: Vec::new(),
            shards: Vec::new(),
            indexes: BTreeMap::new(),
            copied: Vec::new(),
            copied_bytes: 0,
            fingerprint: String::new(),
        };
        let mut fingerprint = blake3::Hasher::new();
        fingerprint.update(format!("1 {shard_bytes}").as_bytes());
        for folder in folders(&input.folder, output)? {
            plan.add_folder(input, &folder, shard_bytes, &mut fingerprint)?;
        }
        ensure!(
            !plan.shards.is_empty(),
            "{}: holds no weights: no *.safetensors, *.bin, *.pth or *.pt",
            input.folder.display()
        );
        plan.fingerprint = fingerprint.finalize().to_hex().to_string();
        Ok(plan)
    }

    pub(super) fn weights_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes).sum()
    }

    fn add_folder(
        &mut self,
        input: &Input,
        folder: &Path,
        shard_bytes: u64,
        fingerprint: &mut blake3::Hasher,
    ) -> Result<()> {
        let here = input.folder.join(folder);
        let present = files(&here)?;
        for (name, &bytes) in &present {
            if input.is_copied(name) && bytes <= MAX_COPIED_BYTES {
                self.copied.push(folder.join(name));
                self.copied_bytes += bytes;
            }
        }
        let weights = match &input.file {
            Some(file) => Some(Weights { files: BTreeSet::from([file.clone()]), index: None }),
            None => Weights::find(&here, &present)?,
        };
        let Some(weights) = weights else { return Ok(()) };
        let mut opened = Vec::new();
        for name in &weights.files {
            let path = here.join(name);
            opened.push((name.clone(), Source::open(&path)?));
            let modified = fs::metadata(&path)?.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
            let line = format!("{:?} {} {}\n", folder.join(name), present[name], modified.as_nanos());
            fingerprint.update(line.as_bytes());
        }
        weights.check(&here, &opened)?;
        self.cut(folder, &stem(&weights.files), opened, shard_bytes);
        Ok(())
    }

    /// Cuts the tensors of a folder into shards of at most `shard_bytes`, unless one tensor has more. No shard holds
    /// tensors of two sources, so that one is read at a time.
    fn cut(&mut self, folder: &Path, stem: &str, opened: Vec<(String, Source)>, shard_bytes: u64) {
        let mut shards: Vec<Shard> = Vec::new();
        for (_, source) in opened {
            let number = self.sources.len();
            let empty = || Shard { path: PathBuf::new(), source: number, names: Vec::new(), bytes: 0 };
            let mut shard = empty();
            for (name, tensor) in &source.tensors {
                let bytes = written_bytes(tensor);
                if !shard.names.is_empty() && shard.bytes + bytes > shard_bytes {
                    shards.push(mem::replace(&mut shard, empty()));
                }
                shard.bytes += bytes;
                shard.names.push(name.clone());
            }
            if !shard.names.is_empty() {
                shards.push(shard);
            }
            self.sources.push(source);
        }
        let count = shards.len();
        let mut weight_map = BTreeMap::new();
        for (place, shard) in shards.iter_mut().enumerate() {
            let file = format!("{stem}-{:05}-of-{count:05}.safetensors", place + 1);
            weight_map.extend(shard.names.iter().map(|name| (name.clone(), file.clone())));
            shard.path = folder.join(file);
            // Wide values first, so that all are aligned, as the safetensors library does.
            let tensors = &self.sources[shard.source].tensors;
            shard.names.sort_by_key(|name| std::cmp::Reverse(width(written_dtype(&tensors[name]))));
        }
        let total: u64 = shards.iter().map(|shard| shard.bytes).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        self.indexes.insert(folder.join(format!("{stem}.safetensors.index.json")), index);
        self.shards.extend(shards);
    }
}

/// Returns the dtype that a tensor is written in: bfloat16 for floats; counters and masks keep theirs.
pub(super) fn written_dtype(tensor: &Tensor) -> Dtype {
    match tensor.dtype {
        Dtype::F64 | Dtype::F32 | Dtype::F16 => Dtype::BF16,
        other => other,
    }
}

pub(super) fn written_bytes(tensor: &Tensor) -> u64 {
    let width = width(written_dtype(tensor)).expect("what is written has a known width");
    tensor.values() * width as u64
}

/// The weights of one folder.
struct Weights {
    files: BTreeSet<String>,
    /// The name of the index, and the file of each tensor.
    index: Option<(String, BTreeMap<String, String>)>,
}

impl Weights {
    /// Finds the safetensors files of a folder, or its pickles where it has none: those that an index names, or all
    /// where there is no index.
    fn find(folder: &Path, present: &BTreeMap<String, u64>) -> Result<Option<Self>> {
        for kinds in [&SAFETENSORS[..], &PICKLED[..]] {
            let is_index = |name: &&String| {
                let ends = |kind: &&str| name.contains(&format!(".{kind}.index")) && name.ends_with(".json");
                kinds.iter().any(ends)
            };
            let is_weights = |name: &&String| extension(name).is_some_and(|end| kinds.contains(&end));
            let indexes: Vec<_> = present.keys().filter(is_index).collect();
            match indexes[..] {
                [] => {
                    let files: BTreeSet<_> = present.keys().filter(is_weights).cloned().collect();
                    if !files.is_empty() {
                        return Ok(Some(Self { files, index: None }));
                    }
                }
                [name] => return Self::of_index(folder, name, present).map(Some),
                [one, other, ..] => {
                    bail!("{}: both {one} and {other}: leave one", folder.display())
                }
            }
        }
        Ok(None)
    }

    fn of_index(folder: &Path, name: &str, present: &BTreeMap<String, u64>) -> Result<Self> {
        #[derive(Deserialize)]
        struct File {
            weight_map: BTreeMap<String, String>,
        }
        let path = folder.join(name);
        let shown = || path.display().to_string();
        ensure!(present[name] <= MAX_INDEX_BYTES, "{}: must have at most {MAX_INDEX_BYTES} bytes", shown());
        let File { weight_map } =
            serde_json::from_slice(&fs::read(&path).with_context(shown)?).with_context(shown)?;
        let files: BTreeSet<_> = weight_map.values().cloned().collect();
        // Also what leads out of the folder is absent from it.
        let absent: Vec<_> = files.iter().filter(|file| !present.contains_key(*file)).cloned().collect();
        ensure!(
            absent.is_empty(),
            "{} names {}, which {} absent",
            shown(),
            absent.join(", "),
            if absent.len() == 1 { "is" } else { "are" }
        );
        Ok(Self { files, index: Some((name.to_owned(), weight_map)) })
    }

    /// Checks that no name stands in two files, and that the files hold what the index says.
    fn check(&self, folder: &Path, opened: &[(String, Source)]) -> Result<()> {
        let mut found: BTreeMap<&str, &str> = BTreeMap::new();
        for (file, source) in opened {
            for name in source.tensors.keys() {
                if let Some(other) = found.insert(name, file) {
                    bail!("{}: `{name}` stands in {other} and in {file}", folder.display());
                }
            }
        }
        let Some((index, listed)) = &self.index else { return Ok(()) };
        let mut problems = Vec::new();
        for (name, file) in listed {
            match found.get(name.as_str()) {
                Some(held) if held == file => {}
                Some(held) => problems.push(format!("`{name}` stands in {held}, but is listed for {file}")),
                None => problems.push(format!("{file} has no `{name}`")),
            }
        }
        let unlisted = found.iter().filter(|(name, _)| !listed.contains_key(**name));
        problems.extend(unlisted.map(|(name, file)| format!("`{name}` stands in {file}, but is not listed")));
        let more = problems.len().saturating_sub(MAX_PROBLEMS);
        problems.truncate(MAX_PROBLEMS);
        if more > 0 {
            problems.push(format!("and {more} more"));
        }
        ensure!(
            problems.is_empty(),
            "{} does not fit its files: {}",
            folder.join(index).display(),
            problems.join("; ")
        );
        Ok(())
    }
}

/// Returns the folders of IN that are converted, relative to it: IN itself and, if it is a diffusers folder, its
/// subfolders.
fn folders(input: &Path, output: &Path) -> Result<Vec<PathBuf>> {
    let mut folders = vec![PathBuf::new()];
    if !input.join(MODEL_INDEX).exists() {
        return Ok(folders);
    }
    for entry in fs::read_dir(input).with_context(|| input.display().to_string())? {
        let entry = entry?;
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        if !hidden && entry.path().is_dir() && entry.path() != output {
            folders.push(PathBuf::from(entry.file_name()));
        }
    }
    folders.sort();
    Ok(folders)
}

/// Returns the names and lengths of a folder's files. Links are followed, because download caches consist of them.
fn files(folder: &Path) -> Result<BTreeMap<String, u64>> {
    let read = || {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let metadata = fs::metadata(entry.path())?;
            if let (true, Ok(name)) = (metadata.is_file(), entry.file_name().into_string()) {
                files.insert(name, metadata.len());
            }
        }
        Ok(files)
    };
    let files: std::io::Result<_> = read();
    files.with_context(|| folder.display().to_string())
}

fn is_copied(name: &str) -> bool {
    let is_index = name.contains(".index.") || name.ends_with(".index.json");
    let known = extension(name).is_some_and(|end| COPIED.contains(&end))
        || LICENCES.iter().any(|start| name.starts_with(start));
    known && !is_index && !name.starts_with('.') && name != record::FINISHED
}

/// Returns what the names of a part's files begin with: `diffusion_pytorch_model` in a diffusers folder, else `model`.
fn stem(files: &BTreeSet<String>) -> String {
    const DIFFUSERS: &str = "diffusion_pytorch_model";
    let diffusers = files.iter().all(|name| name.starts_with(DIFFUSERS));
    if diffusers { DIFFUSERS } else { "model" }.to_owned()
}

fn extension(name: &str) -> Option<&str> {
    name.rsplit_once('.').map(|(_, extension)| extension)
}
