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

/// What a cluster serves, and where its router listens.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// The models that are served; at least one.
    pub models: Vec<ModelSource>,
    /// Where the router listens; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where the router's `/metrics`, `/healthz` and `/readyz` listen, if anywhere; port 0 takes a free one.
    pub admin: Option<SocketAddr>,
    /// The Redis that the router caches in; without one it caches in this process.
    pub redis_url: Option<RedisUrl>,
    /// Who may call the router.
    pub auth: AuthConfig,
    /// The certificates that the router shows and asks for.
    pub tls: TlsConfig,
}

impl ClusterConfig {
    /// Returns the configuration of a cluster on the CPU and free loopback ports, with its cache in this process.
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

/// Where a stage of a model listens in a running cluster. Models that share an encoder have the same address for it.
#[derive(Clone, Debug)]
pub struct StageEndpoint {
    /// The name that the model is served under.
    pub model: String,
    /// `encoder`, `llm` or `decoder`.
    pub stage: &'static str,
    /// The stage's gRPC address.
    pub addr: SocketAddr,
    /// The address of the stage's admin pages, if it has some.
    pub admin: Option<SocketAddr>,
}

/// A running cluster. Dropping it aborts its services; [`Cluster::stop`] ends them in order.
#[derive(Debug)]
pub struct Cluster {
    /// The router's gRPC address.
    pub addr: SocketAddr,
    /// The address of the router's admin pages, if it has some.
    pub admin: Option<SocketAddr>,
    /// The stages of all models, in the order of the models.
    pub stages: Vec<StageEndpoint>,
    stop_router: Shutdown,
    stop_stages: Shutdown,
    router: JoinSet<Result<()>>,
    services: JoinSet<Result<()>>,
}

impl Cluster {
    /// Starts every service, and returns while they load; [`Cluster::ready`] waits for them.
    ///
    /// # Errors
    ///
    /// A model folder that cannot be served, weights that do not fit the devices, or an address that is taken.
    pub async fn start(config: ClusterConfig) -> Result<Self> {
        let router = config.router();
        // May read two visual encoders to see whether they are one.
        let plan = tokio::task::spawn_blocking(move || Plan::new(&config.models)).await;
        let plan = plan.context("planning the cluster panicked")??;
        let mut starting = Starting::default();
        match starting.start(plan, router).await {
            Ok((addr, admin)) => {
                let Starting { endpoints, stop_router, stop_stages, router, services } = starting;
                Ok(Self { addr, admin, stages: endpoints, stop_router, stop_stages, router, services })
            }
            Err(error) => {
                starting.stop_stages.begin();
                // Why it did not start says more than how the rest ended.
                let _ = join_all(&mut starting.services).await;
                Err(error)
            }
        }
    }

    /// Waits until the router serves every model.
    ///
    /// # Errors
    ///
    /// A service ended before that.
    pub async fn ready(&mut self) -> Result<()> {
        tokio::select! {
            ready = serving(self.addr) => ready,
            failed = failure(&mut self.router, &mut self.services) => failed,
        }
    }

    /// Waits for the first service that ends by itself, which no service of a healthy cluster does; so whatever this
    /// returns is an error.
    pub async fn failed(&mut self) -> Result<()> {
        failure(&mut self.router, &mut self.services).await
    }

    /// Stops the cluster, the router first so that running requests still find their stages; returns the first error
    /// of a service.
    pub async fn stop(mut self) -> Result<()> {
        self.stop_router.begin();
        let router = join_all(&mut self.router).await;
        self.stop_stages.begin();
        router.and(join_all(&mut self.services).await)
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

async fn join_all(services: &mut JoinSet<Result<()>>) -> Result<()> {
    let mut outcome = Ok(());
    while let Some(ended) = services.join_next().await {
        outcome = outcome.and(ended.context("a service panicked").flatten());
    }
    outcome
}

/// The services that have been started so far.
#[derive(Default)]
struct Starting {
    endpoints: Vec<StageEndpoint>,
    stop_router: Shutdown,
    stop_stages: Shutdown,
    router: JoinSet<Result<()>>,
    services: JoinSet<Result<()>>,
}

impl Starting {
    /// Starts the services of a plan, then a router before them; returns the router's gRPC and admin addresses.
    async fn start(
        &mut self,
        plan: Plan,
        mut router: emu2_router::config::Config,
    ) -> Result<(SocketAddr, Option<SocketAddr>)> {
        let mut router_models = Vec::with_capacity(plan.models.len());
        let mut addresses = Vec::with_capacity(plan.services.len());
        for service in plan.services {
            addresses.push(self.service(service).await?);
        }
        for model in plan.models {
            let stages =
                [("encoder", Some(model.encoder)), ("llm", Some(model.llm)), ("decoder", model.decoder)];
            for (stage, index) in stages {
                let Some((addr, admin)) = index.map(|index| addresses[index]) else { continue };
                self.endpoints.push(StageEndpoint { model: model.name.clone(), stage, addr, admin });
            }
            let endpoint = |index: usize| vec![format!("http://{}", addresses[index].0)];
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
