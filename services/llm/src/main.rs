//! `emu2-llm --config FILE`: the language model service.

use emu2_llm::{Config, NAME};
use emu2_serve::{config, server::Listeners, shutdown::Shutdown, telemetry};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config: Config = config::from_args()?;
    let _telemetry = telemetry::init(NAME, &config.telemetry)?;
    let listeners = Listeners::bind(&config.server).await?;
    emu2_llm::run(config, listeners, Shutdown::on_signals()).await
}
