//! Which shards are finished, and their checksums: kept in OUT while a conversion runs, so that a later one goes on
//! from there, and under another name when it is complete, so that anyone can check what was copied on.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

pub(super) const UNFINISHED: &str = ".emu2-convert.json";
pub(super) const FINISHED: &str = "checksums.json";
/// The extension that is added to the name of a file while it is written.
const PARTIAL_EXTENSION: &str = "part";
/// Bytes that a record may have; a shard takes 150.
const MAX_BYTES: u64 = 16 << 20;

/// The finished shards of a conversion, with their checksums.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    /// The fingerprint of the source files and of how they are cut into shards.
    source: String,
    /// The finished shards by their path in OUT.
    shards: BTreeMap<PathBuf, Finished>,
}

/// The length and checksum of a finished shard.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Finished {
    pub(super) bytes: u64,
    pub(super) blake3: String,
}

impl Record {
    /// Opens the record of an earlier run on the same source, or begins a new one in an empty folder.
    pub(super) fn open(output: &Path, source: &str) -> Result<Self> {
        for name in [UNFINISHED, FINISHED] {
            let path = output.join(name);
            let shown = || path.display().to_string();
            let bytes = match fs::metadata(&path) {
                Ok(metadata) => metadata.len(),
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error).with_context(shown),
            };
            ensure!(bytes <= MAX_BYTES, "{}: must have at most {MAX_BYTES} bytes, has {bytes}", shown());
            let bytes = fs::read(&path).with_context(shown)?;
            let record: Self = serde_json::from_slice(&bytes)
                .with_context(|| format!("{} is no record of a conversion", shown()))?;
            ensure!(
                record.source == source,
                "{} was begun from other files; convert to another folder, or empty this one",
                output.display()
            );
            return Ok(record);
        }
        let record = Self { source: source.to_owned(), shards: BTreeMap::new() };
        for entry in fs::read_dir(output).with_context(|| output.display().to_string())? {
            let name = entry?.file_name();
            // A file system of its own has one.
            if name != "lost+found" {
                bail!(
                    "{} is neither empty nor an earlier conversion: it holds {}",
                    output.display(),
                    name.display()
                );
            }
        }
        record.save(output)?;
        Ok(record)
    }

    pub(super) fn finished(&self, shard: &Path) -> Option<&Finished> {
        self.shards.get(shard)
    }

    pub(super) fn count(&self) -> usize {
        self.shards.len()
    }

    /// Removes a finished shard that turned out to be damaged.
    pub(super) fn forget(&mut self, shard: &Path) {
        self.shards.remove(shard);
    }

    pub(super) fn add(&mut self, output: &Path, shard: &Path, finished: Finished) -> Result<()> {
        self.shards.insert(shard.to_owned(), finished);
        self.save(output)
    }

    /// Marks the conversion as complete by giving the record its final name.
    pub(super) fn close(&self, output: &Path) -> Result<()> {
        self.save(output)?;
        fs::rename(output.join(UNFINISHED), output.join(FINISHED))?;
        sync_folder(output)
    }

    fn save(&self, output: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).expect("its keys are texts");
        write(&output.join(UNFINISHED), text.as_bytes())
    }
}

/// Writes a file atomically: after a crash or a power failure all of it is there, or none.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |file| Ok(file.write_all(bytes)?))
}

/// Writes a file as [`write()`] does, with the contents that `fill` writes.
pub(super) fn write_with<T>(path: &Path, fill: impl FnOnce(&mut File) -> Result<T>) -> Result<T> {
    let partial = partial_path(path);
    let fill = || -> Result<T> {
        remove(&partial)?;
        // Never through a link that someone put there.
        let mut file = File::create_new(&partial)?;
        let filled = fill(&mut file)?;
        file.sync_all()?;
        fs::rename(&partial, path)?;
        sync_folder(path.parent().expect("a file is in a folder"))?;
        Ok(filled)
    };
    fill().with_context(|| path.display().to_string())
}

/// Returns the path where a file is written until it is complete.
pub(super) fn partial_path(path: &Path) -> PathBuf {
    path.with_added_extension(PARTIAL_EXTENSION)
}

/// Removes a file if it exists.
pub(super) fn remove(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_folder(folder: &Path) -> Result<()> {
    Ok(File::open(folder)?.sync_all()?)
}
