//! A client that leaves, or whose time is up, frees every stage within a step: read from the stages' own metrics.

use std::time::Duration;

use emu2_nn::golden;
use emu2_proto::v1::{self, generate_event::Event};
use emu2_standalone::cluster::{Cluster, ClusterConfig};
use tokio::time::{Instant, sleep};
use tonic::{Code, Request};

use crate::support::{admin_page, ask, client, draw, fresh_png, greedy, image, start, text};

/// Far longer than a step of a tiny model, far shorter than the work that is cancelled.
const WITHIN: Duration = Duration::from_secs(2);

async fn cluster() -> Cluster {
    start(ClusterConfig::local(vec![golden::model_dir("emu2-gen")])).await
}

const LLM_RUNNING: &str = "emu2_stage_running{stage=\"llm\"}";
const DECODER_RUNNING: &str = "emu2_stage_running{stage=\"decoder\"}";

/// A request that would paint for minutes.
fn long_painting() -> v1::GenerateRequest {
    let output =
        v1::ImageOutput { steps: Some(250), height: Some(512), width: Some(512), ..Default::default() };
    draw(vec![image(fresh_png(100)), text("on the beach")], output)
}

fn value(metrics: &str, name: &str) -> f64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no metric {name} in {metrics}")).parse().unwrap()
}

/// What each stage holds now, by its own count.
async fn held(cluster: &Cluster) -> Vec<(&'static str, f64)> {
    let mut held = Vec::new();
    for member in &cluster.stages {
        let metrics = admin_page(member.admin.unwrap(), "/metrics").await;
        let gauges: &[&'static str] = match member.stage {
            "encoder" => &["emu2_rpc_in_flight_requests"],
            "llm" => &[LLM_RUNNING, "emu2_stage_waiting{stage=\"llm\"}"],
            _ => &[DECODER_RUNNING, "emu2_stage_waiting{stage=\"decoder\"}"],
        };
        held.extend(gauges.iter().map(|gauge| (*gauge, value(&metrics, gauge))));
    }
    held
}

async fn assert_freed(cluster: &Cluster) {
    until(cluster, |held| held.iter().all(|(_, count)| *count == 0.0)).await;
}

/// Gauges follow within a step, not at once.
async fn until(cluster: &Cluster, wanted: impl Fn(&[(&'static str, f64)]) -> bool) {
    let deadline = Instant::now() + WITHIN;
    loop {
        let held = held(cluster).await;
        if wanted(&held) {
            return;
        }
        assert!(Instant::now() < deadline, "after {WITHIN:?} still {held:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_frees_the_decoder() {
    let cluster = cluster().await;
    let mut events = client(cluster.addr).await.generate(long_painting()).await.unwrap().into_inner();
    while !matches!(events.message().await.unwrap().unwrap().event, Some(Event::DenoiseProgress(_))) {}
    until(&cluster, |held| held.contains(&(DECODER_RUNNING, 1.0))).await;
    drop(events);
    assert_freed(&cluster).await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn a_client_that_leaves_frees_the_llm() {
    let cluster = cluster().await;
    let output = v1::TextOutput { min_length: Some(1_024), ..greedy(1_024) };
    let mut events = client(cluster.addr)
        .await
        .generate(ask("emu2-gen", vec![text("a")], output))
        .await
        .unwrap()
        .into_inner();
    while !matches!(events.message().await.unwrap().unwrap().event, Some(Event::TextDelta(_))) {}
    until(&cluster, |held| held.contains(&(LLM_RUNNING, 1.0))).await;
    drop(events);
    assert_freed(&cluster).await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn a_deadline_that_passes_frees_every_stage() {
    let cluster = cluster().await;
    let mut request = Request::new(long_painting());
    request.set_timeout(Duration::from_millis(1_500));
    let asked = Instant::now();
    let status = match client(cluster.addr).await.generate(request).await {
        Err(status) => status,
        Ok(response) => {
            let mut events = response.into_inner();
            loop {
                match events.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("the painting ended before its deadline"),
                    Err(status) => break status,
                }
            }
        }
    };
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
    assert_freed(&cluster).await;
    cluster.stop().await.unwrap();
}
