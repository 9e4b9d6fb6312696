//! The router: the public API in front of the stages. Clients see one service; the router finds or computes the
//! embeddings of a request's images, asks the llm, hands what it regresses to the decoder, and streams what comes.
//! It holds no model and no tensors' values: embeddings pass through as shared bytes.
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | models and their replicas, limits, cache, pools |
//! | `service` | the public service `emu2.v1.Emu2`: admit, check, hand to the pipeline |
//! | `request` | what a client asks, checked and with every default filled in; pure |
//! | `admission` | who is let in, once it is known what is asked |
//! | `pipeline` | one request through its stages, top to bottom |
//! | `context` | what all of a request's work shares: its caller, its model, the routes to its stages |
//! | `embeddings` | the store of embeddings: of images, of prompts, of guidance's negatives |
//! | `cache` | memory, Redis, one flight per key here and one lease per key among routers |
//! | `field_hasher` | several fields as one hash, for keys and hints |
//! | `model`, `pool` | a model's stages, and the replicas of each |
//! | `stages`, `stage_call`, `rows` | the calls to the stages, and how they outlive a replica |
//! | `report` | the last event of an answer |
//! | `error`, `metrics` | what a stage's refusal means to the client; every metric name |
//! | `fuzz` | doors for the fuzz targets, no interface; feature `fuzz` |
//!
//! It builds without libtorch.

pub mod config;
#[cfg(feature = "fuzz")]
#[doc(hidden)]
pub mod fuzz;

mod admission;
mod cache;
mod context;
mod embeddings;
mod error;
mod field_hasher;
mod metrics;
mod model;
mod pipeline;
mod pool;
mod report;
mod request;
mod rows;
mod service;
mod stage_call;
mod stages;
#[cfg(test)]
mod tests;

use emu2_proto::v1::emu2_server::Emu2Server;
use emu2_serve::{
    server::{Listeners, Server},
    shutdown::Shutdown,
    tenant::Tenants,
};
use prometheus_client::registry::Registry;

use crate::{config::Config, metrics::Metrics, service::Router};

/// Serves until shutdown. Ready once every stage of every model has answered, and every replica of it was asked; they
/// may start later than the router.
pub async fn run(config: Config, listeners: Listeners, shutdown: Shutdown) -> anyhow::Result<()> {
    let server_config = config.server.clone();
    let max_message_bytes = server_config.max_message_bytes;
    let tenants = Tenants::open(&config.auth)?;
    let mut registry = Registry::default();
    let router = Router::start(config, Metrics::register(&mut registry))?;
    let service = Emu2Server::new(router.clone())
        .max_decoding_message_size(max_message_bytes)
        .max_encoding_message_size(max_message_bytes);
    let server = Server::new("emu2-router", &server_config, listeners)
        .service(service)
        .registry(registry)
        .tenants(tenants);
    let readiness = server.readiness();
    let stages_answer = async {
        router.answered(|reason| readiness.not_ready(reason)).await;
        Ok(())
    };
    server.run_after(stages_answer, shutdown).await
}
