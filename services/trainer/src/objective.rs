//! A stage's objective at work: which samples make its batches, and their loss.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::{Context, Result};
use emu2_decoder::noise::standard_normal;
use emu2_llm::tokenizer::Tokenizer;
use emu2_nn::layers::Linear;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;
use tch::{Device, Kind, Tensor};

use crate::{
    data::{Document, Picture, Piece, Queries, Sequence, Task},
    layout::Layout,
    loss::{self, FedBack, Loss, Named, NamingHeads, Noising, Regression},
    model::Model,
    pixels::Pixels,
    stage::TaskShare,
};

/// Where samples come from. Each is a function of its number.
pub trait Samples: Send + Sync + 'static {
    fn document(&self, task: Task, number: u64) -> Document;
    fn scene(&self, number: u64) -> NamedScene;
}

/// A picture and what stands where in it.
#[derive(Clone, Debug)]
pub struct NamedScene {
    pub picture: Picture,
    /// Of each query, row by row: a concept's number, or [`NAMES`] for none.
    pub names: Vec<i64>,
    /// Of each query: left, top, right and bottom of what it is named after, in fractions of the picture; for none
    /// anything.
    pub boxes: Vec<[f32; 4]>,
    pub background: i64,
    /// 1 to [`COUNTS`].
    pub count: i64,
}

/// Concepts, named backgrounds, and the most things of a scene.
pub const NAMES: i64 = crate::data::concept::CONCEPTS_MAX as i64;
pub const BACKGROUNDS: i64 = crate::data::Background::ALL.len() as i64;
pub const COUNTS: i64 = 4;

/// Makes the batch of a number.
pub type Maker<B> = Box<dyn Fn(u64) -> B + Send + Sync>;

pub trait Objective {
    type Batch: Batch;

    /// For the loader's threads.
    fn maker(&self) -> Maker<Self::Batch>;

    /// `step`: the batch's number, which also decides what is drawn.
    fn loss(&self, model: &Model, batch: &Self::Batch, step: u64) -> Loss;

    /// Trained beside the model's weights and thrown away.
    fn variables(&self) -> BTreeMap<String, Tensor> {
        BTreeMap::new()
    }
}

pub trait Batch: Send + 'static {
    /// In it.
    fn samples(&self) -> usize;
}

/// The number of a batch's sample `index`: stages never share samples, nor do steps.
fn number(step: u64, batch: usize, index: usize) -> u64 {
    step * batch as u64 + index as u64
}

/// Another seed for each use of a stage's.
fn seed(stage: u64, step: u64, usage: u64) -> u64 {
    let mut hasher = blake3::Hasher::new();
    [stage, step, usage].iter().for_each(|value| {
        hasher.update(&value.to_le_bytes());
    });
    u64::from_le_bytes(*hasher.finalize().as_bytes().first_chunk().expect("a hash has 32 bytes"))
}

/// What stands where: stage 0.
pub struct Naming {
    pub samples: Arc<dyn Samples>,
    pub batch: usize,
    heads: NamingHeads,
}

pub struct NamedScenes {
    pixels: Pixels,
    names: Vec<i64>,
    boxes: Vec<f32>,
    backgrounds: Vec<i64>,
    counts: Vec<i64>,
}

impl Batch for NamedScenes {
    fn samples(&self) -> usize {
        self.counts.len()
    }
}

impl Naming {
    pub fn new(samples: Arc<dyn Samples>, batch: usize, model: &Model) -> Self {
        // Zeros: a linear layer's gradient does not need another beginning.
        let width = model.tower.config.width;
        let head = |classes: i64| Linear {
            weight: zeros(&[classes, width], model.device()),
            bias: Some(zeros(&[classes], model.device())),
        };
        let heads = NamingHeads {
            names: head(NAMES + 1),
            boxes: head(4),
            background: head(BACKGROUNDS),
            count: head(COUNTS),
        };
        Self { samples, batch, heads }
    }
}

fn zeros(shape: &[i64], device: Device) -> Tensor {
    Tensor::zeros(shape, (Kind::Float, device)).set_requires_grad(true)
}

impl Objective for Naming {
    type Batch = NamedScenes;

    fn maker(&self) -> Maker<NamedScenes> {
        let (samples, batch) = (Arc::clone(&self.samples), self.batch);
        Box::new(move |step| {
            let scenes: Vec<_> = (0..batch).map(|index| samples.scene(number(step, batch, index))).collect();
            NamedScenes {
                names: scenes.iter().flat_map(|scene| scene.names.iter().copied()).collect(),
                boxes: scenes.iter().flat_map(|scene| scene.boxes.iter().flatten().copied()).collect(),
                backgrounds: scenes.iter().map(|scene| scene.background).collect(),
                counts: scenes.iter().map(|scene| scene.count - 1).collect(),
                pixels: scenes.into_iter().map(|scene| scene.picture).collect(),
            }
        })
    }

    fn loss(&self, model: &Model, batch: &NamedScenes, _step: u64) -> Loss {
        let device = model.device();
        let classes = |classes: &[i64]| Tensor::from_slice(classes).to_device(device);
        let names = classes(&batch.names);
        let truth = Named {
            covered: names.not_equal(NAMES),
            names,
            boxes: Tensor::from_slice(&batch.boxes).to_device(device).view([-1, 4]),
            backgrounds: classes(&batch.backgrounds),
            counts: classes(&batch.counts),
        };
        loss::naming(model, &self.heads, &batch.pixels.normalised(device), &truth)
    }

    fn variables(&self) -> BTreeMap<String, Tensor> {
        let heads = [
            ("names", &self.heads.names),
            ("boxes", &self.heads.boxes),
            ("background", &self.heads.background),
            ("count", &self.heads.count),
        ];
        let mut variables = BTreeMap::new();
        for (name, head) in heads {
            let tensors = [("weight", Some(&head.weight)), ("bias", head.bias.as_ref())];
            for (kind, tensor) in tensors {
                variables
                    .extend(tensor.map(|tensor| (format!("heads.{name}.{kind}"), tensor.shallow_clone())));
            }
        }
        variables
    }
}

/// Where batches of documents come from: one task a batch.
pub struct Mixture {
    pub samples: Arc<dyn Samples>,
    pub tokenizer: Arc<Tokenizer>,
    pub queries: Queries,
    pub tasks: Vec<TaskShare>,
    pub text_only: bool,
    /// The stage's.
    pub seed: u64,
}

/// The next token or embedding of interleaved documents.
pub struct NextElement {
    pub mixture: Mixture,
    pub regression_weight: f64,
    /// Of the steps, in which [`FedBack::Nothing`] and [`FedBack::Predicted`] take the place of the truth.
    pub blind_share: f64,
    pub predicted_share: f64,
}

pub struct Documents {
    pub task: Task,
    pub layout: Layout,
    pub pixels: Pixels,
}

impl Batch for Documents {
    fn samples(&self) -> usize {
        self.layout.sequences
    }
}

impl Mixture {
    /// For the loader's threads.
    pub fn maker(&self) -> Maker<Documents> {
        let (samples, tokenizer) = (Arc::clone(&self.samples), Arc::clone(&self.tokenizer));
        let (queries, tasks, text_only, stage) =
            (self.queries, self.tasks.clone(), self.text_only, self.seed);
        Box::new(move |step| {
            let TaskShare { task, batch, .. } = draw(&tasks, seed(stage, step, 0));
            let sequence = |index| {
                let document = samples.document(task, number(step, batch, index));
                let document = if text_only { text_of(document) } else { document };
                Sequence::new(&document, &tokenizer, queries)
            };
            let sequences: Vec<_> = (0..batch).map(sequence).collect();
            let (layout, pictures) = Layout::new(&sequences, queries.n_query)
                .expect("pictures and frames have as many embeddings");
            Documents { task, layout, pixels: pictures.into_iter().collect() }
        })
    }
}

impl Objective for NextElement {
    type Batch = Documents;

    fn maker(&self) -> Maker<Documents> {
        self.mixture.maker()
    }

    fn loss(&self, model: &Model, batch: &Documents, step: u64) -> Loss {
        let pixels = batch.pixels.normalised(model.device());
        let drawn = ChaCha12Rng::seed_from_u64(seed(self.mixture.seed, step, 6)).random_range(0.0..1.0);
        let fed_back = match drawn {
            _ if drawn < self.blind_share => FedBack::Nothing,
            _ if drawn < self.blind_share + self.predicted_share => FedBack::Predicted,
            _ => FedBack::Truth,
        };
        let regression = Regression { weight: self.regression_weight, fed_back };
        let loss = loss::next_element((&model.tower, &model.llm), &batch.layout, &pixels, regression);
        // Each task's own loss is in the log too: their mean hides the one that does not learn.
        loss.also_as(batch.task.name())
    }
}

/// One of the tasks, by weight.
fn draw(tasks: &[TaskShare], seed: u64) -> TaskShare {
    let sum: f64 = tasks.iter().map(|share| share.weight).sum();
    let mut left = ChaCha12Rng::seed_from_u64(seed).random_range(0.0..sum);
    for share in tasks {
        if left < share.weight {
            return *share;
        }
        left -= share.weight;
    }
    // Rounding may leave a little.
    tasks[tasks.len() - 1]
}

/// A document's texts as one, all of it learned.
fn text_of(document: Document) -> Document {
    let texts = document.pieces.iter().filter_map(|piece| match piece {
        Piece::Text { text, .. } => Some(text.as_str()),
        Piece::Image { .. } | Piece::Box { .. } | Piece::Video { .. } => None,
    });
    let text = texts.collect::<Vec<_>>().concat();
    Document { pieces: vec![Piece::Text { text, learn: true }], ..document }
}

/// Pictures through the VAE and back.
pub struct Autoencode {
    pub samples: Arc<dyn Samples>,
    pub batch: usize,
    pub divergence_weight: f64,
    pub seed: u64,
}

pub struct Pictures(Pixels, usize);

impl Batch for Pictures {
    fn samples(&self) -> usize {
        self.1
    }
}

fn pictures(samples: &Arc<dyn Samples>, batch: usize) -> Maker<Pictures> {
    let samples = Arc::clone(samples);
    Box::new(move |step| {
        let picture = |index| samples.scene(number(step, batch, index)).picture;
        Pictures((0..batch).map(picture).collect(), batch)
    })
}

/// Standard normal values of a shape.
fn normal(shape: &[i64], seed: u64, device: Device) -> Tensor {
    let count = shape.iter().product::<i64>() as usize;
    Tensor::from_slice(&standard_normal(seed, count)).view(shape).to_device(device)
}

/// Of the latents of so many pictures.
fn latents_shape(model: &Model, batch: usize, pixels: &Tensor) -> Result<[i64; 4]> {
    let (_, _, height, width_px) = pixels.size4().context("pixels have four dimensions")?;
    let levels = model.vae.decoder.up_blocks.len();
    Ok([batch as i64, model.unet.config.in_channels, height >> (levels - 1), width_px >> (levels - 1)])
}

impl Objective for Autoencode {
    type Batch = Pictures;

    fn maker(&self) -> Maker<Pictures> {
        pictures(&self.samples, self.batch)
    }

    fn loss(&self, model: &Model, batch: &Pictures, step: u64) -> Loss {
        let pixels = batch.0.signed(model.device());
        let shape = latents_shape(model, batch.1, &pixels).expect("pixels have been made with four");
        let noise = normal(&shape, seed(self.seed, step, 1), model.device());
        loss::autoencode(model, &pixels, &noise, self.divergence_weight)
    }
}

/// What noise is drawn for a batch of [`loss::denoise`].
#[derive(Clone, Copy, Debug)]
pub struct Noise {
    /// For each picture.
    pub draws: usize,
    /// Of the embeddings.
    pub dropped_share: f64,
    /// The stage's.
    pub seed: u64,
}

impl Noise {
    fn draw(self, model: &Model, pictures: usize, pixels: &Tensor, step: u64) -> Noising {
        let device = model.device();
        let count = pictures * self.draws;
        let shape = latents_shape(model, count, pixels).expect("pixels have been made with four");
        let [sampling, noise] = [2, 3].map(|usage| normal(&shape, seed(self.seed, step, usage), device));
        let mut random = ChaCha12Rng::seed_from_u64(seed(self.seed, step, 4));
        let last = model.alphas_cumprod.size()[0];
        let timesteps: Vec<i64> = (0..count).map(|_| random.random_range(0..last)).collect();
        let dropped: Vec<bool> = (0..count).map(|_| random.random_bool(self.dropped_share)).collect();
        Noising {
            sampling,
            noise,
            offset: normal(&[shape[0], shape[1], 1, 1], seed(self.seed, step, 5), device),
            timesteps: Tensor::from_slice(&timesteps).to_device(device),
            dropped: Tensor::from_slice(&dropped).to_device(device),
        }
    }
}

/// Noise out of pictures' latents, given their embeddings.
pub struct Denoise {
    pub samples: Arc<dyn Samples>,
    pub batch: usize,
    pub noise: Noise,
}

impl Objective for Denoise {
    type Batch = Pictures;

    fn maker(&self) -> Maker<Pictures> {
        pictures(&self.samples, self.batch)
    }

    fn loss(&self, model: &Model, batch: &Pictures, step: u64) -> Loss {
        let device = model.device();
        let normalised = batch.0.normalised(device).to_kind(model.kind());
        let embeddings = tch::no_grad(|| model.tower.encode_image(&normalised, model.n_query()));
        let pixels = batch.0.signed(device);
        loss::denoise(model, &embeddings, &pixels, &self.noise.draw(model, batch.1, &pixels, step))
    }
}

/// The same, given what the llm predicts of a painting document's picture: its predictions are means of what is still
/// possible, which the tower's embeddings never are.
pub struct Illustrate {
    /// Whose documents each end with a picture to paint, their only one.
    pub mixture: Mixture,
    /// Of the steps, in which the tower's embeddings are given all the same.
    pub truth_share: f64,
    pub noise: Noise,
}

impl Objective for Illustrate {
    type Batch = Documents;

    fn maker(&self) -> Maker<Documents> {
        self.mixture.maker()
    }

    fn loss(&self, model: &Model, batch: &Documents, step: u64) -> Loss {
        let device = model.device();
        let mut random = ChaCha12Rng::seed_from_u64(seed(self.noise.seed, step, 6));
        let truly = random.random_bool(self.truth_share);
        let embeddings = loss::told(model, &batch.layout, &batch.pixels.normalised(device), truly);
        let painted = batch.layout.painted(i64::from(model.n_query()));
        let rows = Tensor::from_slice(&painted).to_device(device);
        let pixels = batch.pixels.signed(device).index_select(0, &rows);
        let noising = self.noise.draw(model, painted.len(), &pixels, step);
        let loss = loss::denoise(model, &embeddings, &pixels, &noising);
        loss.also_as(if truly { "of the tower's" } else { batch.task.name() })
    }
}
