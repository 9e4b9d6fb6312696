//! The whole cluster in one process: every stage of every model on a free loopback port, and a router before them.
//!
//! The services are the same `run` functions that their binaries call and speak the same gRPC; only the process is
//! shared, and with it the cores.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::{Context, Result, bail, ensure};
use emu2_router::config::{ModelConfig, RedisUrl};
use emu2_serve::{
    config::Validate, server::Listeners, shutdown::Shutdown, tenant::AuthConfig, tls::TlsConfig,
};
use tokio::task::JoinSet;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::plan::{ModelSource, Plan, Service};

/// What to start.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    pub models: Vec<ModelSource>,
    /// Of the router; port 0 takes a free one.
    pub listen: SocketAddr,
    pub admin: Option<SocketAddr>,
    pub redis_url: Option<RedisUrl>,
    /// Who may call the router.
    pub auth: AuthConfig,
    pub tls: TlsConfig,
}

impl ClusterConfig {
    /// On the CPU and free loopback ports, with the cache in process.
    pub fn local(model_dirs: Vec<PathBuf>) -> Self {
        let free = SocketAddr::from(([127, 0, 0, 1], 0));
        let cpu = ["cpu".to_owned()];
        let models = model_dirs.into_iter().map(|dir| ModelSource::new(dir, &cpu)).collect();
        Self {
            models,
            listen: free,
            admin: Some(free),
            redis_url: None,
            auth: AuthConfig::default(),
            tls: TlsConfig::default(),
        }
    }

    fn router(&self) -> emu2_router::config::Config {
        let mut router = emu2_router::config::Config::default();
        router.server.listen = self.listen;
        router.server.admin = self.admin;
        router.cache.redis_url = self.redis_url.clone();
        router.auth = self.auth.clone();
        router.server.tls = self.tls.clone();
        router
    }
}

/// A stage of a model in a running cluster. Models that share an encoder name the same address.
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
        let router = config.router();
        // May read two visual encoders to see whether they are one.
        let plan = tokio::task::spawn_blocking(move || Plan::of(&config.models)).await;
        let plan = plan.context("planning the cluster panicked")??;
        let mut starting = Starting::default();
        match starting.start(plan, router).await {
            Ok((addr, admin)) => {
                let Starting { members, stop_router, stop_stages, router, services } = starting;
                Ok(Self { addr, admin, stages: members, stop_router, stop_stages, router, services })
            }
            Err(error) => {
                starting.stop_stages.begin();
                // Why it did not start says more than how the rest ended.
                let _ = all(&mut starting.services).await;
                Err(error)
            }
        }
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

/// What has been started so far.
#[derive(Default)]
struct Starting {
    members: Vec<Member>,
    stop_router: Shutdown,
    stop_stages: Shutdown,
    router: JoinSet<Result<()>>,
    services: JoinSet<Result<()>>,
}

impl Starting {
    /// The addresses of the router, gRPC and admin.
    async fn start(
        &mut self,
        plan: Plan,
        mut router: emu2_router::config::Config,
    ) -> Result<(SocketAddr, Option<SocketAddr>)> {
        let mut router_models = Vec::with_capacity(plan.models.len());
        let mut places = Vec::with_capacity(plan.services.len());
        for service in plan.services {
            places.push(self.service(service).await?);
        }
        for model in plan.models {
            let stages =
                [("encoder", Some(model.encoder)), ("llm", Some(model.llm)), ("decoder", model.decoder)];
            for (stage, place) in stages {
                let Some((addr, admin)) = place.map(|place| places[place]) else { continue };
                self.members.push(Member { model: model.name.clone(), stage, addr, admin });
            }
            let endpoint = |place: usize| vec![format!("http://{}", places[place].0)];
            router_models.push(ModelConfig {
                name: model.name,
                encoder: endpoint(model.encoder),
                llm: endpoint(model.llm),
                decoder: model.decoder.map(endpoint).unwrap_or_default(),
            });
        }
        router.models = router_models;
        let problems = router.problems();
        ensure!(problems.is_empty(), "router: {}", problems.join("; "));
        let listeners = Listeners::bind(&router.server).await?;
        let addresses = (listeners.grpc_addr(), listeners.admin_addr());
        self.router.spawn(emu2_router::run(router, listeners, self.stop_router.clone()));
        Ok(addresses)
    }

    async fn service(&mut self, service: Service) -> Result<(SocketAddr, Option<SocketAddr>)> {
        let listeners = Listeners::bind(service.server()).await?;
        let addresses = (listeners.grpc_addr(), listeners.admin_addr());
        service.spawn(listeners, self.stop_stages.clone(), &mut self.services);
        Ok(addresses)
    }
}
