//! Denoising on the step engine. The unit of scheduling is one denoising step: requests of one size join and leave the
//! batch at any step, each with its own schedule, guidance and seed.
//!
//! After a denoising step come the pixels of at most one finished image, so that a row of large images does not stop
//! everybody else's steps.

use std::{
    convert::Infallible,
    time::{Duration, Instant},
};

use emu2_engine::{
    engine::{self, Options},
    error::guarded,
    line::Line,
    load::LoadMetrics,
    stage::{Arrival, Batch, Outbox, Stage, Ticket},
};
use emu2_nn::{
    checkpoint::{ModelDir, Part, Progress},
    device, thread,
};
use tracing::{Span, info_span};

use crate::{
    config::Config,
    denoise::{BatchShape, DenoiseRequest, DiffusionPipeline, ModelInfo, RgbImage, Sample},
    error::{LatentsNotFinite, LoadError},
    metrics::Metrics,
    scheduler::{Demand, StepScheduler},
};

#[cfg(test)]
mod tests;

/// The step engine of the decoder.
pub type Engine = engine::Engine<Decoder>;

/// The step engine of the decoder while it is loading.
pub type Started = engine::Started<Decoder, ModelInfo, LoadError>;

/// What a request is told: each of its steps, then its image.
#[derive(Debug, PartialEq)]
pub enum Event {
    /// How many steps are done now.
    Step(usize),
    /// The image; nothing comes after it.
    Finished(FinishedImage),
}

/// A finished image, and where its time went.
#[derive(Debug, PartialEq)]
pub struct FinishedImage {
    /// The image.
    pub image: RgbImage,
    /// Time from submission to the first step.
    pub queue: Duration,
    /// Time from the first step to the last, other batches' steps in between included.
    pub denoise: Duration,
    /// Time from the last step to the pixels, the wait for them included.
    pub vae: Duration,
}

/// The decoder's stage: the pipeline, and the requests that it works on.
#[derive(Debug)]
pub struct Decoder {
    pipeline: DiffusionPipeline,
    /// Oldest first, higher classes before lower ones that have not begun.
    active: Line<Active>,
    scheduler: StepScheduler<BatchShape>,
    /// Whether the last step denoised, so that an image's pixels may be next.
    denoised: bool,
    metrics: Metrics,
}

/// A request that the stage holds.
#[derive(Debug)]
struct Active {
    ticket: Ticket,
    sample: Sample,
    /// The caller's span.
    span: Span,
    /// The span of the stage that the request is in; replacing it ends it.
    stage: Span,
    queue: Duration,
    first_step: Option<Instant>,
    last_step: Option<Instant>,
}

/// The work of one step of the engine.
#[derive(Debug)]
pub enum Work {
    /// A denoising step of these requests, all of one shape.
    Denoise(Vec<Ticket>),
    /// The pixels of one request's image.
    Vae(Ticket),
}

/// The index in [`Decoder::UNITS`] of pixels times denoising steps.
const DENOISE: usize = 0;
/// The index in [`Decoder::UNITS`] of pixels to be decoded from latents.
const VAE: usize = 1;

/// Starts the engine's thread, which loads the model and generates one small image with it, and keeps `progress` at how
/// far the loading is.
pub fn start(config: &Config, progress: Progress, load_metrics: LoadMetrics, metrics: Metrics) -> Started {
    let (model_dir, devices, cores) = (config.model_dir.clone(), config.devices.clone(), config.cores);
    let max_batch_pixels = config.max_batch_pixels;
    let max_waiting = config.server.max_requests;
    // Every waiting request holds one of max_requests, so these places are never what runs out.
    let options = Options { name: "decoder", max_waiting, limit_name: "server.max_requests" };
    let load = move || {
        let device = device::open(&devices)?[0];
        let kind = device::compute_kind(device);
        let dir = ModelDir::open_with(&model_dir, progress)?;
        dir.prepare(&[Part::Unet, Part::Vae], device, kind)?;
        let (pipeline, info) = DiffusionPipeline::load(&dir, device, kind)?;
        guarded(|| pipeline.warm_up())?;
        Ok((Decoder::new(pipeline, max_batch_pixels, metrics), info))
    };
    engine::Engine::start(options, load_metrics, move || thread::set_up(cores), load)
}

impl Decoder {
    fn new(pipeline: DiffusionPipeline, max_batch_pixels: u64, metrics: Metrics) -> Self {
        let scheduler = StepScheduler::new(max_batch_pixels);
        Self { pipeline, active: Line::default(), scheduler, denoised: false, metrics }
    }

    /// Returns the request that has waited longest for its pixels.
    fn denoised_first(&self) -> Option<&Active> {
        self.active.iter().find(|active| active.sample.steps_left() == 0)
    }

    /// Plans a batch of those that take the next denoising step.
    fn plan_denoise(&mut self) -> Option<Batch<Work>> {
        let unfinished: Vec<&Active> =
            self.active.iter().filter(|active| active.sample.steps_left() > 0).collect();
        let demand = |active: &&Active| Demand { shape: active.sample.shape, pixels: active.sample.pixels };
        let chosen = self.scheduler.next(&unfinished.iter().map(demand).collect::<Vec<_>>());
        let tickets: Vec<Ticket> = chosen.iter().map(|&position| unfinished[position].ticket).collect();
        let units = chosen.iter().map(|&position| unfinished[position].sample.pixels as f64).sum();
        let work = Work::Denoise(tickets.clone());
        (!tickets.is_empty()).then_some(Batch { tickets, kind: DENOISE, units, work })
    }

    fn plan_vae(&self) -> Option<Batch<Work>> {
        let Active { ticket, sample, .. } = self.denoised_first()?;
        let units = sample.image_pixels() as f64;
        Some(Batch { tickets: vec![*ticket], kind: VAE, units, work: Work::Vae(*ticket) })
    }

    fn denoise(&mut self, tickets: &[Ticket], outbox: &mut Outbox<'_, Self>) {
        let started = Instant::now();
        let batch = self.active.iter_mut().filter(|active| tickets.contains(&active.ticket));
        let mut batch: Vec<&mut Active> = batch.collect();
        for active in &mut batch {
            if let Some(waited) = outbox.begin(active.ticket) {
                active.begin(started, waited);
            }
        }
        let mut samples: Vec<_> = batch.iter_mut().map(|active| &mut active.sample).collect();
        self.pipeline.step(&mut samples);
        let rows: usize = batch.iter().map(|active| active.sample.rows()).sum();
        self.metrics.batch_rows.observe(rows as f64);
        self.metrics.steps.inc_by(batch.len() as u64);
        self.metrics.denoise_step.observe(started.elapsed().as_secs_f64());
        for active in batch {
            active.step_done();
            outbox.send(active.ticket, Event::Step(active.sample.steps_done()));
        }
    }

    fn decode(&mut self, ticket: Ticket, outbox: &mut Outbox<'_, Self>) {
        let Some(active) = self.active.iter().find(|active| active.ticket == ticket) else { return };
        let started = Instant::now();
        let image = self.pipeline.image(&active.sample);
        self.metrics.vae.observe(started.elapsed().as_secs_f64());
        match image {
            Some(image) => {
                self.metrics.images.inc();
                outbox.finish(ticket, Event::Finished(active.finished(image)));
            }
            None => outbox.fail(ticket, LatentsNotFinite),
        }
    }
}

impl Stage for Decoder {
    const UNITS: &'static [&'static str] = &["denoised_pixel", "decoded_pixel"];
    type Request = DenoiseRequest;
    type Input = Infallible;
    type Event = Event;
    type Error = LatentsNotFinite;
    type Work = Work;

    fn max_events(request: &DenoiseRequest) -> usize {
        request.steps + 1
    }

    fn join(
        &mut self,
        ticket: Ticket,
        request: DenoiseRequest,
        Arrival { priority, span }: Arrival,
    ) -> Result<(), LatentsNotFinite> {
        let sample = self.pipeline.start(&request);
        let (shape, queue, stage) = (sample.shape, Duration::ZERO, Span::none());
        let active = Active { ticket, sample, span, stage, queue, first_step: None, last_step: None };
        let waits_alike = |other: &Active| other.sample.shape == shape && other.first_step.is_none();
        self.active.push_among(priority, active, waits_alike);
        Ok(())
    }

    fn plan(&mut self) -> Option<Batch<Work>> {
        let pixels = if self.denoised { self.plan_vae() } else { None };
        let batch = pixels.or_else(|| self.plan_denoise()).or_else(|| self.plan_vae())?;
        self.denoised = matches!(batch.work, Work::Denoise(_));
        Some(batch)
    }

    fn step(&mut self, work: Work, outbox: &mut Outbox<'_, Self>) {
        match work {
            Work::Denoise(tickets) => self.denoise(&tickets, outbox),
            Work::Vae(ticket) => self.decode(ticket, outbox),
        }
    }

    fn leave(&mut self, ticket: Ticket) {
        self.active.retain(|active| active.ticket != ticket);
    }

    fn units_left(&self) -> Vec<f64> {
        let denoise = |active: &Active| active.sample.steps_left() as f64 * active.sample.pixels as f64;
        let vae = |active: &Active| active.sample.image_pixels() as f64;
        vec![self.active.iter().map(denoise).sum(), self.active.iter().map(vae).sum()]
    }
}

impl Active {
    /// Records that the request's first step begins at `now`.
    fn begin(&mut self, now: Instant, waited: Duration) {
        self.first_step = Some(now);
        self.queue = waited;
        let steps = self.sample.steps_left();
        self.stage = info_span!(parent: &self.span, "denoise_steps", steps);
    }

    fn step_done(&mut self) {
        if self.sample.steps_left() == 0 {
            self.last_step = Some(Instant::now());
            self.stage = info_span!(parent: &self.span, "vae");
        }
    }

    fn finished(&self, image: RgbImage) -> FinishedImage {
        let done = Instant::now();
        let first_step = self.first_step.unwrap_or(done);
        let last_step = self.last_step.unwrap_or(done);
        FinishedImage { image, queue: self.queue, denoise: last_step - first_step, vae: done - last_step }
    }
}
