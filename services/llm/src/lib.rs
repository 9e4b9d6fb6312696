//! The language model service: LLaMA over text and embeddings, behind `emu2.stage.v1.LanguageModel`.
//!
//! | module | holds |
//! |---|---|
//! | `service` | the gRPC edge: requests checked, events put on the wire |
//! | [`prompt`] | parts → positions: templates, placeholders, slots for embeddings |
//! | [`tokenizer`] | text ↔ ids, as upstream's pinned tokenizer |
//! | [`request`] | what the engine is asked, and what it tells |
//! | [`engine`] | the stage that runs on the step engine: the model and its sequences |
//! | [`scheduler`] | who runs and what a step computes; no torch |
//! | `sequence` | one request in the engine: what it feeds and what it makes of the answer |
//! | `step` | one forward over the rows of all sequences |
//! | [`search`] | greedy, sampling, beam search; no torch |
//! | [`llama`] | the model |
//! | [`kv`] | keys and values of one sequence, a tree |
//! | [`load`] | from a model folder to a warm model |
//! | `budget` | how many keys and values there is room for |
//! | [`config`], [`error`], [`metrics`] | what their names say |
//!
//! A request's way: `service` → `prompt` → `engine` → (`scheduler` → `sequence` → `step` → `llama` → `search`)* →
//! `service`.

mod budget;
pub mod config;
pub mod engine;
pub mod error;
pub mod kv;
pub mod llama;
pub mod load;
pub mod metrics;
pub mod prompt;
pub mod request;
pub mod scheduler;
pub mod search;
mod sequence;
mod service;
mod step;
pub mod tokenizer;

use std::sync::{Arc, OnceLock};

use anyhow::Context;
use emu2_engine::load::LoadMetrics;
use emu2_nn::checkpoint::Progress;
use emu2_proto::stage::language_model_server::LanguageModelServer;
use emu2_serve::{
    server::{Listeners, Server},
    shutdown::Shutdown,
};
use prometheus_client::registry::Registry;

pub use config::Config;
use engine::Started;
use error::LoadError;
use load::ModelConfig;
use metrics::Metrics;
use service::Service;

/// The service's name in logs, spans and health checks.
pub const NAME: &str = "emu2-llm";

/// Serves until shutdown begins. The service is ready once the model is loaded and warm.
///
/// # Errors
///
/// The model cannot be loaded, a listener fails, or the engine can no longer be trusted: the process ends and
/// Kubernetes starts it anew.
pub async fn run(config: Config, listeners: Listeners, shutdown: Shutdown) -> anyhow::Result<()> {
    let mut registry = Registry::default();
    let server = Server::new(NAME, &config.server, listeners);
    let readiness = server.readiness();
    let progress = Progress::observed(move |percent| readiness.loading(percent));
    let model = ModelConfig { progress, ..config.model() };
    let load_metrics = LoadMetrics::register(&mut registry, "llm");
    let metrics = Metrics::register(&mut registry);
    let Started { engine, loaded: loading, ended } = engine::start(model, load_metrics, metrics);
    let loaded = Arc::new(OnceLock::new());
    let max_bytes = config.server.max_message_bytes;
    let service = LanguageModelServer::new(Service::new(&config, engine, Arc::clone(&loaded)))
        .max_decoding_message_size(max_bytes)
        .max_encoding_message_size(max_bytes);
    let server = server.registry(registry).service(service);

    let load = async move {
        let model = loading.await.map_err(|_| LoadError::Ended)?.context("the model cannot be served")?;
        // Set once, here.
        let _ = loaded.set(model);
        Ok(())
    };
    server.run_engine(load, ended, shutdown).await
}
