//! What a stage has come to, in one file that is replaced whole: a crash leaves the last one.
//!
//! Its tensors: `weights.` and the trained variables' names, in float32; `optimizer.` and the optimizer's state; and
//! `progress`.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use tch::Tensor;

use crate::{model::Model, optimizer::AdamW};

const WEIGHTS: &str = "weights.";
const OPTIMIZER: &str = "optimizer.";
const PROGRESS: &str = "progress";
/// The prefix of a running average among the optimizer's state.
const AVERAGE: &str = "optimizer.average.";

/// How far a stage has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Steps that have been taken.
    pub steps: u64,
    /// Samples that these steps were taken on.
    pub samples: u64,
    /// Time that these steps took, in milliseconds.
    pub milliseconds: u64,
    /// The step at which the optimizer last began without its state.
    pub restarted: u64,
}

/// Returns the path of a stage's checkpoint among the runs.
pub fn path(runs: &Path, stage: &str) -> PathBuf {
    runs.join(stage).join("checkpoint.safetensors")
}

/// Writes the optimizer's weights, heads included, its state and the progress.
///
/// # Errors
/// When the file cannot be written; the one before it stays.
pub fn save(path: &Path, optimizer: &AdamW, progress: Progress) -> Result<()> {
    let Progress { steps, samples, milliseconds, restarted } = progress;
    let progress = [steps, samples, milliseconds, restarted].map(|value| value as i64);
    let mut tensors = vec![(PROGRESS.to_owned(), Tensor::from_slice(&progress))];
    tensors.extend(
        optimizer.weights().map(|(name, tensor)| (format!("{WEIGHTS}{name}"), tensor.shallow_clone())),
    );
    tensors
        .extend(optimizer.state().into_iter().map(|(name, tensor)| (format!("{OPTIMIZER}{name}"), tensor)));
    write(path, &tensors)
}

/// Writes tensors by name to a safetensors file, aside first: a reader finds the old file or the new one, whole.
///
/// # Errors
/// When the file cannot be written.
pub fn write(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let aside = path.with_extension("new");
    Tensor::write_safetensors(tensors, &aside)
        .with_context(|| format!("cannot write {}", aside.display()))?;
    fs::rename(&aside, path).with_context(|| format!("cannot write {}", path.display()))
}

/// Reads the tensors of a safetensors file by name.
///
/// # Errors
/// When the file cannot be read.
pub fn read(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let tensors =
        Tensor::read_safetensors(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(tensors.into_iter().collect())
}

/// Reads how far the stage of a checkpoint is.
///
/// # Errors
/// When the file cannot be read or is no checkpoint.
pub fn progress_in(path: &Path) -> Result<Progress> {
    progress(&read(path)?)
}

/// Restores the optimizer and its variables from a checkpoint, and returns how far the stage is.
///
/// # Errors
/// When the file is no checkpoint of these variables.
pub fn resume(path: &Path, optimizer: &mut AdamW) -> Result<Progress> {
    let tensors = read(path)?;
    optimizer.restore(&under(&tensors, WEIGHTS), &under(&tensors, OPTIMIZER))?;
    progress(&tensors)
}

/// Restores a model from what a finished stage hands on: its weights, or their running averages where it keeps them.
/// Returns how far the stage is.
///
/// # Errors
/// When the file is no checkpoint of this model.
pub fn restore_model(path: &Path, model: &Model) -> Result<Progress> {
    let tensors = read(path)?;
    let mut weights = under(&tensors, WEIGHTS);
    weights.extend(under(&tensors, AVERAGE));
    let of_model = weights.iter().filter(|(name, _)| !name.starts_with("heads."));
    model.restore(of_model.map(|(name, tensor)| (name.as_str(), tensor)))?;
    progress(&tensors)
}

fn progress(tensors: &BTreeMap<String, Tensor>) -> Result<Progress> {
    let values = tensors.get(PROGRESS).map(Vec::<i64>::try_from).transpose()?.unwrap_or_default();
    ensure!(values.len() == 4, "`{PROGRESS}` must be 4 numbers, got {}", values.len());
    let [steps, samples, milliseconds, restarted] = [0, 1, 2, 3].map(|index| values[index] as u64);
    Ok(Progress { steps, samples, milliseconds, restarted })
}

fn under(tensors: &BTreeMap<String, Tensor>, prefix: &str) -> BTreeMap<String, Tensor> {
    let named = tensors.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?, tensor)));
    named.map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone())).collect()
}
