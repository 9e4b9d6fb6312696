//! The router as a process: configuration, telemetry, run.

use emu2_router::config::Config;
use emu2_serve::{config, server::Listeners, shutdown::Shutdown, telemetry};

/// Every request takes and gives back buffers of the size of one image's embeddings. glibc's allocator returns them to
/// the kernel each time, and each time the kernel hands out cleared pages anew.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config: Config = config::from_args()?;
    let _telemetry = telemetry::init("emu2-router", &config.telemetry)?;
    let listeners = Listeners::bind(&config.server).await?;
    emu2_router::run(config, listeners, Shutdown::on_signals()).await
}
