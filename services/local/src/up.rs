//! `emu2 up`: a cluster in this process until SIGINT or SIGTERM.

use std::path::PathBuf;

use anyhow::{Result, bail};
use emu2_serve::{
    shutdown::Shutdown,
    telemetry::{self, TelemetryConfig},
    tenant::{AuthConfig, AuthMode},
    tls::{TlsConfig, TlsMode},
};
use emu2_standalone::{
    cluster::{Cluster, ClusterConfig},
    models_file,
    plan::ModelSource,
};

use crate::{args::Up, loading::Bars};

/// The models that are served where none are named; relative to the root of the tree.
const NANO: &str = "deploy/models/nano.toml";

pub(crate) async fn up(args: Up) -> Result<()> {
    let log = TelemetryConfig {
        log: args.log.clone(),
        otlp_endpoint: args.otlp_endpoint.clone(),
        ..Default::default()
    };
    let bars = Bars::on_standard_error();
    let writer = bars.clone();
    let telemetry = telemetry::init_to("emu2", &log, move || writer.clone())?;
    let outcome = match config(args) {
        Ok(config) => serve(config, &bars).await,
        Err(error) => Err(error),
    };
    telemetry.shutdown().await;
    outcome
}

fn config(args: Up) -> Result<ClusterConfig> {
    let random = args.random_weights.map(|size| PathBuf::from(format!("random:{size}")));
    let dirs = args.model_dirs.into_iter().chain(random);
    let mut models: Vec<_> = dirs.map(|dir| ModelSource::new(dir, &args.devices)).collect();
    let nano = || models.is_empty().then(|| PathBuf::from(NANO));
    if let Some(file) = args.models.or_else(nano) {
        models.extend(models_file::read(&file, &args.devices)?);
    }
    let insecure = args.insecure;
    let mode = match args.tenants {
        Some(_) => Some(AuthMode::Tokens),
        None => insecure.then_some(AuthMode::None),
    };
    let auth = AuthConfig { mode, tenants_file: args.tenants, ..AuthConfig::default() };
    let tls = TlsConfig { mode: insecure.then_some(TlsMode::None), ..TlsConfig::default() };
    if !args.listen.ip().is_loopback() && !insecure {
        bail!("--listen {} is not loopback: say --insecure to talk in the clear there", args.listen);
    }
    let (listen, admin) = (args.listen, Some(args.admin));
    Ok(ClusterConfig { models, listen, admin, redis_url: args.redis_url, auth, tls })
}

async fn serve(config: ClusterConfig, bars: &Bars) -> Result<()> {
    let shutdown = Shutdown::on_signals();
    let mut cluster = Cluster::start(config).await?;
    for stage in &cluster.stages {
        let admin = stage.admin.map(tracing::field::display);
        tracing::info!(model = stage.model, stage = stage.stage, addr = %stage.addr, admin, "started");
    }
    let outcome = tokio::select! {
        outcome = run(&mut cluster, bars) => outcome,
        () = shutdown.begun() => Ok(()),
    };
    // The error that ended it comes before those of its services' ends.
    outcome.and(cluster.stop().await)
}

/// Waits until the cluster is ready, then until a service ends by itself.
async fn run(cluster: &mut Cluster, bars: &Bars) -> Result<()> {
    let stages = cluster.stages.clone();
    tokio::select! {
        ready = cluster.ready() => ready?,
        () = bars.follow(&stages) => {}
    }
    let admin = cluster.admin.map(tracing::field::display);
    tracing::info!(addr = %cluster.addr, admin, "ready: try `emu2 models`");
    cluster.failed().await
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn config(words: &[&str]) -> Result<ClusterConfig> {
        let words = ["emu2", "up"].iter().chain(words);
        let Command::Up(args) = Cli::parse_from(words).command else { panic!("another command") };
        super::config(args)
    }

    #[test]
    fn nano_is_served_where_no_model_is_named() {
        // Tests run in this crate's folder, where there is none.
        let error = format!("{:#}", config(&[]).unwrap_err());
        assert!(error.contains(NANO), "{error}");
        for named in [["--model-dir", "x"], ["--random-weights", "emu2-tiny"]] {
            assert_eq!(config(&named).unwrap().models.len(), 1);
        }
    }
}
