//! The command line of `emu2-trainer`.

use std::{
    fs,
    io::IsTerminal,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use emu2_llm::tokenizer::Tokenizer as Ids;
use emu2_serve::shutdown::Shutdown;
use emu2_sheet::sheet::{self, Row};

use crate::{
    checkpoint::Progress,
    data::{Queries, Split, Task, Vocabulary, World, concept::CONCEPTS_MAX},
    documents,
    eval::{self, Eval},
    export::{self, Source},
    model::{self, Model, Sections},
    objective::{
        autoencode::Autoencode,
        denoise::Denoise,
        documents::{DocumentMixture, TaskShare},
        illustrate::Illustrate,
        naming::Naming,
        next_element::NextElement,
    },
    samples::{SampleSource, TrainingWorld},
    stage::{ObjectiveConfig, Stage},
    tour,
    train::{self, Run, StageOutcome},
};

/// Documents on one sheet: those with most images take 6 MB each.
const COUNT_MAX: u64 = 200;

/// Train a small Emu2, and measure it.
#[derive(Debug, Parser)]
#[command(name = "emu2-trainer", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// A command of `emu2-trainer`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Draw documents of the training data, a sheet for each task.
    Data(Data),
    /// Train stages in their order, each from its last checkpoint; finished ones are passed over.
    Train(Train),
    /// Write what has been trained as a model folder.
    Export(Export),
    /// Learn the tokenizer from the documents: tokenizer.model, and the same as tokenizer.json.
    Tokenizer(Tokenizer),
    /// Write the prompts that a model folder brings for `emu2 demo`.
    Tour(Tour),
    /// Measure what a served model can do, through its public API.
    Eval(Eval),
}

/// Where training reads and writes.
#[derive(Debug, Args)]
pub struct Places {
    /// A folder of stages.
    #[arg(long, default_value = "services/trainer/stages", value_name = "DIR")]
    pub stages: PathBuf,
    /// Checkpoints, logs and curves, a folder for each stage.
    #[arg(long, value_name = "DIR")]
    pub runs: PathBuf,
    /// An exported model to begin with, in place of random weights.
    #[arg(long, value_name = "DIR")]
    pub base: Option<PathBuf>,
    /// The tokenizer of the model that is trained.
    #[arg(long, default_value = "deploy/models/nano/tokenizer.model", value_name = "FILE")]
    pub tokenizer: PathBuf,
}

/// Arguments of `emu2-trainer data`.
#[derive(Debug, Args)]
pub struct Data {
    /// The folder that `deploy/fetch/drawings.py` prints.
    #[arg(long, value_name = "DIR")]
    pub drawings: PathBuf,
    /// The folder for the sheets.
    #[arg(long, default_value = "out/data", value_name = "DIR")]
    pub out: PathBuf,
    /// Documents of a task: a sheet of all of them is made in memory.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u64).range(1..=COUNT_MAX))]
    pub count: u64,
    /// Seed of the documents.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Arguments of `emu2-trainer train`.
#[derive(Debug, Args)]
pub struct Train {
    /// Where training reads and writes.
    #[command(flatten)]
    pub places: Places,
    /// Only these stages, by name; default: all.
    #[arg(long = "only", value_name = "STAGE")]
    pub only: Vec<String>,
    /// The folder that `deploy/fetch/drawings.py` prints.
    #[arg(long, value_name = "DIR")]
    pub drawings: PathBuf,
    /// Stop after so many minutes in all, to be resumed; default: when all is done.
    #[arg(long, value_name = "MINUTES", value_parser = minutes)]
    pub minutes: Option<Duration>,
    /// Threads of one torch operation; 0 means all.
    #[arg(long, default_value_t = 0)]
    pub cores: usize,
    /// Threads that make batches.
    #[arg(long, default_value_t = 1)]
    pub loaders: usize,
    /// Seed of the initial weights.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Device of torch: `cpu` or `cuda:0`.
    #[arg(long, default_value = "cpu")]
    pub device: String,
}

/// Arguments of `emu2-trainer tokenizer`.
#[derive(Debug, Args)]
pub struct Tokenizer {
    /// The folder that `deploy/fetch/drawings.py` prints.
    #[arg(long, value_name = "DIR")]
    pub drawings: PathBuf,
    /// The folder for both files.
    #[arg(long, default_value = "deploy/models/nano", value_name = "DIR")]
    pub out: PathBuf,
    /// Ids in all, special ones too.
    #[arg(long, default_value_t = 1_500)]
    pub size: usize,
    /// Seed of the documents.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Arguments of `emu2-trainer tour`.
#[derive(Debug, Args)]
pub struct Tour {
    /// The folder that `deploy/fetch/drawings.py` prints.
    #[arg(long, value_name = "DIR")]
    pub drawings: PathBuf,
    /// The model folder.
    #[arg(long, default_value = "deploy/models/nano", value_name = "DIR")]
    pub out: PathBuf,
    /// Seed of the scenes.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Arguments of `emu2-trainer export`.
#[derive(Debug, Args)]
pub struct Export {
    /// Where training reads and writes.
    #[command(flatten)]
    pub places: Places,
    /// The folder for the model.
    #[arg(long, default_value = "deploy/models/nano", value_name = "DIR")]
    pub out: PathBuf,
}

fn minutes(text: &str) -> Result<Duration> {
    let minutes: f64 = text.parse()?;
    Ok(Duration::try_from_secs_f64(minutes * 60.0)?)
}

/// Runs a command to its end.
///
/// # Errors
/// When files cannot be read or written, a configuration is wrong, or a stage was interrupted.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Data(args) => data(args),
        Command::Train(args) => train(args),
        Command::Tokenizer(args) => tokenizer(args),
        Command::Tour(Tour { drawings, out, seed }) => {
            tour::write(&World::open(&drawings, model::concept_count(&model::nano())?, seed, false)?, &out)
        }
        Command::Eval(args) => {
            tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(eval::eval(args))
        }
        Command::Export(Export { places, out }) => {
            let stages = Stage::read_all(&places.stages)?;
            let source = Source { runs: places.runs, base: places.base };
            export::export(&source, &model::nano(), &stages, &places.tokenizer, &out)
        }
    }
}

fn data(args: Data) -> Result<()> {
    let world = World::open(&args.drawings, model::concept_count(&model::nano())?, args.seed, false)?;
    make_folder(&args.out)?;
    for task in Task::ALL {
        let documents = (0..args.count).map(|index| world.document(Split::Train, task, index));
        let rows: Vec<Row> = documents.map(|document| documents::row(&document)).collect();
        let path = args.out.join(format!("{}.png", task.name()));
        sheet::draw(&rows).save(&path).with_context(|| format!("cannot write {}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}

fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))
}

fn tokenizer(args: Tokenizer) -> Result<()> {
    let world = World::open(&args.drawings, CONCEPTS_MAX, args.seed, false)?;
    let vocabulary = Vocabulary::learn(&world, args.size)?;
    make_folder(&args.out)?;
    let write = |name: &str, bytes: &[u8]| {
        let path = args.out.join(name);
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
    };
    write("tokenizer.model", &vocabulary.sentencepiece())?;
    write("tokenizer.json", serde_json::to_string(&vocabulary.hugging_face(true)?)?.as_bytes())
}

fn train(args: Train) -> Result<()> {
    // A time that the clock cannot reach is none.
    let deadline = args.minutes.and_then(|time| Instant::now().checked_add(time));
    let stages = Stage::read_all(&args.places.stages)?;
    for name in &args.only {
        ensure!(stages.iter().any(|stage| stage.name == *name), "there is no stage {name}");
    }
    let device = emu2_nn::device::open(std::slice::from_ref(&args.device))?[0];
    if args.cores > 0 {
        tch::set_num_threads(args.cores.try_into().context("cores")?);
    }
    let sections = model::nano();
    // Signals are heard by a thread of their own.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let _entered = runtime.enter();
    let mut run = Run {
        runs: args.places.runs.clone(),
        before: Progress::default(),
        loader_threads: args.loaders,
        deadline,
        shutdown: Shutdown::on_signals(),
        bar: std::io::stdout().is_terminal(),
    };
    let source = Source { runs: args.places.runs.clone(), base: args.places.base.clone() };
    let wanted = |stage: &&Stage| args.only.is_empty() || args.only.contains(&stage.name);
    for (index, stage) in stages.iter().enumerate().filter(|(_, stage)| wanted(stage)) {
        run.before = source.before(&stage.name)?;
        let model =
            source.model(&sections, &stages[..index], args.seed, (device, stage.precision.kind(device)))?;
        let world = World::open(&args.drawings, model::concept_count(&sections)?, stage.seed, false)?;
        let ids = || trained_ids(&args.places, &sections);
        // No success: who runs this, a Job of Kubernetes for one, is to start it again.
        let outcome = train_stage(stage, &model, world, ids, &run)?;
        ensure!(
            outcome == StageOutcome::Finished,
            "{} was stopped; the same command goes on from there",
            stage.name
        );
        println!("{}: finished", stage.name);
    }
    print!("{}", source.times(stages.iter().filter(wanted))?);
    Ok(())
}

/// Returns the tokenizer, which must give as many ids as the model has rows for.
fn trained_ids(places: &Places, sections: &Sections) -> Result<Arc<Ids>> {
    let instruct = sections.get("instruct").and_then(serde_json::Value::as_bool).unwrap_or(false);
    let path = &places.tokenizer;
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let tokenizer = Ids::parse(&bytes, instruct).with_context(|| path.display().to_string())?;
    let (rows, ids) = (sections["llama"]["vocab_size"].as_u64(), tokenizer.vocab_size() as u64);
    ensure!(rows == Some(ids), "llama.vocab_size is {rows:?}, but the tokenizer has {ids} ids");
    Ok(Arc::new(tokenizer))
}

fn train_stage(
    stage: &Stage,
    model: &Model,
    world: World,
    ids: impl Fn() -> Result<Arc<Ids>>,
    run: &Run,
) -> Result<StageOutcome> {
    let (n_query, v_query) = (model.n_query() as usize, model.tower.config.v_query as usize);
    let source: Arc<dyn SampleSource> = Arc::new(TrainingWorld { world, grid_side: n_query.isqrt() });
    let seed = stage.seed;
    let mixture = |tasks: &[TaskShare], text_only| -> Result<DocumentMixture> {
        let queries = Queries { n_query, v_query };
        let (source, tasks) = (Arc::clone(&source), tasks.to_vec());
        Ok(DocumentMixture { source, tokenizer: ids()?, queries, tasks, text_only, seed })
    };
    match &stage.objective {
        &ObjectiveConfig::Naming(config) => {
            train::train(stage, model, &Naming::new(config, source, model), run)
        }
        ObjectiveConfig::NextElement(config) => {
            let mixture = mixture(&config.tasks, config.text_only)?;
            train::train(stage, model, &NextElement::new(config, mixture), run)
        }
        &ObjectiveConfig::Autoencode(config) => {
            train::train(stage, model, &Autoencode { config, source, seed }, run)
        }
        &ObjectiveConfig::Denoise(config) => {
            train::train(stage, model, &Denoise::new(config, source, seed), run)
        }
        ObjectiveConfig::Illustrate(config) => {
            let mixture = mixture(&config.tasks, false)?;
            train::train(stage, model, &Illustrate::new(config, mixture), run)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train_args(words: &[&str]) -> Result<Train, clap::Error> {
        match Cli::try_parse_from(words)?.command {
            Command::Train(args) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    /// deploy/train-job.yaml, whose list of words stands a word a line.
    #[test]
    fn the_jobs_words_are_understood() {
        let job = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/train-job.yaml");
        let job = fs::read_to_string(job).unwrap();
        let (_, list) = job.split_once(" args:\n").unwrap();
        let words: Vec<_> = list.lines().map_while(|line| line.trim().strip_prefix("- ")).collect();
        let args = train_args(&words).unwrap();
        assert_eq!((words[0], args.cores), ("emu2-trainer", 2), "{words:?}");
        assert_eq!((args.places.runs, args.drawings), ("/data/runs".into(), "/data/drawings".into()));
    }

    #[test]
    fn minutes_are_a_time() {
        let minutes = |minutes: &str| {
            train_args(&[
                "emu2-trainer",
                "train",
                "--runs=r",
                "--drawings=d",
                &format!("--minutes={minutes}"),
            ])
        };
        assert_eq!(minutes("0.5").unwrap().minutes, Some(Duration::from_secs(30)));
        assert!(minutes("1e15").is_ok());
        for wrong in ["-1", "nan", "1e300", "soon"] {
            let error = minutes(wrong).unwrap_err().to_string();
            assert!(error.contains("--minutes") && error.contains(wrong), "{error}");
        }
    }

    #[test]
    fn a_sheet_has_some_documents() {
        let count =
            |count: &str| Cli::try_parse_from(["emu2-trainer", "data", "--drawings=d", "--count", count]);
        assert!(count("200").is_ok() && count("0").is_err() && count("201").is_err());
    }
}
