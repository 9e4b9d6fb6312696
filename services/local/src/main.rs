//! `emu2-local`: the commands of `emu2` that need torch: up, demo, inspect and convert.

use std::process::ExitCode;

use clap::Parser;
use emu2_local::Cli;

#[tokio::main]
async fn main() -> ExitCode {
    match emu2_local::run(Cli::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
