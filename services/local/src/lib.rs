//! The commands of `emu2` that work on model folders of this machine, in a binary of their own: they are linked to
//! libtorch, whose loading a client need not wait for. `emu2` executes it.
//!
//! | module | holds |
//! |---|---|
//! | `args` | the command line |
//! | `up` | `emu2 up`: a standalone cluster until a signal |
//! | `loading` | progress bars while its stages load |
//! | `demo` | `emu2 demo`: a standalone cluster, tried through its public API |
//! | `convert` | `emu2 convert`: published weights to what is served |
//! | `inspect` | `emu2 inspect`: what a folder holds, and whether it can be served |

use anyhow::Result;

mod args;
mod convert;
mod demo;
mod inspect;
mod loading;
mod up;

pub use args::Cli;
use args::Command;

/// Runs a command to its end.
///
/// # Errors
///
/// The reason why the command failed, in words for a person.
pub async fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Up(args) => up::up(args).await,
        Command::Convert(args) => convert::convert(args).await,
        Command::Inspect(args) => inspect::inspect(args).await,
        Command::Demo(args) => demo::demo(args).await,
    }
}
