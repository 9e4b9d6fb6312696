//! The thread that owns the model. It batches whatever queued while it was busy: there is no timer, so a lone picture
//! never waits for company, and the batch grows by itself under load. Higher classes go into a batch first (see
//! [`emu2_serve::priority`]). When it is formed, pictures whose caller has left are dropped.

use std::{
    collections::VecDeque,
    path::PathBuf,
    time::{Duration, Instant},
};

use emu2_nn::{
    array,
    checkpoint::{ModelDir, Part, Progress},
    device,
    engine::{Ending, EngineFault, Pulse, guarded, spawn},
};
use emu2_proto::array::{Array, ArrayError, Dtype};
use emu2_serve::priority::{Priority, Standing};
use tch::{Device, Kind, Tensor};
use tokio::sync::{mpsc, oneshot};
use tracing::Span;

use crate::{
    config::Config,
    error::{EncodeError, LoadError},
    eva_vit::{EvaVit, pool},
    metrics::Metrics,
};

#[cfg(test)]
mod tests;

/// What the engine encodes.
#[derive(Debug)]
pub struct Picture {
    pub pixels: Pixels,
    /// Embeddings wanted; what pooling can leave.
    pub n_query: u32,
}

#[derive(Debug)]
pub enum Pixels {
    /// Normalised, [3, image_size, image_size].
    Values(Vec<f32>),
    /// Zeros: the mean colour.
    Mean,
}

/// One picture's answer.
#[derive(Debug)]
pub struct Encoded {
    /// [queries, width]
    pub embeddings: Array,
    pub queued: Duration,
    /// The forward of its batch.
    pub took: Duration,
}

/// What everyone else needs to know of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    pub weights_digest: String,
    pub dtype: Dtype,
    /// Width of one embedding.
    pub width: usize,
    /// Side of the square that pictures are resized to, and of its grid of patches.
    pub image_size: usize,
    pub grid_side: usize,
}

/// A model as the engine sees it.
pub trait BatchEncoder {
    /// [queries, width] for each picture, in order.
    fn encode(&self, batch: &[Picture]) -> Vec<Result<Array, ArrayError>>;
}

/// The queue's end that takes pictures; the thread ends when all clones are dropped.
#[derive(Clone, Debug)]
pub struct Engine {
    queue: mpsc::Sender<Job>,
    metrics: Metrics,
    pulse: Pulse,
}

/// An engine on its way; see [`emu2_serve::server::Server::run_engine`].
#[derive(Debug)]
pub struct Started {
    pub engine: Engine,
    pub loaded: oneshot::Receiver<Result<ModelInfo, LoadError>>,
    /// Told when a thread that served has ended.
    pub ended: oneshot::Receiver<()>,
}

#[derive(Debug)]
struct Job {
    picture: Picture,
    standing: Standing,
    /// Closed when the caller has left.
    answer: oneshot::Sender<Result<Encoded, EncodeError>>,
    queued: Instant,
    span: Span,
    /// From the queue's entry to its batch.
    waiting: Span,
}

/// Most pictures that wait, and most of one batch.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    waiting: usize,
    batch: usize,
}

impl Engine {
    /// Starts the thread, which loads and warms the model; `progress` is told how far it is.
    pub fn start(config: &Config, progress: Progress, metrics: Metrics) -> Started {
        let (dir, devices) = (config.model_dir.clone(), config.devices.clone());
        // Every waiting picture holds one of max_images, so the queue never is what is full.
        let bounds = Bounds { waiting: config.max_images, batch: config.max_batch_images };
        Self::start_with(bounds, config.cores, metrics, move || load(dir, &devices, progress))
    }

    fn start_with<M: BatchEncoder>(
        bounds: Bounds,
        cores: usize,
        metrics: Metrics,
        load: impl FnOnce() -> Result<(M, ModelInfo), LoadError> + Send + 'static,
    ) -> Started {
        let (queue, jobs) = mpsc::channel(bounds.waiting);
        let (ending, ended) = Ending::channel();
        let engine = Self { queue, metrics: metrics.clone(), pulse: Pulse::default() };
        let pulse = engine.pulse.clone();
        let loaded = spawn("encoder", cores, load, move |model| {
            let _serving = ending.begin();
            serve(&model, jobs, bounds.batch, &metrics, &pulse);
        });
        Started { engine, loaded, ended }
    }

    /// How long the current batch has been running; 0 between batches.
    pub fn step_ms(&self) -> u64 {
        self.pulse.step_ms()
    }

    /// Dropping the future takes the picture out of the queue.
    pub async fn encode(&self, picture: Picture, priority: Priority) -> Result<Encoded, EncodeError> {
        let (answer, answered) = oneshot::channel();
        let (span, waiting) = (Span::current(), tracing::info_span!("queue"));
        let standing = Standing::new(priority);
        let job = Job { picture, standing, answer, queued: Instant::now(), span, waiting };
        // Counted first: the engine may take it before this goes on.
        self.metrics.waiting.inc();
        if let Err(error) = self.queue.try_send(job) {
            self.metrics.waiting.dec();
            return Err(match error {
                mpsc::error::TrySendError::Full(_) => EncodeError::Full { max: self.queue.max_capacity() },
                mpsc::error::TrySendError::Closed(_) => EncodeError::Stopped,
            });
        }
        answered.await.map_err(|_| EncodeError::Stopped)?
    }
}

/// Until the queue closes, or the device cannot be trusted any more.
fn serve<M: BatchEncoder>(
    model: &M,
    mut queue: mpsc::Receiver<Job>,
    max_batch: usize,
    metrics: &Metrics,
    pulse: &Pulse,
) {
    // The next one first.
    let mut line = VecDeque::new();
    while let Some(first) = line.pop_front().or_else(|| queue.blocking_recv()) {
        line.push_front(first);
        while let Ok(job) = queue.try_recv() {
            stand(&mut line, job);
        }
        let batch = gather(&mut line, max_batch, metrics);
        if batch.is_empty() {
            continue;
        }
        let _beat = pulse.beat();
        if let Err(fault) = encode(model, batch, metrics) {
            tracing::error!(%fault, "the engine stops");
            return;
        }
    }
}

/// Higher classes before lower ones, and nobody is overtaken for ever.
fn stand(line: &mut VecDeque<Job>, job: Job) {
    let passed = job.standing.overtakes(line.iter_mut().rev().map(|waiting| &mut waiting.standing));
    line.insert(line.len() - passed, job);
}

/// The first of the line, up to a full batch, less those that nobody waits for.
fn gather(line: &mut VecDeque<Job>, max_batch: usize, metrics: &Metrics) -> Vec<Job> {
    let mut batch = Vec::new();
    while batch.len() < max_batch
        && let Some(job) = line.pop_front()
    {
        metrics.waiting.dec();
        if job.answer.is_closed() {
            metrics.left.inc();
        } else {
            batch.push(job);
        }
    }
    batch
}

/// One forward; its faults are the answers. An error is a fault after which nothing more can be computed.
fn encode<M: BatchEncoder>(model: &M, batch: Vec<Job>, metrics: &Metrics) -> Result<(), EngineFault> {
    let begun = Instant::now();
    let images = batch.len();
    metrics.batch_images.observe(images as f64);
    let (pictures, callers): (Vec<_>, Vec<_>) = batch
        .into_iter()
        .map(|Job { picture, answer, queued, span, waiting, .. }| {
            drop(waiting);
            let queued = begun.duration_since(queued);
            metrics.queue_duration.observe(queued.as_secs_f64());
            // Each request's trace shows the batch that its picture was in.
            let stage = tracing::info_span!(parent: &span, "encode_batch", images);
            (picture, (answer, queued, stage))
        })
        .unzip();
    let encoded = guarded(|| model.encode(&pictures));
    let took = begun.elapsed();
    metrics.batch_duration.observe(took.as_secs_f64());
    let answers = match &encoded {
        Ok(answers) => answers.iter().cloned().map(|answer| answer.map_err(EncodeError::from)).collect(),
        Err(fault) => vec![Err(EncodeError::Fault(fault.clone())); images],
    };
    for ((answer, queued, _stage), embeddings) in callers.into_iter().zip(answers) {
        metrics.encoded.inc_by(u64::from(embeddings.is_ok()));
        // The caller may have left during the forward.
        let _ = answer.send(embeddings.map(|embeddings| Encoded { embeddings, queued, took }));
    }
    match encoded {
        Err(fault @ EngineFault::Device(_)) => Err(fault),
        Err(fault) => {
            tracing::error!(%fault, images, "a batch failed");
            Ok(())
        }
        Ok(_) => Ok(()),
    }
}

impl BatchEncoder for EvaVit {
    fn encode(&self, batch: &[Picture]) -> Vec<Result<Array, ArrayError>> {
        let side = self.config.image_size;
        let pixels: Vec<Tensor> = batch
            .iter()
            .map(|picture| match &picture.pixels {
                Pixels::Values(values) => Tensor::from_slice(values).view([3, side, side]),
                Pixels::Mean => Tensor::zeros([3, side, side], (Kind::Float, Device::Cpu)),
            })
            .collect();
        let pixels = Tensor::stack(&pixels, 0).to_device(self.device()).to_kind(self.kind());
        let features = self.forward(&pixels);
        let pooled = |(index, picture): (usize, &Picture)| {
            let features = features.narrow(0, index as i64, 1);
            array::from_tensor(&pool(&features, self.config.grid_side(), picture.n_query).squeeze_dim(0))
        };
        batch.iter().enumerate().map(pooled).collect()
    }
}

/// Loads and warms the model; runs on the engine's thread.
fn load(dir: PathBuf, devices: &[String], progress: Progress) -> Result<(EvaVit, ModelInfo), LoadError> {
    let device = device::open(devices)?[0];
    let kind = device::compute_kind(device);
    let dir = ModelDir::open_with(&dir, progress)?;
    dir.prepare(&[Part::Visual], device, kind)?;
    let (model, weights_digest) = EvaVit::load(&dir, device, kind)?;
    let config = &model.config;
    // What is allocated or compiled at first use is, before anyone waits for it.
    let warm = Picture { pixels: Pixels::Mean, n_query: config.n_query };
    guarded(|| model.encode(&[warm])).map_err(LoadError::WarmUp)?;
    // All are positive: the configuration has been checked.
    let info = ModelInfo {
        weights_digest,
        dtype: array::dtype(kind),
        width: config.width as usize,
        image_size: config.image_size as usize,
        grid_side: config.grid_side() as usize,
    };
    Ok((model, info))
}
