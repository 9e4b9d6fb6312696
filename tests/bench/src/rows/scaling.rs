//! Eight times the replicas, eight times the work, until the router's core is full; and where that is.

use std::time::{Duration, Instant};

use emu2_proto::v1::{ImageOutput, generate_request::Output};

use super::setup::{Measured, Setup};
use crate::{
    cluster::{Cluster, Stage},
    figures::{Bar, Figure},
    load::{self, Ask, Stop},
};

const FEW: usize = 8;
const MANY: usize = 64;
/// Callers a replica: enough that none stands idle, whichever two the router looks at.
const CALLERS: usize = 6;
const STEPS: u32 = 8;

pub(super) async fn measure(setup: &Setup) -> anyhow::Result<Measured> {
    let mut scales = Figure::new("throughput of 64 / throughput of 8 / 8", "×").bar(Bar::AtLeast(0.9));
    let mut few = Figure::new("8 replicas a stage", "/s");
    let mut many = Figure::new("64 replicas a stage", "/s");
    let mut share = Figure::new("of the router's core in use at 64", "%");
    let mut full = Figure::new("one core is full at (requests / its processor time)", "/s");
    let mut free = Figure::new("stages that cost nothing", "/s");
    let mut free_share = Figure::new("of the router's core in use then", "%");
    for _ in 0..setup.rounds {
        let slow = |stage| Stage::new(stage, "--image-ms 200 --step-ms 50 --rows 1");
        let of_few = run(setup, FEW, FEW * CALLERS, slow).await?;
        let of_many = run(setup, MANY, MANY * CALLERS, slow).await?;
        let of_free = run(setup, FEW, 64, |stage| Stage::new(stage, "")).await?;
        few.push(of_few.per_second);
        many.push(of_many.per_second);
        scales.push(of_many.per_second / of_few.per_second * FEW as f64 / MANY as f64);
        share.push(of_many.share * 100.0);
        full.push(of_many.per_second / of_many.share);
        free.push(of_free.per_second);
        free_share.push(of_free.share * 100.0);
    }
    Ok(Measured {
        conditions: format!(
            "half text of {STEPS} tokens about a new image, half autoencoding in {STEPS} steps; 200 ms an encode, 50 ms a \
             step, one row a replica, {CALLERS} callers a replica, cache off; {}",
            setup.pinning()
        ),
        figures: vec![scales, few, many, share, full, free, free_share],
        notes: vec![],
    })
}

struct Rate {
    per_second: f64,
    share: f64,
}

async fn run(
    setup: &Setup,
    replicas: usize,
    callers: usize,
    stage: impl Fn(&'static str) -> Stage,
) -> anyhow::Result<Rate> {
    let mut plan = setup.plan();
    [plan.encoder, plan.llm, plan.decoder] = ["encoder", "llm", "decoder"].map(|role| {
        let mut stage = stage(role);
        stage.arguments.extend(["--replicas".into(), replicas.to_string()]);
        stage
    });
    plan.server = "max_requests = 4096".into();
    let cluster = Cluster::start(plan).await?;
    let channels = [cluster.router().client(), cluster.router().client()];
    let (warm, counted) = (Duration::from_secs(4), setup.window(10));
    let stop = Stop::default();
    let (record, used) =
        tokio::join!(load::closed_loop(&channels, callers, usize::MAX, &stop, request), async {
            tokio::time::sleep(warm).await;
            let (cpu, began) = (cluster.router().process.cpu_seconds()?, Instant::now());
            tokio::time::sleep(counted).await;
            let share = (cluster.router().process.cpu_seconds()? - cpu) / began.elapsed().as_secs_f64();
            stop.stop();
            anyhow::Ok(share)
        });
    anyhow::ensure!(record.failures().next().is_none(), "requests failed: {}", record.reasons());
    let ended =
        record.0.iter().filter(|sent| (warm..warm + counted).contains(&(sent.at + sent.took))).count();
    Ok(Rate { per_second: ended as f64 / counted.as_secs_f64(), share: used? })
}

/// Each takes one encode, and one call of the llm or of the decoder.
fn request(number: u64) -> Ask {
    if number.is_multiple_of(2) {
        return load::write(vec![load::image(number), load::text("What is this?")], STEPS);
    }
    let output = ImageOutput { steps: Some(STEPS), guidance_scale: Some(1.0), ..Default::default() };
    load::generate(vec![load::image(number)], Output::Image(output), number)
}
