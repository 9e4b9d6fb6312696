//! What stages report of their load, as the router goes by it.

use std::time::Duration;

use emu2_proto::stage::Load;
use tonic::Code;
use tonic_types::StatusExt;

use super::{
    mocks::{Role, Script, Stage},
    sandbox::{Router, Sandbox, ask, collect, config, paint, text, until},
};

/// Far longer than a test: what is known of a load came by the watch.
const NEVER_MS: u64 = 3_600_000;

fn behind(backlog_seconds: f64) -> Load {
    Load { backlog_seconds, running: 1, waiting: 3, ..Default::default() }
}

#[tokio::test]
async fn a_stage_that_reports_a_backlog_is_asked_no_more() {
    let sandbox = Sandbox::with(|config| {
        config.pool.refresh_ms = NEVER_MS;
        config.admission.max_backlog_ms = 1_000;
    })
    .await;
    sandbox.llm.load.send_replace(behind(90.0));
    until("the backlog is known", || async { sandbox.events(ask(vec![text("a")])).await.is_err() }).await;
    let refused = sandbox.events(ask(vec![text("a")])).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().starts_with("the llm is 90.0 s behind, at most 1000 ms"), "{refused}");
    assert_eq!(refused.get_details_retry_info().unwrap().retry_delay, Some(Duration::from_secs(90)));
    sandbox.llm.load.send_replace(Load::default());
    until("it is known to be gone", || async { sandbox.events(ask(vec![text("a")])).await.is_ok() }).await;
    sandbox.decoder.load.send_replace(behind(5.0));
    let painting = || sandbox.events(paint(vec![text("a")], 1.0));
    until("the decoder is known to be behind", || async { painting().await.is_err() }).await;
    sandbox.events(ask(vec![text("a")])).await.unwrap();
}

/// As when another router keeps a replica busy.
#[tokio::test]
async fn calls_go_to_the_replica_that_reports_less() {
    let sandbox = Sandbox::start().await;
    let other = Stage::start(Role::Llm { instruct: true }, Script::new("l1"));
    let mut config = config(&sandbox.encoder, &sandbox.llm, &sandbox.decoder);
    config.pool.refresh_ms = NEVER_MS;
    config.models.iter_mut().for_each(|model| model.llm.push(other.endpoint()));
    let router = Router::start(config).await;
    until("the router is ready", || router.is_ready()).await;
    for (busy, idle) in [(&sandbox.llm, &other), (&other, &sandbox.llm)] {
        busy.load.send_replace(Load { running: 9, backlog_seconds: 20.0, ..Default::default() });
        idle.load.send_replace(Load { running: 1, backlog_seconds: 2.0, ..Default::default() });
        // Different texts, so that hints name either.
        let goes_to_the_idle_one = async |run: usize| {
            let before = (busy.calls(), idle.calls());
            for number in 0..10 {
                let request = ask(vec![text(&format!("{run} {number}"))]);
                collect(router.client.clone().generate(request).await.unwrap().into_inner()).await.unwrap();
            }
            (busy.calls() - before.0, idle.calls() - before.1) == (0, 10)
        };
        let mut run = 0;
        until("ten calls in a row go to the idle one", || {
            run += 1;
            goes_to_the_idle_one(run)
        })
        .await;
    }
}
