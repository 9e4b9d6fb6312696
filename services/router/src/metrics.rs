//! Every metric of the router, units last.

use std::{sync::Arc, time::Instant};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use crate::cache::Kind;

/// What became of one lookup; each lookup counts once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The value was in this process's memory.
    L1Hit,
    /// The value was in Redis.
    L2Hit,
    /// Nowhere: computed.
    Miss,
    /// Redis held bytes that failed their check: deleted, computed.
    BadValue,
    /// Another request, of this router or of another, was computing it already.
    Waited,
    /// Another router was computing it for too long: computed here, too.
    WaitedTooLong,
    /// Redis was not asked or did not answer in time: computed.
    Bypassed,
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Self::L1Hit => "l1_hit",
            Self::L2Hit => "l2_hit",
            Self::Miss => "miss",
            Self::BadValue => "bad_value",
            Self::Waited => "waited",
            Self::WaitedTooLong => "waited_too_long",
            Self::Bypassed => "bypassed",
        }
    }

    /// Whether the cache held the value, as users count it.
    pub(crate) fn is_hit(self) -> bool {
        matches!(self, Self::L1Hit | Self::L2Hit)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LookupLabels {
    kind: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    model: String,
    task: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabels {
    stage: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LossLabels {
    stage: &'static str,
    reason: &'static str,
}

/// Cloning shares the counters.
#[derive(Clone)]
pub(crate) struct Metrics(Arc<Families>);

struct Families {
    lookups: Family<LookupLabels, Counter>,
    requests: Family<RequestLabels, Counter>,
    stages: Family<StageLabels, Histogram, fn() -> Histogram>,
    lost: Family<LossLabels, Counter>,
}

/// 1 ms (a cached answer) to about 17 minutes (a large image without a GPU).
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 21))
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let lookups = Family::default();
        registry.register(
            "emu2_router_cache_lookups",
            "Lookups of cached values by outcome",
            lookups.clone(),
        );
        let requests = Family::default();
        registry.register("emu2_router_requests", "Requests that passed their checks", requests.clone());
        let stages = Family::new_with_constructor(seconds as fn() -> Histogram);
        registry.register(
            "emu2_router_stage_seconds",
            "A call of a stage, from its beginning to its end, all its attempts together",
            stages.clone(),
        );
        let lost = Family::default();
        registry.register(
            "emu2_router_attempts_lost",
            "Attempts of a stage's call that ended before the call did; it goes on elsewhere if it can",
            lost.clone(),
        );
        Self(Arc::new(Families { lookups, requests, stages, lost }))
    }

    pub(crate) fn cache_lookup(&self, kind: Kind, outcome: Outcome) {
        self.0.lookups.get_or_create(&LookupLabels { kind: kind.name(), outcome: outcome.name() }).inc();
    }

    pub(crate) fn request(&self, model: &str, task: &'static str) {
        self.0.requests.get_or_create(&RequestLabels { model: model.to_owned(), task }).inc();
    }

    pub(crate) fn attempt_lost(&self, stage: &'static str, reason: &'static str) {
        self.0.lost.get_or_create(&LossLabels { stage, reason }).inc();
    }

    /// Observes a call's length when dropped, however the call ends.
    pub(crate) fn time(&self, stage: &'static str) -> StageTimer {
        StageTimer { stage, began: Instant::now(), metrics: self.clone() }
    }
}

pub(crate) struct StageTimer {
    stage: &'static str,
    began: Instant,
    metrics: Metrics,
}

impl Drop for StageTimer {
    fn drop(&mut self) {
        let labels = StageLabels { stage: self.stage };
        self.metrics.0.stages.get_or_create(&labels).observe(self.began.elapsed().as_secs_f64());
    }
}
