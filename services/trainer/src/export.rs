//! What has been trained, as a model folder that the services load: a native checkpoint in bfloat16.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{
    checkpoint::{self, Progress},
    model::{Model, Sections},
    stage::Stage,
};

/// The file beside an exported model that says how far each stage has come.
const REPORT: &str = "training.json";

#[derive(Debug, Default, Serialize, Deserialize)]
struct Report {
    stages: BTreeMap<String, Trained>,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Trained {
    steps: u64,
    steps_planned: u64,
    samples: u64,
    minutes: f64,
}

impl Trained {
    fn and(self, other: &Self) -> Self {
        Self {
            steps: self.steps + other.steps,
            steps_planned: self.steps_planned + other.steps_planned,
            samples: self.samples + other.samples,
            minutes: self.minutes + other.minutes,
        }
    }
}

/// The checkpoints of a run, over those of the model that it began with.
#[derive(Clone, Debug)]
pub struct Source {
    /// The folder of runs.
    pub runs: PathBuf,
    /// The exported model that the runs began with, in place of random weights.
    pub base: Option<PathBuf>,
}

impl Source {
    /// Returns the model that a stage begins with: the weights of those of `stages` that have been trained, each over
    /// those before.
    ///
    /// # Errors
    /// When a checkpoint or the base does not fit the model.
    pub fn model(
        &self,
        sections: &Sections,
        stages: &[Stage],
        seed: u64,
        (device, kind): (Device, Kind),
    ) -> Result<Model> {
        let model = match &self.base {
            Some(base) => Model::open(base, device)?,
            None => Model::new(sections, seed, device)?,
        };
        self.replay(&model, stages)?;
        model.computing_in(kind)
    }

    /// Returns how far a stage was when the base was exported: it goes on from there, with an optimizer that begins
    /// anew.
    ///
    /// # Errors
    /// When the base does not say.
    pub fn before(&self, stage: &str) -> Result<Progress> {
        let Some(trained) = self.report()?.stages.get(stage).copied() else { return Ok(Progress::default()) };
        let milliseconds = (trained.minutes * 60_000.0) as u64;
        let Trained { steps, samples, .. } = trained;
        Ok(Progress { steps, samples, milliseconds, restarted: steps })
    }

    /// Returns a table of how long stages took, all their turns together.
    ///
    /// # Errors
    /// When a stage has no checkpoint.
    pub fn times<'a>(&self, stages: impl Iterator<Item = &'a Stage>) -> Result<String> {
        let mut rows = Vec::new();
        for stage in stages {
            let path = checkpoint::path(&self.runs, &stage.name);
            rows.push((stage.name.as_str(), trained(stage, &checkpoint::progress_in(&path)?)));
        }
        let together = rows.iter().fold(Trained::default(), |sum, (_, stage)| sum.and(stage));
        rows.push(("together", together));
        let row = |(name, Trained { steps, samples, minutes, .. })| {
            format!("{name:>16} {steps:>6} steps {samples:>8} samples {minutes:>7.1} minutes\n")
        };
        Ok(rows.into_iter().map(row).collect())
    }

    /// Reads the base's report; an empty one without a base.
    fn report(&self) -> Result<Report> {
        let Some(base) = &self.base else { return Ok(Report::default()) };
        let path = base.join(REPORT);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is not understood", path.display()))
    }

    /// Restores the model from the stages that have been trained, and returns how far each of them is.
    fn replay(&self, model: &Model, stages: &[Stage]) -> Result<BTreeMap<String, Progress>> {
        let mut done = BTreeMap::new();
        for stage in stages {
            let path = checkpoint::path(&self.runs, &stage.name);
            if path.exists() {
                let progress = checkpoint::restore_model(&path, model)
                    .with_context(|| format!("{} does not fit this model", path.display()))?;
                done.insert(stage.name.clone(), progress);
            }
        }
        Ok(done)
    }
}

/// Writes config.json, model.safetensors, tokenizer.model and training.json to the folder `out`.
///
/// # Errors
/// When no stage has been trained, or a file cannot be read or written.
pub fn export(
    source: &Source,
    sections: &Sections,
    stages: &[Stage],
    tokenizer: &Path,
    out: &Path,
) -> Result<()> {
    let model = source.model(sections, &[], 0, (Device::Cpu, Kind::Float))?;
    let done = source.replay(&model, stages)?;
    ensure!(!done.is_empty(), "{} holds no trained stage", source.runs.display());
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let narrow = |(name, tensor): (String, Tensor)| (name, tensor.detach().to_kind(Kind::BFloat16));
    let tensors: Vec<_> = model.variables().into_iter().map(narrow).collect();
    checkpoint::write(&out.join("model.safetensors"), &tensors)?;
    let write = |name: &str, text: String| {
        let path = out.join(name);
        fs::write(&path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    };
    write("config.json", serde_json::to_string_pretty(sections)?)?;
    let mut report = source.report()?;
    let trained =
        stages.iter().filter_map(|stage| Some((stage.name.clone(), trained(stage, done.get(&stage.name)?))));
    report.stages.extend(trained);
    write(REPORT, serde_json::to_string_pretty(&report)?)?;
    let copy = out.join("tokenizer.model");
    if tokenizer != copy {
        fs::copy(tokenizer, &copy).with_context(|| format!("cannot copy {}", tokenizer.display()))?;
    }
    Ok(())
}

fn trained(stage: &Stage, progress: &Progress) -> Trained {
    let minutes = (progress.milliseconds as f64 / 6000.0).round() / 10.0;
    Trained { steps: progress.steps, steps_planned: stage.steps, samples: progress.samples, minutes }
}

#[cfg(test)]
mod tests {
    use emu2_decoder::denoise::DiffusionPipeline;
    use emu2_encoder::eva_vit::EvaVit;
    use emu2_llm::{load::ModelConfig, tokenizer::Tokenizer};
    use emu2_nn::checkpoint::{Layout, ModelDir};
    use serde_json::json;

    use super::*;
    use crate::{
        model::nano,
        optimizer::{AdamW, OptimizerConfig},
    };

    fn stage(name: &str) -> Stage {
        let text = "seed = 1\nsteps = 10\ntrain = { \"visual.\" = 1.0 }\nobjective = { naming = { batch = 1 } }\n\
                    [optimizer]\nlearning_rate = 1e-3\nwarm_up_steps = 1\nbetas = [0.9, 0.95]\nclip = 1.0";
        Stage::parse(name, text).unwrap()
    }

    /// Writes a checkpoint as if a stage had set all of a part to one value.
    fn trained(source: &Source, sections: &Sections, stage: &Stage, value: f64) {
        let model = Model::new(sections, 0, Device::Cpu).unwrap();
        let variables = model.train(&["visual.".to_owned()]).unwrap().into_iter().map(|(name, tensor)| {
            let _ = tch::no_grad(|| tensor.shallow_clone().fill_(value));
            (name, (tensor, 1.0))
        });
        let optimizer = AdamW::new(OptimizerConfig::clone(&stage.optimizer), variables.collect());
        let progress = Progress { steps: 7, samples: 70, milliseconds: 90_000, restarted: 0 };
        let path = checkpoint::path(&source.runs, &stage.name);
        checkpoint::save(&path, &optimizer, progress).unwrap();
    }

    #[test]
    fn an_export_is_a_native_folder_of_the_last_stages_weights() {
        let folder = tempfile::tempdir().unwrap();
        let (tokenizer, out) = (folder.path().join("tokenizer.model"), folder.path().join("nano"));
        fs::write(&tokenizer, "pieces").unwrap();
        let source = Source { runs: folder.path().join("runs"), base: None };
        let (sections, stages) = (nano(), [stage("0-a"), stage("1-b"), stage("2-never")]);
        let error = export(&source, &sections, &stages, &tokenizer, &out).unwrap_err().to_string();
        assert!(error.contains("no trained stage"), "{error}");
        assert!(source.times(stages.iter()).is_err());
        trained(&source, &sections, &stages[0], 0.5);
        trained(&source, &sections, &stages[1], 0.25);
        export(&source, &sections, &stages, &tokenizer, &out).unwrap();

        let times = source.times(stages[..2].iter()).unwrap();
        assert!(times.ends_with("together     14 steps      140 samples     3.0 minutes\n"), "{times}");

        let dir = ModelDir::open(&out).unwrap();
        assert_eq!((dir.layout(), dir.name(), dir.unknown().len()), (Layout::Native, "nano", 0));
        assert!(dir.contents().iter().all(|part| part.dtypes.iter().eq(["BF16"])));
        assert_eq!(dir.tokenizer_bytes().unwrap(), b"pieces");
        let report: serde_json::Value =
            serde_json::from_slice(&fs::read(out.join("training.json")).unwrap()).unwrap();
        assert_eq!(report["stages"]["1-b"]["samples"], 70);
        assert_eq!(report["stages"]["1-b"]["minutes"], 1.5);
        assert!(report["stages"].get("2-never").is_none());

        // A later run goes on from the folder, and its own stages come over it.
        let base = Source { runs: folder.path().join("other"), base: Some(out) };
        let value = |source: &Source| {
            let model = source.model(&sections, &stages, 9, (Device::Cpu, Kind::Float)).unwrap();
            model.variables()["visual.cls_token"].double_value(&[0, 0, 0])
        };
        assert_eq!(value(&base), 0.25);
        let before = Progress { steps: 7, samples: 70, milliseconds: 90_000, restarted: 7 };
        assert_eq!(base.before("1-b").unwrap(), before);
        assert_eq!(base.before("2-never").unwrap(), Progress::default());
        trained(&base, &sections, &stages[0], 0.75);
        assert_eq!(value(&base), 0.75);
    }

    /// With the golden tokenizer, whose ids nano's vocabulary is cut to.
    #[test]
    fn the_services_load_an_export() {
        tch::set_num_threads(1);
        let folder = tempfile::tempdir().unwrap();
        let (source, out) =
            (Source { runs: folder.path().join("runs"), base: None }, folder.path().join("nano"));
        let tokenizer = emu2_nn::golden::model_dir("emu2-chat").join("tokenizer.model");
        let mut sections = nano();
        sections["llama"]["vocab_size"] =
            json!(Tokenizer::parse(&fs::read(&tokenizer).unwrap(), true).unwrap().vocab_size());
        let stages = [stage("0-a")];
        trained(&source, &sections, &stages[0], 0.1);
        export(&source, &sections, &stages, &tokenizer, &out).unwrap();

        let dir = ModelDir::open(&out).unwrap();
        EvaVit::load(&dir, Device::Cpu, Kind::Float).unwrap();
        let (painter, info) = DiffusionPipeline::load(&dir, Device::Cpu, Kind::Float).unwrap();
        painter.warm_up();
        assert_eq!((info.default_side, info.width), (64, 192));
        let config = ModelConfig {
            model_dir: out,
            devices: vec!["cpu".to_owned()],
            cores: 1,
            kv_budget_bytes: 1 << 30,
            prefill_chunk: 256,
            max_waiting: 1,
            progress: Default::default(),
        };
        let (_, loaded) = emu2_llm::load::load(&config).unwrap();
        assert_eq!((loaded.n_query, loaded.v_query, loaded.max_positions), (16, 16, 2048));
    }
}
