//! A router killed in the middle: its streams end with UNAVAILABLE, and the same request, asked again of the router
//! that comes back, has the same answer.

use std::{collections::BTreeMap, time::Duration};

use tonic::Code;

use super::setup::{Measured, Setup};
use crate::{
    cluster::Cluster,
    figures::{Bar, Figure},
    load::{self, Ask},
    rows::kills::mixed_plan,
};

/// How many streams of each kind there are.
const STREAMS: u64 = 8;

pub(super) async fn measure(setup: &Setup) -> anyhow::Result<Measured> {
    let mut otherwise =
        Figure::new("streams that ended otherwise than UNAVAILABLE", "").bar(Bar::Exactly(0.0));
    let mut different = Figure::new("answers other than before, asked again", "").bar(Bar::Exactly(0.0));
    let mut cut = Figure::new("streams cut", "");
    let mut notes = vec![];
    for _ in 0..setup.rounds {
        let mut plan = mixed_plan(setup);
        // Long enough to be in the middle of all of them.
        plan.llm = crate::cluster::Stage::new("llm", "--step-ms 20");
        let mut cluster = Cluster::start(plan).await?;
        let client = cluster.router().client();
        let all = || (0..2 * STREAMS).map(ask).map(|ask| (client.clone(), ask)).collect::<Vec<_>>();
        let before = load::at_once(all()).await;
        anyhow::ensure!(before.iter().all(Result::is_ok), "undisturbed requests failed: {before:?}");
        let (answers, ()) = tokio::join!(load::at_once(all()), async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            cluster.routers[0].process.signal(rustix::process::Signal::KILL);
        });
        let mut codes: BTreeMap<String, usize> = BTreeMap::new();
        for answer in &answers {
            let code =
                answer.as_ref().map_or_else(|status| format!("{:?}", status.code()), |_| "answered".into());
            *codes.entry(code).or_default() += 1;
        }
        let unavailable = |status: &tonic::Status| status.code() == Code::Unavailable;
        let ended = answers.iter().filter(|answer| answer.as_ref().is_err_and(unavailable)).count();
        otherwise.push((answers.len() - ended) as f64);
        cut.push(answers.len() as f64);
        notes.push(format!("codes: {codes:?}"));

        let address = cluster.routers[0].address;
        cluster.routers.clear();
        let mut router = cluster.spawn_router(address)?;
        router.ready().await?;
        cluster.routers.push(router);
        let again = load::at_once(all()).await;
        let same = before.iter().zip(&again).filter(|(one, two)| match (one, two) {
            (Ok(one), Ok(two)) => one.digest == two.digest,
            _ => false,
        });
        different.push((again.len() - same.count()) as f64);
    }
    Ok(Measured {
        conditions: format!("kill -9 with {} streams in the middle, half text, half images", 2 * STREAMS),
        figures: vec![otherwise, different, cut],
        notes,
    })
}

fn ask(number: u64) -> Ask {
    let words = load::text(format!("stream {number}"));
    if number.is_multiple_of(2) { load::write(vec![words], 60) } else { load::draw(vec![words], 20, number) }
}
