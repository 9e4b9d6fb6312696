//! A stage at work: batches from the loader, steps, checkpoints, the log; until its steps are done, its time is up or
//! a signal comes.

#[cfg(test)]
mod tests;

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use emu2_serve::shutdown::Shutdown;

use crate::{
    checkpoint::{self, Progress},
    data::Loader,
    log::{Log, StepMetrics},
    model::Model,
    objective::interface::{Batch, Objective},
    optimizer::AdamW,
    stage::Stage,
};

/// Batches that each of the loader's threads keeps ready.
const AHEAD: usize = 4;
/// Time between checkpoints.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(60);

/// Where and how long to train.
#[derive(Clone, Debug)]
pub struct Run {
    /// A folder with one folder for each stage.
    pub runs: PathBuf,
    /// How far the model has come in the stage where there is no checkpoint.
    pub before: Progress,
    /// Threads that make batches.
    pub loader_threads: usize,
    /// When a stage is interrupted, to be resumed.
    pub deadline: Option<Instant>,
    /// Interrupts a stage, to be resumed, once it begins.
    pub shutdown: Shutdown,
    /// Whether a person watches: a bar, instead of lines.
    pub bar: bool,
}

/// Whether a stage has taken all of its steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StageOutcome {
    /// The stage has taken its last step.
    Finished,
    /// Its deadline or a signal came before that; its checkpoint is saved.
    Interrupted,
}

impl Run {
    /// Returns the path of a stage's checkpoint.
    pub fn checkpoint(&self, stage: &str) -> PathBuf {
        checkpoint::path(&self.runs, stage)
    }
}

/// Trains a stage from its last checkpoint, or from the model as it is, to its end or until it is interrupted.
///
/// # Errors
/// When another process trains the stage, its checkpoint is of another model, or a file cannot be written.
pub fn train<O: Objective>(stage: &Stage, model: &Model, objective: &O, run: &Run) -> Result<StageOutcome> {
    let folder = run.runs.join(&stage.name);
    let _lock = lock(&folder)?;
    let checkpoint = run.checkpoint(&stage.name);
    let mut state = State::begin(stage, model, objective, (&checkpoint, run.before))?;
    let mut log = Log::open(&folder, stage, state.progress, run.bar)?;
    let mut batches = Loader::start(run.loader_threads, AHEAD, state.progress.steps, objective.batch_fn());
    let mut saved = Instant::now();
    while state.progress.steps < stage.steps {
        let timed_out = run.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        if timed_out || run.shutdown.is_begun() {
            state.save()?;
            log.plot()?;
            return Ok(StageOutcome::Interrupted);
        }
        let started = Instant::now();
        let batch = batches.next().context("a thread that makes batches has failed")?;
        let waited = started.elapsed();
        let step = state.step(stage, model, objective, &batch);
        state.progress.milliseconds += started.elapsed().as_millis() as u64;
        log.step(state.progress, &step, waited)?;
        if saved.elapsed() >= CHECKPOINT_EVERY {
            state.save()?;
            log.plot()?;
            saved = Instant::now();
        }
    }
    state.save()?;
    log.plot()?;
    Ok(StageOutcome::Finished)
}

/// Held while a stage is trained: two processes would overwrite each other's checkpoints.
fn lock(folder: &Path) -> Result<File> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let file =
        File::create(folder.join("lock")).with_context(|| format!("cannot use {}", folder.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!("another process trains in {}", folder.display()),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", folder.display()))
        }
    }
}

struct State<'a> {
    checkpoint: &'a Path,
    optimizer: AdamW,
    progress: Progress,
}

impl<'a> State<'a> {
    fn begin<O: Objective>(
        stage: &Stage,
        model: &Model,
        objective: &O,
        (checkpoint, before): (&'a Path, Progress),
    ) -> Result<Self> {
        let prefixes: Vec<String> = stage.train.keys().cloned().collect();
        let mut trained = model.train(&prefixes)?;
        let share = |name: &str| {
            let of = stage.train.iter().filter(|(prefix, _)| name.starts_with(prefix.as_str()));
            // The longest prefix says it best; heads have the full rate.
            of.max_by_key(|(prefix, _)| prefix.len()).map_or(1.0, |(_, &share)| share)
        };
        trained.extend(objective.variables());
        let variables = trained.into_iter().map(|(name, tensor)| {
            let share = share(&name);
            (name, (tensor, share))
        });
        let mut optimizer = AdamW::new(stage.optimizer.clone(), variables.collect());
        optimizer.set_master_weights(model.master_weights())?;
        let mut progress = before;
        if checkpoint.exists() {
            progress = checkpoint::resume(checkpoint, &mut optimizer)
                .with_context(|| format!("cannot go on from {}", checkpoint.display()))?;
        }
        Ok(Self { checkpoint, optimizer, progress })
    }

    fn step<O: Objective>(
        &mut self,
        stage: &Stage,
        model: &Model,
        objective: &O,
        batch: &O::Batch,
    ) -> StepMetrics {
        let step = self.progress.steps;
        let learning_rate = stage.optimizer.rate(step, stage.steps, self.progress.restarted);
        let loss = objective.loss(model, batch, step);
        loss.total.backward();
        let gradient_norm = self.optimizer.step(learning_rate);
        self.progress.steps += 1;
        self.progress.samples += batch.samples() as u64;
        StepMetrics {
            loss: loss.total.double_value(&[]),
            parts: loss.parts.iter().map(|(name, value)| (*name, value.double_value(&[]))).collect(),
            gradient_norm,
            learning_rate,
        }
    }

    fn save(&self) -> Result<()> {
        checkpoint::save(self.checkpoint, &self.optimizer, self.progress)
    }
}
