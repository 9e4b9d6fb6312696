//! `emu2`: asks a cluster, and passes the commands that need torch to `emu2-local`.

use std::process::ExitCode;

use clap::Parser;
use emu2_cli::Cli;

fn main() -> ExitCode {
    match emu2_cli::run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
