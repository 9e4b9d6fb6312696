//! One stage of training, as its file in `stages/` says.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use tch::{Device, Kind};

use crate::{data::Task, optimizer::OptimizerConfig};

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// The file's name without its ending; stages build on those whose names sort before.
    #[serde(skip)]
    pub name: String,
    /// Of the samples and of what is drawn for them.
    pub seed: u64,
    pub steps: u64,
    #[serde(default)]
    pub precision: Precision,
    /// How the names of the weights begin that are trained, and their share of the learning rate.
    pub train: BTreeMap<String, f64>,
    pub objective: ObjectiveConfig,
    pub optimizer: OptimizerConfig,
}

/// What a stage computes in. Its optimizer and its checkpoints keep float32 in either case, and so does what the next
/// stage begins with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum Precision {
    #[default]
    #[serde(rename = "float32")]
    Float32,
    /// On a GPU and on a processor with AVX512_BF16, where products take half the time; on other processors it is
    /// float32 after all.
    #[serde(rename = "bfloat16")]
    Bfloat16,
}

impl Precision {
    pub fn kind(self, device: Device) -> Kind {
        match self {
            // Without those instructions products take up to 70 times as long as in float32.
            Self::Bfloat16 if device != Device::Cpu || is_x86_feature_detected!("avx512bf16") => {
                Kind::BFloat16
            }
            Self::Float32 | Self::Bfloat16 => Kind::Float,
        }
    }
}

/// What is minimised; see [`crate::loss`]. `batch`: samples of a step.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ObjectiveConfig {
    Naming {
        batch: usize,
    },
    NextElement {
        /// One task a step, drawn by weight: sequences of one task are about as long as each other.
        tasks: Vec<TaskShare>,
        /// The texts alone, all of them learned: the language before the pictures.
        #[serde(default)]
        text_only: bool,
        /// Of the embeddings' error against the tokens' cross-entropy; the paper gives none.
        #[serde(default = "one")]
        regression_weight: f64,
        /// Of the steps, in which a picture's embeddings are learned from the prompt alone, without those before them.
        #[serde(default)]
        blind_share: f64,
        /// Of the steps, in which the model's own predictions stand in the place of those before.
        #[serde(default)]
        predicted_share: f64,
    },
    Autoencode {
        batch: usize,
        /// Of the latents' divergence from standard normal.
        divergence_weight: f64,
    },
    Denoise {
        batch: usize,
        /// Of noise for each picture: what it costs to encode it is paid once.
        #[serde(default = "once")]
        draws: usize,
        /// Of the pictures whose embeddings are dropped, for guidance.
        dropped_share: f64,
    },
    Illustrate {
        /// Whose documents end with a picture to paint, their only one.
        tasks: Vec<TaskShare>,
        #[serde(default = "once")]
        draws: usize,
        dropped_share: f64,
        /// Of the steps, in which the tower's embeddings are given instead of the llm's.
        truth_share: f64,
    },
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskShare {
    pub task: Task,
    pub weight: f64,
    pub batch: usize,
}

fn one() -> f64 {
    1.0
}

fn once() -> usize {
    1
}

impl Stage {
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.file_stem().and_then(|name| name.to_str()).context("a stage's file has no name")?;
        Self::parse(name, &text).with_context(|| format!("stage {}", path.display()))
    }

    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let stage = Self { name: name.to_owned(), ..toml::from_str(text)? };
        let problems = stage.problems();
        ensure!(problems.is_empty(), "{}", problems.join("; "));
        Ok(stage)
    }

    /// All stages of a folder, in order.
    pub fn read_all(folder: &Path) -> Result<Vec<Self>> {
        let files = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
        let mut paths = Vec::new();
        for file in files {
            let path = file?.path();
            if path.extension().is_some_and(|ending| ending == "toml") {
                paths.push(path);
            }
        }
        paths.sort();
        if paths.is_empty() {
            bail!("{} holds no stage", folder.display());
        }
        paths.iter().map(|path| Self::read(path)).collect()
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = self.optimizer.problems();
        let mut require = |holds: bool, problem: String| {
            if !holds {
                problems.push(problem);
            }
        };
        require(self.steps > 0, "steps must be at least 1, is 0".to_owned());
        require(!self.train.is_empty(), "train names no weights".to_owned());
        for (prefix, &share) in &self.train {
            require(share > 0.0, format!("train.`{prefix}` must be above 0, is {share}"));
        }
        let (mut batches, mut mixture) = (Vec::new(), None);
        let mut share = |name: &str, value: f64, max: f64| {
            require((0.0..=max).contains(&value), format!("{name} must be 0 to {max}, is {value}"));
        };
        match &self.objective {
            ObjectiveConfig::Naming { batch } => batches.push(*batch),
            ObjectiveConfig::NextElement {
                tasks, regression_weight, blind_share, predicted_share, ..
            } => {
                share("regression_weight", *regression_weight, 1e6);
                share("blind_share", *blind_share, 1.0);
                share("predicted_share", *predicted_share, 1.0 - blind_share);
                mixture = Some(tasks);
            }
            ObjectiveConfig::Autoencode { batch, divergence_weight } => {
                share("divergence_weight", *divergence_weight, 1e6);
                batches.push(*batch);
            }
            ObjectiveConfig::Denoise { batch, draws, dropped_share } => {
                share("dropped_share", *dropped_share, 1.0);
                batches.extend([*batch, *draws]);
            }
            ObjectiveConfig::Illustrate { tasks, draws, dropped_share, truth_share } => {
                share("dropped_share", *dropped_share, 1.0);
                share("truth_share", *truth_share, 1.0);
                batches.push(*draws);
                mixture = Some(tasks);
            }
        }
        if let Some(tasks) = mixture {
            batches.extend(tasks.iter().map(|share| share.batch));
            tasks.iter().for_each(|task| share("tasks.weight", task.weight, 1e6));
            let sum: f64 = tasks.iter().map(|share| share.weight).sum();
            require(sum > 0.0, format!("the weights of tasks must add up to more than 0, is {sum}"));
        }
        if let ObjectiveConfig::Illustrate { tasks, .. } = &self.objective {
            for task in tasks.iter().map(|share| share.task) {
                require(task.paints(), format!("{} is no task that always paints one picture", task.name()));
            }
        }
        for batch in batches {
            require((1..=65_536).contains(&batch), format!("batch must be 1 to 65536, is {batch}"));
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_stages_are_read_in_order() {
        let stages = Stage::read_all(&Path::new(env!("CARGO_MANIFEST_DIR")).join("stages")).unwrap();
        let names: Vec<_> = stages.iter().map(|stage| stage.name.as_str()).collect();
        assert!(names.starts_with(&["0-tower"]) && names.is_sorted(), "{names:?}");
    }

    #[test]
    fn every_mistake_is_told_with_its_value() {
        let text = r#"
            seed = 1
            steps = 0
            train = { "visual." = 0.0 }
            objective = { autoencode = { batch = 0, divergence_weight = -1.0 } }
            optimizer = { learning_rate = 0.0, warm_up_steps = 1, betas = [0.9, 1.0], clip = 1.0 }
        "#;
        let error = Stage::parse("bad", text).unwrap_err().to_string();
        for part in
            ["steps", "train.`visual.`", "batch must be 1 to 65536, is 0", "is -1", "learning_rate", "betas"]
        {
            assert!(error.contains(part), "{part} not in {error}");
        }
        let error = Stage::parse("bad", &text.replace("seed", "sead")).unwrap_err().to_string();
        assert!(error.contains("sead"), "{error}");
    }
}
