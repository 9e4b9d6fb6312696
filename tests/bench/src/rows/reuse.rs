//! What the cache gives when images come back: throughput and time to first text, on and off, at 0, 50 and 80 %.
//!
//! The cost ratio is Emu2's. Encoding an image is 4.4 B parameters × 2 × 1,025 patches = 9.0 TFLOP; its 66 positions
//! in the llm's prefill are 33 B × 2 × 66 = 4.4 TFLOP; 30 positions of text 2 TFLOP; a decode step reads 66 GB of
//! weights whoever shares it. At 400 TFLOP/s and 3 TB/s, a large GPU's: 23 ms an image, 11 ms its prefill, 5 ms the
//! text's, 22 ms a step. Only these ratios matter here; the pools (one encoder, two llms) are a deployment's choice.

use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::setup::{Measured, Setup};
use crate::{
    cluster::{Cluster, NO_CACHE, Stage},
    figures::{Bar, Figure, percentile_ms},
    load::{self, Ask, Stop},
};

const IMAGES: u64 = 4;
const TOKENS: u32 = 8;
const CLIENTS: usize = 24;
/// Images that come back: so many that two requests rarely wait for the same one at the same time, which is shared
/// work with the cache off, too.
const KNOWN: u64 = 400;
const ENCODER: &str = "--image-ms 23";
const LLM: &str = "--slot-ms 11 --prompt-ms 5 --step-ms 22 --rows 32 --replicas 2";

pub(super) async fn measure(setup: &Setup) -> anyhow::Result<Measured> {
    let mut figures = vec![
        Figure::new("80 %: throughput on / off", "×").bar(Bar::AtLeast(1.3)),
        Figure::new("80 %: time to first text on / off, p50", "×").bar(Bar::AtMost(0.4)),
    ];
    for reused in [0, 50, 80] {
        let mut lines = [
            ("off", "throughput", "/s"),
            ("on", "throughput", "/s"),
            ("off", "first text, p50", "ms"),
            ("on", "first text, p50", "ms"),
        ]
        .map(|(cache, what, unit)| Figure::new(format!("{reused} % reused, cache {cache}: {what}"), unit));
        for _ in 0..setup.rounds {
            let off = run(setup, reused, NO_CACHE).await?;
            let on = run(setup, reused, "").await?;
            let values = [off.0, on.0, off.1, on.1];
            lines.iter_mut().zip(values).for_each(|(line, value)| line.push(value));
            if reused == 80 {
                figures[0].push(on.0 / off.0);
                figures[1].push(on.1 / off.1);
            }
        }
        figures.extend(lines);
    }
    Ok(Measured {
        conditions: format!(
            "{CLIENTS} callers, {IMAGES} images and {TOKENS} tokens a request; encode 23 ms an image, prefill 11 ms an \
             image and 5 ms, 22 ms a step: the ratios of Emu2's stages; one encoder, two llms; cache: memory"
        ),
        figures,
        notes: vec![],
    })
}

/// Requests a second, and the median time to the first text in milliseconds.
async fn run(setup: &Setup, reused_percent: u32, tables: &str) -> anyhow::Result<(f64, f64)> {
    let mut plan = setup.plan();
    plan.encoder = Stage::new("encoder", ENCODER);
    plan.llm = Stage::new("llm", LLM);
    plan.tables = tables.into();
    let cluster = Cluster::start(plan).await?;
    let channels = [cluster.router().client()];
    if tables != NO_CACHE {
        // Those that come back have been there.
        let seen = load::closed_loop(&channels, CLIENTS, KNOWN as usize, &Stop::default(), load::embed).await;
        anyhow::ensure!(seen.failures().next().is_none(), "warming failed: {}", seen.reasons());
    }
    let (warm, counted) = (Duration::from_secs(2), setup.window(10));
    let stop = Stop::default();
    let (record, ()) = tokio::join!(
        load::closed_loop(&channels, CLIENTS, usize::MAX, &stop, move |number| request(
            number,
            reused_percent
        )),
        async {
            tokio::time::sleep(warm + counted).await;
            stop.stop();
        }
    );
    anyhow::ensure!(record.failures().next().is_none(), "requests failed: {}", record.reasons());
    let ended = |sent: &&load::Sent| (warm..warm + counted).contains(&(sent.at + sent.took));
    let first: Vec<_> =
        record.0.iter().filter(ended).filter_map(|sent| Some(sent.outcome.as_ref().ok()?.first)).collect();
    Ok((first.len() as f64 / counted.as_secs_f64(), percentile_ms(&first, 0.5)))
}

fn request(number: u64, reused_percent: u32) -> Ask {
    let mut random = StdRng::seed_from_u64(number);
    let parts = (0..IMAGES).map(|image| {
        let known = random.random_range(0..100) < reused_percent;
        load::image(if known { random.random_range(0..KNOWN) } else { KNOWN + number * IMAGES + image })
    });
    let mut parts: Vec<_> = parts.collect();
    parts.push(load::text("What is this?"));
    load::write(parts, TOKENS)
}
