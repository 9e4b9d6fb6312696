//! `emu2 convert IN OUT`: published weights, pickled or wide, to safetensors in bfloat16.
//!
//! | module | holds |
//! |---|---|
//! | `plan` | what is to be written |
//! | `source` | a file of weights, as tensors that are read piece by piece |
//! | `archive`, `pickle` | torch.save's zip file, and its pickle, of which no code is run |
//! | `shard` | writes one shard |
//! | `record` | what is finished, with checksums |
//! | `progress` | what happens, and how it is shown |
//!
//! Nothing is held but a piece of one tensor, so memory does not depend on the model. Each shard is written aside,
//! synced, renamed and recorded; whatever stops a conversion, the same command goes on at the first shard that is
//! not recorded.

use std::{
    fs::{self, File, TryLockError},
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use emu2_nn::checkpoint::{CheckpointError, ModelDir};
use indicatif::{DecimalBytes, HumanDuration};

use crate::args;

mod archive;
mod file;
mod pickle;
mod plan;
mod progress;
mod record;
mod shard;
mod source;
#[cfg(test)]
mod tests;

use plan::{Input, Plan};
use progress::{Event, Progress, Watch, shard_count};
use record::Record;

/// Bytes of the largest shard, unless a tensor alone has more: what a published 10 GB float32 shard becomes.
const SHARD_BYTES: u64 = 5_000_000_000;
/// Bytes that are left for what a file system needs for itself, for each file and once more for all.
const SLACK_BYTES: u64 = 64 << 10;

/// Converts published weights, or goes on with a conversion that was stopped.
///
/// # Errors
///
/// The source cannot be read or served, OUT holds something else, or has no room.
pub(crate) async fn convert(args: args::Convert) -> Result<()> {
    tokio::task::spawn_blocking(move || {
        let started = Instant::now();
        let mut progress = Progress::default();
        let conversion = Conversion { input: args.input, output: args.output, shard_bytes: SHARD_BYTES };
        let done = conversion.run(&mut |event| progress.show(event))?;
        let output = conversion.output.display();
        let (shards, bytes, took) =
            (shard_count(done.shards), DecimalBytes(done.bytes), HumanDuration(started.elapsed()));
        let kept = match done.kept {
            0 => String::new(),
            kept => format!(", {kept} of them verified from an earlier run"),
        };
        println!(
            "{output}: {shards}, {bytes}, in {took}{kept}; their blake3 sums are in {}",
            record::FINISHED
        );
        println!("next: emu2 inspect {output}");
        Ok(())
    })
    .await
    .context("the conversion panicked")?
}

/// What a conversion would read and write. Its files were opened, but their values were not read.
pub(crate) struct Outline {
    pub(crate) files: usize,
    pub(crate) tensors: Vec<TensorOutline>,
    pub(crate) written_bytes: u64,
}

/// A tensor of an outline.
pub(crate) struct TensorOutline {
    /// The tensor's name; in a diffusers folder, with the name of its part's folder in front.
    pub(crate) name: String,
    pub(crate) dtype: String,
    pub(crate) values: u64,
    pub(crate) bytes: u64,
}

/// Returns the outline of a conversion of a folder or file.
///
/// # Errors
///
/// It holds no weights, or weights that could not be converted.
pub(crate) fn outline(input: &Path) -> Result<Outline> {
    let input = Input::find(input)?;
    let plan = Plan::make(&input, Path::new(""), SHARD_BYTES)?;
    let tensors = plan.sources.iter().flat_map(|source| {
        let part = source.path.parent().filter(|folder| **folder != *input.folder).and_then(Path::file_name);
        let prefix = part.map(|part| format!("{}.", part.display())).unwrap_or_default();
        source.tensors.iter().map(move |(name, tensor)| TensorOutline {
            name: format!("{prefix}{name}"),
            dtype: format!("{:?}", tensor.dtype),
            values: tensor.values(),
            bytes: tensor.values()
                * source::width(tensor.dtype).expect("it was checked when it was opened") as u64,
        })
    });
    let (tensors, written_bytes) = (tensors.collect(), plan.weights_bytes());
    Ok(Outline { files: plan.sources.len(), tensors, written_bytes })
}

/// A conversion that is to be done.
#[derive(Debug)]
struct Conversion {
    input: PathBuf,
    output: PathBuf,
    shard_bytes: u64,
}

/// The sums of a conversion that was done.
#[derive(Debug, PartialEq)]
struct Summary {
    shards: usize,
    /// How many of the shards an earlier run had finished.
    kept: usize,
    bytes: u64,
}

impl Conversion {
    fn run(&self, watch: Watch<'_>) -> Result<Summary> {
        let (input, output) = self.resolve_paths()?;
        let _only_one = lock(&output)?;
        let plan = Plan::make(&input, &output, self.shard_bytes)?;
        let mut record = Record::open(&output, &plan.fingerprint)?;
        let bytes = plan.weights_bytes();
        watch(Event::Planned { shards: plan.shards.len(), bytes });
        let sound = verify(&output, &plan, &mut record, watch)?;
        check_space(&output, &plan, &sound)?;
        for (shard, _) in plan.shards.iter().zip(&sound).filter(|(_, sound)| !**sound) {
            watch(Event::Converting(&shard.path));
            let path = output.join(&shard.path);
            fs::create_dir_all(path.parent().expect("it is in OUT"))?;
            let source = &plan.sources[shard.source];
            shard::write(&path, shard, source, |bytes| watch(Event::Advanced(bytes)))
                .and_then(|finished| record.add(&output, &shard.path, finished))
                .map_err(|error| self.explain(error, record.count(), plan.shards.len()))?;
            watch(Event::Finished);
        }
        let rest = write_rest(&input.folder, &output, &plan).and_then(|()| record.close(&output));
        rest.map_err(|error| self.explain(error, plan.shards.len(), plan.shards.len()))?;
        let kept = sound.iter().filter(|sound| **sound).count();
        Ok(Summary { shards: plan.shards.len(), kept, bytes })
    }

    /// Returns what is read, and the folder that is written, which is created if it does not exist.
    fn resolve_paths(&self) -> Result<(Input, PathBuf)> {
        let input = Input::find(&self.input)?;
        refuse_foreign(&input)?;
        let shown = || self.output.display().to_string();
        fs::create_dir_all(&self.output).with_context(shown)?;
        let output = self.output.canonicalize().with_context(shown)?;
        ensure!(input.folder != output, "{}: IN and OUT are the same folder", shown());
        Ok((input, output))
    }

    /// Adds to the error of a full disk what stays there and how to go on.
    fn explain(&self, error: anyhow::Error, finished: usize, all: usize) -> anyhow::Error {
        let full = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>()).any(|error| {
            let full = [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::FileTooLarge];
            full.contains(&error.kind())
        });
        if !full {
            return error;
        }
        error.context(format!(
            "no space left in {}: {finished} of {} are finished and stay; make room and run the same command again",
            self.output.display(),
            shard_count(all)
        ))
    }
}

/// Refuses at once a folder of another model, which serving would refuse after hours of conversion. Whether pickles are
/// sound is not checked here.
fn refuse_foreign(input: &Input) -> Result<()> {
    match ModelDir::open(&input.folder) {
        Err(foreign @ CheckpointError::Foreign { .. }) if input.file.is_none() => Err(foreign.into()),
        _ => Ok(()),
    }
}

/// Locks a folder, because two conversions into it would overwrite each other's files. The lock is held until the file
/// is dropped.
fn lock(output: &Path) -> Result<File> {
    let shown = || output.display().to_string();
    let folder = File::open(output).with_context(shown)?;
    match folder.try_lock() {
        Ok(()) => Ok(folder),
        Err(TryLockError::WouldBlock) => bail!("another conversion writes to {}", shown()),
        // Some network file systems know no locks.
        Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => Ok(folder),
        Err(TryLockError::Error(error)) => Err(error).with_context(shown),
    }
}

/// Returns which shards are finished and sound. Removes files that an interrupted run left half-written.
fn verify(output: &Path, plan: &Plan, record: &mut Record, watch: Watch<'_>) -> Result<Vec<bool>> {
    let mut verified = Vec::new();
    for shard in &plan.shards {
        let path = output.join(&shard.path);
        record::remove(&record::partial_path(&path))?;
        let Some(finished) = record.finished(&shard.path) else {
            verified.push(false);
            continue;
        };
        watch(Event::Verifying(&shard.path));
        let sound = shard::is_sound(&path, finished, |bytes| watch(Event::Advanced(bytes)))?;
        if sound {
            watch(Event::Finished);
        } else {
            record::remove(&path)?;
            record.forget(&shard.path);
            watch(Event::Damaged(&shard.path));
        }
        verified.push(sound);
    }
    Ok(verified)
}

/// Refuses at once a conversion that would run out of space after hours.
fn check_space(output: &Path, plan: &Plan, sound: &[bool]) -> Result<()> {
    let left = plan.shards.iter().zip(sound).filter(|(_, sound)| !**sound);
    let left =
        left.fold(0, |sum: u64, (shard, _)| sum.saturating_add(shard.bytes).saturating_add(SLACK_BYTES));
    let needed = left.saturating_add(plan.copied_bytes).saturating_add(SLACK_BYTES);
    let free = rustix::fs::statvfs(output).with_context(|| output.display().to_string())?;
    let free = free.f_bavail.saturating_mul(free.f_frsize);
    ensure!(
        needed <= free,
        "{} needs {}, and {} are free there",
        output.display(),
        DecimalBytes(needed),
        DecimalBytes(free)
    );
    Ok(())
}

/// Writes indexes, and copies configurations and tokenizers.
fn write_rest(input: &Path, output: &Path, plan: &Plan) -> Result<()> {
    for (path, index) in &plan.indexes {
        let text = serde_json::to_string_pretty(index).expect("its keys are texts");
        record::write(&output.join(path), text.as_bytes())?;
    }
    for path in &plan.copied {
        let bytes = fs::read(input.join(path)).with_context(|| input.join(path).display().to_string())?;
        let copy = output.join(path);
        fs::create_dir_all(copy.parent().expect("it is in OUT"))?;
        record::write(&copy, &bytes)?;
    }
    Ok(())
}
