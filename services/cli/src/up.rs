//! `emu2 up`: a cluster in this process until SIGINT or SIGTERM.

use std::path::PathBuf;

use anyhow::Result;
use emu2_serve::{
    shutdown::Shutdown,
    telemetry::{self, TelemetryConfig},
};

use crate::{
    args::Up,
    cluster::{Cluster, ClusterConfig},
};

pub async fn up(args: Up) -> Result<()> {
    let log = TelemetryConfig { log: args.log, otlp_endpoint: args.otlp_endpoint, ..Default::default() };
    let telemetry = telemetry::init("emu2", &log)?;
    let random = args.random_weights.map(|size| PathBuf::from(format!("random:{size}")));
    let outcome = serve(ClusterConfig {
        model_dirs: args.model_dirs.into_iter().chain(random).collect(),
        listen: args.listen,
        admin: Some(args.admin),
        devices: args.devices,
        redis_url: args.redis_url,
    })
    .await;
    telemetry.shutdown().await;
    outcome
}

async fn serve(config: ClusterConfig) -> Result<()> {
    let shutdown = Shutdown::on_signals();
    let mut cluster = Cluster::start(config).await?;
    for stage in &cluster.stages {
        let admin = stage.admin.map(tracing::field::display);
        tracing::info!(model = stage.model, stage = stage.stage, addr = %stage.addr, admin, "started");
    }
    tokio::select! {
        ready = cluster.ready() => {
            ready?;
            let admin = cluster.admin.map(tracing::field::display);
            tracing::info!(addr = %cluster.addr, admin, "ready: try `emu2 models`");
        }
        () = shutdown.begun() => return cluster.stop().await,
    }
    tokio::select! {
        failed = cluster.failed() => failed,
        () = shutdown.begun() => cluster.stop().await,
    }
}
