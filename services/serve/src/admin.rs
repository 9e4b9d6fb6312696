//! The admin port: what operators and Kubernetes read. Plain HTTP/1, no secrets, loopback unless configured.

use std::sync::Arc;

use axum::{
    Router,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    metrics,
    readiness::{Readiness, State},
};

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves the admin pages until `stopped` is cancelled.
pub(crate) async fn serve(
    listener: TcpListener,
    registry: Arc<Registry>,
    readiness: Readiness,
    stopped: CancellationToken,
) -> std::io::Result<()> {
    let routes = Router::new()
        .route("/metrics", get(move || std::future::ready(metrics_page(&registry))))
        .route("/healthz", get(|| std::future::ready("alive\n")))
        .route("/readyz", get(move || std::future::ready(readiness_page(&readiness))));
    axum::serve(listener, routes).with_graceful_shutdown(stopped.cancelled_owned()).await
}

fn metrics_page(registry: &Arc<Registry>) -> Response {
    match metrics::text(registry) {
        Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

fn readiness_page(readiness: &Readiness) -> Response {
    match readiness.state() {
        State::Ready => "ready\n".into_response(),
        State::NotReady(reason) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")).into_response()
        }
        State::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "not ready: shutting down\n").into_response(),
    }
}
