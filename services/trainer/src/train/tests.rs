//! A toy world and the smallest model: losses fall, and a resumed run is the run.

use std::sync::Arc;

use emu2_llm::tokenizer::Tokenizer;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::*;
use crate::{
    data::{Arrangement, Background, Document, Image, Piece, Queries, Scene, Task},
    model::Sections,
    objective::{
        autoencode::{Autoencode, AutoencodeConfig},
        denoise::{Denoise, NoiseSampler},
        documents::{DocumentMixture, TaskShare},
        illustrate::Illustrate,
        interface::BatchFn,
        llm_pass::{ConditionSource, condition_embeddings},
        loss::Loss,
        naming::{Naming, NamingConfig},
        next_element::NextElement,
    },
    samples::{LabelledScene, NO_CONCEPT, SampleSource},
};

/// Images of one colour, the left half brighter where the first concept "stands".
struct Toy;

impl SampleSource for Toy {
    /// A caption, or for odd numbers an image to paint.
    fn document(&self, task: Task, number: u64) -> Document {
        let shade = ["dark", "grey", "bright"][number as usize % 3];
        let text = |text: String, learn| Piece::Text { text, learn };
        let image = |learn| Piece::Image { image: self.scene(number).image, learn };
        let pieces = if number.is_multiple_of(2) {
            vec![image(false), text(format!(" it is {shade}"), true)]
        } else {
            vec![text(format!("it is {shade}"), false), image(true)]
        };
        let scene = Scene {
            background: Background::Red,
            arrangement: Arrangement::Group(None),
            things: Vec::new(),
            circled: None,
        };
        Document { task, pieces, scene, ends: true }
    }

    fn scene(&self, number: u64) -> LabelledScene {
        let background = number % 3;
        let shade = 60 * background as u8;
        let pixel = |index: usize| if (index / 3) % 64 < 32 { shade + 80 } else { shade };
        LabelledScene {
            image: Image::new((0..Image::BYTES).map(pixel).collect()),
            names: vec![0, NO_CONCEPT, 0, NO_CONCEPT],
            boxes: vec![[0.0, 0.0, 0.5, 1.0]; 4],
            background: background as i64,
            count: 1,
        }
    }
}

const NAMING: NamingConfig = NamingConfig { batch: 6 };
const AUTOENCODE: AutoencodeConfig = AutoencodeConfig { batch: 2, kl_weight: 1e-4 };

fn tokenizer() -> Arc<Tokenizer> {
    let path = emu2_nn::golden::model_dir("emu2-chat").join("tokenizer.model");
    Arc::new(Tokenizer::parse(&fs::read(path).unwrap(), true).unwrap())
}

fn tiny() -> Sections {
    let sections = json!({
        "vision": {
            "image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 2.0,
            "n_query": 4, "v_query": 4,
        },
        "llama": {
            "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1,
            "vocab_size": tokenizer().vocab_size(),
        },
        "unet": {
            "sample_size": 32, "block_out_channels": [8, 16], "attention_head_dim": [1, 1],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 1],
            "layers_per_block": 1, "cross_attention_dim": 32, "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80, "norm_num_groups": 4,
        },
        "vae": { "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "scaling_factor": 1.0 },
    });
    sections.as_object().unwrap().clone()
}

fn stage(name: &str, steps: u64, train: &str, average: &str) -> Stage {
    let text = format!(
        "seed = 5\nsteps = {steps}\ntrain = {{ \"{train}\" = 1.0 }}\nobjective = {{ naming = {{ batch = 6 }} }}\n\
         [optimizer]\nlearning_rate = 3e-3\nwarm_up_steps = 2\nbetas = [0.9, 0.95]\nclip = 5.0\n{average}"
    );
    Stage::parse(name, &text).unwrap()
}

fn averaged(name: &str, steps: u64) -> Stage {
    stage(name, steps, "unet.", "average_decay = 0.9")
}

fn mixture(task: Task, text_only: bool) -> DocumentMixture {
    DocumentMixture {
        source: Arc::new(Toy),
        tokenizer: tokenizer(),
        queries: Queries { n_query: 4, v_query: 4 },
        tasks: vec![TaskShare { task, weight: 1.0, batch: 6 }],
        text_only,
        seed: 5,
    }
}

fn captions(text_only: bool) -> NextElement {
    let mixture = mixture(Task::Caption, text_only);
    NextElement { mixture, regression_weight: 1.0, blind_share: 0.3, scheduled_sampling_share: 0.3 }
}

fn run(runs: &Path) -> Run {
    // Tests run side by side.
    tch::set_num_threads(1);
    Run {
        runs: runs.to_owned(),
        before: Progress::default(),
        loader_threads: 2,
        deadline: None,
        shutdown: Shutdown::new(),
        bar: false,
    }
}

fn model() -> Model {
    Model::new(&tiny(), 1, Device::Cpu).unwrap()
}

/// The log's losses, step by step.
fn losses(runs: &Path, stage: &str) -> Vec<f64> {
    let text = fs::read_to_string(runs.join(stage).join("metrics.jsonl")).unwrap();
    let loss =
        |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap();
    text.lines().map(loss).collect()
}

fn weights(model: &Model, prefix: &str) -> Vec<Tensor> {
    model
        .variables()
        .into_iter()
        .filter(|(name, _)| name.starts_with(prefix))
        .map(|(_, tensor)| tensor.copy())
        .collect()
}

/// A signal comes during a step.
struct Interrupted<O> {
    objective: O,
    step: u64,
    shutdown: Shutdown,
}

impl<O: Objective> Objective for Interrupted<O> {
    type Batch = O::Batch;

    fn batch_fn(&self) -> BatchFn<O::Batch> {
        self.objective.batch_fn()
    }

    fn loss(&self, model: &Model, batch: &O::Batch, step: u64) -> Loss {
        if step == self.step {
            self.shutdown.begin();
        }
        self.objective.loss(model, batch, step)
    }
}

#[test]
fn losses_of_every_objective_on_images_fall() {
    let folder = tempfile::tempdir().unwrap();
    let (run, samples): (_, Arc<dyn SampleSource>) = (run(folder.path()), Arc::new(Toy));
    let check = |name: &str, share: f64| {
        let losses = losses(folder.path(), name);
        assert!(losses[losses.len() - 1] < share * losses[0], "{name}: {losses:?}");
        assert!(folder.path().join(name).join("loss.png").exists());
    };
    let (model, fresh) = (model(), model());
    let naming = Naming::new(NAMING, Arc::clone(&samples), &model);
    assert_eq!(
        train(&stage("naming", 60, "visual.", ""), &model, &naming, &run).unwrap(),
        StageOutcome::Finished
    );
    check("naming", 0.5);
    let autoencode = Autoencode { config: AUTOENCODE, source: Arc::clone(&samples), seed: 5 };
    train(&stage("vae", 40, "vae.", ""), &model, &autoencode, &run).unwrap();
    check("vae", 0.8);
    let noise = NoiseSampler { draws: 1, condition_dropout: 0.5, seed: 5 };
    train(&averaged("unet", 60), &model, &Denoise { source: samples, batch: 2, noise }, &run).unwrap();
    check("unet", 0.97);
    let illustrate = Illustrate { mixture: mixture(Task::TextToImage, false), tower_share: 0.5, noise };
    train(&averaged("illustrator", 60), &fresh, &illustrate, &run).unwrap();
    check("illustrator", 0.97);
}

#[test]
fn the_tower_conditions_with_the_true_image_and_the_llm_with_its_own() {
    let model = model();
    // The odd ones are images to paint.
    let batch = mixture(Task::TextToImage, false).batch_fn()(0);
    let pixels = batch.pixels.normalised(Device::Cpu);
    let rows = Tensor::from_slice(&batch.layout.painted(4));
    assert_eq!(Vec::<i64>::try_from(&rows).unwrap(), [1, 3, 5]);
    let truth = model.tower.encode_image(&pixels.index_select(0, &rows), 4);
    let embeddings = |source| condition_embeddings(&model, &batch.layout, &pixels, source);
    let predicted = embeddings(ConditionSource::Llm);
    assert!(embeddings(ConditionSource::Tower).allclose(&truth, 1e-4, 1e-5, false));
    assert!(!predicted.allclose(&truth, 1e-1, 1e-1, false) && !predicted.requires_grad());
}

#[test]
fn losses_of_documents_fall_with_images_and_without() {
    let folder = tempfile::tempdir().unwrap();
    let run = run(folder.path());
    for (name, text_only, parts) in [("words", true, 3), ("elements", false, 6)] {
        train(&stage(name, 60, "decoder.lm.", ""), &model(), &captions(text_only), &run).unwrap();
        let losses = losses(folder.path(), name);
        assert!(losses[losses.len() - 1] < 0.6 * losses[0], "{name}: {losses:?}");
        let text = fs::read_to_string(folder.path().join(name).join("metrics.jsonl")).unwrap();
        let line: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        // Cross-entropy, accuracy and the task's loss; with images the error of their embeddings too.
        assert_eq!(line["parts"].as_object().unwrap().len(), parts, "{name}: {line}");
    }
}

/// Whatever the processor has instructions for.
#[test]
fn losses_in_bfloat16_are_those_in_float32() {
    let samples: Arc<dyn SampleSource> = Arc::new(Toy);
    let captions = |_: &Model| captions(false);
    let denoise = |_: &Model| Denoise {
        source: Arc::clone(&samples),
        batch: 2,
        noise: NoiseSampler { draws: 2, condition_dropout: 0.5, seed: 5 },
    };
    let naming = |model: &Model| Naming::new(NAMING, Arc::clone(&samples), model);
    agree("elements", "decoder.lm.", captions);
    agree("naming", "visual.", naming);
    let autoencode = |_: &Model| Autoencode { config: AUTOENCODE, source: Arc::clone(&samples), seed: 5 };
    agree("unet", "unet.", denoise);
    agree("vae", "vae.", autoencode);
}

fn agree<O: Objective>(name: &str, train_prefix: &str, objective: impl Fn(&Model) -> O) {
    let last = [Kind::Float, Kind::BFloat16].map(|kind| {
        let folder = tempfile::tempdir().unwrap();
        let model = model().computing_in(kind).unwrap();
        assert_eq!(model.kind(), kind);
        train(&stage(name, 40, train_prefix, ""), &model, &objective(&model), &run(folder.path())).unwrap();
        let losses = losses(folder.path(), name);
        losses[losses.len() - 1]
    });
    assert!((last[1] / last[0] - 1.0).abs() < 0.05, "{name}: {last:?}");
}

/// What one stage has come to in float32 is what the next begins with, not its rounded values.
#[test]
fn a_narrow_stage_begins_with_wide_weights() {
    let (folder, wide) = (tempfile::tempdir().unwrap(), weights(&model(), "visual."));
    let narrow = model().computing_in(Kind::BFloat16).unwrap();
    let naming = Naming::new(NAMING, Arc::new(Toy), &narrow);
    let run = Run { deadline: Some(Instant::now()), ..run(folder.path()) };
    let stage = stage("naming", 9, "visual.", "average_decay = 0.9");
    assert_eq!(train(&stage, &narrow, &naming, &run).unwrap(), StageOutcome::Interrupted);
    let next = model();
    for (_, mut value) in next.variables() {
        let _ = tch::no_grad(|| value.zero_());
    }
    let progress = checkpoint::restore_model(&run.checkpoint("naming"), &next).unwrap();
    assert_eq!((progress.steps, weights(&next, "visual.")), (0, wide));
}

#[test]
fn a_stage_is_trained_by_one_process_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let held = lock(&folder.path().join("naming")).unwrap();
    let model = model();
    let naming = Naming::new(NAMING, Arc::new(Toy), &model);
    let once = || train(&stage("naming", 1, "visual.", ""), &model, &naming, &run(folder.path()));
    let error = once().unwrap_err().to_string();
    assert!(error.contains("another process") && error.contains("naming"), "{error}");
    drop(held);
    once().unwrap();
}

#[test]
fn a_resumed_run_has_the_same_losses_bit_for_bit() {
    let samples: Arc<dyn SampleSource> = Arc::new(Toy);
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let stage = averaged("unet", 45);
    let denoise = Denoise {
        source: samples,
        batch: 2,
        noise: NoiseSampler { draws: 1, condition_dropout: 0.5, seed: 5 },
    };
    let straight = model();
    train(&stage, &straight, &denoise, &run(folders[0].path())).unwrap();

    // A signal in the 20th step; the model that goes on is a new one.
    let first = run(folders[1].path());
    let interrupted = Interrupted { objective: denoise, step: 19, shutdown: first.shutdown.clone() };
    assert_eq!(train(&stage, &model(), &interrupted, &first).unwrap(), StageOutcome::Interrupted);
    let denoise = interrupted.objective;
    let second = model();
    assert_eq!(train(&stage, &second, &denoise, &run(folders[1].path())).unwrap(), StageOutcome::Finished);

    assert_eq!(losses(folders[0].path(), "unet"), losses(folders[1].path(), "unet"));
    for (one, other) in weights(&straight, "unet.").iter().zip(weights(&second, "unet.")) {
        assert_eq!(*one, other);
    }
    let read = |folder: &tempfile::TempDir| {
        let model = model();
        checkpoint::restore_model(&checkpoint::path(folder.path(), "unet"), &model).unwrap();
        weights(&model, "unet.")
    };
    assert_eq!(read(&folders[0]), read(&folders[1]), "averages");
    assert_ne!(read(&folders[0]), weights(&straight, "unet."), "averages are given on");
}
