//! Every metric of the router, units last.

use std::{sync::Arc, time::Duration};

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
    /// In this process's memory.
    L1Hit,
    /// In Redis.
    L2Hit,
    /// Nowhere: computed.
    Miss,
    /// Redis held bytes that failed their check: deleted, computed.
    BadValue,
    /// Another request was computing it already.
    Waited,
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

/// Cloning shares the counters.
#[derive(Clone)]
pub(crate) struct Metrics(Arc<Families>);

struct Families {
    lookups: Family<LookupLabels, Counter>,
    requests: Family<RequestLabels, Counter>,
    stages: Family<StageLabels, Histogram, fn() -> Histogram>,
}

/// 1 ms (a cached answer) to about 17 minutes (a large picture without a GPU).
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
            "A call of a stage, from opening its stream to the stream's end",
            stages.clone(),
        );
        Self(Arc::new(Families { lookups, requests, stages }))
    }

    pub(crate) fn cache_lookup(&self, kind: Kind, outcome: Outcome) {
        self.0.lookups.get_or_create(&LookupLabels { kind: kind.name(), outcome: outcome.name() }).inc();
    }

    pub(crate) fn request(&self, model: &str, task: &'static str) {
        self.0.requests.get_or_create(&RequestLabels { model: model.to_owned(), task }).inc();
    }

    pub(crate) fn stage(&self, stage: &'static str, took: Duration) {
        self.0.stages.get_or_create(&StageLabels { stage }).observe(took.as_secs_f64());
    }
}
