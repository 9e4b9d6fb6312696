//! Stages that compute nothing: each call costs a set time, and each answer is drawn from a hash of everything that
//! a model's would depend on (weights digest, content, seed, and what came before it), so that answers can be
//! compared byte for byte. They are served as real stages are (`emu2_serve::server`): permits, deadlines, health,
//! SIGTERM.
//!
//! | module | holds |
//! |---|---|
//! | [`options`] | the command line |
//! | `replica` | what the three share: costs, counts, the end of a call whose caller has left |
//! | `values` | bytes out of hashes |
//! | `encoder`, `llm`, `decoder` | the services |

mod decoder;
mod encoder;
mod llm;
pub mod options;
mod replica;
mod values;

use std::{io::Write, sync::Arc};

use emu2_proto::stage::{
    language_model_server::LanguageModelServer, visual_decoder_server::VisualDecoderServer,
    visual_encoder_server::VisualEncoderServer,
};
use emu2_serve::{
    server::{Listeners, Server},
    shutdown::Shutdown,
};
use prometheus_client::registry::Registry;
use tokio::task::JoinSet;

use self::{
    decoder::MockDecoder,
    encoder::MockEncoder,
    llm::MockLlm,
    options::{Options, Role},
    replica::Replica,
};

/// Serves every replica until shutdown. Each writes a line to standard output once it listens:
/// `ready http://ADDRESS http://ADMIN`, or `https` where it speaks TLS.
///
/// # Errors
///
/// A replica cannot listen, or its server fails.
pub async fn run(options: Options, shutdown: Shutdown) -> anyhow::Result<()> {
    let mut replicas = JoinSet::new();
    for number in 0..options.replicas {
        let config = options.server(number);
        let listeners = Listeners::bind(&config).await?;
        let admin = listeners.admin_addr().expect("a mock stage has an admin port");
        let mut out = std::io::stdout();
        writeln!(out, "ready {}://{} http://{admin}", options.scheme(), listeners.grpc_addr())?;
        out.flush()?;

        let mut registry = Registry::default();
        let replica = Arc::new(Replica::new(options.clone(), &mut registry));
        let server = Server::new("mock-stage", &config, listeners).registry(registry);
        let bytes = config.max_message_bytes;
        let server = match options.role {
            Role::Encoder => server
                .service(VisualEncoderServer::new(MockEncoder(replica)).max_decoding_message_size(bytes)),
            Role::Llm => {
                server.service(LanguageModelServer::new(MockLlm(replica)).max_decoding_message_size(bytes))
            }
            Role::Decoder => server
                .service(VisualDecoderServer::new(MockDecoder(replica)).max_decoding_message_size(bytes)),
        };
        replicas.spawn(Box::pin(server.run_after(async { Ok(()) }, shutdown.clone())));
    }
    while let Some(ended) = replicas.join_next().await {
        ended??;
    }
    Ok(())
}
