//! The visual decoder of Emu2 as a service: embeddings in, images out.
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | the service's configuration |
//! | `service` | the edge: `VisualDecoder` of the stage protocol; PNG |
//! | `intake` | a request as it comes in, checked |
//! | [`engine`] | the stage that runs on the step engine, one denoising step at a time |
//! | [`scheduler`] | which requests take the next step |
//! | [`denoise`] | one step of a batch; what UNet, VAE and schedule do together |
//! | [`unet`], [`vae`], `blocks` | the models |
//! | [`schedule`] | timesteps and noise levels |
//! | [`noise`] | a seed's initial noise |
//! | `switches` | settings of published configurations that have one supported value |
//! | [`error`], [`metrics`] | what goes wrong, and what is counted |
//!
//! [`run`] is the service: `main` calls it, and so does a test, on port 0.

use anyhow::Context;
use emu2_engine::load::LoadMetrics;
use emu2_nn::checkpoint::Progress;
use emu2_serve::{
    server::{Listeners, Server},
    shutdown::Shutdown,
};
use prometheus_client::registry::Registry;

mod blocks;
pub mod config;
pub mod denoise;
pub mod engine;
pub mod error;
mod intake;
pub mod metrics;
pub mod noise;
pub mod schedule;
pub mod scheduler;
mod service;
mod switches;
pub mod unet;
pub mod vae;

pub use config::Config;

/// Serves until shutdown begins. The service is ready once the model is loaded and warm.
///
/// # Errors
///
/// The model cannot be loaded, its device fails later, or a listener fails.
pub async fn run(config: Config, listeners: Listeners, shutdown: Shutdown) -> anyhow::Result<()> {
    let mut registry = Registry::default();
    let server = Server::new("emu2-decoder", &config.server, listeners);
    let readiness = server.readiness();
    let progress = Progress::observed(move |percent| readiness.loading(percent));
    let load_metrics = LoadMetrics::register(&mut registry, "decoder");
    let metrics = metrics::Metrics::register(&mut registry);
    let started = engine::start(&config, progress, load_metrics, metrics);
    let service = service::Service::new(&config, started.engine);
    let server = server.service(service.clone().into_grpc()).registry(registry);
    // Takes this handle of the service along, so that from then on only the server holds the engine.
    let load = async move {
        let model = started.loaded.await.context("the engine thread ended while loading")??;
        tracing::info!(digest = model.weights_digest, "model loaded");
        service.loaded(model);
        Ok(())
    };
    server.run_engine(load, started.ended, shutdown).await
}
