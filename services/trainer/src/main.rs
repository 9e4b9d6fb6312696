//! `emu2-trainer`: trains small Emu2 models, exports and measures them.

use std::process::ExitCode;

use clap::Parser;
use emu2_trainer::args::{self, Cli};

fn main() -> ExitCode {
    match args::run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
