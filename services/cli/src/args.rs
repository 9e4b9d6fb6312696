//! The command line of `emu2`.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand};
use emu2_client::RouterArgs;
use emu2_router::config::RedisUrl;

use crate::parts::BoxArg;

/// Serve Emu2, and ask it.
#[derive(Debug, Parser)]
#[command(name = "emu2", version)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start the whole cluster in this process.
    Up(Up),
    /// Ask about pictures; words and pictures in any order: emu2 ask dog.png "What is this?"
    Ask(Ask),
    /// Talk to a chat model; `/image FILE` attaches a picture to the next line.
    Chat(Chat),
    /// Paint a picture: emu2 draw "a dog" -o dog.png; a picture alone is autoencoded.
    Draw(Draw),
    /// A picture's embeddings.
    Embed(Embed),
    /// The models that a cluster serves, and its limits.
    Models(RouterArgs),
    /// Turn pickled or float32 weights into bfloat16 safetensors; run it again after a stop, and it goes on.
    Convert(Convert),
    /// What a model folder holds, and whether it can be served here.
    Inspect(Inspect),
    /// Start a cluster, and try everything on it.
    Demo(Demo),
}

/// Which cluster and which of its models.
#[derive(Clone, Debug, Args)]
pub struct Target {
    #[command(flatten)]
    pub server: RouterArgs,
    /// A name from `emu2 models`; default: the first that can do what is asked.
    #[arg(long)]
    pub model: Option<String>,
    /// Makes sampling and painting repeatable; drawn and printed when absent.
    #[arg(long)]
    pub seed: Option<u64>,
}

#[derive(Debug, Args)]
pub struct Up {
    /// A model folder: config.json, *.safetensors, tokenizer.model. Repeat for several models; those with the same
    /// visual weights share an encoder.
    #[arg(long = "model-dir", value_name = "DIR")]
    pub model_dirs: Vec<PathBuf>,
    /// Models by name in a TOML file: [[models]] with dir and, where they differ, name and the devices of encoder, llm
    /// and decoder. Without any model named here or otherwise: nano, deploy/models/nano.toml.
    #[arg(long, env = "EMU2_MODELS", value_name = "FILE")]
    pub models: Option<PathBuf>,
    /// A model of this size with weights out of a seed, for sizing and for measuring time: emu2-37b, emu2-third (a
    /// third of the width) or emu2-tiny; add ,seed=N for another.
    #[arg(long, value_name = "SIZE")]
    pub random_weights: Option<String>,
    /// Where the router listens.
    #[arg(long, default_value = "127.0.0.1:50051")]
    pub listen: SocketAddr,
    /// Where /metrics, /healthz and /readyz of the router listen.
    #[arg(long, default_value = "127.0.0.1:51051")]
    pub admin: SocketAddr,
    /// Devices of every model: cpu, or cuda:0,cuda:1; the llm's layers are spread over them, the rest takes the first.
    #[arg(long, default_value = "cpu", value_delimiter = ',')]
    pub devices: Vec<String>,
    /// Share encoded pictures with other routers through Redis (redis://…); in this process alone otherwise.
    #[arg(long, env = "EMU2_REDIS_URL", hide_env_values = true)]
    pub redis_url: Option<RedisUrl>,
    /// Who may call: a TOML file of [[tenants]] with name and token_sha256, read again when it changes; everybody
    /// otherwise.
    #[arg(long, value_name = "FILE")]
    pub tenants: Option<PathBuf>,
    /// Listen off loopback in the clear, and without --tenants to everybody.
    #[arg(long)]
    pub insecure: bool,
    /// Send traces here (OTLP over gRPC, http://…).
    #[arg(long, env = "EMU2_OTLP_ENDPOINT")]
    pub otlp_endpoint: Option<String>,
    /// Log filter, e.g. info or emu2_router=debug.
    #[arg(long, env = "EMU2_LOG", default_value = "info")]
    pub log: String,
}

#[derive(Debug, Args)]
pub struct Ask {
    #[command(flatten)]
    pub target: Target,
    #[command(flatten)]
    pub text: TextArgs,
    /// Files are pictures, anything else is text, in this order.
    #[arg(required = true, value_name = "IMAGE|TEXT")]
    pub parts: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Chat {
    #[command(flatten)]
    pub target: Target,
    #[command(flatten)]
    pub text: TextArgs,
    /// Replaces the model's own system message.
    #[arg(long)]
    pub system: Option<String>,
}

#[derive(Clone, Debug, Default, Args)]
pub struct TextArgs {
    /// Tokens to generate at most [default: 64]
    #[arg(long)]
    pub max_new_tokens: Option<u32>,
    /// Beams; 1 streams as it comes [default: 5, or 1 in chat]
    #[arg(long)]
    pub beams: Option<u32>,
    /// Draw tokens at this temperature instead of taking the likeliest.
    #[arg(long)]
    pub temperature: Option<f32>,
    /// With --temperature: among tokens that together reach this probability.
    #[arg(long)]
    pub top_p: Option<f32>,
    /// Ask for boxes.
    #[arg(long)]
    pub grounding: bool,
}

#[derive(Debug, Args)]
pub struct Draw {
    #[command(flatten)]
    pub target: Target,
    #[command(flatten)]
    pub image: ImageArgs,
    /// Files are pictures, anything else is text, in this order.
    #[arg(value_name = "IMAGE|TEXT")]
    pub parts: Vec<String>,
    /// A picture to start from; with --box, the picture of the box at the same place in the order.
    #[arg(long = "image", value_name = "FILE")]
    pub images: Vec<PathBuf>,
    /// Put a phrase somewhere: LEFT,TOP,RIGHT,BOTTOM:PHRASE in fractions of the picture.
    #[arg(long = "box", value_name = "L,T,R,B:PHRASE")]
    pub boxes: Vec<BoxArg>,
    /// Where the PNG goes.
    #[arg(short, long, default_value = "out.png")]
    pub output: PathBuf,
}

#[derive(Clone, Debug, Default, Args)]
pub struct ImageArgs {
    /// Pixels [default: the model's]
    #[arg(long)]
    pub height: Option<u32>,
    /// Pixels [default: the model's]
    #[arg(long)]
    pub width: Option<u32>,
    /// Denoising steps [default: 50]
    #[arg(long)]
    pub steps: Option<u32>,
    /// Guidance scale [default: 3]
    #[arg(long)]
    pub guidance: Option<f32>,
}

#[derive(Debug, Args)]
pub struct Embed {
    #[command(flatten)]
    pub server: RouterArgs,
    #[arg(long)]
    pub model: Option<String>,
    /// Embeddings wanted [default: the model's]
    #[arg(long)]
    pub n_query: Option<u32>,
    /// Write them here (safetensors, one tensor `embeddings`).
    #[arg(short, long)]
    pub output: Option<PathBuf>,
    pub image: PathBuf,
}

#[derive(Debug, Args)]
pub struct Convert {
    /// A model folder as published (*.bin or *.safetensors, with their index if there is one), or one such file.
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// A new folder; it needs as much room as the weights have in bfloat16.
    #[arg(value_name = "OUT")]
    pub output: PathBuf,
}

#[derive(Debug, Args)]
pub struct Inspect {
    /// A model folder.
    pub dir: PathBuf,
    /// What it would be served on, as for `emu2 up`.
    #[arg(long, default_value = "cpu", value_delimiter = ',')]
    pub devices: Vec<String>,
    /// Read all weights and print the digests that `emu2 models` would.
    #[arg(long)]
    pub digest: bool,
}

#[derive(Debug, Args)]
pub struct Demo {
    /// A model folder with every part.
    #[arg(long, default_value = "deploy/models/nano")]
    pub model_dir: PathBuf,
    /// Folder with chelsea.png and coffee.png, for a model that brings no prompts of its own (demo.toml).
    #[arg(long)]
    pub photos: Option<PathBuf>,
    /// Where the pictures go.
    #[arg(long, default_value = "out/demo")]
    pub out: PathBuf,
    #[arg(long, default_value = "cpu", value_delimiter = ',')]
    pub devices: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_password_of_redis_is_not_printed() {
        let words =
            ["emu2", "up", "--model-dir", "x", "--redis-url", "redis://:hunter2@localhost", "--log", "off"];
        let Command::Up(up) = Cli::parse_from(words).command else { panic!("another command") };
        assert!(!format!("{up:?}").contains("hunter2"));
        assert_eq!(up.redis_url.unwrap().reveal(), "redis://:hunter2@localhost");
    }
}
