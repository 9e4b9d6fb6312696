//! A gRPC server as every service of the cluster runs it: health, reflection, the layer of `rpc` around each call,
//! an admin port, and an end in order.
//!
//! A service that loads nothing, called once and shut down:
//!
//! ```
//! use emu2_proto::v1::{ListModelsRequest, emu2_client::Emu2Client, emu2_server::Emu2Server};
//! use emu2_serve::{
//!     client,
//!     server::{Listeners, Server, ServerConfig},
//!     shutdown::Shutdown,
//! };
//! # use emu2_proto::v1::{
//! #     EmbedRequest, EmbedResponse, GenerateEvent, GenerateRequest, ListModelsResponse, emu2_server::Emu2,
//! # };
//! # use emu2_serve::stream::Events;
//! # use tonic::{Request, Response, Status};
//! # struct Example;
//! # #[tonic::async_trait]
//! # impl Emu2 for Example {
//! #     type GenerateStream = Events<GenerateEvent>;
//! #     async fn generate(
//! #         &self,
//! #         _: Request<GenerateRequest>,
//! #     ) -> Result<Response<Self::GenerateStream>, Status> {
//! #         Err(Status::unimplemented("the example has no model"))
//! #     }
//! #     async fn embed(&self, _: Request<EmbedRequest>) -> Result<Response<EmbedResponse>, Status> {
//! #         Err(Status::unimplemented("the example has no model"))
//! #     }
//! #     async fn list_models(
//! #         &self,
//! #         _: Request<ListModelsRequest>,
//! #     ) -> Result<Response<ListModelsResponse>, Status> {
//! #         Ok(Response::new(ListModelsResponse::default()))
//! #     }
//! # }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> anyhow::Result<()> {
//! let config = ServerConfig::on_port(0);
//! let listeners = Listeners::bind(&config).await?;
//! let address = listeners.grpc_addr();
//! let server = Server::new("example", &config, listeners).service(Emu2Server::new(Example));
//! let (readiness, shutdown) = (server.readiness(), Shutdown::new());
//! let load = async { Ok(()) };
//! let running = tokio::spawn(Box::pin(server.run_after(load, shutdown.clone())));
//!
//! readiness.became_ready().await;
//! let channel = client::endpoint(format!("http://{address}"))?.connect_lazy();
//! let answer = Emu2Client::new(channel).list_models(ListModelsRequest {}).await?;
//! assert!(answer.into_inner().models.is_empty());
//!
//! shutdown.begin();
//! running.await??;
//! # Ok(())
//! # }
//! ```

mod config;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context;
use prometheus_client::registry::Registry;
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{body::Body, codegen::http::Request, server::NamedService, service::Routes};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::Service;

use crate::{
    admin,
    admission::Admission,
    client::{
        CONNECTION_WINDOW_BYTES, FRAME_BYTES, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, STREAM_WINDOW_BYTES,
    },
    connections::Connections,
    methods::Methods,
    metrics::RpcMetrics,
    readiness::{Readiness, State},
    rpc::{RpcLayer, Shared},
    shutdown::Shutdown,
    tenant::Tenants,
};

pub use self::config::ServerConfig;

/// Streams of one connection beyond the permits: a caller over the limit must reach admission and be refused there,
/// not wait unseen for a free stream; and health checks must always find one.
const SPARE_STREAMS: usize = 256;
/// Headers of one call. What a client of ours sends is a few hundred bytes, a token and a trace included.
const HEADER_LIST_BYTES_MAX: u32 = 16 << 10;
/// After the grace: for the last trailers to leave, and for the admin port to close.
const CLOSE_MS_MAX: u64 = 1_000;
/// For an engine to end the step that it is in.
const ENGINE_END_MS_MAX: u64 = 5_000;

/// The sockets of a service, bound before anything else starts, so that a taken port fails at once and a test can
/// ask for port 0.
#[derive(Debug)]
pub struct Listeners {
    grpc: TcpListener,
    admin: Option<TcpListener>,
}

impl Listeners {
    /// Binds the gRPC port and, where one is configured, the admin port. Fails on an address that cannot be listened
    /// on.
    pub async fn bind(config: &ServerConfig) -> anyhow::Result<Self> {
        let bind = async |address| {
            TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
        };
        let grpc = bind(config.listen).await?;
        let admin = match config.admin {
            Some(address) => Some(bind(address).await?),
            None => None,
        };
        Ok(Self { grpc, admin })
    }

    /// Returns the address of the gRPC port.
    pub fn grpc_addr(&self) -> SocketAddr {
        self.grpc.local_addr().expect("a bound listener has an address")
    }

    /// Returns the address of the admin port, if there is one.
    pub fn admin_addr(&self) -> Option<SocketAddr> {
        self.admin.as_ref().map(|admin| admin.local_addr().expect("a bound listener has an address"))
    }
}

/// A gRPC server under construction, until one of its `run` functions serves.
pub struct Server {
    name: &'static str,
    config: ServerConfig,
    listeners: Listeners,
    routes: Routes,
    services: Vec<&'static str>,
    registry: Registry,
    readiness: Readiness,
    tenants: Tenants,
}

impl Server {
    /// Returns a server without services; `name` is the `service` field of its spans and log lines.
    pub fn new(name: &'static str, config: &ServerConfig, listeners: Listeners) -> Self {
        Self {
            name,
            config: config.clone(),
            listeners,
            routes: Routes::default(),
            services: Vec::new(),
            registry: Registry::default(),
            readiness: Readiness::new(),
            tenants: Tenants::default(),
        }
    }

    /// Adds a tonic service. Its message limits are its own: give it
    /// `.max_decoding_message_size(config.max_message_bytes)` and the same for encoding.
    #[must_use]
    pub fn service<S>(mut self, service: S) -> Self
    where
        S: Service<Request<Body>, Error = std::convert::Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Response: axum::response::IntoResponse,
        S::Future: Send + 'static,
    {
        self.services.push(S::NAME);
        self.routes = self.routes.add_service(service);
        self
    }

    /// Sets the registry that holds the service's own metrics; the server adds those of its RPCs.
    #[must_use]
    pub fn registry(mut self, registry: Registry) -> Self {
        self.registry = registry;
        self
    }

    /// Sets who may call; without it anybody may.
    #[must_use]
    pub fn tenants(mut self, tenants: Tenants) -> Self {
        self.tenants = tenants;
        self
    }

    /// Returns the server's readiness, which starts as "not ready": until that changes, RPCs other than health and
    /// reflection answer UNAVAILABLE.
    pub fn readiness(&self) -> Readiness {
        self.readiness.clone()
    }

    /// Serves a model on its engine thread, as [`Server::run_after`] does. The end of a thread that served (`ended`)
    /// before shutdown is an error besides, so that the process ends and is started anew. After the server has ended,
    /// the thread is waited for, at most 5 s.
    pub async fn run_engine<L>(
        self,
        load: L,
        mut ended: oneshot::Receiver<()>,
        shutdown: Shutdown,
    ) -> anyhow::Result<()>
    where
        L: Future<Output = anyhow::Result<()>>,
    {
        let (readiness, stop) = (self.readiness(), shutdown.child());
        let mut serving = Box::pin(self.run_after(load, stop.clone()));
        tokio::select! {
            served = &mut serving => served?,
            // A thread that never served drops the other end; then `load` has the reason.
            Ok(()) = &mut ended => {
                let lost = !shutdown.is_begun();
                readiness.not_ready("the engine has stopped");
                stop.begin();
                serving.await?;
                anyhow::ensure!(!lost, "the engine has stopped");
                return Ok(());
            }
        }
        // The server held the last handles of the engine. Torch does not like a process that ends under its threads.
        drop(serving);
        if timeout(Duration::from_millis(ENGINE_END_MS_MAX), ended).await.is_err() {
            tracing::warn!("the engine is still in a step");
        }
        Ok(())
    }

    /// Serves while `load` runs, becomes ready when it succeeds, and ends with its error when it fails. From then on it
    /// serves as [`Server::run`] does.
    pub async fn run_after<L>(self, load: L, shutdown: Shutdown) -> anyhow::Result<()>
    where
        L: Future<Output = anyhow::Result<()>>,
    {
        let (readiness, stop) = (self.readiness(), shutdown.child());
        readiness.not_ready("loading");
        let loading = async {
            tokio::select! {
                loaded = load => match loaded {
                    Ok(()) => readiness.ready(),
                    Err(error) => {
                        stop.begin();
                        return Err(error);
                    }
                },
                // Nobody will be served by what is still loading.
                () = stop.begun() => {}
            }
            Ok(())
        };
        let serving = async {
            let served = self.run(stop.clone()).await;
            stop.begin();
            served
        };
        let (loaded, served) = tokio::join!(loading, Box::pin(serving));
        loaded.and(served)
    }

    /// Serves until shutdown begins. Then the server is not ready and takes no new connections, running requests may
    /// finish within the grace, and what is left is cut with UNAVAILABLE. Fails where TLS files cannot be used or a
    /// port fails.
    pub async fn run(self, shutdown: Shutdown) -> anyhow::Result<()> {
        let Self { name, config, listeners, routes, services, mut registry, readiness, tenants } = self;
        let methods = Arc::new(Methods::read()?);
        let shared = Arc::new(Shared {
            service: name,
            metrics: RpcMetrics::register(&mut registry, &methods),
            methods,
            readiness: readiness.clone(),
            admission: Admission::new(&config),
            tenants,
            stalled: Duration::from_millis(config.stalled_ms),
            draining: CancellationToken::new(),
            cut: CancellationToken::new(),
        });
        let (health, health_service) = tonic_health::server::health_reporter();
        let health = Health { reporter: health, services: services.clone() };
        health.tell(ServingStatus::NotServing).await;
        let routes = with_reflection(routes.add_service(health_service), &config, services)?;

        let address = listeners.grpc_addr();
        tracing::info!(service = name, %address, admin = ?listeners.admin_addr(), "listening");
        let admin_stopped = CancellationToken::new();
        let admin = listeners.admin.map(|listener| {
            tokio::spawn(admin::serve(listener, Arc::new(registry), readiness.clone(), admin_stopped.clone()))
        });
        let watching = tokio::spawn(health.clone().follow(readiness.clone()));

        let draining = shared.draining.clone();
        let begun = shutdown.clone();
        let drain = async move {
            begun.begun().await;
            readiness.stop();
            health.tell(ServingStatus::NotServing).await;
            draining.cancel();
        };
        let incoming = Connections::accept(listeners.grpc, &config, config.tls.open()?);
        let serving = transport(&config).layer(RpcLayer(Arc::clone(&shared))).add_routes(routes);
        let serving = serving.serve_with_incoming_shutdown(incoming, drain);
        let served = until_cut(Box::pin(serving), &config, &shutdown, &shared.cut).await;
        watching.abort();
        admin_stopped.cancel();
        close(admin).await?;
        tracing::info!(service = name, "stopped");
        served
    }
}

fn transport(config: &ServerConfig) -> tonic::transport::Server {
    let streams =
        u32::try_from(config.max_requests + SPARE_STREAMS).expect("max_requests has been validated");
    tonic::transport::Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .max_concurrent_streams(streams)
        .http2_max_header_list_size(HEADER_LIST_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
}

fn with_reflection(
    mut routes: Routes,
    config: &ServerConfig,
    services: Vec<&'static str>,
) -> anyhow::Result<Routes> {
    if !config.reflection {
        return Ok(routes);
    }
    // Only what this server answers, though the descriptors hold every service of the cluster.
    let builder = || {
        let builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(emu2_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name("grpc.health.v1.Health");
        services.iter().fold(builder, |builder, service| builder.with_service_name(*service))
    };
    routes = routes.add_service(builder().build_v1().context("reflection cannot be built")?);
    // grpcurl and older clients still ask for the alpha version.
    Ok(routes.add_service(builder().build_v1alpha().context("reflection cannot be built")?))
}

async fn until_cut<E>(
    mut serving: std::pin::Pin<Box<impl Future<Output = Result<(), E>>>>,
    config: &ServerConfig,
    shutdown: &Shutdown,
    cut: &CancellationToken,
) -> anyhow::Result<()>
where
    E: std::error::Error + Send + Sync + 'static,
{
    let grace_over = async {
        shutdown.begun().await;
        tokio::time::sleep(Duration::from_millis(config.shutdown_grace_ms)).await;
    };
    tokio::select! {
        served = &mut serving => return served.context("gRPC server failed"),
        () = grace_over => {}
    }
    tracing::warn!(grace_ms = config.shutdown_grace_ms, "cutting the requests that still run");
    cut.cancel();
    // A connection whose caller no longer reads stays open; it ends with the process.
    let _ = timeout(Duration::from_millis(CLOSE_MS_MAX), serving).await;
    Ok(())
}

async fn close(admin: Option<JoinHandle<std::io::Result<()>>>) -> anyhow::Result<()> {
    let Some(mut admin) = admin else { return Ok(()) };
    match timeout(Duration::from_millis(CLOSE_MS_MAX), &mut admin).await {
        Ok(served) => served.context("admin server panicked")?.context("admin server failed"),
        Err(_) => {
            admin.abort();
            Ok(())
        }
    }
}

/// The service grpc.health.v1, to which the server as a whole (the empty name) and each of its services say the same.
#[derive(Clone)]
struct Health {
    reporter: HealthReporter,
    services: Vec<&'static str>,
}

impl Health {
    async fn tell(&self, status: ServingStatus) {
        self.reporter.set_service_status("", status).await;
        for service in &self.services {
            self.reporter.set_service_status(service, status).await;
        }
    }

    async fn follow(self, readiness: Readiness) {
        let mut changes = readiness.changes();
        let mut told = None;
        loop {
            let state = changes.borrow_and_update().clone();
            let status =
                if state == State::Ready { ServingStatus::Serving } else { ServingStatus::NotServing };
            // Whoever watches hears of changes, not of every new reason.
            if told.replace(status) != Some(status) {
                self.tell(status).await;
            }
            if state == State::Stopping {
                return;
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
