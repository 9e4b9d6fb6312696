//! A random replica killed every second under mixed load, and started again at once; never the last one of a pool.

use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::setup::{Measured, Setup, differences, digests};
use crate::{
    cluster::{Cluster, Stage},
    figures::{Bar, Figure, percentile_ms},
    load::{self, Record, Stop},
};

const REPLICAS: usize = 3;
const CLIENTS: usize = 8;
/// Requests that are told apart; the load goes through them again and again.
const CYCLE: u64 = 120;

pub(super) async fn measure(setup: &Setup) -> anyhow::Result<Measured> {
    let mut failed = Figure::new("failed requests", "").bar(Bar::Exactly(0.0));
    let mut different = Figure::new("answers other than undisturbed", "").bar(Bar::Exactly(0.0));
    let mut answered = Figure::new("answered requests", "");
    let mut kills = Figure::new("kills", "");
    let mut calm = Figure::new("p99 undisturbed", "ms");
    let mut slow = Figure::new("p99 under kills", "ms");
    let mut notes = vec![];
    let length = setup.window(60);
    for round in 0..setup.rounds {
        let mut cluster = Cluster::start(mixed_plan(setup)).await?;
        let channels = [cluster.router().client(), cluster.router().client()];
        let undisturbed =
            load::closed_loop(&channels, CLIENTS, CYCLE as usize, &Stop::default(), load::mixed).await;
        anyhow::ensure!(undisturbed.failures().next().is_none(), "undisturbed: {}", undisturbed.reasons());
        let stop = Stop::default();
        let (record, killed) = tokio::join!(
            load::closed_loop(&channels, CLIENTS, usize::MAX, &stop, |number| load::mixed(number % CYCLE)),
            async {
                let killed = kill_every_second(&mut cluster, length, round as u64).await;
                stop.stop();
                killed
            }
        );
        let differ = differences(&digests(&undisturbed), &record, CYCLE);
        failed.push(record.failures().count() as f64);
        different.push(differ.len() as f64);
        answered.push(record.answers().count() as f64);
        kills.push(killed? as f64);
        calm.push(p99(&undisturbed));
        slow.push(p99(&record));
        notes.extend((!differ.is_empty()).then(|| format!("requests with other answers: {differ:?}")));
        notes.extend(record.failures().next().map(|_| record.reasons()));
    }
    Ok(Measured {
        conditions: format!(
            "{REPLICAS} replicas a stage, {CLIENTS} callers for {} s: text (greedy, sampled, beams), images (generated \
             under guidance, autoencoded), embeddings; cache off",
            length.as_secs()
        ),
        figures: vec![failed, different, answered, kills, calm, slow],
        notes,
    })
}

/// Stages with costs of a few milliseconds a step, three replicas each.
pub(super) fn mixed_plan(setup: &Setup) -> crate::cluster::Plan {
    let mut plan = setup.plan();
    plan.replicas = REPLICAS;
    plan.encoder = Stage::new("encoder", "--image-ms 5 --jitter 0.5");
    plan.llm = Stage::new("llm", "--prompt-ms 5 --step-ms 5 --jitter 0.5");
    plan.decoder = Stage::new("decoder", "--step-ms 10 --vae-ms 10 --jitter 0.5");
    plan
}

pub(super) fn p99(record: &Record) -> f64 {
    let took: Vec<_> = record.answers().map(|answer| answer.total).collect();
    percentile_ms(&took, 0.99)
}

async fn kill_every_second(cluster: &mut Cluster, length: Duration, seed: u64) -> anyhow::Result<usize> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut second = tokio::time::interval(Duration::from_secs(1));
    let kills = length.as_secs() as usize;
    for _ in 0..kills {
        second.tick().await;
        let pool = cluster.pool(random.random_range(0..3));
        // The one killed before is listening again: `restart` has waited for it.
        let victim = random.random_range(0..pool.len());
        pool[victim].process.kill();
        pool[victim].restart().await?;
    }
    second.tick().await;
    Ok(kills)
}
