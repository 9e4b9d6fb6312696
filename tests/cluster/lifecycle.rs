//! The real binaries: start, serve, and end in order.

use std::{net::SocketAddr, time::Duration};

use emu2_proto::v1::{self, emu2_client::Emu2Client, generate_event::Event};
use tonic::{Code, Status, transport::Endpoint};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::{
    processes::{Process, Processes},
    support::{answer, ask, client, draw, fresh_png, greedy, image, text},
};

#[tokio::test]
async fn four_processes_serve_and_drain_on_sigterm() {
    let mut cluster = Processes::start("").await;
    let mut api = client(cluster.router.addr).await;
    let asked = ask("emu2-gen", vec![image(fresh_png(80)), text("What is this?")], greedy(3));
    answer(&mut api, asked).await.unwrap();

    // A request that is running when SIGTERM comes finishes; the router wants no other.
    let output = v1::ImageOutput { steps: Some(250), ..Default::default() };
    let mut running = api.generate(draw(vec![text("a dog")], output)).await.unwrap().into_inner();
    while !matches!(running.message().await.unwrap().unwrap().event, Some(Event::DenoiseProgress(_))) {}
    cluster.router.terminate();
    let told = async { while cluster.router.health().await == Some(ServingStatus::Serving) {} };
    tokio::time::timeout(Duration::from_secs(20), told).await.expect("the router stops saying SERVING");
    let late = client_of_its_own(cluster.router.addr).await;
    assert_eq!(late.unwrap_err().code(), Code::Unavailable);
    let mut last = running.message().await.unwrap().unwrap().event;
    assert!(
        matches!(last, Some(Event::DenoiseProgress(_))),
        "the request ended before it was asked: {last:?}"
    );
    while let Some(event) = running.message().await.unwrap() {
        last = event.event;
    }
    assert!(matches!(last, Some(Event::Finished(_))), "the running request finishes: {last:?}");
    drop((running, api));
    assert!(cluster.router.ended().await.success());
    assert_eq!(cluster.router.health().await, None);

    for stage in &mut cluster.stages {
        assert_eq!(stage.health().await, Some(ServingStatus::Serving));
        stage.terminate();
        assert!(stage.ended().await.success());
    }
}

/// A call on a new connection.
async fn client_of_its_own(router: SocketAddr) -> Result<(), Status> {
    let channel = Endpoint::from_shared(format!("http://{router}")).unwrap().connect_lazy();
    Emu2Client::new(channel).list_models(v1::ListModelsRequest {}).await.map(drop)
}

#[tokio::test]
async fn a_service_that_cannot_load_ends_with_an_error() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["emu2-encoder", "emu2-llm", "emu2-decoder"] {
        let mut service = Process::start(dir.path(), name, "model_dir = \"/no/such/model\"\n");
        assert!(!service.ended().await.success(), "{name}");
        assert!(service.errors().contains("/no/such/model"), "{name}: {}", service.errors());
    }
    // An unknown key is refused, not ignored.
    let mut router = Process::start(dir.path(), "emu2-router", "modles = []\n");
    assert!(!router.ended().await.success());
    assert!(router.errors().contains("modles"), "{}", router.errors());
}

#[tokio::test]
async fn a_router_without_its_stages_is_not_ready() {
    let dir = tempfile::tempdir().unwrap();
    let nobody = "[\"http://127.0.0.1:9\"]";
    let models = format!("\n[[models]]\nname = \"emu2\"\nencoder = {nobody}\nllm = {nobody}\n");
    let router = Process::start(dir.path(), "emu2-router", &models);
    for _ in 0..100 {
        match router.health().await {
            None => tokio::time::sleep(Duration::from_millis(50)).await,
            Some(health) => {
                assert_eq!(health, ServingStatus::NotServing);
                return;
            }
        }
    }
    panic!("the router does not listen");
}
