//! Ten routers on one Redis, a hundred requests each at once for one new image: one encode.

use super::setup::{Measured, Setup};
use crate::{
    cluster::{Cluster, Redis, Stage},
    figures::{Bar, Figure},
    load,
};

const ROUTERS: usize = 10;
const REQUESTS: usize = 100;
/// Longer than it takes all requests to arrive, so that they all find it under way.
const IMAGE_MS: f64 = 500.0;

pub(super) async fn measure(setup: &Setup) -> anyhow::Result<Measured> {
    let dir = tempfile::tempdir()?;
    let redis = Redis::start(dir.path()).await?;
    let mut plan = setup.plan();
    plan.encoder = Stage::new("encoder", &format!("--image-ms {IMAGE_MS}"));
    plan.tables = format!("[cache]\nredis_url = {:?}\n", redis.url());
    let mut cluster = Cluster::start(plan).await?;
    for _ in 1..ROUTERS {
        cluster.add_router().await?;
    }
    let mut encodes = Figure::new("encodes of one new image", "").bar(Bar::Exactly(1.0));
    let mut failed = Figure::new("failed requests", "");
    let mut slowest = Figure::new("until the last answer", "ms");
    let mut notes = vec![];
    for round in 0..setup.rounds.max(3) {
        let before = cluster.encoders[0].metric("emu2_mock_calls_total").await;
        let asks = (0..ROUTERS * REQUESTS)
            .map(|request| (cluster.routers[request % ROUTERS].client(), load::embed(round as u64)));
        let answers = load::at_once(asks.collect()).await;
        encodes.push(cluster.encoders[0].metric("emu2_mock_calls_total").await - before);
        let (answered, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
        failed.push(refused.len() as f64);
        notes.extend(refused.into_iter().take(1).map(|refused| format!("{:?}", refused.err())));
        let last = answered.iter().flatten().map(|answer| answer.total).max().unwrap_or_default();
        slowest.push(last.as_secs_f64() * 1e3);
        anyhow::ensure!(
            answered.iter().flatten().all(|answer| Some(answer.digest) == first_digest(&answered)),
            "two requests for one image had different answers"
        );
    }
    Ok(Measured {
        conditions: format!(
            "{ROUTERS} routers, {REQUESTS} requests at once to each, a connection each; one encode takes {IMAGE_MS} ms; one \
             Redis; a new image a round"
        ),
        figures: vec![encodes, failed, slowest],
        notes,
    })
}

fn first_digest(answers: &[Result<load::Answer, tonic::Status>]) -> Option<blake3::Hash> {
    answers.iter().flatten().map(|answer| answer.digest).next()
}
