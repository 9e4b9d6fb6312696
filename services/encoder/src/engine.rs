//! Batches of images on the step engine. A batch is whatever queued while the engine was busy: there is no timer, so a
//! lone image never waits for company, and the batch grows by itself under load. Higher classes go into a batch first
//! (see [`emu2_serve::priority`]).

use std::{convert::Infallible, path::PathBuf, time::Duration, time::Instant};

use emu2_engine::{
    engine::{self, Options},
    error::guarded,
    line::Line,
    load::LoadMetrics,
    stage::{Arrival, Batch, Outbox, Stage, Ticket},
};
use emu2_nn::{
    array,
    checkpoint::{ModelDir, Part, Progress},
    device, thread,
};
use emu2_proto::array::{Array, ArrayError, Dtype};
use tch::{Device, Kind, Tensor};
use tracing::{Span, info_span};

use crate::{
    config::Config,
    error::{LoadError, UnsoundEmbeddings},
    eva_vit::{EvaVit, pool},
    metrics::Metrics,
};

#[cfg(test)]
mod tests;

/// The step engine of the encoder.
pub type Engine = engine::Engine<Encoder<EvaVit>>;

/// The step engine of the encoder while it is loading.
pub type Started = engine::Started<Encoder<EvaVit>, ModelInfo, LoadError>;

/// An image that has been prepared for the model.
#[derive(Debug)]
pub struct PreparedImage {
    /// The pixels that the model sees.
    pub pixels: Pixels,
    /// How many embeddings are wanted: a number that pooling can leave.
    pub n_query: u32,
}

/// The pixels of a prepared image.
#[derive(Debug)]
pub enum Pixels {
    /// Normalised values in row-major order, [3, image_size, image_size].
    Values(Vec<f32>),
    /// The mean colour, which normalises to zeros.
    Mean,
}

/// The embeddings of one image, and how long they took.
#[derive(Debug, PartialEq)]
pub struct Encoded {
    /// The embeddings, [queries, width].
    pub embeddings: Array,
    /// The time from submission to the image's batch.
    pub queued: Duration,
    /// The time of the forward of the image's batch.
    pub took: Duration,
}

/// What the service and its clients have to know of the loaded model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    /// The digest of the weights as they are computed with, 64 hexadecimal digits.
    pub weights_digest: String,
    /// The dtype of embeddings.
    pub dtype: Dtype,
    /// The width of one embedding.
    pub width: usize,
    /// The side of the square that images are resized to, in pixels.
    pub image_size: usize,
    /// How many patches lie along a side of that square.
    pub grid_side: usize,
}

/// A model as the encoder's stage sees it.
pub trait BatchEncoder: 'static {
    /// Encodes a batch of images to embeddings, [queries, width] for each image, in order. An error is the end of its
    /// image alone.
    fn encode(&self, batch: &[PreparedImage]) -> Vec<Result<Array, ArrayError>>;
}

/// The stage of the encoder: a model, and the images that wait for it.
#[derive(Debug)]
pub struct Encoder<M> {
    model: M,
    max_batch: usize,
    line: Line<Waiting>,
    metrics: Metrics,
}

/// An image that waits for its batch.
#[derive(Debug)]
pub struct Waiting {
    ticket: Ticket,
    image: PreparedImage,
    /// The caller's span.
    span: Span,
}

/// Starts the engine's thread, which loads and warms the model, and keeps `progress` at how far the loading is.
pub fn start(config: &Config, progress: Progress, load_metrics: LoadMetrics, metrics: Metrics) -> Started {
    let (dir, devices, cores) = (config.model_dir.clone(), config.devices.clone(), config.cores);
    let max_batch = config.max_batch_images;
    // Every waiting image holds one of max_images, so these places are never what runs out.
    let options = Options { name: "encoder", max_waiting: config.max_images, limit_name: "max_images" };
    let load = move || {
        let (model, info) = load(dir, &devices, progress)?;
        Ok((Encoder::new(model, max_batch, metrics), info))
    };
    engine::Engine::start(options, load_metrics, move || thread::set_up(cores), load)
}

impl<M: BatchEncoder> Encoder<M> {
    fn new(model: M, max_batch: usize, metrics: Metrics) -> Self {
        Self { model, max_batch, line: Line::default(), metrics }
    }
}

impl<M: BatchEncoder> Stage for Encoder<M> {
    const UNITS: &'static [&'static str] = &["image"];
    type Request = PreparedImage;
    type Input = Infallible;
    type Event = Encoded;
    type Error = UnsoundEmbeddings;
    type Work = Vec<Waiting>;

    fn max_events(_: &PreparedImage) -> usize {
        1
    }

    fn join(
        &mut self,
        ticket: Ticket,
        image: PreparedImage,
        Arrival { priority, span }: Arrival,
    ) -> Result<(), UnsoundEmbeddings> {
        self.line.push(priority, Waiting { ticket, image, span });
        Ok(())
    }

    /// Takes the first images of the line, up to a full batch.
    fn plan(&mut self) -> Option<Batch<Vec<Waiting>>> {
        let work: Vec<Waiting> = std::iter::from_fn(|| self.line.pop_front()).take(self.max_batch).collect();
        let tickets: Vec<Ticket> = work.iter().map(|waiting| waiting.ticket).collect();
        let units = work.len() as f64;
        (!work.is_empty()).then_some(Batch { tickets, kind: 0, units, work })
    }

    /// Encodes a batch in one forward.
    fn step(&mut self, work: Vec<Waiting>, outbox: &mut Outbox<'_, Self>) {
        let images = work.len();
        self.metrics.batch_images.observe(images as f64);
        let (batch, callers): (Vec<_>, Vec<_>) = work
            .into_iter()
            .map(|Waiting { ticket, image, span }| {
                let queued = outbox.begin(ticket).unwrap_or_default();
                // Each request's trace shows the batch that its image was in.
                (image, (ticket, queued, info_span!(parent: &span, "encode_batch", images)))
            })
            .unzip();
        let begun = Instant::now();
        let encoded = self.model.encode(&batch);
        let took = begun.elapsed();
        for ((ticket, queued, _span), embeddings) in callers.into_iter().zip(encoded) {
            match embeddings {
                Ok(embeddings) => {
                    self.metrics.encoded.inc();
                    outbox.finish(ticket, Encoded { embeddings, queued, took });
                }
                Err(error) => outbox.fail(ticket, error.into()),
            }
        }
    }

    fn leave(&mut self, ticket: Ticket) {
        self.line.retain(|waiting| waiting.ticket != ticket);
    }

    fn units_left(&self) -> Vec<f64> {
        vec![self.line.len() as f64]
    }
}

impl BatchEncoder for EvaVit {
    fn encode(&self, batch: &[PreparedImage]) -> Vec<Result<Array, ArrayError>> {
        let side = self.config.image_size;
        let pixels: Vec<Tensor> = batch
            .iter()
            .map(|image| match &image.pixels {
                Pixels::Values(values) => Tensor::from_slice(values).view([3, side, side]),
                Pixels::Mean => Tensor::zeros([3, side, side], (Kind::Float, Device::Cpu)),
            })
            .collect();
        let pixels = Tensor::stack(&pixels, 0).to_device(self.device()).to_kind(self.kind());
        let features = self.forward(&pixels);
        let pooled = |(index, image): (usize, &PreparedImage)| {
            let features = features.narrow(0, index as i64, 1);
            array::from_tensor(&pool(&features, self.config.grid_side(), image.n_query).squeeze_dim(0))
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
    let warm = PreparedImage { pixels: Pixels::Mean, n_query: config.n_query };
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
