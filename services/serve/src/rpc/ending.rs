//! The end of one RPC: its status completed on the way out, one count and one log line.

use std::time::Instant;

use http::{HeaderMap, Request};
use tonic::{Code, Status, body::Body};
use tracing::{Span, field::Empty};

use super::path::{PROBE, method_of};
use crate::{
    admission::Permit,
    message,
    metrics::{InFlight, RpcMetrics},
    status::{self, code_name},
    trace::{self, RequestId},
};

/// The end of one RPC, which is reported when this is dropped, whichever way it came.
pub(crate) struct Ending {
    pub(crate) request_id: RequestId,
    method: String,
    pub(crate) span: Span,
    begun: Instant,
    metrics: RpcMetrics,
    /// The status's code, known once the status has passed through. A response dropped before that is one whose caller
    /// left.
    code: Option<Code>,
    pub(crate) permit: Option<Permit>,
    _in_flight: InFlight,
}

impl Ending {
    /// Begins a call: opens its span under the caller's, and counts it as in flight.
    pub(crate) fn begin(
        service: &'static str,
        metrics: &RpcMetrics,
        request: &Request<Body>,
        request_id: Option<&RequestId>,
    ) -> Self {
        let request_id = request_id.cloned().unwrap_or_else(RequestId::generate);
        let method = method_of(request).to_owned();
        let span =
            if method.ends_with(PROBE) { Span::none() } else { Self::span(service, &method, &request_id) };
        if let Some(trace_id) = trace::adopt(&span, request.headers(), &request_id) {
            span.record("trace_id", trace_id);
        }
        Self {
            request_id,
            method,
            span,
            begun: Instant::now(),
            metrics: metrics.clone(),
            code: None,
            permit: None,
            _in_flight: metrics.arrived(),
        }
    }

    fn span(service: &'static str, method: &str, request_id: &RequestId) -> Span {
        tracing::info_span!(
            parent: None,
            "request",
            otel.name = method,
            otel.kind = "server",
            otel.status_code = Empty,
            rpc.system = "grpc",
            rpc.grpc.status_code = Empty,
            service,
            %request_id,
            tenant = Empty,
            trace_id = Empty,
        )
    }

    /// Notes the status in headers or trailers, if there is one, and completes it.
    pub(crate) fn settle(&mut self, headers: &mut HeaderMap) {
        let Some(status) = Status::from_header_map(headers) else { return };
        self.code = Some(status.code());
        if status.code() == Code::Ok {
            return;
        }
        let status = message::decode_status(status);
        let complete = status::with_request_id(&status, self.request_id.as_str());
        self.code = Some(complete.code());
        let previous =
            ["grpc-status", "grpc-message", "grpc-status-details-bin"].map(|name| headers.remove(name));
        if complete.add_header(headers).is_err() {
            // A message that is no header value: the bare code still says more than nothing.
            let [code, ..] = previous;
            headers.extend(code.map(|code| (http::HeaderName::from_static("grpc-status"), code)));
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        let code = self.code.unwrap_or(Code::Cancelled);
        let duration = self.begun.elapsed();
        self.metrics.ended(&self.method, code, duration);
        self.span.record("rpc.grpc.status_code", code as i32);
        let _entered = self.span.enter();
        let (method, code_name, duration_ms) = (&self.method, code_name(code), duration.as_secs_f64() * 1e3);
        match code {
            // A replica that still loads says so to every probe.
            Code::Ok | Code::Unavailable if self.method.ends_with(PROBE) => {
                tracing::debug!(method, code = code_name, duration_ms, "request ended");
            }
            // The codes that OpenTelemetry counts as the server's failures.
            Code::Unknown
            | Code::Internal
            | Code::DataLoss
            | Code::Unimplemented
            | Code::Unavailable
            | Code::DeadlineExceeded => {
                self.span.record("otel.status_code", "ERROR");
                tracing::warn!(method, code = code_name, duration_ms, "request ended");
            }
            _ => tracing::info!(method, code = code_name, duration_ms, "request ended"),
        }
    }
}
