//! What a model's stage implements, and the outbox that its steps write to.

use std::{
    collections::BTreeMap,
    fmt::{Debug, Display},
    time::{Duration, Instant},
};

use emu2_serve::priority::Priority;
use tokio::sync::mpsc;
use tracing::{Span, error, warn};

use crate::{
    error::{EngineError, EngineFault},
    load::LoadMetrics,
};

/// The name of a request within its engine; later requests have greater ones.
pub type Ticket = u64;

/// What an event queue of a request carries.
pub(crate) type Told<S> = Result<<S as Stage>::Event, EngineError<<S as Stage>::Error>>;

/// A model and the requests that it is working on, as the engine's loop drives them.
///
/// All methods run on the engine's thread. A panic in `join`, `input` or `step` fails the requests that it was for and
/// nobody else, unless it says that the device has failed.
pub trait Stage: Sized + 'static {
    /// The kinds of units that work is counted in, by name; each has a pace of its own.
    const UNITS: &'static [&'static str];
    /// What is asked.
    type Request: Debug + Send;
    /// What a request is given later; `Infallible` where nothing is.
    type Input: Debug + Send;
    /// What a request is told.
    type Event: Debug + Send;
    /// Why the stage refuses or fails a request.
    type Error: Clone + Debug + Display + Send;
    /// What one step does.
    type Work;

    /// The most events that `request` can be told, its last included: so much room its queue gets, and telling never
    /// waits, however slowly events are read.
    fn max_events(request: &Self::Request) -> usize;

    /// Takes a request in, or refuses it.
    fn join(&mut self, ticket: Ticket, request: Self::Request, arrival: Arrival) -> Result<(), Self::Error>;

    /// Takes what a request was still waiting for. A ticket that has left is never named.
    fn input(&mut self, _ticket: Ticket, input: Self::Input) {
        drop(input);
    }

    /// Chooses the next step; none when nothing can be done before another request or input comes. What was planned is
    /// taken as done: whatever fails in it is told to leave.
    fn plan(&mut self) -> Option<Batch<Self::Work>>;

    /// Computes a step and tells what came of it.
    fn step(&mut self, work: Self::Work, outbox: &mut Outbox<'_, Self>);

    /// Forgets a request that is over: it finished, failed, or its caller left. One whose `join` panicked is named too,
    /// since it may be half in.
    fn leave(&mut self, ticket: Ticket);

    /// Units of work left over all requests, one number for each of [`Stage::UNITS`].
    fn units_left(&self) -> Vec<f64>;

    /// Positions of keys and values that no request has reserved; none in a stage without keys and values.
    fn free_positions(&self) -> Option<usize> {
        None
    }
}

/// How a request came.
#[derive(Debug)]
pub struct Arrival {
    /// The request's class.
    pub priority: Priority,
    /// The caller's span: spans of the stage become its children.
    pub span: Span,
}

/// One step of the engine.
#[derive(Debug)]
pub struct Batch<W> {
    /// The requests that take part; a panic in the step fails all of them.
    pub tickets: Vec<Ticket>,
    /// Index into [`Stage::UNITS`] of the units that the step is measured in.
    pub kind: usize,
    /// Units that the step does.
    pub units: f64,
    /// What the step does.
    pub work: W,
}

/// The engine's side of a request.
#[derive(Debug)]
pub(crate) struct Entry<S: Stage> {
    pub(crate) events: mpsc::Sender<Told<S>>,
    submitted: Instant,
    /// From submission to the first step; none from then on.
    queue: Option<Span>,
}

/// The requests of an engine, by ticket.
#[derive(Debug)]
pub(crate) struct Entries<S: Stage> {
    entries: BTreeMap<Ticket, Entry<S>>,
    metrics: LoadMetrics,
}

impl<S: Stage> Entries<S> {
    pub(crate) fn new(metrics: LoadMetrics) -> Self {
        Self { entries: BTreeMap::new(), metrics }
    }

    pub(crate) fn insert(
        &mut self,
        ticket: Ticket,
        events: mpsc::Sender<Told<S>>,
        submitted: Instant,
        queue: Span,
    ) {
        self.entries.insert(ticket, Entry { events, submitted, queue: Some(queue) });
    }

    pub(crate) fn contains(&self, ticket: Ticket) -> bool {
        self.entries.contains_key(&ticket)
    }

    pub(crate) fn tickets(&self) -> Vec<Ticket> {
        self.entries.keys().copied().collect()
    }

    /// Requests whose caller has left.
    pub(crate) fn left(&self) -> Vec<Ticket> {
        let left = self.entries.iter().filter(|(_, entry)| entry.events.is_closed());
        left.map(|(&ticket, _)| ticket).collect()
    }

    pub(crate) fn running(&self) -> usize {
        self.entries.values().filter(|entry| entry.queue.is_none()).count()
    }

    /// Takes a request out; one that never began gives its place to wait back.
    pub(crate) fn remove(&mut self, ticket: Ticket) -> Option<Entry<S>> {
        let entry = self.entries.remove(&ticket)?;
        if entry.queue.is_some() {
            self.metrics.leave();
        }
        Some(entry)
    }
}

/// Where a step tells what came of it. A ticket that is over already is passed over.
#[derive(Debug)]
pub struct Outbox<'a, S: Stage> {
    entries: &'a mut Entries<S>,
    /// Requests that are over, for the stage to forget.
    pub(crate) over: Vec<Ticket>,
    pub(crate) device_lost: bool,
}

impl<'a, S: Stage> Outbox<'a, S> {
    pub(crate) fn new(entries: &'a mut Entries<S>) -> Self {
        Self { entries, over: Vec::new(), device_lost: false }
    }

    /// Ends a request's wait: its first step is this one. Returns how long it has waited, at its first call; later
    /// calls change nothing.
    pub fn begin(&mut self, ticket: Ticket) -> Option<Duration> {
        let entry = self.entries.entries.get_mut(&ticket)?;
        entry.queue.take()?;
        let waited = entry.submitted.elapsed();
        self.entries.metrics.begin(waited);
        Some(waited)
    }

    /// Tells a request something; more will come.
    pub fn send(&mut self, ticket: Ticket, event: S::Event) {
        if let Some(entry) = self.entries.entries.get(&ticket) {
            // The queue has room for all that a request can be told, so this fails only when the caller has left,
            // which is seen before the next step.
            let _ = entry.events.try_send(Ok(event));
        }
    }

    /// Tells a request the last that it will hear.
    pub fn finish(&mut self, ticket: Ticket, event: S::Event) {
        self.end(ticket, Ok(event));
    }

    /// Ends a request with an error of the stage.
    pub fn fail(&mut self, ticket: Ticket, error: S::Error) {
        self.fail_with(ticket, EngineError::Stage(error));
    }

    /// Ends a request that `fault` hit. Its text goes to the log alone.
    pub fn fault(&mut self, ticket: Ticket, fault: &EngineFault) {
        error!(ticket, %fault, "work failed");
        self.device_lost |= matches!(fault, EngineFault::Device(_));
        if self.entries.contains(ticket) {
            self.entries.metrics.fail();
            self.end(ticket, Err(EngineError::from(fault)));
        }
    }

    pub(crate) fn fail_with(&mut self, ticket: Ticket, error: EngineError<S::Error>) {
        warn!(ticket, %error, "request failed");
        self.end(ticket, Err(error));
    }

    fn end(&mut self, ticket: Ticket, told: Told<S>) {
        if let Some(entry) = self.entries.remove(ticket) {
            let _ = entry.events.try_send(told);
            self.over.push(ticket);
        }
    }
}
