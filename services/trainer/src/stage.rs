//! One stage of training, as its file in `stages/` says.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use tch::{Device, Kind};

use crate::{
    objective::{
        autoencode::AutoencodeConfig, denoise::DenoiseConfig, illustrate::IllustrateConfig,
        naming::NamingConfig, next_element::NextElementConfig,
    },
    optimizer::OptimizerConfig,
};

/// One stage of training: what is trained, towards what, for how long.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// The name of its file without the ending; a stage builds on those whose names sort before its own.
    #[serde(skip)]
    pub name: String,
    /// The seed of the samples and of every random choice of a step.
    pub seed: u64,
    /// The number of optimizer steps.
    pub steps: u64,
    /// The type that forward and backward passes compute in.
    #[serde(default)]
    pub precision: Precision,
    /// The weights that are trained: prefixes of their names, each with its share of the learning rate.
    pub train: BTreeMap<String, f64>,
    /// What is minimised.
    pub objective: ObjectiveConfig,
    /// How the weights are moved.
    pub optimizer: OptimizerConfig,
}

/// The type that a stage computes in. Its optimizer and its checkpoints keep float32 in either case, and so does what
/// the next stage begins with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum Precision {
    /// 32-bit floating point.
    #[default]
    #[serde(rename = "float32")]
    Float32,
    /// bfloat16 on a GPU and on a processor with AVX512_BF16, where products take half the time; float32 on other
    /// processors.
    #[serde(rename = "bfloat16")]
    Bfloat16,
}

impl Precision {
    /// Returns the type that is computed in on a device.
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

/// Section `[objective.NAME]` of a stage: what is minimised, and over which samples.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ObjectiveConfig {
    /// Trains the tower to name what stands where.
    Naming(NamingConfig),
    /// Trains the llm, and whatever else is named, to predict the next token or embedding.
    NextElement(NextElementConfig),
    /// Trains the VAE to encode images and decode them again.
    Autoencode(AutoencodeConfig),
    /// Trains the UNet to denoise latents, given the tower's embeddings.
    Denoise(DenoiseConfig),
    /// Trains the UNet to denoise latents, given the llm's predictions.
    Illustrate(IllustrateConfig),
}

impl ObjectiveConfig {
    fn problems(&self) -> Vec<String> {
        match self {
            Self::Naming(config) => config.problems(),
            Self::NextElement(config) => config.problems(),
            Self::Autoencode(config) => config.problems(),
            Self::Denoise(config) => config.problems(),
            Self::Illustrate(config) => config.problems(),
        }
    }
}

impl Stage {
    /// Reads a stage from its TOML file.
    ///
    /// # Errors
    /// When the file cannot be read or [`Self::parse`] refuses it.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.file_stem().and_then(|name| name.to_str()).context("a stage's file has no name")?;
        Self::parse(name, &text).with_context(|| format!("stage {}", path.display()))
    }

    /// Parses a stage from TOML.
    ///
    /// # Errors
    /// When a key is unknown or missing, or values are out of range: every mistake is told with its value.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let stage = Self { name: name.to_owned(), ..toml::from_str(text)? };
        let problems = stage.problems();
        ensure!(problems.is_empty(), "{}", problems.join("; "));
        Ok(stage)
    }

    /// Reads every `.toml` file of a folder, in the order of their names.
    ///
    /// # Errors
    /// When the folder holds no stage, or one is refused.
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
        problems.extend(self.objective.problems());
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
            objective = { autoencode = { batch = 0, kl_weight = -1.0 } }
            optimizer = { learning_rate = 0.0, warm_up_steps = 1, betas = [0.9, 1.0], clip = 1.0 }
        "#;
        let error = Stage::parse("bad", text).unwrap_err().to_string();
        for part in
            ["steps", "train.`visual.`", "batch must be 1 to 65536, is 0", "is -1", "learning_rate", "betas"]
        {
            assert!(error.contains(part), "{part} not in {error}");
        }
        for (key, misspelt) in [("seed", "sead"), ("kl_weight", "kl_wait")] {
            let error = Stage::parse("bad", &text.replace(key, misspelt)).unwrap_err().to_string();
            assert!(error.contains(misspelt), "{error}");
        }
    }
}
