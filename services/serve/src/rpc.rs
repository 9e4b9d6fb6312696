//! The layer around every RPC. On the way in: request id, deadline, span, readiness, permit. On the way out: request id in
//! metadata and details, tonic's codes for bad messages corrected, one count, one log line. In between: whatever the
//! handler does is stopped at the deadline, and at the end of the shutdown grace.
//!
//! An RPC ends when its response *body* ends, so all of this lives as long as the body does.

use std::{
    any::Any,
    convert::Infallible,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture};
use http::{HeaderMap, Request, Response};
use http_body::{Frame, SizeHint};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, body::Body, service::Routes};
use tower::{Layer, Service};
use tracing::{Instrument, Span, field::Empty};

use crate::{
    admission::{Admission, Permit},
    deadline::Deadline,
    message,
    methods::{Method, Methods},
    metrics::{InFlight, RpcMetrics},
    readiness::{Readiness, State},
    status::{self, code_name},
    tenant::{Tenant, Tenants},
    trace::{self, REQUEST_ID, RequestId},
};

/// Health checks and reflection: answered before the service is ready, stopped as soon as shutdown begins (a health
/// watch would never end), and neither traced nor counted, since probes would drown what people look for.
const INFRASTRUCTURE: &str = "/grpc.";
/// The one of these that needs no token: probes have none, and learn only whether to come back.
const HEALTH: &str = "/grpc.health.";
/// The router asks every replica for this every few seconds: counted, but not traced, and logged only when it fails.
const PROBE: &str = "/Info";

/// What the layer needs to know of the server.
pub(crate) struct Shared {
    pub(crate) service: &'static str,
    pub(crate) methods: Arc<Methods>,
    pub(crate) metrics: RpcMetrics,
    pub(crate) readiness: Readiness,
    pub(crate) admission: Admission,
    pub(crate) tenants: Tenants,
    /// Shutdown has begun.
    pub(crate) draining: CancellationToken,
    /// The shutdown grace is over.
    pub(crate) cut: CancellationToken,
}

#[derive(Clone)]
pub(crate) struct RpcLayer(pub(crate) Arc<Shared>);

impl Layer<Routes> for RpcLayer {
    type Service = Rpc;

    fn layer(&self, routes: Routes) -> Rpc {
        Rpc { routes, shared: Arc::clone(&self.0) }
    }
}

#[derive(Clone)]
pub(crate) struct Rpc {
    routes: Routes,
    shared: Arc<Shared>,
}

impl Service<Request<Body>> for Rpc {
    type Response = Response<RpcBody>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<Request<Body>>::poll_ready(&mut self.routes, context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        if request.uri().path().starts_with(INFRASTRUCTURE) {
            let stop = stop(Deadline::none(), self.shared.draining.clone());
            let response = self.infrastructure(request);
            return Box::pin(async move {
                let response = answer(response, stop).await;
                Ok(response.map(|(inner, stop)| RpcBody { inner: Some(inner), stop, ending: None }))
            });
        }
        let request_id = RequestId::of_headers(request.headers());
        let mut ending = Ending::begin(&self.shared, &request, request_id.as_ref().ok());
        let span = ending.span.clone();
        // Fixed here, before tonic starts its own timer for the same header: ours must be the one that fires, because
        // tonic would answer CANCELLED.
        let deadline = request_id.and_then(|_| Deadline::of_headers(request.headers()));
        let admitted = deadline.and_then(|deadline| {
            let tenant = self.shared.tenants.identify(request.headers_mut())?;
            ending.span.record("tenant", tenant.name());
            ending.permit = self.shared.admit(&mut request)?;
            Ok((deadline, tenant))
        });
        let deadline = admitted.as_ref().map_or(Deadline::none(), |(deadline, _)| *deadline);
        let stop = stop(deadline, self.shared.cut.clone());
        let response: BoxFuture<'static, Result<Response<Body>, Infallible>> = match admitted {
            Ok((deadline, tenant)) => {
                request.extensions_mut().insert(deadline);
                request.extensions_mut().insert::<Tenant>(tenant);
                request.extensions_mut().insert(ending.request_id.clone());
                Box::pin(span.in_scope(|| self.routes.call(request)))
            }
            Err(refusal) => Box::pin(std::future::ready(Ok(refusal.into_http()))),
        };
        let answered = async move {
            let mut response = answer(response, stop).await;
            ending.settle(response.headers_mut());
            response.headers_mut().insert(REQUEST_ID, ending.request_id.header());
            Ok(response.map(|(inner, stop)| RpcBody { inner: Some(inner), stop, ending: Some(ending) }))
        };
        Box::pin(answered.instrument(span))
    }
}

impl Rpc {
    fn infrastructure(
        &mut self,
        mut request: Request<Body>,
    ) -> BoxFuture<'static, Result<Response<Body>, Infallible>> {
        let open = request.uri().path().starts_with(HEALTH);
        match self.shared.tenants.identify(request.headers_mut()) {
            Err(refusal) if !open => Box::pin(std::future::ready(Ok(refusal.into_http()))),
            _ => Box::pin(self.routes.call(request)),
        }
    }
}

impl Shared {
    /// What the call occupies while it is served; nothing for a method that nobody serves.
    fn admit(&self, request: &mut Request<Body>) -> Result<Option<Permit>, Status> {
        // While stopping, calls that were on their way when the connection was told to go are still served.
        if let State::NotReady(reason) = self.readiness.state() {
            return Err(status::unavailable(format!("not ready: {reason}")));
        }
        let Some(method) = self.methods.get(method_of(request)) else { return Ok(None) };
        let Method { asks_nothing, streams_in } = method;
        let permit = if asks_nothing { self.admission.question() } else { self.admission.try_enter()? };
        if !streams_in {
            let body = std::mem::take(request.body_mut());
            *request.body_mut() = permit.hold(body);
        }
        Ok(Some(permit))
    }
}

/// `package.Service/Method`
fn method_of(request: &Request<Body>) -> &str {
    request.uri().path().trim_start_matches('/')
}

type Stop = Pin<Box<dyn Future<Output = Status> + Send>>;

/// Why an RPC is stopped from outside, once it is.
fn stop(deadline: Deadline, cut: CancellationToken) -> Stop {
    Box::pin(async move {
        tokio::select! {
            () = deadline.passed() => status::deadline_exceeded(),
            () = cut.cancelled_owned() => status::unavailable("the server is shutting down"),
        }
    })
}

/// The handler's response, or the status of whatever stopped it first.
async fn answer(
    response: impl Future<Output = Result<Response<Body>, Infallible>> + Send,
    mut stop: Stop,
) -> Response<(Body, Stop)> {
    let answer = tokio::select! {
        biased;
        status = &mut stop => status.into_http(),
        answer = AssertUnwindSafe(response).catch_unwind() => match answer {
            Ok(Ok(response)) => response,
            Err(panic) => {
                tracing::error!(panic = panic_text(&*panic), "the handler panicked");
                status::internal("the handler failed").into_http()
            }
        },
    };
    answer.map(|body| (body, stop))
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let owned = panic.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without text")
}

/// A response body that outlives neither the deadline nor the shutdown grace.
pub(crate) struct RpcBody {
    inner: Option<Body>,
    stop: Stop,
    ending: Option<Ending>,
}

impl http_body::Body for RpcBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        let _entered = this.ending.as_ref().map(|ending| ending.span.clone().entered());
        let Some(inner) = &mut this.inner else {
            return Poll::Ready(None);
        };
        if let Poll::Ready(status) = this.stop.as_mut().poll(context) {
            // Dropping the handler's stream tells whoever computes for it.
            this.inner = None;
            let mut trailers = HeaderMap::new();
            status.add_header(&mut trailers)?;
            return Poll::Ready(Some(Ok(this.last(trailers))));
        }
        let frame = std::task::ready!(Pin::new(inner).poll_frame(context));
        Poll::Ready(match frame {
            Some(Ok(frame)) => Some(Ok(match frame.into_trailers() {
                Ok(trailers) => this.last(trailers),
                Err(data) => data,
            })),
            other => other,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or_else(|| SizeHint::with_exact(0), http_body::Body::size_hint)
    }
}

impl RpcBody {
    fn last(&mut self, mut trailers: HeaderMap) -> Frame<Bytes> {
        if let Some(ending) = &mut self.ending {
            ending.settle(&mut trailers);
        }
        Frame::trailers(trailers)
    }
}

/// The end of one RPC: reported when dropped, whichever way it came.
struct Ending {
    request_id: RequestId,
    method: String,
    span: Span,
    begun: Instant,
    metrics: RpcMetrics,
    /// Known once the status has passed through; a response dropped before that is one whose caller left.
    code: Option<Code>,
    permit: Option<Permit>,
    _in_flight: InFlight,
}

impl Ending {
    fn begin(shared: &Shared, request: &Request<Body>, request_id: Option<&RequestId>) -> Self {
        let request_id = request_id.cloned().unwrap_or_else(RequestId::generate);
        let method = method_of(request).to_owned();
        let span =
            if method.ends_with(PROBE) { Span::none() } else { Self::span(shared, &method, &request_id) };
        if let Some(trace_id) = trace::adopt(&span, request.headers(), &request_id) {
            span.record("trace_id", trace_id);
        }
        let _in_flight = shared.metrics.arrived();
        let metrics = shared.metrics.clone();
        Self {
            request_id,
            method,
            span,
            begun: Instant::now(),
            metrics,
            code: None,
            permit: None,
            _in_flight,
        }
    }

    fn span(shared: &Shared, method: &str, request_id: &RequestId) -> Span {
        tracing::info_span!(
            parent: None,
            "request",
            otel.name = method,
            otel.kind = "server",
            otel.status_code = Empty,
            rpc.system = "grpc",
            rpc.grpc.status_code = Empty,
            service = shared.service,
            %request_id,
            tenant = Empty,
            trace_id = Empty,
        )
    }

    /// Notes the status in headers or trailers, if there is one, and completes it.
    fn settle(&mut self, headers: &mut HeaderMap) {
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

#[cfg(test)]
mod tests;
