//! `emu2-decoder --config FILE`: serves the image decoder of Emu2.

use emu2_decoder::{Config, run};
use emu2_serve::{config, server::Listeners, shutdown::Shutdown, telemetry};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config: Config = config::from_args()?;
    let _telemetry = telemetry::init("emu2-decoder", &config.telemetry)?;
    let listeners = Listeners::bind(&config.server).await?;
    run(config, listeners, Shutdown::on_signals()).await
}
