//! The visual encoder service: images in, embeddings out, behind `emu2.stage.v1.VisualEncoder`.
//!
//! | module | holds |
//! |---|---|
//! | `service` | the edge: requests checked, answers put on the wire |
//! | [`preprocess`] | an encoded image → normalised pixels, as Pillow and CLIP do it; no torch |
//! | [`engine`] | the stage that runs on the step engine: the model and its batches |
//! | [`eva_vit`] | the model |
//! | [`config`], [`error`], [`metrics`] | what their names say |
//!
//! An image's way: `service` (a permit) → `preprocess` (a thread of its own) → `engine` (a batch) → `service`.
//! [`run`] is the service: `main` calls it, and so does a test, on port 0.

use anyhow::Context;
use emu2_engine::load::LoadMetrics;
use emu2_nn::checkpoint::Progress;
use emu2_serve::{
    server::{Listeners, Server},
    shutdown::Shutdown,
};
use prometheus_client::registry::Registry;

pub mod config;
pub mod engine;
pub mod error;
pub mod eva_vit;
pub mod metrics;
pub mod preprocess;
mod service;
#[cfg(test)]
mod tests;

pub use config::Config;
use engine::Started;
use metrics::Metrics;
use service::Service;

/// The service's name in logs, spans and health checks.
pub const NAME: &str = "emu2-encoder";

/// Serves until shutdown begins. The service is ready once the model is loaded and warm.
///
/// # Errors
///
/// The model cannot be loaded, its device fails later, or a listener fails.
pub async fn run(config: Config, listeners: Listeners, shutdown: Shutdown) -> anyhow::Result<()> {
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    let load_metrics = LoadMetrics::register(&mut registry, "encoder");
    let server = Server::new(NAME, &config.server, listeners);
    let readiness = server.readiness();
    let progress = Progress::observed(move |percent| readiness.loading(percent));
    let Started { engine, loaded, ended } = engine::start(&config, progress, load_metrics, metrics.clone());
    let service = Service::new(&config, engine, metrics);
    let server = server.service(service.clone().into_grpc()).registry(registry);
    // The service's own handle ends with the load: from then on only the server's keep the engine.
    let load = async move {
        let model = loaded.await.context("the engine thread ended while loading")??;
        tracing::info!(digest = model.weights_digest, "model loaded");
        service.loaded(model);
        Ok(())
    };
    server.run_engine(load, ended, shutdown).await
}
