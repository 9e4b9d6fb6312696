//! The real binaries: start, serve, and end in order.

use emu2_proto::v1::{self, generate_event::Event};
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
    let output = v1::ImageOutput { steps: Some(40), ..Default::default() };
    let mut running = api.generate(draw(vec![text("a dog")], output)).await.unwrap().into_inner();
    while !matches!(running.message().await.unwrap().unwrap().event, Some(Event::DenoiseProgress(_))) {}
    cluster.router.terminate();
    let mut last = None;
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

#[tokio::test]
async fn a_service_that_cannot_load_ends_with_an_error() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["emu2-encoder", "emu2-llm", "emu2-decoder"] {
        let mut service = Process::start(dir.path(), name, "model_dir = \"/no/such/model\"\n");
        assert!(!service.ended().await.success(), "{name}");
    }
    // An unknown key is refused, not ignored.
    let mut router = Process::start(dir.path(), "emu2-router", "modles = []\n");
    assert!(!router.ended().await.success());
}

#[tokio::test]
async fn a_router_without_its_stages_is_not_ready() {
    let dir = tempfile::tempdir().unwrap();
    let nobody = "[\"http://127.0.0.1:9\"]";
    let models = format!("\n[[models]]\nname = \"emu2\"\nencoder = {nobody}\nllm = {nobody}\n");
    let router = Process::start(dir.path(), "emu2-router", &models);
    for _ in 0..100 {
        match router.health().await {
            None => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
            Some(health) => {
                assert_eq!(health, ServingStatus::NotServing);
                return;
            }
        }
    }
    panic!("the router does not listen");
}
