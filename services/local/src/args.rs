//! The arguments of the commands that work on model folders of this machine.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand};
use emu2_router::config::RedisUrl;

/// The commands of `emu2` that work on model folders of this machine. `emu2` executes this binary for them.
#[derive(Debug, Parser)]
#[command(name = "emu2", bin_name = "emu2", version)]
pub struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start the whole cluster in this process.
    Up(Up),
    /// Turn pickled or float32 weights into bfloat16 safetensors; run it again after a stop, and it goes on.
    Convert(Convert),
    /// Tell what a model folder holds, and whether it can be served here.
    Inspect(Inspect),
    /// Start a cluster, and try everything on it.
    Demo(Demo),
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// A model folder: config.json, *.safetensors, tokenizer.model. Repeat for several models; those with the same
    /// visual weights share an encoder.
    #[arg(long = "model-dir", value_name = "DIR")]
    pub(crate) model_dirs: Vec<PathBuf>,
    /// Models by name in a TOML file: [[models]] with dir and, where they differ, name and the devices of encoder, llm
    /// and decoder. Without any model named here or otherwise: nano, deploy/models/nano.toml.
    #[arg(long, env = "EMU2_MODELS", value_name = "FILE")]
    pub(crate) models: Option<PathBuf>,
    /// A model of this size with weights out of a seed, for sizing and for measuring time: emu2-37b, emu2-third (a
    /// third of the width) or emu2-tiny; add ,seed=N for another.
    #[arg(long, value_name = "SIZE")]
    pub(crate) random_weights: Option<String>,
    /// Where the router listens.
    #[arg(long, default_value = "127.0.0.1:50051")]
    pub(crate) listen: SocketAddr,
    /// Where /metrics, /healthz and /readyz of the router listen.
    #[arg(long, default_value = "127.0.0.1:51051")]
    pub(crate) admin: SocketAddr,
    /// Devices of every model: cpu, or cuda:0,cuda:1; the llm's layers are spread over them, the rest takes the first.
    #[arg(long, default_value = "cpu", value_delimiter = ',')]
    pub(crate) devices: Vec<String>,
    /// Share encoded images with other routers through Redis (redis://…); in this process alone otherwise.
    #[arg(long, env = "EMU2_REDIS_URL", hide_env_values = true)]
    pub(crate) redis_url: Option<RedisUrl>,
    /// Who may call: a TOML file of [[tenants]] with name and token_sha256, read again when it changes; everybody
    /// otherwise.
    #[arg(long, value_name = "FILE")]
    pub(crate) tenants: Option<PathBuf>,
    /// Listen off loopback in the clear, and without --tenants to everybody.
    #[arg(long)]
    pub(crate) insecure: bool,
    /// Send traces here (OTLP over gRPC, http://…).
    #[arg(long, env = "EMU2_OTLP_ENDPOINT")]
    pub(crate) otlp_endpoint: Option<String>,
    /// Log filter, e.g. info or emu2_router=debug.
    #[arg(long, env = "EMU2_LOG", default_value = "info")]
    pub(crate) log: String,
}

#[derive(Debug, Args)]
pub(crate) struct Convert {
    /// A model folder as published (*.bin or *.safetensors, with their index if there is one), or one such file.
    #[arg(value_name = "IN")]
    pub(crate) input: PathBuf,
    /// A new folder; it needs as much room as the weights have in bfloat16.
    #[arg(value_name = "OUT")]
    pub(crate) output: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// A model folder.
    pub(crate) dir: PathBuf,
    /// What it would be served on, as for `emu2 up`.
    #[arg(long, default_value = "cpu", value_delimiter = ',')]
    pub(crate) devices: Vec<String>,
    /// Read all weights and print the digests that `emu2 models` would.
    #[arg(long)]
    pub(crate) digest: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// A model folder with every part.
    #[arg(long, default_value = "deploy/models/nano")]
    pub(crate) model_dir: PathBuf,
    /// Folder with chelsea.png and coffee.png, for a model that brings no prompts of its own (demo.toml).
    #[arg(long)]
    pub(crate) photos: Option<PathBuf>,
    /// The folder that receives the images.
    #[arg(long, default_value = "out/demo")]
    pub(crate) out: PathBuf,
    /// Devices of the model, as for `emu2 up`.
    #[arg(long, default_value = "cpu", value_delimiter = ',')]
    pub(crate) devices: Vec<String>,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use clap::CommandFactory;

    use super::*;

    /// `emu2 --help` lists these commands, but reads none of their arguments.
    #[test]
    fn the_client_lists_these_commands() {
        let listed = |command: clap::Command| -> BTreeMap<String, String> {
            let about = |command: &clap::Command| command.get_about().unwrap().to_string();
            command.get_subcommands().map(|sub| (sub.get_name().to_owned(), about(sub))).collect()
        };
        let (here, by_client) = (listed(Cli::command()), listed(emu2_cli::Cli::command()));
        assert_eq!(here.len(), 4);
        for (name, about) in here {
            assert_eq!(by_client.get(&name), Some(&about), "{name}");
        }
    }

    #[test]
    fn the_password_of_redis_is_not_printed() {
        let words =
            ["emu2", "up", "--model-dir", "x", "--redis-url", "redis://:hunter2@localhost", "--log", "off"];
        let Command::Up(up) = Cli::parse_from(words).command else { panic!("another command") };
        assert!(!format!("{up:?}").contains("hunter2"));
        assert_eq!(up.redis_url.unwrap().reveal(), "redis://:hunter2@localhost");
    }
}
