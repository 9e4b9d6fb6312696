use std::time::{Duration, Instant};

use emu2_proto::{
    stage::{EncoderWatchLoadRequest, visual_encoder_client::VisualEncoderClient},
    v1,
};
use tokio::{net::TcpStream, sync::oneshot};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus as Told, health_client::HealthClient,
};

use super::*;
use crate::tests::loopback::{Loopback, PATIENCE, reflected};

fn check(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.into() }
}

#[tokio::test]
async fn readiness_flips_health_the_admin_page_and_the_calls() {
    let server = Loopback::start_not_ready(ServerConfig::default()).await;
    let mut watch =
        HealthClient::new(server.channel()).watch(check("emu2.v1.Emu2")).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), Told::NotServing);
    assert_eq!(server.admin("/readyz").await, (503, "not ready: starting\n".into()));
    let refused = server.client().list_models(v1::ListModelsRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);

    server.readiness.ready();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), Told::Serving);
    let whole = HealthClient::new(server.channel()).check(check("")).await.unwrap().into_inner();
    assert_eq!(whole.status(), Told::Serving);
    assert_eq!(server.admin("/readyz").await, (200, "ready\n".into()));
    server.client().list_models(v1::ListModelsRequest {}).await.unwrap();

    server.readiness.not_ready("device lost");
    assert_eq!(watch.message().await.unwrap().unwrap().status(), Told::NotServing);
    assert_eq!(server.admin("/readyz").await, (503, "not ready: device lost\n".into()));
    assert_eq!(server.admin("/healthz").await, (200, "alive\n".into()));
    assert_eq!(server.admin("/nowhere").await.0, 404);
}

#[tokio::test]
async fn shutdown_lets_a_running_stream_finish() {
    let server = Loopback::start(ServerConfig::default()).await;
    let mut watch = HealthClient::new(server.channel()).watch(check("")).await.unwrap().into_inner();
    let mut events = server.generate(3).await;
    server.probe.steps.add_permits(1);
    assert!(events.message().await.unwrap().is_some());

    let begun = Instant::now();
    server.shutdown.begin();
    while TcpStream::connect(server.address).await.is_ok() {
        assert!(begun.elapsed() < PATIENCE, "the port is still open");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(server.admin("/readyz").await, (503, "not ready: shutting down\n".into()));
    server.probe.steps.add_permits(2);
    assert!(events.message().await.unwrap().is_some());
    assert!(events.message().await.unwrap().is_some());
    assert!(events.message().await.unwrap().is_none());
    // A health watch has no end of its own; it must not hold the server up.
    while let Ok(Some(_)) = watch.message().await {}
    server.ended().await;
    assert!(begun.elapsed() < PATIENCE);
}

/// As a router watches a stage: for as long as both live.
#[tokio::test]
async fn a_watch_takes_no_permit_and_does_not_hold_the_shutdown_up() {
    let server = Loopback::start(ServerConfig { max_requests: 1, ..ServerConfig::default() }).await;
    let mut encoder = VisualEncoderClient::new(server.channel());
    let mut watch = encoder.watch_load(EncoderWatchLoadRequest {}).await.unwrap().into_inner();
    assert!(watch.message().await.unwrap().is_some());
    let mut events = server.generate(1).await;
    server.probe.steps.add_permits(1);
    while events.message().await.unwrap().is_some() {}

    let begun = Instant::now();
    server.shutdown.begin();
    assert_eq!(watch.message().await.unwrap_err().code(), Code::Unavailable);
    server.ended().await;
    assert!(begun.elapsed() < PATIENCE);
}

#[tokio::test]
async fn what_outlives_the_grace_is_cut() {
    let server = Loopback::start(ServerConfig { shutdown_grace_ms: 100, ..ServerConfig::default() }).await;
    let mut closed = server.probe.closed_streams.subscribe();
    let mut events = server.generate(1).await;
    server.shutdown.begin();
    let error = events.message().await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error:?}");
    tokio::time::timeout(PATIENCE, closed.wait_for(|&count| count == 1)).await.unwrap().unwrap();
    server.ended().await;
}

async fn run_after(load: impl Future<Output = anyhow::Result<()>>, shutdown: Shutdown) -> anyhow::Result<()> {
    let config = ServerConfig::default();
    let listeners = Listeners::bind(&config).await.unwrap();
    let run = Server::new("probe", &config, listeners).run_after(load, shutdown);
    tokio::time::timeout(PATIENCE, run).await.unwrap()
}

#[tokio::test]
async fn a_failed_load_ends_the_server_with_its_error() {
    let error =
        run_after(async { anyhow::bail!("model folder is empty") }, Shutdown::new()).await.unwrap_err();
    assert_eq!(error.to_string(), "model folder is empty");
}

#[tokio::test]
async fn a_server_that_still_loads_can_be_shut_down() {
    let shutdown = Shutdown::new();
    shutdown.begin();
    run_after(std::future::pending(), shutdown).await.unwrap();
}

#[tokio::test]
async fn loading_makes_ready() {
    let config = ServerConfig::default();
    let server = Server::new("probe", &config, Listeners::bind(&config).await.unwrap());
    let (readiness, shutdown) = (server.readiness(), Shutdown::new());
    let (loaded, load) = oneshot::channel();
    let load = async { Ok(load.await?) };
    let running = tokio::spawn(Box::pin(server.run_after(load, shutdown.clone())));
    assert!(!readiness.is_ready());
    loaded.send(()).unwrap();
    tokio::time::timeout(PATIENCE, readiness.became_ready()).await.unwrap();
    shutdown.begin();
    tokio::time::timeout(PATIENCE, running).await.unwrap().unwrap().unwrap();
}

/// An engine that loads at once and serves until `ended` is told.
async fn run_engine(ended: oneshot::Receiver<()>, shutdown: Shutdown) -> anyhow::Result<()> {
    let config = ServerConfig::default();
    let server = Server::new("probe", &config, Listeners::bind(&config).await.unwrap());
    let run = Box::pin(server.run_engine(async { Ok(()) }, ended, shutdown));
    tokio::time::timeout(PATIENCE, run).await.unwrap()
}

#[tokio::test]
async fn a_lost_engine_ends_the_server_with_an_error_and_only_that_server() {
    let (report, ended) = oneshot::channel();
    report.send(()).unwrap();
    let shutdown = Shutdown::new();
    run_engine(ended, shutdown.clone()).await.unwrap_err();
    assert!(!shutdown.is_begun());
}

#[tokio::test]
async fn an_engine_that_ends_with_its_server_is_no_error() {
    let (report, ended) = oneshot::channel();
    let shutdown = Shutdown::new();
    shutdown.begin();
    let engine = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(50)).await;
        report.send(()).unwrap();
    });
    run_engine(ended, shutdown).await.unwrap();
    engine.await.unwrap();
}

#[tokio::test]
async fn reflection_tells_what_is_served_unless_it_is_off() {
    let server = Loopback::start(ServerConfig::default()).await;
    let services = reflected(&server).await.unwrap();
    for served in ["emu2.v1.Emu2", "emu2.stage.v1.VisualEncoder", "grpc.health.v1.Health"] {
        assert!(services.iter().any(|name| name == served), "{services:?}");
    }
    assert!(!services.iter().any(|name| name.contains("LanguageModel")), "{services:?}");
    let server = Loopback::start(ServerConfig { reflection: false, ..ServerConfig::default() }).await;
    assert_eq!(reflected(&server).await.unwrap_err().code(), Code::Unimplemented);
}
