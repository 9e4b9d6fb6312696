//! Opens a folder: maps its weights files and translates their names.

use std::{
    cell::RefCell,
    collections::{BTreeMap, btree_map},
    path::Path,
};

use super::{
    CheckpointError, ModelDir, Part, Progress, Reading, Source,
    files::{self, WeightFiles},
    layout::{self, Component},
    mapped::{Entry, Files, Mapped},
    names::{canonical, is_known_extra},
};

/// The table whose rows are the vocabulary.
const EMBEDDING: &str = "decoder.lm.model.embed_tokens.weight";
/// How many names of a foreign file its error cites.
const CITED_NAMES: usize = 3;

/// What has been found so far.
#[derive(Default)]
struct Opening {
    files: Vec<Mapped>,
    entries: BTreeMap<(Part, String), Entry>,
    unknown: Vec<String>,
    passed_over: Vec<String>,
}

impl ModelDir {
    pub(super) fn of_folder(path: &Path, progress: Progress) -> Result<Self, CheckpointError> {
        let found = layout::recognise(path)?;
        let mut opening = Opening::default();
        for component in &found.components {
            opening.add(component)?;
        }
        if opening.entries.is_empty() {
            return Err(foreign(path, &opening.unknown));
        }
        let vocabulary = || Some(*opening.entries.get(&(Part::Llm, EMBEDDING.to_owned()))?.shape.first()?);
        let published = found.config.is_none();
        let dir = Self {
            path: path.to_owned(),
            layout: found.layout,
            config: found.config.unwrap_or_else(|| layout::published(vocabulary())),
            tokenizer: Some(found.tokenizer.join("tokenizer.model")),
            source: Source::Files(Files(opening.files)),
            entries: opening.entries,
            unknown: opening.unknown,
            reading: Reading::default(),
            progress,
            expected: RefCell::default(),
        };
        dir.tell(published, &opening.passed_over);
        Ok(dir)
    }

    fn tell(&self, published_sizes: bool, passed_over: &[String]) {
        let parts: Vec<_> = self.contents().iter().map(|contents| contents.part.to_string()).collect();
        tracing::info!(
            path = %self.path.display(),
            layout = %self.layout,
            model = self.name(),
            instruct = self.instruct(),
            parts = parts.join(" "),
            published_sizes,
            passed_over = passed_over.join(" "),
            "model recognised"
        );
    }
}

impl Opening {
    fn add(&mut self, component: &Component) -> Result<(), CheckpointError> {
        let weights = files::find(&component.folder, component.stem)?;
        let mut opened = Vec::new();
        for path in &weights.paths {
            opened.push(Mapped::open(path, self.files.len() + opened.len())?);
        }
        let names = |(_, entries): &(Mapped, Vec<(String, Entry)>)| -> Vec<String> {
            entries.iter().map(|(name, _)| name.clone()).collect()
        };
        weights.check(&opened.iter().map(names).collect::<Vec<_>>())?;
        let WeightFiles { paths, passed_over, .. } = weights;
        for (path, (file, entries)) in paths.iter().zip(opened) {
            self.files.push(file);
            for (name, entry) in entries {
                self.name(path, component.prefix.to_owned() + &name, entry)?;
            }
        }
        self.passed_over.extend(passed_over);
        Ok(())
    }

    fn name(&mut self, path: &Path, name: String, entry: Entry) -> Result<(), CheckpointError> {
        if is_known_extra(&name) {
            return Ok(());
        }
        match canonical(&name).map(|key| self.entries.entry(key)) {
            None => self.unknown.push(name),
            Some(btree_map::Entry::Vacant(place)) => {
                place.insert(entry);
            }
            Some(btree_map::Entry::Occupied(_)) => {
                return Err(CheckpointError::Duplicate { path: path.to_owned(), name });
            }
        }
        Ok(())
    }
}

/// Weights, none of them Emu2's.
fn foreign(path: &Path, names: &[String]) -> CheckpointError {
    if names.is_empty() {
        return CheckpointError::NoWeights(path.to_owned());
    }
    let cited: Vec<_> = names.iter().take(CITED_NAMES).map(|name| format!("`{name}`")).collect();
    let family = format!("a model with weights such as {}", cited.join(", "));
    CheckpointError::Foreign { path: path.to_owned(), family }
}
