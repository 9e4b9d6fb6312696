//! Redis killed, back, paused, back, under a load that asks it for everything: no request fails, and none is slower by
//! more than one cache deadline.

use std::time::Duration;

use super::{
    kills::p99,
    setup::{Measured, Setup},
};
use crate::{
    cluster::{Cluster, Redis, Stage},
    figures::{Bar, Figure},
    load::{self, Ask, Record, Stop},
};

const CLIENTS: usize = 4;
/// Images that come back; every fifth request has a new one.
const KNOWN: u64 = 50;
/// The cache's deadline, its default.
const DEADLINE_MS: f64 = 20.0;
/// The time that the breaker has to close again after Redis is back.
const SETTLE: Duration = Duration::from_secs(2);

pub(super) async fn measure(setup: &Setup) -> anyhow::Result<Measured> {
    let mut failed = Figure::new("failed requests", "").bar(Bar::Exactly(0.0));
    let mut killed =
        Figure::new("p99 while Redis is gone, beyond healthy", "ms").bar(Bar::AtMost(DEADLINE_MS));
    let mut paused =
        Figure::new("p99 while Redis is paused, beyond healthy", "ms").bar(Bar::AtMost(DEADLINE_MS));
    let mut healthy = Figure::new("p99 healthy", "ms");
    let mut back = Figure::new("p99 when it is back", "ms");
    let mut sent = Figure::new("requests", "");
    let mut notes = vec![];
    for _ in 0..setup.rounds {
        let dir = tempfile::tempdir()?;
        let mut redis = Redis::start(dir.path()).await?;
        let mut plan = setup.plan();
        plan.encoder = Stage::new("encoder", "--image-ms 2");
        // No memory: every lookup is Redis's.
        plan.tables = format!("[cache]\nmemory_bytes = 0\nredis_url = {:?}\n", redis.url());
        let cluster = Cluster::start(plan).await?;
        let length = setup.window(10);
        let mut offset = 0;
        let mut phase = async |length: Duration| {
            offset += 1_000_000;
            load_for(&cluster, length, offset).await
        };
        phase(SETTLE).await;
        let mut phases = vec![phase(length).await];
        redis.process.kill();
        phases.push(phase(length).await);
        redis.restart().await?;
        phases.push(phase(SETTLE).await);
        redis.pause();
        phases.push(phase(length).await);
        redis.go_on();
        phases.push(phase(SETTLE).await);
        phases.push(phase(length).await);

        let p99s: Vec<_> = phases.iter().map(p99).collect();
        healthy.push(p99s[0]);
        killed.push(p99s[1] - p99s[0]);
        paused.push(p99s[3] - p99s[0]);
        back.push(p99s[5]);
        sent.push(phases.iter().map(|phase| phase.0.len()).sum::<usize>() as f64);
        failed.push(phases.iter().map(|phase| phase.failures().count()).sum::<usize>() as f64);
        notes.extend(phases.iter().find(|phase| phase.failures().next().is_some()).map(Record::reasons));
    }
    Ok(Measured {
        conditions: format!(
            "{CLIENTS} callers of Embed, 4 of 5 images known, 2 ms an encode, cache deadline {DEADLINE_MS} ms, no memory \
             cache; killed, back, SIGSTOP, SIGCONT"
        ),
        figures: vec![failed, killed, paused, healthy, back, sent],
        notes,
    })
}

async fn load_for(cluster: &Cluster, length: Duration, offset: u64) -> Record {
    let stop = Stop::default();
    let channels = [cluster.router().client()];
    let (record, ()) = tokio::join!(
        load::closed_loop(&channels, CLIENTS, usize::MAX, &stop, move |number| request(number, offset)),
        async {
            tokio::time::sleep(length).await;
            stop.stop();
        }
    );
    record
}

fn request(number: u64, offset: u64) -> Ask {
    load::embed(if number.is_multiple_of(5) { offset + number } else { number % KNOWN })
}
