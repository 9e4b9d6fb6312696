//! The thread that owns the model, and the handle that everyone else has.
//!
//! ```text
//! Engine::submit ─▶ commands (bounded) ─▶ receive ─▶ drop who left ─▶ plan ─▶ one forward ─▶ events, one queue a request
//! ```
//!
//! The thread waits only for commands, and only when there is nothing to compute. It never waits for a caller: a
//! request's event queue has room for everything that the request can produce.

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use emu2_nn::{
    array,
    engine::{Ending, EngineFault, Pulse, guarded, spawn},
};
use emu2_proto::array::Array;
use emu2_serve::priority::Priority;
use tch::Tensor;
use tokio::sync::{mpsc, oneshot};
use tracing::{Span, error, warn};

use crate::{
    error::{EngineError, LoadError},
    kv::KvCache,
    llama::Llama,
    load::{Loaded, ModelConfig, load},
    metrics::Metrics,
    prompt::Prompt,
    scheduler::{Plan, Scheduler, SchedulerLimits, Ticket, Work},
    search::{TextIds, TextParameters},
    sequence::{Progress, Sequence},
    step,
};

/// Commands that may wait for the step that is running; each is a prompt or one picture's embeddings.
const COMMANDS: usize = 256;

/// A prompt to continue.
#[derive(Debug)]
pub struct Request {
    /// Extended by what `resumed` counts: ids of a text, or a last slot for rows of an image.
    pub prompt: Prompt,
    pub output: Output,
    /// Tokens or rows of the output that another replica has given: positions at the prompt's end.
    pub resumed: usize,
    /// The caller's; the stages become its children.
    pub span: Span,
}

#[derive(Clone, Debug)]
pub enum Output {
    Text(TextParameters),
    /// So many embeddings of an image.
    Image {
        queries: usize,
    },
}

impl Output {
    /// Events at most: one for each token or embedding, and the end.
    fn max_events(&self) -> usize {
        1 + match self {
            Self::Text(parameters) => parameters.max_new_tokens,
            Self::Image { queries } => *queries,
        }
    }
}

/// What a request gets: tokens or embeddings in order, then `Finished` or `Failed`.
#[derive(Debug)]
pub enum Event {
    Tokens(Vec<u32>),
    /// `rows`: [1, embedding_width], the `start`-th of the image.
    Embeddings {
        start: usize,
        rows: Array,
    },
    /// `complete`: it ended by itself rather than at `max_new_tokens`.
    Finished {
        complete: bool,
        generated_tokens: usize,
        timings: Timings,
    },
    Failed(EngineError),
}

/// Milliseconds in each stage.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    pub queue_ms: f64,
    pub prefill_ms: f64,
    pub generate_ms: f64,
}

#[derive(Debug)]
enum Command {
    Start {
        ticket: Ticket,
        request: Request,
        priority: Priority,
        events: mpsc::Sender<Event>,
    },
    Embeddings {
        ticket: Ticket,
        slot: usize,
        embeddings: Array,
    },
    /// Some caller left; look for who.
    Left,
}

/// A handle to the engine; the thread ends when all handles and generations are gone.
#[derive(Clone, Debug)]
pub struct Engine {
    commands: mpsc::Sender<Command>,
    tickets: Arc<AtomicU64>,
    pulse: Pulse,
}

/// An engine that is loading.
#[derive(Debug)]
pub struct Started {
    pub engine: Engine,
    /// When the model is warm, or why it never will be.
    pub loaded: oneshot::Receiver<Result<Loaded, LoadError>>,
    /// When a thread that served has ended: its handles are gone, or its device failed.
    pub ended: oneshot::Receiver<()>,
}

impl Engine {
    /// Starts the thread, which loads first.
    pub fn start(config: ModelConfig, metrics: Metrics) -> Started {
        Self::start_on(DEVICE, config, metrics)
    }

    fn start_on(on_device: OnDevice, config: ModelConfig, metrics: Metrics) -> Started {
        let (commands, queue) = mpsc::channel(COMMANDS);
        let (ending, ended) = Ending::channel();
        let (cores, pulse) = (config.cores, Pulse::default());
        let beats = pulse.clone();
        let load = move || load(&config).map(|(model, loaded)| ((model, loaded.clone(), config), loaded));
        let serve = move |(model, loaded, config): (Llama, Loaded, ModelConfig)| {
            let _serving = ending.begin();
            Worker::new(model, &loaded, &config, queue, metrics, on_device).run(&beats);
        };
        let loaded = spawn("llm", cores, load, serve);
        Started { engine: Self { commands, tickets: Arc::default(), pulse }, loaded, ended }
    }

    /// How long the current step has been running; 0 between steps.
    pub fn step_ms(&self) -> u64 {
        self.pulse.step_ms()
    }

    /// Never waits: a full queue is an error.
    pub fn submit(&self, request: Request, priority: Priority) -> Result<Generation, EngineError> {
        let ticket = self.tickets.fetch_add(1, Ordering::Relaxed);
        let (sender, events) = mpsc::channel(request.output.max_events());
        let start = Command::Start { ticket, request, priority, events: sender };
        self.commands.try_send(start).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => EngineError::Busy,
            mpsc::error::TrySendError::Closed(_) => EngineError::Stopped,
        })?;
        Ok(Generation { ticket, events, commands: self.commands.clone() })
    }
}

/// A request in the engine; dropping it takes the request out of the batch before the next step.
#[derive(Debug)]
pub struct Generation {
    ticket: Ticket,
    events: mpsc::Receiver<Event>,
    commands: mpsc::Sender<Command>,
}

impl Generation {
    /// The embeddings of one slot, [len, embedding_width] of the engine's dtype.
    pub async fn place(&self, slot: usize, embeddings: Array) -> Result<(), EngineError> {
        let command = Command::Embeddings { ticket: self.ticket, slot, embeddings };
        self.commands.send(command).await.map_err(|_| EngineError::Stopped)
    }

    /// The next event; none after `Finished` or `Failed`.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.events.close();
        // The engine may be asleep for want of this request's embeddings. With a full queue it is not asleep.
        let _ = self.commands.try_send(Command::Left);
    }
}

/// What a worker asks of its device outside its steps. A test puts what fails in their place.
#[derive(Clone, Copy)]
struct OnDevice {
    place: fn(&Llama, &Array) -> Tensor,
    allocate: fn(&Llama, i64) -> KvCache,
}

const DEVICE: OnDevice = OnDevice {
    place: |model, embeddings| array::to_tensor(embeddings, model.device(), model.kind()),
    allocate: Llama::kv_cache,
};

/// The device does not work any more: the thread must end, and with it the service.
#[derive(Debug)]
struct DeviceLost;

/// What lives on the engine's thread.
struct Worker {
    model: Llama,
    text_ids: TextIds,
    scheduler: Scheduler,
    sequences: BTreeMap<Ticket, Sequence>,
    commands: mpsc::Receiver<Command>,
    kv_entry_bytes: usize,
    metrics: Metrics,
    on_device: OnDevice,
}

impl Worker {
    fn new(
        model: Llama,
        loaded: &Loaded,
        config: &ModelConfig,
        commands: mpsc::Receiver<Command>,
        metrics: Metrics,
        on_device: OnDevice,
    ) -> Self {
        let kv_entry_bytes = model.config().kv_bytes(model.kind());
        let limits = SchedulerLimits {
            kv_entries: loaded.kv_entries,
            prefill_chunk: config.prefill_chunk,
            max_waiting: config.max_waiting,
        };
        metrics.kv_budget.set((loaded.kv_entries * kv_entry_bytes) as i64);
        Self {
            model,
            text_ids: loaded.text_ids,
            scheduler: Scheduler::new(limits),
            sequences: BTreeMap::new(),
            commands,
            kv_entry_bytes,
            metrics,
            on_device,
        }
    }

    fn run(mut self, pulse: &Pulse) {
        if let Err(DeviceLost) = self.serve(pulse) {
            error!(dropped = self.sequences.len(), "device lost, the engine stops");
            self.fail_all(EngineError::Stopped);
        }
    }

    /// Until nobody is left.
    fn serve(&mut self, pulse: &Pulse) -> Result<(), DeviceLost> {
        let mut idle = true;
        while self.receive(idle)? {
            let _beat = pulse.beat();
            idle = self.turn()?;
        }
        Ok(())
    }

    /// Whether there was nothing to do.
    fn turn(&mut self) -> Result<bool, DeviceLost> {
        self.drop_left();
        let plan = self.scheduler.plan();
        let idle = plan.work.is_empty() && plan.admitted.is_empty();
        self.step(plan)?;
        self.report();
        Ok(idle)
    }

    /// Takes every command that has come; waits for one if there is nothing else to do. False when nobody is left.
    fn receive(&mut self, idle: bool) -> Result<bool, DeviceLost> {
        if idle {
            match self.commands.blocking_recv() {
                Some(command) => self.obey(command)?,
                None => return Ok(false),
            }
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.obey(command)?,
                Err(mpsc::error::TryRecvError::Empty) => return Ok(true),
                Err(mpsc::error::TryRecvError::Disconnected) => return Ok(false),
            }
        }
    }

    fn obey(&mut self, command: Command) -> Result<(), DeviceLost> {
        match command {
            Command::Start { ticket, request, priority, events } => {
                let sequence = Sequence::new(request, self.text_ids, events);
                match self.scheduler.submit(ticket, sequence.demand(priority)) {
                    Ok(()) => drop(self.sequences.insert(ticket, sequence)),
                    Err(refusal) => sequence.fail(EngineError::Refused(refusal)),
                }
            }
            Command::Embeddings { ticket, slot, embeddings } => {
                // It may have failed or left since.
                let Some(sequence) = self.sequences.get_mut(&ticket) else { return Ok(()) };
                match guarded(|| (self.on_device.place)(&self.model, &embeddings)) {
                    Ok(embeddings) => {
                        let ready = sequence.place(slot, embeddings);
                        self.scheduler.set_ready(ticket, ready);
                    }
                    Err(fault) => self.suffer([ticket], &fault)?,
                }
            }
            Command::Left => {}
        }
        Ok(())
    }

    /// Whoever's caller left does not see another step.
    fn drop_left(&mut self) {
        let left = self.sequences.iter().filter(|(_, sequence)| sequence.caller_left());
        let left: Vec<Ticket> = left.map(|(&ticket, _)| ticket).collect();
        for ticket in left {
            self.metrics.left.inc();
            self.remove(ticket);
        }
    }

    fn step(&mut self, mut plan: Plan) -> Result<(), DeviceLost> {
        for ticket in plan.admitted {
            // On its own: what does not fit is no reason for anyone else to fail.
            if let Err(fault) = self.admit(ticket) {
                plan.work.remove(&ticket);
                self.suffer([ticket], &fault)?;
            }
        }
        if plan.work.is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        let answers = guarded(|| {
            let working =
                self.sequences.iter_mut().filter_map(|(ticket, it)| Some((it, plan.work.get(ticket)?)));
            let feeds: Vec<_> = working.map(|(sequence, work)| sequence.feed(work)).collect();
            self.metrics.step_rows.observe(feeds.iter().map(|feed| feed.ids.len() as f64).sum());
            step::run(&self.model, feeds)
        });
        match answers {
            Ok(answers) => {
                self.metrics.step_duration.observe(started.elapsed().as_secs_f64());
                for ((&ticket, work), answer) in plan.work.iter().zip(answers) {
                    self.advance(ticket, work, answer)?;
                }
                Ok(())
            }
            // Their caches may hold half a step.
            Err(fault) => self.suffer(plan.work.into_keys(), &fault),
        }
    }

    fn admit(&mut self, ticket: Ticket) -> Result<(), EngineFault> {
        let sequence = self.sequences.get_mut(&ticket).expect("the scheduler admits only the living");
        let entries = sequence.kv_entries() as i64;
        sequence.admit(guarded(|| (self.on_device.allocate)(&self.model, entries))?);
        Ok(())
    }

    fn advance(&mut self, ticket: Ticket, work: &Work, answer: step::Answer) -> Result<(), DeviceLost> {
        let Some(sequence) = self.sequences.get_mut(&ticket) else { return Ok(()) };
        self.metrics.count(work, &answer);
        match guarded(|| sequence.advance(answer)) {
            Ok(Ok(Progress::Continues)) => {}
            Ok(Ok(Progress::Ended)) => self.remove(ticket),
            Ok(Err(error)) => self.fail(ticket, error),
            Err(fault) => self.suffer([ticket], &fault)?,
        }
        Ok(())
    }

    /// Ends the requests that a fault hit; the engine goes on unless the device is lost.
    fn suffer(
        &mut self,
        tickets: impl IntoIterator<Item = Ticket>,
        fault: &EngineFault,
    ) -> Result<(), DeviceLost> {
        error!(%fault, "work failed");
        for ticket in tickets {
            self.fail(ticket, EngineError::from(fault));
        }
        if matches!(fault, EngineFault::Device(_)) { Err(DeviceLost) } else { Ok(()) }
    }

    fn fail(&mut self, ticket: Ticket, error: EngineError) {
        if let Some(sequence) = self.sequences.get(&ticket) {
            warn!(ticket, %error, "request failed");
            sequence.fail(error);
        }
        self.remove(ticket);
    }

    fn fail_all(&mut self, error: EngineError) {
        for ticket in self.sequences.keys().copied().collect::<Vec<_>>() {
            self.fail(ticket, error.clone());
        }
    }

    fn remove(&mut self, ticket: Ticket) {
        self.sequences.remove(&ticket);
        self.scheduler.remove(ticket);
    }

    fn report(&self) {
        self.metrics.running.set(self.scheduler.running() as i64);
        self.metrics.waiting.set(self.scheduler.waiting() as i64);
        self.metrics.kv_reserved.set((self.scheduler.reserved() * self.kv_entry_bytes) as i64);
    }
}
