use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use emu2_cli::{
    args::{Cli, Command},
    ask, convert, demo, draw, embed, inspect, models, up,
};

#[tokio::main]
async fn main() -> ExitCode {
    match run(Cli::parse().command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> Result<()> {
    match command {
        Command::Up(args) => up::up(args).await,
        Command::Ask(args) => ask::ask(args).await,
        Command::Chat(args) => ask::chat(args).await,
        Command::Draw(args) => draw::draw(args).await,
        Command::Embed(args) => embed::embed(args).await,
        Command::Models(server) => models::models(server).await,
        Command::Convert(args) => convert::convert(args).await,
        Command::Inspect(args) => inspect::inspect(args).await,
        Command::Demo(args) => demo::demo(args).await,
    }
}
