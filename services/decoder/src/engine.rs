//! The thread that owns the model. The unit of scheduling is one denoising step: requests of one size join and leave
//! the batch at any step, each with its own schedule, guidance and seed.
//!
//! One turn: take what has arrived, let go of whoever's caller has left, one denoising step of the batch whose turn
//! it is, then the pixels of at most one finished image, so that a row of large images does not stop everybody
//! else's steps.

use std::time::{Duration, Instant};

use emu2_nn::{
    checkpoint::{ModelDir, Part, Progress},
    device,
    engine::{Ending, EngineFault, Pulse, guarded, spawn},
};
use emu2_serve::priority::{Priority, Standing};
use tokio::sync::{mpsc, oneshot};
use tracing::Span;

use crate::{
    config::Config,
    denoise::{BatchShape, ModelInfo, PaintRequest, Painter, Picture, Sample},
    error::{LoadError, PaintError},
    metrics::Metrics,
    turns::{self, Demand, Turns},
};

#[cfg(test)]
mod tests;

/// How much a new step counts in the pace: about the last ten.
const PACE_WEIGHT: f64 = 0.1;

/// What the engine tells of a request: each of its steps, then how it ended.
#[derive(Debug, PartialEq)]
pub enum Event {
    /// Steps done.
    Step(usize),
    Painted(Painted),
    Failed(PaintError),
}

/// A finished image and where its time went.
#[derive(Debug, PartialEq)]
pub struct Painted {
    pub picture: Picture,
    /// From submission to the first step.
    pub queue: Duration,
    /// From the first step to the last, other batches' steps in between included.
    pub denoise: Duration,
    /// From the last step to the pixels, the wait for them included.
    pub vae: Duration,
}

/// How requests reach the engine; it stops once every clone is dropped.
#[derive(Clone, Debug)]
pub struct Engine {
    jobs: mpsc::Sender<Job>,
    pulse: Pulse,
}

/// An engine that has been started.
#[derive(Debug)]
pub struct Started {
    pub engine: Engine,
    pub loaded: oneshot::Receiver<Result<ModelInfo, LoadError>>,
    /// Told when the thread has let go of a model that it served.
    pub ended: oneshot::Receiver<()>,
}

#[derive(Debug)]
struct Job {
    request: PaintRequest,
    standing: Standing,
    events: mpsc::Sender<Event>,
    submitted: Instant,
    /// The caller's, and the queue's as its child.
    span: Span,
    queue: Span,
}

/// Starts the thread, which loads the model and runs one small image through it; `progress` is told how far it is.
pub fn start(config: &Config, progress: Progress, metrics: Metrics) -> Started {
    // Everything admitted fits, so a full queue means requests whose callers have left but that have not been let
    // go of yet.
    let (jobs, queue) = mpsc::channel(config.server.max_requests);
    let (ending, ended) = Ending::channel();
    let pulse = Pulse::default();
    let beats = pulse.clone();
    let max_batch_pixels = config.max_batch_pixels;
    let (model_dir, devices) = (config.model_dir.clone(), config.devices.clone());
    let load = move || {
        let device = device::open(&devices)?[0];
        let kind = device::compute_kind(device);
        let dir = ModelDir::open_with(&model_dir, progress)?;
        dir.prepare(&[Part::Unet, Part::Vae], device, kind)?;
        let (painter, info) = Painter::load(&dir, device, kind)?;
        guarded(|| painter.warm_up())?;
        Ok((painter, info))
    };
    let serve = move |painter| {
        let _serving = ending.begin();
        Worker::new(painter, queue, max_batch_pixels, metrics).run(&beats);
    };
    Started {
        engine: Engine { jobs, pulse },
        loaded: spawn("decoder-engine", config.cores, load, serve),
        ended,
    }
}

impl Engine {
    /// How long the current step has been running; 0 between steps.
    pub fn step_ms(&self) -> u64 {
        self.pulse.step_ms()
    }

    /// Queues a request that has been checked. Dropping the receiver takes it out again within one step.
    pub fn submit(
        &self,
        request: PaintRequest,
        priority: Priority,
    ) -> Result<mpsc::Receiver<Event>, PaintError> {
        // Room for every event that there can be: telling never waits, however slowly they are read.
        let (events, receiver) = mpsc::channel(request.steps + 1);
        let (span, queue) = (Span::current(), tracing::info_span!("queue"));
        let standing = Standing::new(priority);
        let job = Job { request, standing, events, submitted: Instant::now(), span, queue };
        self.jobs.try_send(job).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => PaintError::Full,
            mpsc::error::TrySendError::Closed(_) => PaintError::Stopped,
        })?;
        Ok(receiver)
    }
}

/// A request that the engine holds.
#[derive(Debug)]
struct Active {
    sample: Sample,
    standing: Standing,
    events: mpsc::Sender<Event>,
    /// The caller's.
    span: Span,
    /// Of the stage that it is in; replacing it ends it.
    stage: Span,
    submitted: Instant,
    first_step: Option<Instant>,
    last_step: Option<Instant>,
}

/// The device does not work any more: the thread must end, and with it the service.
#[derive(Debug)]
struct DeviceLost;

/// The engine's state on its thread.
struct Worker {
    painter: Painter,
    jobs: mpsc::Receiver<Job>,
    /// Oldest first, higher classes before lower ones that have not begun.
    active: Vec<Active>,
    turns: Turns<BatchShape>,
    /// Seconds of one step for one pixel of one row.
    pace: f64,
    metrics: Metrics,
}

impl Worker {
    fn new(painter: Painter, jobs: mpsc::Receiver<Job>, max_batch_pixels: u64, metrics: Metrics) -> Self {
        Self { painter, jobs, active: Vec::new(), turns: Turns::new(max_batch_pixels), pace: 0.0, metrics }
    }

    /// Until the queue is closed and everything is painted, or the device is lost.
    fn run(mut self, pulse: &Pulse) {
        while self.wait() {
            let _beat = pulse.beat();
            if self.turn().is_err() {
                tracing::error!(dropped = self.active.len(), "device lost, the engine stops");
                return;
            }
        }
    }

    /// Sleeps while there is nothing to do; false when there never will be.
    fn wait(&mut self) -> bool {
        if !self.active.is_empty() {
            return true;
        }
        self.metrics.backlog.set(0.0);
        match self.jobs.blocking_recv() {
            // A device that fails here fails in the turn as well.
            Some(job) => self.admit(job).is_ok(),
            None => false,
        }
    }

    fn turn(&mut self) -> Result<(), DeviceLost> {
        while let Ok(job) = self.jobs.try_recv() {
            self.admit(job)?;
        }
        self.let_go();
        self.denoise()?;
        self.paint_one()?;
        self.tell_load();
        Ok(())
    }

    fn admit(&mut self, job: Job) -> Result<(), DeviceLost> {
        let Job { request, standing, events, submitted, span, queue } = job;
        match guarded(|| self.painter.start(&request)) {
            Ok(sample) => {
                let (stage, first_step, last_step) = (queue, None, None);
                let waits_alike =
                    |other: &Active| other.sample.shape == sample.shape && other.first_step.is_none();
                let place =
                    turns::place(&mut self.active, standing, waits_alike, |other| &mut other.standing);
                let active =
                    Active { sample, standing, events, span, stage, submitted, first_step, last_step };
                self.active.insert(place, active);
                Ok(())
            }
            Err(fault) => self.fail(&[events], fault),
        }
    }

    /// Those whose caller has left take no further step.
    fn let_go(&mut self) {
        let held = self.active.len();
        self.active.retain(|active| !active.events.is_closed());
        self.metrics.abandoned.inc_by((held - self.active.len()) as u64);
    }

    /// One step of the batch whose turn it is.
    fn denoise(&mut self) -> Result<(), DeviceLost> {
        let unfinished: Vec<_> =
            self.active.iter_mut().filter(|active| active.sample.steps_left() > 0).collect();
        let demand =
            |active: &&mut Active| Demand { shape: active.sample.shape, pixels: active.sample.pixels };
        let chosen = self.turns.next(&unfinished.iter().map(demand).collect::<Vec<_>>());
        if chosen.is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        let mut batch: Vec<&mut Active> = Vec::with_capacity(chosen.len());
        for (position, active) in unfinished.into_iter().enumerate() {
            if chosen.contains(&position) {
                active.begin(started, &self.metrics);
                batch.push(active);
            }
        }
        let mut samples: Vec<_> = batch.iter_mut().map(|active| &mut active.sample).collect();
        let stepped = guarded(|| self.painter.step(&mut samples));
        if let Err(fault) = stepped {
            let failed: Vec<_> = batch.iter().map(|active| active.events.clone()).collect();
            return self.fail(&failed, fault);
        }
        let (rows, pixels) = batch.iter().fold((0, 0), |(rows, pixels), active| {
            (rows + active.sample.rows(), pixels + active.sample.pixels)
        });
        batch.iter_mut().for_each(|active| active.progress());
        self.metrics.batch_rows.observe(rows as f64);
        self.metrics.steps.inc_by(batch.len() as u64);
        self.measure(started.elapsed(), pixels);
        Ok(())
    }

    /// The pixels of the image that has waited longest for them.
    fn paint_one(&mut self) -> Result<(), DeviceLost> {
        let Some(position) = self.active.iter().position(|active| active.sample.steps_left() == 0) else {
            return Ok(());
        };
        let active = self.active.remove(position);
        if active.events.is_closed() {
            self.metrics.abandoned.inc();
            return Ok(());
        }
        let started = Instant::now();
        let picture = match guarded(|| self.painter.picture(&active.sample)) {
            Ok(picture) => picture,
            Err(fault) => return self.fail(&[active.events], fault),
        };
        self.metrics.vae.observe(started.elapsed().as_secs_f64());
        let event = match picture {
            Some(picture) => {
                self.metrics.images.inc();
                Event::Painted(active.painted(picture))
            }
            None => {
                self.metrics.failed.inc();
                Event::Failed(PaintError::NotFinite)
            }
        };
        active.tell(event);
        Ok(())
    }

    /// Ends those requests; the engine goes on unless the device is lost.
    fn fail(&mut self, failed: &[mpsc::Sender<Event>], fault: EngineFault) -> Result<(), DeviceLost> {
        tracing::error!(requests = failed.len(), %fault, "batch failed");
        self.metrics.failed.inc_by(failed.len() as u64);
        for events in failed {
            self.active.retain(|active| !active.events.same_channel(events));
            let _ = events.try_send(Event::Failed(PaintError::Fault(fault.clone())));
        }
        if matches!(fault, EngineFault::Device(_)) { Err(DeviceLost) } else { Ok(()) }
    }

    fn measure(&mut self, step: Duration, pixels: u64) {
        let seconds = step.as_secs_f64();
        self.metrics.denoise_step.observe(seconds);
        let pace = seconds / pixels as f64;
        self.pace = if self.pace == 0.0 { pace } else { self.pace + PACE_WEIGHT * (pace - self.pace) };
    }

    fn tell_load(&self) {
        let work = |active: &Active| active.sample.steps_left() as f64 * active.sample.pixels as f64;
        self.metrics.backlog.set(self.pace * self.active.iter().map(work).sum::<f64>());
        self.metrics.active.set(self.active.len() as i64);
    }
}

impl Active {
    /// The first step ends the wait.
    fn begin(&mut self, now: Instant, metrics: &Metrics) {
        if self.first_step.is_none() {
            self.first_step = Some(now);
            metrics.queue_wait.observe((now - self.submitted).as_secs_f64());
            let steps = self.sample.steps_left();
            self.stage = tracing::info_span!(parent: &self.span, "denoise_steps", steps);
        }
    }

    /// A step is done.
    fn progress(&mut self) {
        if self.sample.steps_left() == 0 {
            self.last_step = Some(Instant::now());
            self.stage = tracing::info_span!(parent: &self.span, "vae");
        }
        self.tell(Event::Step(self.sample.steps_done()));
    }

    fn painted(&self, picture: Picture) -> Painted {
        let done = Instant::now();
        let first_step = self.first_step.unwrap_or(done);
        let last_step = self.last_step.unwrap_or(done);
        Painted {
            picture,
            queue: first_step - self.submitted,
            denoise: last_step - first_step,
            vae: done - last_step,
        }
    }

    /// The channel has room for every event, so this fails only when the caller has left, which the next turn sees.
    fn tell(&self, event: Event) {
        let _ = self.events.try_send(event);
    }
}
