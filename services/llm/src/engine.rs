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
    engine::{EngineFault, guarded, spawn},
};
use emu2_proto::array::Array;
use tokio::sync::{mpsc, oneshot};
use tracing::{Span, error, warn};

use crate::{
    error::{EngineError, LoadError},
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
    pub prompt: Prompt,
    pub output: Output,
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
        let (commands, queue) = mpsc::channel(COMMANDS);
        let (report_end, ended) = oneshot::channel();
        let cores = config.cores;
        let load = move || load(&config).map(|(model, loaded)| ((model, loaded.clone(), config), loaded));
        let serve = move |(model, loaded, config): (Llama, Loaded, ModelConfig)| {
            Worker::new(model, &loaded, &config, queue, metrics).run();
            // Whoever started the engine may be gone already.
            let _ = report_end.send(());
        };
        let loaded = spawn("llm", cores, load, serve);
        Started { engine: Self { commands, tickets: Arc::default() }, loaded, ended }
    }

    /// Never waits: a full queue is an error.
    pub fn submit(&self, request: Request) -> Result<Generation, EngineError> {
        let ticket = self.tickets.fetch_add(1, Ordering::Relaxed);
        let (sender, events) = mpsc::channel(request.output.max_events());
        let start = Command::Start { ticket, request, events: sender };
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

/// What lives on the engine's thread.
struct Worker {
    model: Llama,
    text_ids: TextIds,
    scheduler: Scheduler,
    sequences: BTreeMap<Ticket, Sequence>,
    commands: mpsc::Receiver<Command>,
    kv_entry_bytes: usize,
    metrics: Metrics,
}

impl Worker {
    fn new(
        model: Llama,
        loaded: &Loaded,
        config: &ModelConfig,
        commands: mpsc::Receiver<Command>,
        metrics: Metrics,
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
        }
    }

    fn run(mut self) {
        let mut idle = true;
        while self.receive(idle) {
            self.drop_left();
            let plan = self.scheduler.plan();
            idle = plan.work.is_empty();
            if let Err(EngineFault::Device(_)) = self.step(&plan) {
                self.fail_all(EngineError::Stopped);
                return;
            }
            self.report();
        }
    }

    /// Takes every command that has come; waits for one if there is nothing else to do. False when nobody is left.
    fn receive(&mut self, idle: bool) -> bool {
        if idle {
            match self.commands.blocking_recv() {
                Some(command) => self.obey(command),
                None => return false,
            }
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.obey(command),
                Err(mpsc::error::TryRecvError::Empty) => return true,
                Err(mpsc::error::TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Start { ticket, request, events } => {
                let sequence = Sequence::new(request, self.text_ids, events);
                match self.scheduler.submit(ticket, sequence.demand()) {
                    Ok(()) => {
                        self.sequences.insert(ticket, sequence);
                    }
                    Err(refusal) => sequence.fail(EngineError::Refused(refusal)),
                }
            }
            Command::Embeddings { ticket, slot, embeddings } => {
                // It may have failed or left since.
                let Some(sequence) = self.sequences.get_mut(&ticket) else { return };
                let model = &self.model;
                match guarded(|| array::to_tensor(&embeddings, model.device(), model.kind())) {
                    Ok(embeddings) => {
                        let ready = sequence.place(slot, embeddings);
                        self.scheduler.set_ready(ticket, ready);
                    }
                    Err(fault) => self.fail(ticket, EngineError::from(&fault)),
                }
            }
            Command::Left => {}
        }
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

    fn step(&mut self, plan: &Plan) -> Result<(), EngineFault> {
        if plan.work.is_empty() && plan.admitted.is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        let answers = guarded(|| {
            for ticket in &plan.admitted {
                let sequence = self.sequences.get_mut(ticket).expect("the scheduler admits only the living");
                sequence.admit(self.model.kv_cache(sequence.kv_entries() as i64));
            }
            let working =
                self.sequences.iter_mut().filter_map(|(ticket, it)| Some((it, plan.work.get(ticket)?)));
            let feeds: Vec<_> = working.map(|(sequence, work)| sequence.feed(work)).collect();
            self.metrics.step_rows.observe(feeds.iter().map(|feed| feed.ids.len() as f64).sum());
            if feeds.is_empty() { Vec::new() } else { step::run(&self.model, feeds) }
        });
        match answers {
            Ok(answers) => {
                self.metrics.step_duration.observe(started.elapsed().as_secs_f64());
                for ((&ticket, work), answer) in plan.work.iter().zip(answers) {
                    self.advance(ticket, work, answer);
                }
                Ok(())
            }
            Err(fault) => {
                error!(%fault, sequences = plan.work.len(), "step failed");
                // Their caches may hold half a step; a sequence that was admitted may have none.
                for &ticket in plan.work.keys().chain(&plan.admitted) {
                    self.fail(ticket, EngineError::from(&fault));
                }
                Err(fault)
            }
        }
    }

    fn advance(&mut self, ticket: Ticket, work: &Work, answer: step::Answer) {
        let Some(sequence) = self.sequences.get_mut(&ticket) else { return };
        self.metrics.count(work, &answer);
        match sequence.advance(answer) {
            Ok(Progress::Continues) => {}
            Ok(Progress::Ended) => self.remove(ticket),
            Err(error) => self.fail(ticket, error),
        }
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
