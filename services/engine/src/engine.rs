//! The handle that a service submits requests to, and the handle of one request.
//!
//! ```text
//! Engine::submit ─▶ commands (bounded) ─▶ Worker: receive ─▶ drop who left ─▶ plan ─▶ step ─▶ events, a queue a
//! request ```

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use emu2_serve::priority::Priority;
use tokio::sync::{mpsc, oneshot};
use tracing::Span;

use crate::{
    error::EngineError,
    load::LoadMetrics,
    stage::{Stage, Ticket, Told},
    thread::{self, EndNotice, StepTimer},
    worker::{Command, Submission, Worker},
};

/// Room in the command queue beyond the requests that may wait: for inputs, and for callers that leave.
const SPARE_COMMANDS: usize = 256;

/// What an engine is called and how many requests may wait for it.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Name of the thread.
    pub name: &'static str,
    /// Requests that may wait for their first step; one more is refused.
    pub max_waiting: usize,
    /// Name of the setting that `max_waiting` comes from, for the refusal.
    pub limit_name: &'static str,
}

/// A handle to an engine. Clones share it; the thread ends when all handles and all requests' handles are gone.
pub struct Engine<S: Stage> {
    commands: mpsc::Sender<Command<S>>,
    tickets: Arc<AtomicU64>,
    options: Options,
    metrics: LoadMetrics,
    timer: StepTimer,
}

impl<S: Stage> Clone for Engine<S> {
    fn clone(&self) -> Self {
        Self {
            commands: self.commands.clone(),
            tickets: Arc::clone(&self.tickets),
            options: self.options,
            metrics: self.metrics.clone(),
            timer: self.timer.clone(),
        }
    }
}

impl<S: Stage> fmt::Debug for Engine<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("options", &self.options).finish_non_exhaustive()
    }
}

/// An engine whose thread has been started and is loading; see `emu2_serve::server::Server::run_engine`.
#[derive(Debug)]
pub struct Started<S: Stage, I, E> {
    /// The handle; requests may be submitted at once, and wait for the load.
    pub engine: Engine<S>,
    /// Tells what the load says of the model once it is warm, or why it never will be.
    pub loaded: oneshot::Receiver<Result<I, E>>,
    /// Tells when a thread that served has ended: its handles are gone, or its device failed.
    pub ended: oneshot::Receiver<()>,
}

impl<S: Stage> Engine<S> {
    /// Starts the thread, which runs `setup`, then `load`, then serves what `load` built (see [`thread::spawn`]).
    pub fn start<G, I, E>(
        options: Options,
        metrics: LoadMetrics,
        setup: impl FnOnce() -> G + Send + 'static,
        load: impl FnOnce() -> Result<(S, I), E> + Send + 'static,
    ) -> Started<S, I, E>
    where
        I: Send + 'static,
        E: Send + 'static,
    {
        let (engine, commands) = Self::with_queue(options, metrics);
        let (notice, ended) = EndNotice::channel();
        let (metrics, timer) = (engine.metrics.clone(), engine.timer.clone());
        let loaded = thread::spawn(options.name, setup, load, move |stage| {
            let _serving = notice.arm();
            Worker::new(stage, commands, metrics, timer).run();
        });
        Started { engine, loaded, ended }
    }

    /// Makes an engine without a thread: whoever holds the worker makes its turns. For tests of a stage.
    pub fn by_hand(options: Options, metrics: LoadMetrics, stage: S) -> (Self, Worker<S>) {
        let (engine, commands) = Self::with_queue(options, metrics);
        let worker = Worker::new(stage, commands, engine.metrics.clone(), engine.timer.clone());
        (engine, worker)
    }

    fn with_queue(options: Options, metrics: LoadMetrics) -> (Self, mpsc::Receiver<Command<S>>) {
        let (commands, queue) = mpsc::channel(options.max_waiting + SPARE_COMMANDS);
        let timer = StepTimer::default();
        (Self { commands, tickets: Arc::default(), options, metrics, timer }, queue)
    }

    /// Milliseconds that the current step has been running; 0 between steps.
    pub fn step_ms(&self) -> u64 {
        self.timer.step_ms()
    }

    pub(crate) fn step_timer(&self) -> StepTimer {
        self.timer.clone()
    }

    /// The engine's load: its measure now, and its changes.
    pub fn load(&self) -> &LoadMetrics {
        &self.metrics
    }

    /// Queues a request. It never waits: where as many are waiting as may, that is the error.
    pub fn submit(
        &self,
        request: S::Request,
        priority: Priority,
    ) -> Result<RequestHandle<S>, EngineError<S::Error>> {
        let Options { max_waiting, limit_name, .. } = self.options;
        let full = EngineError::Full { max: max_waiting, limit_name };
        if !self.metrics.enter(max_waiting) {
            return Err(full);
        }
        let ticket = self.tickets.fetch_add(1, Ordering::Relaxed);
        // Room for the last error too.
        let (sender, events) = mpsc::channel(S::max_events(&request) + 1);
        let (span, queue) = (Span::current(), tracing::info_span!("queue"));
        let submitted = Instant::now();
        let submission = Submission { ticket, request, priority, events: sender, submitted, span, queue };
        self.commands.try_send(Command::Submit(Box::new(submission))).map_err(|error| {
            self.metrics.leave();
            match error {
                mpsc::error::TrySendError::Full(_) => full,
                mpsc::error::TrySendError::Closed(_) => EngineError::Stopped,
            }
        })?;
        Ok(RequestHandle { ticket, events, commands: self.commands.clone() })
    }
}

/// A request in an engine; dropping it takes the request out of the batch before the next step.
pub struct RequestHandle<S: Stage> {
    ticket: Ticket,
    events: mpsc::Receiver<Told<S>>,
    commands: mpsc::Sender<Command<S>>,
}

impl<S: Stage> fmt::Debug for RequestHandle<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestHandle").field("ticket", &self.ticket).finish_non_exhaustive()
    }
}

impl<S: Stage> RequestHandle<S> {
    /// Gives the request what it was still waiting for; waits while the engine's queue is full.
    pub async fn input(&self, input: S::Input) -> Result<(), EngineError<S::Error>> {
        let command = Command::Input { ticket: self.ticket, input };
        self.commands.send(command).await.map_err(|_| EngineError::Stopped)
    }

    /// The next event or the error that the request ended with; none after its end, and none when the engine has ended
    /// without a word.
    pub async fn next(&mut self) -> Option<Told<S>> {
        self.events.recv().await
    }

    /// The next event if it is here already.
    pub fn try_next(&mut self) -> Option<Told<S>> {
        self.events.try_recv().ok()
    }

    /// The next event, from a thread that may block.
    pub fn blocking_next(&mut self) -> Option<Told<S>> {
        self.events.blocking_recv()
    }
}

impl<S: Stage> Drop for RequestHandle<S> {
    fn drop(&mut self) {
        self.events.close();
        // The engine may be asleep for want of this request's input. With a full queue it is not asleep.
        let _ = self.commands.try_send(Command::Left);
    }
}
