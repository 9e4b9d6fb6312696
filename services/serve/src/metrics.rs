//! The metrics that every service has. The registry is the service's own: it registers its own metrics in it and
//! gives it to the server, which adds these and exposes all of them at `/metrics`.

use std::{
    sync::{Arc, atomic::AtomicI64},
    time::Duration,
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};
use tonic::Code;

use crate::{methods::Methods, status::code_name};

/// Finished RPCs by method and code; exposed as `emu2_rpc_requests_total`.
const RPC_REQUESTS: &str = "emu2_rpc_requests";
/// Time from the arrival of the headers to the end of the stream, by method and code; exposed as
/// `emu2_rpc_duration_seconds`.
const RPC_DURATION: &str = "emu2_rpc_duration";
/// RPCs that have arrived and not ended.
const RPC_IN_FLIGHT: &str = "emu2_rpc_in_flight_requests";
/// The method label of calls to anything else: callers choose paths, and labels must stay few.
const UNKNOWN_METHOD: &str = "unknown";

/// Buckets for durations in seconds, from a cache hit (1 ms) to an image on a CPU (17 minutes).
fn duration_buckets() -> impl Iterator<Item = f64> {
    exponential_buckets(0.001, 2.0, 21)
}

/// Returns an empty histogram of durations in seconds, with 21 buckets from 1 ms to 17 minutes. It has the shape that
/// `Family::new_with_constructor` wants.
pub fn duration_histogram() -> Histogram {
    Histogram::new(duration_buckets())
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Rpc {
    method: String,
    code: &'static str,
}

#[derive(Clone)]
pub(crate) struct RpcMetrics {
    requests: Family<Rpc, Counter>,
    duration: Family<Rpc, Histogram, fn() -> Histogram>,
    in_flight: Gauge,
    methods: Arc<Methods>,
}

/// One RPC in flight, which leaves the gauge when dropped.
pub(crate) struct InFlight(Gauge<i64, AtomicI64>);

impl RpcMetrics {
    pub(crate) fn register(registry: &mut Registry, methods: &Arc<Methods>) -> Self {
        let metrics = Self {
            methods: Arc::clone(methods),
            requests: Family::default(),
            duration: Family::new_with_constructor(duration_histogram),
            in_flight: Gauge::default(),
        };
        registry.register(RPC_REQUESTS, "RPCs that have ended", metrics.requests.clone());
        let help = "Time from an RPC's arrival to its end";
        registry.register_with_unit(RPC_DURATION, help, Unit::Seconds, metrics.duration.clone());
        registry.register(RPC_IN_FLIGHT, "RPCs that have arrived and not ended", metrics.in_flight.clone());
        metrics
    }

    pub(crate) fn arrived(&self) -> InFlight {
        self.in_flight.inc();
        InFlight(self.in_flight.clone())
    }

    pub(crate) fn ended(&self, method: &str, code: Code, duration: Duration) {
        let method = if self.methods.get(method).is_some() { method } else { UNKNOWN_METHOD };
        let labels = Rpc { method: method.to_owned(), code: code_name(code) };
        self.requests.get_or_create(&labels).inc();
        self.duration.get_or_create(&labels).observe(duration.as_secs_f64());
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Writes all metrics of a registry as OpenMetrics text.
pub(crate) fn text(registry: &Arc<Registry>) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry)?;
    Ok(text)
}
