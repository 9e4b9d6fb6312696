//! How training goes: JSON lines in `metrics.jsonl`, the curve in `loss.png`, and a bar or lines for who watches.

mod plot;

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use crate::{checkpoint::Progress, stage::Stage};

/// Steps that a line is the mean of.
const EVERY: u64 = 20;

/// What one step of training measured.
#[derive(Debug)]
pub struct StepMetrics {
    /// The parts of the loss and accuracies, by name.
    pub parts: Vec<(&'static str, f64)>,
    /// The loss that was minimised.
    pub loss: f64,
    /// The norm of all gradients together, before clipping.
    pub gradient_norm: f64,
    /// The learning rate of weights whose share is 1.
    pub learning_rate: f64,
}

/// One line of the log: means over the steps since the one before.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Line {
    steps: u64,
    samples: u64,
    loss: f64,
    /// What the loss is made of, and accuracies.
    parts: BTreeMap<String, f64>,
    gradient_norm: f64,
    learning_rate: f64,
    samples_per_second: f64,
    /// Share of the time that training waited for data.
    waited_share: f64,
}

/// Sums of the steps since the last line.
#[derive(Debug, Default)]
struct Sums {
    steps: u64,
    loss: f64,
    /// A part that only some steps have counts by itself.
    parts: BTreeMap<&'static str, (f64, u64)>,
    gradient_norm: f64,
    waited: Duration,
}

/// The log of a stage.
#[derive(Debug)]
pub struct Log {
    name: String,
    file: File,
    plot: PathBuf,
    lines: Vec<Line>,
    sums: Sums,
    since: Instant,
    samples: u64,
    steps_max: u64,
    bar: Option<ProgressBar>,
}

impl Log {
    /// Opens the log in the stage's folder. Lines of steps after `progress` are dropped: they are made again. `bar`:
    /// whether a person watches.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn open(folder: &Path, stage: &Stage, progress: Progress, bar: bool) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let path = folder.join("metrics.jsonl");
        let mut lines = read(&path)?;
        lines.retain(|line| line.steps <= progress.steps);
        let mut file = OpenOptions::new().create(true).write(true).truncate(true).open(&path)?;
        for line in &lines {
            writeln!(file, "{}", serde_json::to_string(line)?)?;
        }
        let bar = bar.then(|| {
            let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {msg}, {eta} left");
            let style = style.expect("the template is well formed");
            let bar = ProgressBar::new(stage.steps).with_style(style).with_prefix(stage.name.clone());
            bar.with_position(progress.steps)
        });
        Ok(Self {
            name: stage.name.clone(),
            file,
            plot: folder.join("loss.png"),
            lines,
            sums: Sums::default(),
            since: Instant::now(),
            samples: progress.samples,
            steps_max: stage.steps,
            bar,
        })
    }

    /// Counts a step; writes a line when enough of them have come together. `waited`: time spent waiting for the batch.
    ///
    /// # Errors
    /// When the line cannot be written.
    pub fn step(&mut self, progress: Progress, step: &StepMetrics, waited: Duration) -> Result<()> {
        let sums = &mut self.sums;
        sums.steps += 1;
        sums.loss += step.loss;
        sums.gradient_norm += step.gradient_norm;
        sums.waited += waited;
        for (name, value) in &step.parts {
            let (sum, count) = sums.parts.entry(name).or_default();
            *sum += value;
            *count += 1;
        }
        if let Some(bar) = &self.bar {
            bar.set_position(progress.steps);
        }
        if progress.steps.is_multiple_of(EVERY) || progress.steps == self.steps_max {
            self.line(progress, step.learning_rate)?;
        }
        Ok(())
    }

    fn line(&mut self, progress: Progress, learning_rate: f64) -> Result<()> {
        let sums = std::mem::take(&mut self.sums);
        let (steps, seconds) = (sums.steps as f64, self.since.elapsed().as_secs_f64());
        let parts = sums.parts.into_iter().map(|(name, (sum, count))| (name.to_owned(), sum / count as f64));
        let line = Line {
            steps: progress.steps,
            samples: progress.samples,
            loss: sums.loss / steps,
            parts: parts.collect(),
            gradient_norm: sums.gradient_norm / steps,
            learning_rate,
            samples_per_second: (progress.samples - self.samples) as f64 / seconds,
            waited_share: sums.waited.as_secs_f64() / seconds,
        };
        writeln!(self.file, "{}", serde_json::to_string(&line)?)?;
        self.tell(&line, seconds / steps);
        self.lines.push(line);
        (self.since, self.samples) = (Instant::now(), progress.samples);
        Ok(())
    }

    fn tell(&self, line: &Line, step_seconds: f64) {
        let parts: Vec<_> = line.parts.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        let text =
            format!("loss {:.4} ({}), {:.0} samples/s", line.loss, parts.join(", "), line.samples_per_second);
        match &self.bar {
            Some(bar) => bar.set_message(text),
            None => {
                let left = (self.steps_max - line.steps) as f64 * step_seconds / 60.0;
                println!("{} {}/{}: {text}, {left:.1} min left", self.name, line.steps, self.steps_max);
            }
        }
    }

    /// Draws the curve of the loss anew.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn plot(&self) -> Result<()> {
        let points: Vec<_> = self.lines.iter().map(|line| (line.samples as f64, line.loss)).collect();
        plot::draw(&self.plot, &self.name, &points)
    }
}

/// What an earlier turn logged. A line that was cut off by a crash ends it.
fn read(path: &Path) -> Result<Vec<Line>> {
    let Ok(file) = File::open(path) else { return Ok(Vec::new()) };
    let mut lines = Vec::new();
    for line in BufReader::new(file).lines() {
        match serde_json::from_str(&line?) {
            Ok(line) => lines.push(line),
            Err(_) => break,
        }
    }
    Ok(lines)
}
