//! Which files of a folder are a model's weights: those that an index names, in one variant and never in two.
//!
//! Published folders may hold the same weights twice (`model.safetensors`, `model.bf16.safetensors`), whole or in
//! shards (`model.bf16-00001-of-00008.safetensors`), and an index for each. Emu2-Gen is documented to be loaded as its
//! variant bf16, so that comes first; a variant of which files are absent is left for a complete one, as diffusers
//! does.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{error::CheckpointError, json::read_json, names::is_known_extra};

/// Largest index that is read; Emu2's has 129 kB.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// How many contradictions of an index are spelled out: swapped shards contradict it in every name.
const MAX_PROBLEMS: usize = 10;
/// What may stand between a file's stem and its extension, the preferred first. float16 comes last: published values
/// do not all fit its range.
const VARIANTS: [&str; 4] = ["bf16", "", "fp32", "fp16"];
const EXTENSION: &str = ".safetensors";
const INDEX: &str = ".safetensors.index";

/// The weights files that were chosen in a folder.
#[derive(Debug)]
pub(super) struct WeightFiles {
    /// The paths of the chosen files, sorted, so that loading does not depend on the file system's order.
    pub(super) paths: Vec<PathBuf>,
    /// The names of weights files in the same folder that stay unread.
    pub(super) passed_over: Vec<String>,
    index: Option<Index>,
}

/// Which file holds which name.
#[derive(Debug)]
struct Index {
    path: PathBuf,
    weight_map: BTreeMap<String, String>,
}

/// Finds the weights files of `stem` in `folder`, or all weights there when no stem is asked for or none of that name
/// exist.
pub(super) fn find(folder: &Path, stem: Option<&str>) -> Result<WeightFiles, CheckpointError> {
    let present =
        file_names(folder).map_err(|source| CheckpointError::Io { path: folder.to_owned(), source })?;
    let (chosen, index) = match choose_index(folder, &present)? {
        Some(index) => (index.weight_map.values().cloned().collect(), Some(index)),
        None => (choose_by_name(&present, stem), None),
    };
    if chosen.is_empty() {
        return Err(no_weights(folder, &present));
    }
    let weights = present.iter().filter(|name| name.ends_with(EXTENSION));
    let passed_over = weights.filter(|name| !chosen.contains(*name)).cloned().collect();
    Ok(WeightFiles { paths: chosen.iter().map(|name| folder.join(name)).collect(), passed_over, index })
}

impl WeightFiles {
    /// Checks that every file holds exactly what the index says; `held` are the names in each of `paths`.
    pub(super) fn check(&self, held: &[Vec<String>]) -> Result<(), CheckpointError> {
        let Some(index) = &self.index else { return Ok(()) };
        let mut problems = Vec::new();
        let mut found = BTreeSet::new();
        for (path, names) in self.paths.iter().zip(held) {
            let file = path.file_name().and_then(|name| name.to_str()).expect("the index named it");
            for name in names {
                match index.weight_map.get(name) {
                    Some(listed) if listed == file => {
                        found.insert(name.as_str());
                    }
                    Some(listed) => {
                        problems.push(format!("`{name}` stands in {file}, but is listed for {listed}"));
                    }
                    None if is_known_extra(name) => {}
                    None => problems.push(format!("`{name}` stands in {file}, but is not listed")),
                }
            }
        }
        let absent = index.weight_map.iter().filter(|(name, _)| !found.contains(name.as_str()));
        problems.extend(absent.map(|(name, file)| format!("{file} has no `{name}`")));
        index.refuse(problems)
    }
}

impl Index {
    fn read(path: PathBuf) -> Result<Self, CheckpointError> {
        #[derive(Deserialize)]
        struct File {
            weight_map: BTreeMap<String, String>,
        }
        let wrong = |reason: String| CheckpointError::Index { path: path.clone(), problems: vec![reason] };
        let value = read_json(&path, MAX_INDEX_BYTES)?;
        let File { weight_map } = File::deserialize(&value).map_err(|error| wrong(error.to_string()))?;
        // A name that leads out of the folder would have any file of the host read.
        let leads_out = |name: &&String| Path::new(name).file_name().is_none_or(|file| file != name.as_str());
        if let Some(name) = weight_map.values().find(leads_out) {
            return Err(wrong(format!("`{name}` is not the name of a file beside it")));
        }
        Ok(Self { path, weight_map })
    }

    fn absent(&self, present: &BTreeSet<String>) -> Vec<String> {
        let named: BTreeSet<_> = self.weight_map.values().collect();
        let absent = named.into_iter().filter(|file| !present.contains(*file));
        absent.map(|file| format!("names {file}, which is absent")).collect()
    }

    fn refuse(&self, mut problems: Vec<String>) -> Result<(), CheckpointError> {
        if problems.is_empty() {
            return Ok(());
        }
        let more = problems.len().saturating_sub(MAX_PROBLEMS);
        problems.truncate(MAX_PROBLEMS);
        if more > 0 {
            problems.push(format!("and {more} more"));
        }
        Err(CheckpointError::Index { path: self.path.clone(), problems })
    }
}

/// Chooses the preferred index of which all files are there. If there is none such, the error names what the preferred
/// one lacks.
fn choose_index(folder: &Path, present: &BTreeSet<String>) -> Result<Option<Index>, CheckpointError> {
    let mut names: Vec<(usize, &String)> =
        present.iter().filter_map(|name| Some((index_rank(name)?, name))).collect();
    names.sort();
    let mut missed = None;
    for (_, name) in names {
        let index = Index::read(folder.join(name))?;
        let absent = index.absent(present);
        if absent.is_empty() {
            return Ok(Some(index));
        }
        missed.get_or_insert((index, absent));
    }
    match missed {
        Some((index, absent)) => index.refuse(absent).map(|()| None),
        None => Ok(None),
    }
}

/// Ranks an index by its variant: `model.safetensors.index.json`, `model.safetensors.index.bf16.json`.
fn index_rank(name: &str) -> Option<usize> {
    let (_, rest) = name.strip_suffix(".json")?.split_once(INDEX)?;
    rank(rest.strip_prefix('.').unwrap_or(rest))
}

fn rank(variant: &str) -> Option<usize> {
    VARIANTS.iter().position(|known| *known == variant)
}

/// Chooses one variant of each stem.
fn choose_by_name(present: &BTreeSet<String>, stem: Option<&str>) -> BTreeSet<String> {
    let mut stems: BTreeMap<&str, BTreeMap<usize, Vec<&String>>> = BTreeMap::new();
    let parsed: Vec<_> = present.iter().filter_map(|name| Some((parse(name)?, name))).collect();
    for ((of, variant), name) in &parsed {
        stems.entry(of).or_default().entry(*variant).or_default().push(name);
    }
    if let Some(variants) = stem.and_then(|stem| stems.remove(stem)) {
        stems = BTreeMap::from([("", variants)]);
    }
    let preferred = stems.into_values().filter_map(|mut variants| variants.pop_first());
    preferred.flat_map(|(_, names)| names.into_iter().cloned()).collect()
}

/// Splits the name of a weights file into its stem and the rank of its variant: (`model`, that of bf16) of
/// `model.bf16-00001-of-00008.safetensors`, which is transformers' way, and of `model-00001-of-00008.bf16.safetensors`,
/// diffusers' newer one.
fn parse(name: &str) -> Option<(String, usize)> {
    let name = without_shard(name.strip_suffix(EXTENSION)?);
    let variant = name.rsplit_once('.').and_then(|(stem, variant)| Some((stem.to_owned(), rank(variant)?)));
    Some(variant.unwrap_or_else(|| (name, rank("").expect("the plain variant is one"))))
}

fn without_shard(name: &str) -> String {
    const SHARD: &str = "-00001-of-00008";
    let is_shard = |text: &str| {
        let pattern = text.bytes().zip(SHARD.bytes());
        text.len() == SHARD.len()
            && pattern
                .into_iter()
                .all(|(byte, of)| byte == of || (byte.is_ascii_digit() && of.is_ascii_digit()))
    };
    let mut starts = name.match_indices('-').map(|(start, _)| start);
    match starts.find(|&start| name.get(start..start + SHARD.len()).is_some_and(is_shard)) {
        Some(start) => name[..start].to_owned() + &name[start + SHARD.len()..],
        None => name.to_owned(),
    }
}

/// Makes the error of a folder without weights that can be read, which says whether there are others.
fn no_weights(folder: &Path, present: &BTreeSet<String>) -> CheckpointError {
    let is_pickled = |name: &&String| [".bin", ".pth", ".pt", ".ckpt"].iter().any(|end| name.ends_with(end));
    match present.iter().find(is_pickled) {
        Some(name) => CheckpointError::Pickled { path: folder.join(name) },
        None => CheckpointError::NoWeights(folder.to_owned()),
    }
}

/// Returns the names of a folder's files; those that are not UTF-8 are nobody's.
pub(super) fn file_names(folder: &Path) -> io::Result<BTreeSet<String>> {
    fs::read_dir(folder)?
        .map(|entry| Ok(entry?.file_name().into_string().ok()))
        .filter_map(Result::transpose)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[&str], stem: Option<&str>) -> Result<WeightFiles, CheckpointError> {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let text = match *file {
                "model.safetensors.index.json" => {
                    r#"{"weight_map": {"a": "model-00001-of-00002.safetensors"}}"#
                }
                "model.safetensors.index.bf16.json" => {
                    r#"{"weight_map": {"a": "model.bf16-00001-of-00002.safetensors", "b": "second.safetensors"}}"#
                }
                _ => "",
            };
            fs::write(folder.path().join(file), text).unwrap();
        }
        find(folder.path(), stem)
    }

    fn chosen(files: &[&str], stem: Option<&str>) -> Vec<String> {
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        found(files, stem).unwrap().paths.iter().map(name).collect()
    }

    #[test]
    fn one_variant_is_read() {
        let both = ["unet.bf16.safetensors", "unet.fp16.safetensors", "unet.safetensors"];
        assert_eq!(chosen(&both, Some("unet")), ["unet.bf16.safetensors"]);
        assert_eq!(found(&both, None).unwrap().passed_over, ["unet.fp16.safetensors", "unet.safetensors"]);
        assert_eq!(chosen(&both[1..], None), ["unet.safetensors"]);
        assert_eq!(chosen(&["unet.fp16.safetensors"], Some("unet")), ["unet.fp16.safetensors"]);
        let shards =
            ["m-00001-of-00002.bf16.safetensors", "m.bf16-00002-of-00002.safetensors", "m.safetensors"];
        assert_eq!(chosen(&shards, None), shards[..2]);
        // Other weights than the stem's, unless it has none.
        assert_eq!(chosen(&["lora.safetensors", "unet.safetensors"], Some("unet")), ["unet.safetensors"]);
        assert_eq!(
            chosen(&["a.safetensors", "b.v2.safetensors"], Some("unet")),
            ["a.safetensors", "b.v2.safetensors"]
        );
    }

    #[test]
    fn an_index_goes_before_names_if_its_files_are_there() {
        let plain = ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model.safetensors"];
        assert_eq!(chosen(&plain, None), ["model-00001-of-00002.safetensors"]);
        let bf16 = [
            "model.safetensors.index.bf16.json",
            "model.bf16-00001-of-00002.safetensors",
            "second.safetensors",
        ];
        let all = [&plain[..], &bf16[..]].concat();
        assert_eq!(chosen(&all, None), bf16[1..]);
        assert_eq!(chosen(&all[..5], None), plain[1..2], "second.safetensors is absent");
        let error = found(&all[3..5], None).unwrap_err();
        assert!(matches!(&error, CheckpointError::Index { .. }), "{error}");
        assert!(error.to_string().contains("names second.safetensors, which is absent"), "{error}");
    }

    #[test]
    fn an_index_does_not_lead_out_of_its_folder() {
        for name in ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""] {
            let folder = tempfile::tempdir().unwrap();
            let index = serde_json::json!({ "weight_map": { "a": name } });
            fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
            let error = find(folder.path(), None).unwrap_err();
            assert!(error.to_string().contains("is not the name of a file beside it"), "{error}");
        }
    }

    #[test]
    fn pickled_weights_are_named() {
        let error = found(&["pytorch_model-00001-of-00015.bin", "config.json"], None).unwrap_err();
        assert!(matches!(&error, CheckpointError::Pickled { .. }), "{error}");
        assert!(error.to_string().contains("pytorch_model-00001-of-00015.bin"), "{error}");
        assert!(matches!(found(&["config.json"], None), Err(CheckpointError::NoWeights(_))));
    }
}
