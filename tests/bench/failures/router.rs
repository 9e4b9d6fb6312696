//! A router that is killed or full, and clients that leave or are out of time.

use std::time::{Duration, Instant};

use emu2_bench::{
    cluster::Stage,
    load::{self, Ask, image, text},
};
use rustix::process::Signal;
use tonic::{Code, Request};

use crate::{assert_same, at_work, cluster, plan, send, until_idle};

/// Asks for a text that takes a second.
fn long_text(number: u64) -> Ask {
    load::write(vec![text(format!("text {number}"))], 125)
}

#[tokio::test]
async fn a_killed_routers_streams_end_and_the_next_router_answers_the_same() {
    let mut cluster = cluster(plan()).await;
    let undisturbed = send(&cluster, long_text(1)).await.unwrap();
    let mut client = cluster.router().client();
    let (cut, ()) = tokio::join!(load::send(&mut client, long_text(1)), async {
        at_work(&cluster.llms).await;
        cluster.routers[0].process.signal(Signal::KILL);
    });
    assert_eq!(cut.unwrap_err().code(), Code::Unavailable);
    until_idle(&mut cluster).await;
    cluster.routers.clear();
    cluster.add_router().await.unwrap();
    assert_same(&undisturbed, &send(&cluster, long_text(1)).await);
}

#[tokio::test]
async fn a_router_that_is_told_to_stop_finishes_its_streams() {
    let mut cluster = cluster(plan()).await;
    let undisturbed = send(&cluster, long_text(1)).await.unwrap();
    let mut client = cluster.router().client();
    let (answer, ()) = tokio::join!(load::send(&mut client, long_text(1)), async {
        at_work(&cluster.llms).await;
        cluster.routers[0].process.signal(Signal::TERM);
    });
    assert_same(&undisturbed, &answer);
    drop(client);
    assert!(cluster.routers[0].process.ended().await.unwrap().success());
}

/// Text with an image keeps encoder and llm at it, an image request llm and decoder.
#[tokio::test]
async fn a_client_that_leaves_frees_every_stage() {
    let mut cluster = cluster(plan()).await;
    for ask in [
        load::write(vec![image(1), text("What is this?")], 500),
        load::draw(vec![image(2), text("the same at night")], 250, 1),
    ] {
        let mut client = cluster.router().client();
        let leaving = tokio::time::timeout(Duration::from_millis(250), load::send(&mut client, ask)).await;
        assert!(leaving.is_err(), "it left before the end");
        until_idle(&mut cluster).await;
    }
    assert!(
        cluster.llms[0].metric("emu2_mock_cancelled_calls_total").await > 0.0
            || cluster.llms[1].metric("emu2_mock_cancelled_calls_total").await > 0.0
    );
}

#[tokio::test]
async fn a_deadline_that_passes_frees_every_stage() {
    let mut cluster = cluster(plan()).await;
    let Ask::Generate(asked) = load::draw(vec![image(2), text("the same at night")], 250, 1) else {
        unreachable!("an image request is a Generate")
    };
    let mut request = Request::new(asked);
    request.set_timeout(Duration::from_millis(400));
    let began = Instant::now();
    let status = match cluster.router().client().generate(request).await {
        Ok(events) => load::read(events.into_inner(), began).await.unwrap_err(),
        Err(status) => status,
    };
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    until_idle(&mut cluster).await;
}

/// What is over the permits is refused at once, what is under them is served, and then there is room again.
#[tokio::test]
async fn overload_is_refused_at_once_and_what_fits_is_served() {
    const PERMITS: usize = 4;
    let mut plan = plan();
    plan.llm = Stage::new("llm", "--step-ms 10");
    plan.server = format!("max_requests = {PERMITS}");
    let cluster = cluster(plan).await;
    let asks = (0..10 * PERMITS as u64)
        .map(|number| (cluster.router().client(), load::write(vec![text(format!("{number}"))], 60)));
    let answers = load::at_once(asks.collect()).await;
    let (served, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
    assert_eq!(served.len(), PERMITS);
    for status in refused.into_iter().filter_map(Result::err) {
        assert_eq!(status.code(), Code::ResourceExhausted);
    }
    send(&cluster, long_text(1)).await.unwrap();
}
