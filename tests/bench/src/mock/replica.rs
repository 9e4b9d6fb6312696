//! What the three mock stages share: a queue that is served at a set pace, steps that all running calls make
//! together, counts, and the end of a call whose caller has left.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use emu2_proto::stage::Load;
use emu2_serve::{
    deadline::Deadline,
    status,
    stream::{self, Events, Sender},
};
use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::{
    sync::{Mutex as Queue, Semaphore, SemaphorePermit, watch},
    time::{Instant, sleep_until},
};
use tonic::{Response, Status};

use super::options::{Options, milliseconds};

/// Events of one call that wait for its caller.
const WAITING_EVENTS: usize = 64;

/// The time between two reports of the load, as in real stages.
const REPORT_INTERVAL: Duration = Duration::from_millis(50);

pub(super) struct Replica {
    pub(super) options: Options,
    counts: Counts,
    /// When the work ahead of a new piece is done. The lock is fair: it is the queue.
    free_at: Queue<Instant>,
    rows: Semaphore,
    /// The load as a real stage tells it.
    load: watch::Sender<Load>,
    jitter: Mutex<StdRng>,
}

/// What `/metrics` tells of a mock stage, beside what every server does.
#[derive(Default)]
struct Counts {
    calls: Counter,
    running: Gauge,
    whole: Counter,
    cancelled: Counter,
}

/// The drift-free clock of one call's steps.
pub(super) struct Steps<'a> {
    held: Held<'a>,
    last: Instant,
    _row: SemaphorePermit<'a>,
}

/// Work that counts as load until it is done or given up.
struct Held<'a> {
    replica: &'a Replica,
    has_begun: bool,
    seconds: f64,
}

impl Replica {
    pub(super) fn new(options: Options, registry: &mut Registry) -> Self {
        let counts = Counts::default();
        registry.register("emu2_mock_calls", "Calls that have begun", counts.calls.clone());
        registry.register("emu2_mock_running_calls", "Calls that run now", counts.running.clone());
        registry.register(
            "emu2_mock_whole_calls",
            "Calls that ended with their result",
            counts.whole.clone(),
        );
        registry.register("emu2_mock_cancelled_calls", "Calls whose caller left", counts.cancelled.clone());
        Self {
            counts,
            free_at: Queue::new(Instant::now()),
            rows: Semaphore::new(options.rows),
            load: watch::Sender::default(),
            jitter: Mutex::new(StdRng::seed_from_u64(options.jitter_seed)),
            options,
        }
    }

    fn jittered(&self, cost_ms: f64) -> Duration {
        let jitter = self.options.jitter;
        let factor = if jitter > 0.0 {
            let mut random = self.jitter.lock().unwrap_or_else(PoisonError::into_inner);
            random.random_range(1.0 - jitter..1.0 + jitter)
        } else {
            1.0
        };
        milliseconds(cost_ms * factor)
    }

    /// Waits for its turn, then for its cost. Who leaves while waiting costs nothing.
    pub(super) async fn work(&self, cost_ms: f64) {
        if cost_ms <= 0.0 {
            return;
        }
        let mut held = self.hold(cost_ms / 1e3);
        let arrived = Instant::now();
        let mut free_at = self.free_at.lock().await;
        held.begin();
        // Not from now: a timer that fired late must not slow the queue down.
        let done = arrived.max(*free_at) + self.jittered(cost_ms);
        sleep_until(done).await;
        *free_at = done;
    }

    /// A place among the running calls, for so many steps at most.
    pub(super) async fn steps(&self, count: u32) -> Steps<'_> {
        let mut held = self.hold(f64::from(count) * self.step_share());
        let row = self.rows.acquire().await.expect("the semaphore is never closed");
        held.begin();
        Steps { held, last: Instant::now(), _row: row }
    }

    /// Seconds of the replica's time that one step of one call takes.
    fn step_share(&self) -> f64 {
        self.options.step_ms.max(0.0) / 1e3 / self.options.rows as f64
    }

    fn hold(&self, seconds: f64) -> Held<'_> {
        self.load.send_modify(|load| {
            load.waiting += 1;
            load.backlog_seconds += seconds;
        });
        Held { replica: self, has_begun: false, seconds }
    }

    /// The load, as `Info` carries it.
    pub(super) fn load(&self) -> Load {
        *self.load.borrow()
    }

    /// The load and its changes.
    pub(super) fn watch_load(&self, deadline: Deadline) -> Response<Events<Load>> {
        Response::new(stream::watched(self.load.subscribe(), |load| *load, REPORT_INTERVAL, deadline))
    }

    /// Answers with what `work` sends, until it ends or its caller leaves.
    pub(super) fn respond<T, F, Work>(self: &Arc<Self>, deadline: Deadline, work: F) -> Response<Events<T>>
    where
        T: Send + 'static,
        F: FnOnce(Arc<Self>, Sender<T>) -> Work,
        Work: Future<Output = Result<(), Status>> + Send + 'static,
    {
        let (sender, events) = stream::channel(WAITING_EVENTS, deadline);
        let work = work(Arc::clone(self), sender.clone());
        let replica = Arc::clone(self);
        self.counts.calls.inc();
        self.counts.running.inc();
        tokio::spawn(async move {
            let outcome = tokio::select! {
                biased;
                () = sender.closed() => Err(status::cancelled()),
                outcome = work => outcome,
            };
            if let Err(status) = outcome {
                if sender.is_closed() {
                    replica.counts.cancelled.inc();
                }
                // When it was cancelled nobody listens, and nobody needs it.
                let _ = sender.send(Err(status)).await;
            } else {
                replica.counts.whole.inc();
            }
            replica.counts.running.dec();
        });
        Response::new(events)
    }
}

impl Steps<'_> {
    pub(super) async fn step(&mut self) {
        let replica = self.held.replica;
        let cost_ms = replica.options.step_ms;
        if cost_ms > 0.0 {
            self.last += replica.jittered(cost_ms);
            sleep_until(self.last).await;
        }
        self.held.did(replica.step_share());
    }
}

impl Held<'_> {
    fn begin(&mut self) {
        self.has_begun = true;
        self.replica.load.send_modify(|load| {
            load.waiting -= 1;
            load.running += 1;
        });
    }

    fn did(&mut self, seconds: f64) {
        let seconds = seconds.min(self.seconds);
        self.seconds -= seconds;
        self.replica.load.send_modify(|load| load.backlog_seconds -= seconds);
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.did(self.seconds);
        self.replica.load.send_modify(|load| match self.has_begun {
            true => load.running -= 1,
            false => load.waiting -= 1,
        });
    }
}

/// A message that a stage refuses: the router sent what it must not.
pub(super) fn refused(what: impl Into<String>) -> Status {
    Status::invalid_argument(what)
}

/// A caller that has left is no failure: the call's own task ends it.
pub(super) async fn send<T>(sender: &Sender<T>, message: T) {
    let _ = sender.send(Ok(message)).await;
}
