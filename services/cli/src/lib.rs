//! The command `emu2`: asks a cluster through its public API, and executes `emu2-local` for everything else.
//!
//! | module | holds |
//! |---|---|
//! | `args` | the command line |
//! | `parts` | words of the command line → parts of a prompt |
//! | `ask`, `draw`, `embed`, `models` | the commands that ask a cluster |
//! | `local` | executes `emu2-local`, which needs libtorch and therefore starts slowly |

use anyhow::Result;

mod args;
mod ask;
mod draw;
mod embed;
mod local;
mod models;
mod parts;

pub use args::Cli;
use args::Command;

/// Runs a command to its end; one that `emu2-local` executes does not return on Unix, unless it cannot be executed.
///
/// # Errors
///
/// The reason why the command failed, in words for a person.
pub fn run(cli: Cli) -> Result<()> {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build();
    match cli.command {
        Command::Up(_) | Command::Convert(_) | Command::Inspect(_) | Command::Demo(_) => local::execute(),
        Command::Ask(args) => runtime()?.block_on(ask::ask(args)),
        Command::Chat(args) => runtime()?.block_on(ask::chat(args)),
        Command::Draw(args) => runtime()?.block_on(draw::draw(args)),
        Command::Embed(args) => runtime()?.block_on(embed::embed(args)),
        Command::Models(router) => runtime()?.block_on(models::models(router)),
    }
}
