//! The layer around every RPC. On the way in: request id, deadline, span, readiness, permit. On the way out: request id
//! in metadata and details, tonic's codes for bad messages corrected, one count, one log line. In between: whatever the
//! handler does is stopped at the deadline, and at the end of the shutdown grace.
//!
//! An RPC ends when its response *body* ends, so all of this lives as long as the body does: see [`body`].

mod body;
mod ending;
mod path;
mod stop;

use std::{
    any::Any,
    convert::Infallible,
    panic::AssertUnwindSafe,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{FutureExt, future::BoxFuture};
use http::{Request, Response};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body, service::Routes};
use tower::{Layer, Service};
use tracing::Instrument;

use self::{
    body::RpcBody,
    ending::Ending,
    path::{HEALTH, INFRASTRUCTURE, method_of},
    stop::{Stop, stop},
};
use crate::{
    admission::{Admission, Permit},
    connections::Activity,
    deadline::Deadline,
    methods::{Method, Methods},
    metrics::RpcMetrics,
    readiness::{Readiness, State},
    status::{self, NotServing},
    tenant::{Guest, Tenants},
    trace::{REQUEST_ID, RequestId},
};

/// What the layer around every RPC needs to know of the server.
pub(crate) struct Shared {
    pub(crate) service: &'static str,
    pub(crate) methods: Arc<Methods>,
    pub(crate) metrics: RpcMetrics,
    pub(crate) readiness: Readiness,
    pub(crate) admission: Admission,
    pub(crate) tenants: Tenants,
    /// Longest time that a caller may leave one frame of an answer unread.
    pub(crate) stalled: Duration,
    /// Cancelled when shutdown begins.
    pub(crate) draining: CancellationToken,
    /// Cancelled when the shutdown grace is over.
    pub(crate) cut: CancellationToken,
}

/// The layer that wraps a server's routes in [`Rpc`].
#[derive(Clone)]
pub(crate) struct RpcLayer(pub(crate) Arc<Shared>);

impl Layer<Routes> for RpcLayer {
    type Service = Rpc;

    fn layer(&self, routes: Routes) -> Rpc {
        Rpc { routes, shared: Arc::clone(&self.0) }
    }
}

/// A server's routes with all that is done around an RPC.
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
        let call = request.extensions().get().map(Activity::call);
        let stalled = self.shared.stalled;
        if self.shared.is_infrastructure(&request) {
            let stop = stop(Deadline::none(), self.shared.draining.clone());
            let response = self.infrastructure(request);
            return Box::pin(async move {
                let response = answer(response, stop).await;
                Ok(response.map(|(inner, stop)| RpcBody::new(inner, stop, stalled, None, call)))
            });
        }
        let request_id = RequestId::of_headers(request.headers());
        let mut ending =
            Ending::begin(self.shared.service, &self.shared.metrics, &request, request_id.as_ref().ok());
        let span = ending.span.clone();
        // Fixed here, before tonic starts its own timer for the same header: ours must be the one that fires, because
        // tonic would answer CANCELLED.
        let deadline = request_id.and_then(|_| Deadline::of_headers(request.headers()));
        let admitted = deadline.and_then(|deadline| {
            let guest = self.shared.tenants.identify(request.headers_mut())?;
            ending.span.record("tenant", guest.tenant.name());
            ending.permit = self.shared.admit(&mut request, &guest)?;
            Ok((deadline, guest.tenant))
        });
        let deadline = admitted.as_ref().map_or(Deadline::none(), |(deadline, _)| *deadline);
        let stop = stop(deadline, self.shared.cut.clone());
        let response: BoxFuture<'static, Result<Response<Body>, Infallible>> = match admitted {
            Ok((deadline, tenant)) => {
                request.extensions_mut().insert(deadline);
                request.extensions_mut().insert(tenant);
                if let Some(permit) = &ending.permit {
                    request.extensions_mut().insert(permit.holding());
                }
                request.extensions_mut().insert(ending.request_id.clone());
                Box::pin(span.in_scope(|| self.routes.call(request)))
            }
            Err(refusal) => Box::pin(std::future::ready(Ok(refusal.into_http()))),
        };
        let answered = async move {
            let mut response = answer(response, stop).await;
            ending.settle(response.headers_mut());
            response.headers_mut().insert(REQUEST_ID, ending.request_id.header());
            Ok(response.map(|(inner, stop)| RpcBody::new(inner, stop, stalled, Some(ending), call)))
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
    fn is_infrastructure(&self, request: &Request<Body>) -> bool {
        let is_watch = || self.methods.get(method_of(request)).is_some_and(Method::is_watch);
        request.uri().path().starts_with(INFRASTRUCTURE) || is_watch()
    }

    /// Returns what the call occupies while it is served (nothing for a method that nobody serves), or the status that
    /// it is refused with.
    fn admit(&self, request: &mut Request<Body>, guest: &Guest) -> Result<Option<Permit>, Status> {
        // While stopping, calls that were on their way when the connection was told to go are still served.
        if let State::NotReady(reason) = self.readiness.state() {
            return Err(NotServing::NotReady.status(format!("not ready: {reason}")));
        }
        let Some(method) = self.methods.get(method_of(request)) else { return Ok(None) };
        let Method { asks_nothing, streams_in, .. } = method;
        let permit = if asks_nothing {
            self.admission.question()
        } else {
            // The tenant's own limits first: who is over them must not take a permit from others even for a moment.
            self.admission.try_enter(guest.enter()?)?
        };
        if !streams_in {
            let body = std::mem::take(request.body_mut());
            *request.body_mut() = permit.hold(body);
        }
        Ok(Some(permit))
    }
}

/// Returns the handler's response, or the status of whatever stopped it first.
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

#[cfg(test)]
mod tests;
