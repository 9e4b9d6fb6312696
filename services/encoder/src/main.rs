//! `emu2-encoder --config FILE`: the visual encoder service.

use emu2_encoder::{Config, NAME};
use emu2_serve::{config, server::Listeners, shutdown::Shutdown, telemetry};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config: Config = config::from_args()?;
    let _telemetry = telemetry::init(NAME, &config.telemetry)?;
    let listeners = Listeners::bind(&config.server).await?;
    emu2_encoder::run(config, listeners, Shutdown::on_signals()).await
}
