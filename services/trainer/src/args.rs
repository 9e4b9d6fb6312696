//! The command line of `emu2-trainer`.

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Train a small Emu2, and measure it.
#[derive(Debug, Parser)]
#[command(name = "emu2-trainer", version)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// What the training data looks like.
    Data,
}

pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Data => {
            let side = crate::data::SIDE;
            println!("pictures of {side} x {side} pixels");
        }
    }
    Ok(())
}
