//! Logs, spans and their export. Spans always exist, so that a trace id joins the log lines of all services and the
//! caller's context is handed on; they leave the process only when an OTLP endpoint is configured.

use std::{
    io::IsTerminal,
    sync::{Mutex, PoisonError, mpsc},
    time::Duration,
};

use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::{Resource, propagation::TraceContextPropagator, trace::SdkTracerProvider};
use serde::{Deserialize, Serialize};
use tracing::{Level, Subscriber};
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{FilterExt, ParseError, Targets, filter_fn},
    fmt::{MakeWriter, format::JsonFields},
    layer::SubscriberExt,
    registry::LookupSpan,
    util::SubscriberInitExt,
};

use crate::{config::Validate, logs::JsonLines};

/// Longest wait for the spans that are left at the end: a collector that is gone must not hold it up.
const FLUSH_MS_MAX: u64 = 3_000;
/// Longest time of one export call.
const EXPORT_MS_MAX: u64 = 2_000;
/// What the targets of our own crates begin with. Spans of the HTTP stack stay out of traces: the export itself makes
/// such spans, without end.
const OWN_CRATES: &str = "emu2";

/// Whether the process has its subscriber, of which it can have one.
static INSTALLED: Mutex<bool> = Mutex::new(false);

/// Part `telemetry` of every configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// Which lines are logged, as tracing's filter directives: `info`, or `warn,emu2_router=debug`. Spans are not
    /// affected.
    pub log: String,
    /// How a line is written.
    pub log_format: LogFormat,
    /// Endpoint of a collector of spans (OTLP over gRPC), such as `http://collector:4317`. Without it no span leaves
    /// the process.
    pub otlp_endpoint: Option<String>,
}

/// The ways in which a log line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One JSON object a line, for log collectors.
    Json,
    /// Text, for people.
    Text,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { log: "info".into(), log_format: LogFormat::Json, otlp_endpoint: None }
    }
}

impl Validate for TelemetryConfig {
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Err(error) = EnvFilter::try_new(&self.log) {
            problems.push(format!("telemetry.log must be filter directives, got {:?}: {error}", self.log));
        }
        if let Some(endpoint) = &self.otlp_endpoint {
            let uri = endpoint.parse::<http::Uri>();
            if !uri.is_ok_and(|uri| uri.scheme().is_some() && uri.authority().is_some()) {
                problems.push(format!("telemetry.otlp_endpoint must be http://host:port, got {endpoint:?}"));
            }
        }
        problems
    }
}

/// The reasons why telemetry cannot start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// `telemetry.log` is no list of filter directives.
    #[error("log filter cannot be read")]
    Filter(#[from] ParseError),
    /// The exporter to `telemetry.otlp_endpoint` cannot be built.
    #[error("span exporter cannot be built")]
    Exporter(#[from] ExporterBuildError),
}

/// The guard of a process's telemetry: spans that wait for export leave when it is shut down or dropped.
#[must_use = "dropping it ends the export of spans"]
#[derive(Debug)]
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

/// Installs logging to standard error, and tracing, for the process, once: a later call (tests start several services
/// in one process) changes nothing and returns an empty guard. With an OTLP endpoint it needs a tokio runtime. Fails on
/// filter directives or an endpoint that cannot be read.
pub fn init(service: &'static str, config: &TelemetryConfig) -> Result<Telemetry, TelemetryError> {
    // Standard output belongs to a program's answers.
    init_to(service, config, std::io::stderr)
}

/// Installs logging and tracing as [`init`] does, with log lines written elsewhere: a program that draws on its
/// terminal must make room for them.
pub fn init_to(
    service: &'static str,
    config: &TelemetryConfig,
    writer: impl for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
) -> Result<Telemetry, TelemetryError> {
    opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
    // A filter that drops a span would drop its request id from the log lines inside it.
    let spans_of_ours = filter_fn(|metadata| metadata.is_span() && metadata.target().starts_with(OWN_CRATES));
    let log_filter = EnvFilter::try_new(&config.log)?.or(spans_of_ours);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if *installed {
        return Ok(Telemetry { provider: None });
    }
    let provider = provider(service, config)?;
    let spans = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer(OWN_CRATES))
        .with_filter(Targets::new().with_target(OWN_CRATES, Level::INFO));
    let logs = log_lines(config.log_format, writer).with_filter(log_filter);
    // Fails where the process has a subscriber of another making: then that one stays.
    let won = tracing_subscriber::registry().with(spans).with(logs).try_init().is_ok();
    *installed = true;
    Ok(Telemetry { provider: won.then_some(provider) })
}

fn provider(service: &'static str, config: &TelemetryConfig) -> Result<SdkTracerProvider, TelemetryError> {
    let resource = Resource::builder().with_service_name(service).build();
    let builder = SdkTracerProvider::builder().with_resource(resource);
    let Some(endpoint) = &config.otlp_endpoint else {
        return Ok(builder.build());
    };
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .with_timeout(Duration::from_millis(EXPORT_MS_MAX))
        .build()?;
    Ok(builder.with_batch_exporter(exporter).build())
}

fn log_lines<S>(
    format: LogFormat,
    writer: impl for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    match format {
        LogFormat::Json => lines.fmt_fields(JsonFields::new()).event_format(JsonLines).boxed(),
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
    }
}

impl Telemetry {
    /// Sends the spans that wait for export now, and waits for that at most 3 s.
    pub async fn flush(&self) {
        if let Some(provider) = self.provider.clone() {
            bounded(move || provider.force_flush().err()).await;
        }
    }

    /// Sends the spans that wait and ends the export, as dropping does, but without blocking the runtime. It waits at
    /// most 3 s.
    pub async fn shutdown(mut self) {
        if let Some(provider) = self.provider.take() {
            let limit = Duration::from_millis(FLUSH_MS_MAX);
            bounded(move || provider.shutdown_with_timeout(limit).err()).await;
        }
    }
}

async fn bounded<E: std::fmt::Display + Send + 'static>(flush: impl FnOnce() -> Option<E> + Send + 'static) {
    let flush = tokio::task::spawn_blocking(flush);
    match tokio::time::timeout(Duration::from_millis(FLUSH_MS_MAX), flush).await {
        Ok(Ok(None)) => {}
        Ok(Ok(Some(error))) => tracing::warn!(%error, "spans were not all exported"),
        Ok(Err(error)) => tracing::warn!(%error, "spans were not all exported"),
        Err(_) => tracing::warn!(limit_ms = FLUSH_MS_MAX, "spans were not all exported in time"),
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        let Some(provider) = self.provider.take() else { return };
        // On a thread of its own, because the export runs on a runtime that the current thread may be driving; and
        // not waited for beyond the limit.
        let (done, finished) = mpsc::sync_channel(1);
        let limit = Duration::from_millis(FLUSH_MS_MAX);
        std::thread::spawn(move || {
            let result = provider.shutdown_with_timeout(limit);
            // Nobody waits any more: then nobody needs to know.
            let _ = done.send(result);
        });
        if !matches!(finished.recv_timeout(limit), Ok(Ok(()))) {
            tracing::warn!("spans were not all exported");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::loopback::exported;

    #[tokio::test]
    async fn a_second_start_in_a_process_changes_nothing() {
        exported();
        let again = init("again", &TelemetryConfig::default()).unwrap();
        assert!(again.provider.is_none());
        again.shutdown().await;
    }

    /// One thread drives this runtime, and so the export: ending must neither deadlock nor wait for ever.
    #[tokio::test]
    async fn a_collector_that_is_gone_does_not_hold_up_the_end() {
        use opentelemetry::trace::{Tracer, TracerProvider};
        let config =
            TelemetryConfig { otlp_endpoint: Some("http://127.0.0.1:1".into()), ..Default::default() };
        let begun = std::time::Instant::now();
        for by_drop in [true, false] {
            let provider = provider("gone", &config).unwrap();
            provider.tracer("test").in_span("lost", |_| {});
            let telemetry = Telemetry { provider: Some(provider) };
            match by_drop {
                true => drop(telemetry),
                false => telemetry.shutdown().await,
            }
        }
        assert!(begun.elapsed() < Duration::from_millis(2 * FLUSH_MS_MAX + 1_000));
    }
}
