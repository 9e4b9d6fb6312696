//! Every replica of every pool restarted in order, by SIGTERM, under mixed load.

use std::time::Duration;

use rustix::process::Signal;

use super::{
    kills::mixed_plan,
    kills::p99,
    setup::{Measured, Setup, differences, digests},
};
use crate::{
    cluster::Cluster,
    figures::{Bar, Figure},
    load::{self, Stop},
};

const CLIENTS: usize = 8;
const CYCLE: u64 = 120;
/// The time between two replicas: as a rollout waits for the new one's readiness.
const PAUSE: Duration = Duration::from_millis(500);

pub(super) async fn measure(setup: &Setup) -> anyhow::Result<Measured> {
    let mut failed = Figure::new("failed requests", "").bar(Bar::Exactly(0.0));
    let mut answered = Figure::new("answered requests", "");
    let mut different = Figure::new("answers other than undisturbed", "");
    let mut calm = Figure::new("p99 undisturbed", "ms");
    let mut slow = Figure::new("p99 while rolling", "ms");
    let mut notes = vec![];
    for _ in 0..setup.rounds {
        let mut cluster = Cluster::start(mixed_plan(setup)).await?;
        let channels = [cluster.router().client(), cluster.router().client()];
        let undisturbed =
            load::closed_loop(&channels, CLIENTS, CYCLE as usize, &Stop::default(), load::mixed).await;
        let stop = Stop::default();
        let (record, rolled) = tokio::join!(
            load::closed_loop(&channels, CLIENTS, usize::MAX, &stop, |number| load::mixed(number % CYCLE)),
            async {
                let rolled = roll(&mut cluster).await;
                stop.stop();
                rolled
            }
        );
        rolled?;
        failed.push(record.failures().count() as f64);
        answered.push(record.answers().count() as f64);
        different.push(differences(&digests(&undisturbed), &record, CYCLE).len() as f64);
        calm.push(p99(&undisturbed));
        slow.push(p99(&record));
        notes.extend(record.failures().next().map(|_| record.reasons()));
    }
    Ok(Measured {
        conditions: format!(
            "9 replicas in order: SIGTERM, its end, its restart; {CLIENTS} callers of mixed load"
        ),
        figures: vec![failed, answered, different, calm, slow],
        notes,
    })
}

async fn roll(cluster: &mut Cluster) -> anyhow::Result<()> {
    for replica in cluster.replicas() {
        tokio::time::sleep(PAUSE).await;
        replica.process.signal(Signal::TERM);
        let status = replica.process.ended().await?;
        anyhow::ensure!(status.success(), "{} ended with {status}", replica.process.name);
        replica.restart().await?;
    }
    tokio::time::sleep(PAUSE).await;
    Ok(())
}
