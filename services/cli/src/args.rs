//! The command line of `emu2`.

use std::{ffi::OsString, path::PathBuf};

use clap::{Args, Parser, Subcommand};
use emu2_client::RouterArgs;

use crate::parts::BoxArg;

/// Serve Emu2, and ask it.
#[derive(Debug, Parser)]
#[command(name = "emu2", version)]
pub struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start the whole cluster in this process.
    Up(LocalArgs),
    /// Ask about images; words and images in any order: emu2 ask dog.png "What is this?"
    Ask(Ask),
    /// Talk to a chat model; `/image FILE` attaches an image to the next line.
    Chat(Chat),
    /// Generate an image: emu2 draw "a dog" -o dog.png; an image alone is autoencoded.
    Draw(Draw),
    /// Compute the embeddings of an image.
    Embed(Embed),
    /// List the models that a cluster serves, and its limits.
    Models(RouterArgs),
    /// Turn pickled or float32 weights into bfloat16 safetensors; run it again after a stop, and it goes on.
    Convert(LocalArgs),
    /// Tell what a model folder holds, and whether it can be served here.
    Inspect(LocalArgs),
    /// Start a cluster, and try everything on it.
    Demo(LocalArgs),
}

/// The arguments of a command that `emu2-local` executes. They are listed here only so that one `--help` names every
/// command: emu2-local reads them, and answers `--help` itself.
#[derive(Debug, Args)]
#[command(disable_help_flag = true, after_help = "With --help, lists its arguments.")]
pub(crate) struct LocalArgs {
    #[arg(value_name = "ARGUMENTS", trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Which cluster and which of its models.
#[derive(Clone, Debug, Args)]
pub(crate) struct Target {
    #[command(flatten)]
    pub(crate) router: RouterArgs,
    /// A name from `emu2 models`; default: the first that can do what is asked.
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Makes sampling and denoising repeatable; drawn and printed when absent.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct Ask {
    #[command(flatten)]
    pub(crate) target: Target,
    #[command(flatten)]
    pub(crate) text: TextArgs,
    /// Files are images, anything else is text, in this order.
    #[arg(required = true, value_name = "IMAGE|TEXT")]
    pub(crate) parts: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Chat {
    #[command(flatten)]
    pub(crate) target: Target,
    #[command(flatten)]
    pub(crate) text: TextArgs,
    /// Replaces the model's own system message.
    #[arg(long)]
    pub(crate) system: Option<String>,
}

#[derive(Clone, Debug, Default, Args)]
pub(crate) struct TextArgs {
    /// Tokens to generate at most [default: 64]
    #[arg(long)]
    pub(crate) max_new_tokens: Option<u32>,
    /// Beams; 1 streams as it comes [default: 5, or 1 in chat]
    #[arg(long)]
    pub(crate) beams: Option<u32>,
    /// Draw tokens at this temperature instead of taking the likeliest.
    #[arg(long)]
    pub(crate) temperature: Option<f32>,
    /// With --temperature: among tokens that together reach this probability.
    #[arg(long)]
    pub(crate) top_p: Option<f32>,
    /// Ask for boxes.
    #[arg(long)]
    pub(crate) grounding: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Draw {
    #[command(flatten)]
    pub(crate) target: Target,
    #[command(flatten)]
    pub(crate) image: ImageArgs,
    /// Files are images, anything else is text, in this order.
    #[arg(value_name = "IMAGE|TEXT")]
    pub(crate) parts: Vec<String>,
    /// An image to start from; with --box, the image of the box at the same place in the order.
    #[arg(long = "image", value_name = "FILE")]
    pub(crate) images: Vec<PathBuf>,
    /// Put a phrase somewhere: LEFT,TOP,RIGHT,BOTTOM:PHRASE in fractions of the image.
    #[arg(long = "box", value_name = "L,T,R,B:PHRASE")]
    pub(crate) boxes: Vec<BoxArg>,
    /// Where the PNG goes.
    #[arg(short, long, default_value = "out.png")]
    pub(crate) output: PathBuf,
}

#[derive(Clone, Debug, Default, Args)]
pub(crate) struct ImageArgs {
    /// Pixels [default: the model's]
    #[arg(long)]
    pub(crate) height: Option<u32>,
    /// Pixels [default: the model's]
    #[arg(long)]
    pub(crate) width: Option<u32>,
    /// Denoising steps [default: 50]
    #[arg(long)]
    pub(crate) steps: Option<u32>,
    /// Guidance scale [default: 3]
    #[arg(long)]
    pub(crate) guidance: Option<f32>,
}

#[derive(Debug, Args)]
pub(crate) struct Embed {
    #[command(flatten)]
    pub(crate) router: RouterArgs,
    /// A name from `emu2 models`; default: the first that can embed.
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Embeddings wanted [default: the model's]
    #[arg(long)]
    pub(crate) n_query: Option<u32>,
    /// Write them here (safetensors, one tensor `embeddings`).
    #[arg(short, long)]
    pub(crate) output: Option<PathBuf>,
    /// An image file.
    pub(crate) image: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_emu2_local_reads_is_not_read_here() {
        for words in [&["--model-dir", "x", "--listen"][..], &["--help"], &["-x", "--", "y"], &[]] {
            let line = ["emu2", "up"].iter().chain(words);
            let Command::Up(up) = Cli::try_parse_from(line).unwrap().command else {
                panic!("another command")
            };
            assert_eq!(up.arguments, words);
        }
    }
}
