//! How much work an engine has: the same measures and the same metric names for every stage.

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use emu2_serve::metrics::duration_histogram;
use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use tokio::sync::watch;

/// How much one more batch counts in the pace of its kind: about the last ten make it up.
const PACE_WEIGHT: f64 = 0.1;

/// What a stage has to do, as routers balance on it and autoscalers scale by it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Seconds that everything the engine holds would take at its present pace; 0 until the first step has shown one.
    pub backlog_seconds: f64,
    /// Requests that have begun.
    pub running: usize,
    /// Requests that have not begun.
    pub waiting: usize,
    /// Positions of keys and values that no request has reserved; none in stages without keys and values.
    pub free_positions: Option<usize>,
}

/// The metrics of an engine's load, and the load itself for whoever watches it. Clones share everything.
#[derive(Clone, Debug)]
pub struct LoadMetrics {
    backlog: Gauge<f64, AtomicU64>,
    queue_wait: Histogram,
    step: Histogram,
    running: Gauge,
    waiting: Gauge,
    callers_left: Counter,
    failed: Counter,
    current: Arc<watch::Sender<Load>>,
}

impl LoadMetrics {
    /// Registers the metrics with the label `stage`.
    pub fn register(registry: &mut Registry, stage: &'static str) -> Self {
        let metrics = Self {
            backlog: Gauge::default(),
            queue_wait: duration_histogram(),
            step: duration_histogram(),
            running: Gauge::default(),
            waiting: Gauge::default(),
            callers_left: Counter::default(),
            failed: Counter::default(),
            current: Arc::new(watch::Sender::default()),
        };
        let all = &metrics;
        let labelled = registry.sub_registry_with_label(("stage".into(), stage.into()));
        let registry = labelled.sub_registry_with_prefix("emu2_stage");
        let help = "Time that everything the engine holds takes at its present pace";
        registry.register_with_unit("backlog", help, Unit::Seconds, all.backlog.clone());
        let help = "Time from a request's submission to its first step";
        registry.register_with_unit("queue_wait", help, Unit::Seconds, all.queue_wait.clone());
        registry.register_with_unit(
            "step",
            "Time of one step of the engine",
            Unit::Seconds,
            all.step.clone(),
        );
        registry.register("running", "Requests that have begun", all.running.clone());
        registry.register("waiting", "Requests that have not begun", all.waiting.clone());
        let help = "Requests whose caller left before their end";
        registry.register("callers_left", help, all.callers_left.clone());
        let help = "Requests that failed by a fault of the stage";
        registry.register("failed_requests", help, all.failed.clone());
        metrics
    }

    /// The load as of the last step, but for the requests that wait, which are those of now.
    pub fn current(&self) -> Load {
        *self.current.borrow()
    }

    /// How many requests' callers left before their end.
    pub fn callers_left(&self) -> u64 {
        self.callers_left.get()
    }

    /// The load and its changes, the latest alone where a watcher is slow.
    pub fn watch(&self) -> watch::Receiver<Load> {
        self.current.subscribe()
    }

    /// Takes one of `max` places to wait; false when all are taken.
    pub(crate) fn enter(&self, max: usize) -> bool {
        let entered = self.current.send_if_modified(|load| {
            let free = load.waiting < max;
            load.waiting += usize::from(free);
            free
        });
        self.show_waiting();
        entered
    }

    /// Gives a place to wait back.
    pub(crate) fn leave(&self) {
        self.current.send_modify(|load| load.waiting -= 1);
        self.show_waiting();
    }

    /// A request's first step begins after it `waited`.
    pub(crate) fn begin(&self, waited: Duration) {
        self.leave();
        self.queue_wait.observe(waited.as_secs_f64());
    }

    /// How many requests failed by a fault of the stage.
    pub fn failed(&self) -> u64 {
        self.failed.get()
    }

    pub(crate) fn fail(&self) {
        self.failed.inc();
    }

    pub(crate) fn caller_left(&self) {
        self.callers_left.inc();
    }

    pub(crate) fn stepped(&self, took: Duration) {
        self.step.observe(took.as_secs_f64());
    }

    pub(crate) fn report(&self, backlog_seconds: f64, running: usize, free_positions: Option<usize>) {
        self.backlog.set(backlog_seconds);
        self.running.set(running as i64);
        self.current.send_if_modified(|load| {
            let new = Load { backlog_seconds, running, free_positions, ..*load };
            std::mem::replace(load, new) != new
        });
    }

    fn show_waiting(&self) {
        self.waiting.set(self.current.borrow().waiting as i64);
    }
}

/// Seconds a unit of work takes, of each kind of unit, as an average over recent batches.
#[derive(Clone, Debug)]
pub struct Pace(Vec<Option<f64>>);

impl Pace {
    /// A pace of `kinds` kinds of units, none of them known yet.
    pub fn new(kinds: usize) -> Self {
        Self(vec![None; kinds])
    }

    /// Takes account of a batch of `units` units of `kind` that took `took`.
    pub fn observe(&mut self, kind: usize, units: f64, took: Duration) {
        if units <= 0.0 {
            return;
        }
        let seconds = took.as_secs_f64() / units;
        let pace = &mut self.0[kind];
        *pace = Some(pace.map_or(seconds, |pace| pace + PACE_WEIGHT * (seconds - pace)));
    }

    /// Seconds that `units` of each kind take; kinds that were never seen count for nothing.
    pub fn seconds(&self, units: &[f64]) -> f64 {
        self.0.iter().zip(units).filter_map(|(pace, units)| pace.map(|pace| pace * units)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_documented_ones() {
        let mut registry = Registry::default();
        let metrics = LoadMetrics::register(&mut registry, "decoder");
        assert!(metrics.enter(1) && !metrics.enter(1));
        metrics.begin(Duration::from_millis(500));
        metrics.report(1.5, 1, Some(100));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "emu2_stage_backlog_seconds{stage=\"decoder\"} 1.5",
            "emu2_stage_queue_wait_seconds_count{stage=\"decoder\"} 1",
            "emu2_stage_step_seconds_count{stage=\"decoder\"} 0",
            "emu2_stage_running{stage=\"decoder\"} 1",
            "emu2_stage_waiting{stage=\"decoder\"} 0",
            "emu2_stage_callers_left_total{stage=\"decoder\"} 0",
            "emu2_stage_failed_requests_total{stage=\"decoder\"} 0",
        ] {
            assert!(text.contains(line), "{line} not in\n{text}");
        }
        assert_eq!(
            metrics.current(),
            Load { backlog_seconds: 1.5, running: 1, waiting: 0, free_positions: Some(100) }
        );
    }

    #[test]
    fn a_pace_follows_recent_batches_of_its_kind() {
        let mut pace = Pace::new(2);
        assert_eq!(pace.seconds(&[10.0, 10.0]), 0.0);
        pace.observe(0, 2.0, Duration::from_secs(1));
        assert_eq!(pace.seconds(&[10.0, 10.0]), 5.0);
        for _ in 0..100 {
            pace.observe(0, 1.0, Duration::from_secs(2));
        }
        assert!((pace.seconds(&[1.0, 0.0]) - 2.0).abs() < 0.01);
        pace.observe(1, 0.0, Duration::from_secs(1));
        assert_eq!(pace.seconds(&[0.0, 1.0]), 0.0, "no unit shows no pace");
    }
}
