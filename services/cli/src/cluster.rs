//! The whole cluster in one process: every stage of every model on a free loopback port, and a router before them.
//!
//! The services are the same `run` functions that their binaries call and speak the same gRPC; only the process is
//! shared, and with it the cores.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, bail};
use emu2_nn::checkpoint::{ModelDir, Part};
use emu2_router::config::{ModelConfig, RedisUrl};
use emu2_serve::{
    server::{Listeners, ServerConfig},
    shutdown::Shutdown,
    telemetry::TelemetryConfig,
};
use tokio::task::JoinSet;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

/// What to start.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    pub model_dirs: Vec<PathBuf>,
    /// Of the router; port 0 takes a free one.
    pub listen: SocketAddr,
    pub admin: Option<SocketAddr>,
    /// The llm's layers are spread over them; encoders and decoders take the first.
    pub devices: Vec<String>,
    pub redis_url: Option<String>,
}

impl ClusterConfig {
    /// On the CPU and free loopback ports, with the cache in process.
    pub fn local(model_dirs: Vec<PathBuf>) -> Self {
        let free = SocketAddr::from(([127, 0, 0, 1], 0));
        Self { model_dirs, listen: free, admin: Some(free), devices: vec!["cpu".to_owned()], redis_url: None }
    }
}

/// A service of a running cluster.
#[derive(Clone, Debug)]
pub struct Member {
    pub model: String,
    /// `encoder`, `llm` or `decoder`.
    pub stage: &'static str,
    pub addr: SocketAddr,
    pub admin: Option<SocketAddr>,
}

/// A running cluster; dropping it leaves its services to the runtime, [`Cluster::stop`] ends them in order.
#[derive(Debug)]
pub struct Cluster {
    /// The router's gRPC address.
    pub addr: SocketAddr,
    pub admin: Option<SocketAddr>,
    pub stages: Vec<Member>,
    stop_router: Shutdown,
    stop_stages: Shutdown,
    router: JoinSet<Result<()>>,
    services: JoinSet<Result<()>>,
}

impl Cluster {
    /// Starts every service; they load while this returns. [`Cluster::ready`] waits for them.
    pub async fn start(config: ClusterConfig) -> Result<Self> {
        let plans = config.model_dirs.iter().map(|dir| Plan::of(dir)).collect::<Result<Vec<_>>>()?;
        let engines: usize = plans.iter().map(|plan| plan.stages.len()).sum();
        let cores = (thread::available_parallelism().map_or(1, |all| all.get()) / engines.max(1)).max(1);
        let mut starting = Starting {
            devices: config.devices,
            cores,
            stop: Shutdown::new(),
            services: JoinSet::new(),
            members: Vec::new(),
        };
        let mut models = Vec::new();
        for plan in &plans {
            models.push(starting.model(plan).await?);
        }
        let stop_router = Shutdown::new();
        let mut router_config = emu2_router::config::Config { models, ..Default::default() };
        router_config.server.listen = config.listen;
        router_config.server.admin = config.admin;
        router_config.cache.redis_url = config.redis_url.map(RedisUrl::new);
        let listeners = Listeners::bind(&router_config.server).await?;
        let (addr, admin) = (listeners.grpc_addr(), listeners.admin_addr());
        let mut router = JoinSet::new();
        router.spawn(emu2_router::run(router_config, listeners, stop_router.clone()));
        let Starting { stop, services, members, .. } = starting;
        Ok(Self { addr, admin, stages: members, stop_router, stop_stages: stop, router, services })
    }

    /// Waits until the router serves every model, or for the first service that failed.
    pub async fn ready(&mut self) -> Result<()> {
        tokio::select! {
            ready = serving(self.addr) => ready,
            failed = failure(&mut self.router, &mut self.services) => failed,
        }
    }

    /// Waits for the first service that ends by itself, which a healthy cluster's never do.
    pub async fn failed(&mut self) -> Result<()> {
        failure(&mut self.router, &mut self.services).await
    }

    /// The router first, so that running requests still find their stages.
    pub async fn stop(mut self) -> Result<()> {
        self.stop_router.begin();
        let router = all(&mut self.router).await;
        self.stop_stages.begin();
        router.and(all(&mut self.services).await)
    }
}

/// Waits until the health of a service on this machine says that it serves.
async fn serving(addr: SocketAddr) -> Result<()> {
    let channel = emu2_serve::client::endpoint(format!("http://{addr}"))?.connect().await?;
    let mut changes = HealthClient::new(channel).watch(HealthCheckRequest::default()).await?.into_inner();
    while let Some(health) = changes.message().await? {
        if health.status() == ServingStatus::Serving {
            return Ok(());
        }
    }
    bail!("the service at {addr} stopped before it was ready")
}

async fn failure(router: &mut JoinSet<Result<()>>, services: &mut JoinSet<Result<()>>) -> Result<()> {
    let ended = tokio::select! {
        Some(ended) = router.join_next() => ended,
        Some(ended) = services.join_next() => ended,
        else => bail!("the cluster has no services"),
    };
    ended.context("a service panicked")??;
    bail!("a service stopped by itself")
}

async fn all(services: &mut JoinSet<Result<()>>) -> Result<()> {
    let mut outcome = Ok(());
    while let Some(ended) = services.join_next().await {
        outcome = outcome.and(ended.context("a service panicked").flatten());
    }
    outcome
}

/// A model folder and the stages it has weights for.
struct Plan {
    dir: PathBuf,
    name: String,
    stages: Vec<&'static str>,
}

impl Plan {
    fn of(dir: &Path) -> Result<Self> {
        let model = ModelDir::open(dir)?;
        let stages = [(Part::Visual, "encoder"), (Part::Llm, "llm"), (Part::Unet, "decoder")];
        let stages =
            stages.into_iter().filter(|(part, _)| model.has(*part)).map(|(_, stage)| stage).collect();
        Ok(Self { dir: dir.to_owned(), name: model.name().to_owned(), stages })
    }
}

/// The stages started so far, and what they share.
struct Starting {
    devices: Vec<String>,
    cores: usize,
    stop: Shutdown,
    services: JoinSet<Result<()>>,
    members: Vec<Member>,
}

impl Starting {
    /// Starts a model's stages and returns how the router reaches them.
    async fn model(&mut self, plan: &Plan) -> Result<ModelConfig> {
        let name = plan.name.clone();
        let mut model = ModelConfig { name, encoder: Vec::new(), llm: Vec::new(), decoder: Vec::new() };
        for &stage in &plan.stages {
            let endpoint = self.stage(plan, stage).await?;
            match stage {
                "encoder" => model.encoder.push(endpoint),
                "llm" => model.llm.push(endpoint),
                _ => model.decoder.push(endpoint),
            }
        }
        Ok(model)
    }

    async fn stage(&mut self, plan: &Plan, stage: &'static str) -> Result<String> {
        let server = ServerConfig::on_port(0);
        let listeners = Listeners::bind(&server).await?;
        let (addr, admin) = (listeners.grpc_addr(), listeners.admin_addr());
        // As upstream's multi-GPU placement: only the llm's layers are spread, everything else is on the first device.
        let spread = if stage == "llm" { self.devices.len() } else { 1 };
        let devices = self.devices.iter().take(spread).cloned().collect();
        let (model_dir, cores) = (plan.dir.clone(), self.cores);
        let (telemetry, stop) = (TelemetryConfig::default(), self.stop.clone());
        match stage {
            "encoder" => {
                use emu2_encoder::{config::Config, run};
                let config = Config { model_dir, devices, cores, server, telemetry, ..Default::default() };
                self.services.spawn(run(config, listeners, stop));
            }
            "llm" => {
                use emu2_llm::{config::Config, run};
                let config = Config { model_dir, devices, cores, server, telemetry, ..Default::default() };
                self.services.spawn(run(config, listeners, stop));
            }
            _ => {
                use emu2_decoder::{config::Config, run};
                let config = Config { model_dir, devices, cores, server, telemetry, ..Default::default() };
                self.services.spawn(run(config, listeners, stop));
            }
        }
        self.members.push(Member { model: plan.name.clone(), stage, addr, admin });
        Ok(format!("http://{addr}"))
    }
}
