//! Ten times what fits, for half a minute: what fits is still served, the rest is told so at once, and memory stays.

use std::time::Duration;

use super::setup::{Measured, Setup};
use crate::{
    cluster::{Cluster, Stage},
    figures::{Bar, Figure, percentile_ms},
    load::{self, Ask, Stop},
};

const FACTOR: f64 = 10.0;
const TOKENS: u32 = 16;
/// Calls that the llm runs at a time, and permits of the router: half as many again wait, so that no row stands empty.
const ROWS: usize = 16;
const PERMITS: usize = 24;

pub(super) async fn measure(setup: &Setup) -> anyhow::Result<Measured> {
    let mut goodput = Figure::new("goodput / capacity", "×").bar(Bar::AtLeast(0.95));
    let mut refusals = Figure::new("a refusal takes, p99", "ms").bar(Bar::AtMost(10.0));
    let mut memory = Figure::new("resident memory, end / after a third", "×").bar(Bar::AtMost(1.1));
    let mut slowest = Figure::new("a refusal takes, at most", "ms");
    let mut capacity = Figure::new("capacity", "/s");
    let mut refused = Figure::new("refused", "");
    let mut resident = Figure::new("resident memory at the end", "MB");
    let mut notes = vec![];
    let length = setup.window(30);
    for _ in 0..setup.rounds {
        let mut plan = setup.plan();
        plan.llm = Stage::new("llm", &format!("--step-ms 10 --rows {ROWS}"));
        plan.server = format!("max_requests = {PERMITS}");
        let cluster = Cluster::start(plan).await?;
        let fits = alone(&cluster, setup.window(8)).await?;
        capacity.push(fits);
        let channels = [cluster.router().client(), cluster.router().client()];
        let (record, resident_bytes) = tokio::join!(
            load::open_loop(&channels, FACTOR * fits, length, ask),
            resident_over(&cluster, length)
        );
        let in_time =
            record.0.iter().filter(|sent| sent.outcome.is_ok() && sent.at + sent.took <= length).count();
        goodput.push(in_time as f64 / length.as_secs_f64() / fits);
        let took: Vec<_> = record.refused().map(|sent| sent.took).collect();
        refusals.push(percentile_ms(&took, 0.99));
        slowest.push(percentile_ms(&took, 1.0));
        refused.push(took.len() as f64);
        let resident_bytes = resident_bytes?;
        let last = resident_bytes[resident_bytes.len() - 1];
        memory.push(last / resident_bytes[resident_bytes.len() / 3]);
        resident.push(last / 1e6);
        let others = record.failures().count() - took.len();
        notes.extend((others > 0).then(|| format!("{others} failed otherwise: {}", record.reasons())));
    }
    Ok(Measured {
        conditions: format!(
            "{FACTOR} × capacity offered for {} s whether or not answered; text of {TOKENS} tokens, {ROWS} rows of 10 ms a \
             step, {PERMITS} permits; {}",
            length.as_secs(),
            setup.pinning()
        ),
        figures: vec![goodput, refusals, memory, slowest, capacity, refused, resident],
        notes,
    })
}

fn ask(number: u64) -> Ask {
    load::write(vec![load::text(format!("request {number}"))], TOKENS)
}

/// Answers a second with as many callers as permits.
async fn alone(cluster: &Cluster, length: Duration) -> anyhow::Result<f64> {
    let stop = Stop::default();
    let channels = [cluster.router().client()];
    let (record, ()) = tokio::join!(load::closed_loop(&channels, PERMITS, usize::MAX, &stop, ask), async {
        tokio::time::sleep(length).await;
        stop.stop();
    });
    anyhow::ensure!(record.answers().count() > 0, "nothing was answered: {}", record.reasons());
    let in_time =
        record.0.iter().filter(|sent| sent.outcome.is_ok() && sent.at + sent.took <= length).count();
    Ok(in_time as f64 / length.as_secs_f64())
}

/// The router's resident memory, in bytes, read every quarter of a second.
async fn resident_over(cluster: &Cluster, length: Duration) -> anyhow::Result<Vec<f64>> {
    let mut quarters = tokio::time::interval(Duration::from_millis(250));
    let mut seen = vec![];
    for _ in 0..(length.as_millis() / 250).max(3) {
        quarters.tick().await;
        seen.push(cluster.router().process.resident_bytes()? as f64);
    }
    Ok(seen)
}
