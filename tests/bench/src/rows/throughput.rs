//! Embeddings through one core: bytes carried a second of processor time, by the router and by a relay that only
//! moves bytes. A second of processor time rather than of the clock, because the stage and the clients, which share
//! what is left of the machine, may be full before the router is.

use std::time::{Duration, Instant};

use futures::future::try_join_all;

use super::{
    latency::{encode, encoder},
    setup::{Measured, Setup},
};
use crate::{
    cluster::Cluster,
    figures::{Bar, Figure},
    load::{self, Stop},
    processes::{Process, free_address},
};

const CLIENTS: usize = 8;
const ANSWER_BYTES: f64 = 229_376.0;

pub(super) async fn measure(setup: &Setup) -> anyhow::Result<Measured> {
    let cluster = Cluster::start(setup.plan()).await?;
    let stage = cluster.encoders[0].endpoints[0].clone();
    let relay_address = free_address();
    let arguments = ["--relay".to_owned(), relay_address.to_string(), stage.replace("http://", "")];
    let own = std::env::current_exe()?;
    let relay = Process::start(cluster.dir(), "relay", &own, &arguments, setup.router_core)?;
    let relayed = format!("http://{relay_address}");

    let mut figures = [
        Figure::new("router / relay, MB a second of one core", "×").bar(Bar::AtLeast(0.25)),
        Figure::new("router, MB a second of one core", "MB/s"),
        Figure::new("relay, MB a second of one core", "MB/s"),
        Figure::new("router, MB/s by the clock", "MB/s"),
        Figure::new("relay, MB/s by the clock", "MB/s"),
        Figure::new("of the router's core in use", "%"),
    ];
    let length = setup.window(6);
    for round in 0..=setup.rounds {
        let through_router = carried(&cluster.router().process, through_router(&cluster, length)).await?;
        let through_relay = carried(&relay, through_relay(&relayed, length)).await?;
        // The first round opens connections and is not counted.
        if round > 0 {
            let values = [
                through_router.per_core / through_relay.per_core,
                through_router.per_core,
                through_relay.per_core,
                through_router.by_clock,
                through_relay.by_clock,
                through_router.share * 100.0,
            ];
            figures.iter_mut().zip(values).for_each(|(figure, value)| figure.push(value));
        }
    }
    Ok(Measured {
        conditions: format!(
            "{CLIENTS} callers, {} s each in turn, cache off, every image (16 KiB) new; {}; MB are of embeddings",
            length.as_secs(),
            setup.pinning()
        ),
        figures: figures.into(),
        notes: vec![],
    })
}

struct Carried {
    per_core: f64,
    by_clock: f64,
    share: f64,
}

/// Runs a load that returns its answers, and reads what it cost the process in between.
async fn carried(
    process: &Process,
    load: impl Future<Output = anyhow::Result<usize>>,
) -> anyhow::Result<Carried> {
    let (cpu, began) = (process.cpu_seconds()?, Instant::now());
    let megabytes = load.await? as f64 * ANSWER_BYTES / 1e6;
    let (cpu, wall) = (process.cpu_seconds()? - cpu, began.elapsed().as_secs_f64());
    Ok(Carried { per_core: megabytes / cpu, by_clock: megabytes / wall, share: cpu / wall })
}

async fn through_router(cluster: &Cluster, length: Duration) -> anyhow::Result<usize> {
    let stop = Stop::default();
    let channels = [cluster.router().client()];
    let (record, ()) =
        tokio::join!(load::closed_loop(&channels, CLIENTS, usize::MAX, &stop, load::embed), async {
            tokio::time::sleep(length).await;
            stop.stop();
        });
    anyhow::ensure!(record.failures().next().is_none(), "requests failed: {}", record.reasons());
    Ok(record.0.len())
}

async fn through_relay(endpoint: &str, length: Duration) -> anyhow::Result<usize> {
    let (client, began) = (encoder(endpoint)?, Instant::now());
    let callers = (0..CLIENTS as u64).map(|caller| {
        let mut client = client.clone();
        async move {
            let mut answered = 0;
            while began.elapsed() < length {
                encode(&mut client, load::image_bytes(caller << 32 | answered)).await?;
                answered += 1;
            }
            anyhow::Ok(answered as usize)
        }
    });
    Ok(try_join_all(callers).await?.into_iter().sum())
}
