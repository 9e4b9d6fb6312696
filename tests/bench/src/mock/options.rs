//! How a mock stage is told what to be.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Parser, ValueEnum};
use emu2_proto::v1::Dtype;
use emu2_serve::{
    server::ServerConfig,
    tls::{TlsConfig, TlsMode},
};

/// The stage that a mock stands in for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// The visual encoder.
    Encoder,
    /// The language model.
    Llm,
    /// The visual decoder.
    Decoder,
}

/// A stage without a model: set costs, comparable answers.
#[derive(Clone, Debug, Parser)]
#[command(name = "mock-stage")]
pub struct Options {
    /// The stage to stand in for.
    pub role: Role,
    /// Where the first replica listens; the others take any free port.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Replicas in this process, each a server of its own.
    #[arg(long, default_value_t = 1)]
    pub replicas: usize,
    /// Weights digest; all answers depend on it.
    #[arg(long, default_value = "w1")]
    pub digest: String,
    /// Width of an embedding.
    #[arg(long, default_value_t = 1792)]
    pub width: u32,
    /// Embeddings of an image.
    #[arg(long, default_value_t = 64)]
    pub queries: u32,
    /// Float32 in place of bfloat16.
    #[arg(long)]
    pub float32: bool,

    /// Encoder: milliseconds an image, one after another.
    #[arg(long, default_value_t = 0.0)]
    pub image_ms: f64,
    /// Llm: milliseconds to prefill a prompt, one after another.
    #[arg(long, default_value_t = 0.0)]
    pub prompt_ms: f64,
    /// Llm: milliseconds more to prefill a prompt for each of its images.
    #[arg(long, default_value_t = 0.0)]
    pub slot_ms: f64,
    /// Llm and decoder: milliseconds a step (a token, a regressed row, a denoising step), all running calls at once.
    #[arg(long, default_value_t = 0.0)]
    pub step_ms: f64,
    /// Decoder: milliseconds that ending an image takes (the VAE).
    #[arg(long, default_value_t = 0.0)]
    pub vae_ms: f64,
    /// Llm and decoder: calls that step at a time; more wait in order.
    #[arg(long, default_value_t = 64)]
    pub rows: usize,
    /// Every cost is drawn between (1 - jitter) and (1 + jitter) of itself.
    #[arg(long, default_value_t = 0.0)]
    pub jitter: f64,
    /// Seed that jittered costs are drawn from.
    #[arg(long, default_value_t = 1)]
    pub jitter_seed: u64,

    /// Decoder: bytes of a generated image.
    #[arg(long, default_value_t = 65_536)]
    pub png_bytes: usize,
    /// Permits; one more call is refused at once.
    #[arg(long, default_value_t = 4096)]
    pub max_requests: usize,
    /// How long running calls go on after SIGTERM, in milliseconds.
    #[arg(long, default_value_t = 10_000)]
    pub grace_ms: u64,

    /// Certificate of the door, as real stages' `server.tls`: with its key TLS, with a client CA mutual TLS.
    #[arg(long, requires = "key_file")]
    pub cert_file: Option<PathBuf>,
    /// Key of the certificate.
    #[arg(long, requires = "cert_file")]
    pub key_file: Option<PathBuf>,
    /// CA of client certificates: mutual TLS.
    #[arg(long, requires = "cert_file")]
    pub client_ca_file: Option<PathBuf>,
}

impl Options {
    pub(super) fn server(&self, number: usize) -> ServerConfig {
        let listen = if number == 0 { self.listen } else { SocketAddr::new(self.listen.ip(), 0) };
        ServerConfig {
            listen,
            max_requests: self.max_requests,
            shutdown_grace_ms: self.grace_ms,
            tls: self.tls(),
            ..ServerConfig::default()
        }
    }

    fn tls(&self) -> TlsConfig {
        let mode = match (&self.cert_file, &self.client_ca_file) {
            (None, _) => TlsMode::None,
            (Some(_), None) => TlsMode::Server,
            (Some(_), Some(_)) => TlsMode::Mutual,
        };
        TlsConfig {
            mode: Some(mode),
            cert_file: self.cert_file.clone(),
            key_file: self.key_file.clone(),
            client_ca_file: self.client_ca_file.clone(),
        }
    }

    /// Returns the scheme of the endpoints that callers name.
    pub(super) fn scheme(&self) -> &'static str {
        if self.cert_file.is_some() { "https" } else { "http" }
    }

    pub(super) fn dtype(&self) -> Dtype {
        if self.float32 { Dtype::F32 } else { Dtype::Bf16 }
    }
}

/// Makes a duration of a cost. Costs are small and come from the command line: a negative one is none.
pub(super) fn milliseconds(cost: f64) -> Duration {
    Duration::from_secs_f64(cost.max(0.0) / 1e3)
}
