//! A mock stage as a process: options, run.

use clap::Parser;
use emu2_bench::mock::{self, options::Options};
use emu2_serve::shutdown::Shutdown;

/// One thread: a stage's work here is waiting, and many replicas share few cores.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    mock::run(Options::parse(), Shutdown::on_signals()).await
}
