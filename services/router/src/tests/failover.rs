//! A replica that is lost, hangs, or has no room costs no request: the call goes on elsewhere, and the client's stream
//! is what it would have been.

use std::{sync::atomic::Ordering, time::Duration};

use emu2_proto::v1::{GenerateEvent, GenerateRequest, generate_event::Event};
use emu2_serve::status;
use tokio::task::JoinHandle;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;

use super::{
    mocks::{Role, Script, Stage},
    sandbox::{Sandbox, ask, collect, image, paint, text, until, words},
};
use crate::config::Config;

/// A cluster with two replicas of every stage.
struct Pair {
    sandbox: Sandbox,
    _encoder: Stage,
    llm: Stage,
    decoder: Stage,
}

impl Pair {
    async fn start() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let encoder = Stage::start(Role::Encoder, Script::new("e1"));
        let llm = Stage::start(Role::Llm { instruct: true }, Script::new("l1"));
        let decoder = Stage::start(Role::Decoder, Script::new("d1"));
        let sandbox = Sandbox::with(|config| {
            for model in &mut config.models {
                model.encoder.push(encoder.endpoint());
                model.llm.push(llm.endpoint());
                if !model.decoder.is_empty() {
                    model.decoder.push(decoder.endpoint());
                }
            }
            config.cache.memory_bytes = 0;
            config.pool.refresh_ms = 50;
            // Enough for a starved machine to answer.
            config.pool.info_timeout_ms = 500;
            change(config);
        })
        .await;
        Self { sandbox, _encoder: encoder, llm, decoder }
    }

    fn run(&self, request: GenerateRequest) -> JoinHandle<Result<Vec<Event>, Status>> {
        let mut client = self.sandbox.client();
        tokio::spawn(async move { collect(client.generate(request).await?.into_inner()).await })
    }

    /// An answer of which two events have been read: that it was accepted, and the first that shows anything.
    async fn begun(&self, request: GenerateRequest) -> Streaming<GenerateEvent> {
        let mut events = self.sandbox.client().generate(request).await.unwrap().into_inner();
        for _ in 0..2 {
            events.message().await.unwrap().unwrap();
        }
        events
    }

    fn llms(&mut self) -> [&mut Stage; 2] {
        [&mut self.sandbox.llm, &mut self.llm]
    }

    fn decoders(&mut self) -> [&mut Stage; 2] {
        [&mut self.sandbox.decoder, &mut self.decoder]
    }
}

/// The one of two that works, once one does, and the other.
async fn at_work(stages: [&mut Stage; 2]) -> (&mut Stage, &mut Stage) {
    until("one is at work", || async { stages.iter().any(|stage| stage.running() == 1) }).await;
    let [first, second] = stages;
    if first.running() == 1 { (first, second) } else { (second, first) }
}

/// As the mocks answer when nothing goes wrong.
const TEXT: [&str; 4] = ["accepted", "text Hel", "text lo", "finished"];
const PICTURE: [&str; 9] = [
    "accepted",
    "embedding 1/4",
    "embedding 2/4",
    "embedding 3/4",
    "embedding 4/4",
    "step 1/2",
    "step 2/2",
    "image 64x64",
    "finished",
];

/// Waits at the llm's gate: before the third token, before the second row.
fn hold(stages: [&mut Stage; 2]) {
    stages.into_iter().for_each(|stage| stage.hold());
}

#[tokio::test]
async fn a_text_goes_on_where_it_was_when_its_replica_is_killed() {
    let mut pair = Pair::start().await;
    hold(pair.llms());
    let running = pair.begun(ask(vec![text("a"), image("cat")])).await;
    let (busy, other) = at_work(pair.llms()).await;
    busy.kill();
    other.let_go();
    assert_eq!(words(&collect(running).await.unwrap()), TEXT[2..]);
    let starts = other.starts.lock().unwrap();
    // The second token shows nothing, so that it may or may not have come.
    let token_ids = &starts.last().unwrap().resume.as_ref().unwrap().token_ids;
    assert!([10, 11].starts_with(token_ids) && !token_ids.is_empty(), "{token_ids:?}");
    assert_eq!(other.slots.lock().unwrap().len(), 1, "its picture was sent again");
    let attempts = other.metadata.lock().unwrap();
    assert_eq!(attempts.last().unwrap().get("x-emu2-attempt").unwrap(), "2");
}

#[tokio::test]
async fn a_regression_goes_on_with_the_rows_that_it_has() {
    let mut pair = Pair::start().await;
    hold(pair.llms());
    let running = pair.begun(paint(vec![text("a")], 1.0)).await;
    let (busy, other) = at_work(pair.llms()).await;
    busy.kill();
    other.let_go();
    assert_eq!(words(&collect(running).await.unwrap()), PICTURE[2..]);
    let resumed = other.starts.lock().unwrap().last().unwrap().resume.clone().unwrap();
    assert_eq!(resumed.rows.unwrap().shape[0], 1);
}

#[tokio::test]
async fn denoising_begins_again_and_the_client_sees_no_step_twice() {
    let mut pair = Pair::start().await;
    hold(pair.decoders());
    let running = pair.run(paint(vec![text("a")], 3.0));
    let (busy, other) = at_work(pair.decoders()).await;
    let rows = |stage: &Stage| stage.positive.lock().unwrap().len();
    until("it has all rows", || async { rows(busy) == 4 }).await;
    busy.kill();
    other.let_go();
    assert_eq!(words(&running.await.unwrap().unwrap()), PICTURE);
    assert_eq!(rows(other), 4, "all rows were sent again");
    let seeds = |stage: &Stage| stage.decodes.lock().unwrap().last().unwrap().seed;
    assert_eq!(seeds(busy), seeds(other));
}

#[tokio::test]
async fn a_replica_that_answers_nothing_is_left_and_what_it_says_later_is_not_heard() {
    let mut pair = Pair::start().await;
    hold(pair.llms());
    let running = pair.run(ask(vec![text("a")]));
    let (busy, other) = at_work(pair.llms()).await;
    busy.hung.send_replace(true);
    busy.let_go();
    other.let_go();
    assert_eq!(words(&running.await.unwrap().unwrap()), TEXT);
    busy.hung.send_replace(false);
    until("it finds its call cancelled", || async { busy.cancelled.load(Ordering::SeqCst) == 1 }).await;
}

#[tokio::test]
async fn a_replica_whose_step_does_not_end_is_left() {
    let mut pair = Pair::with(|config| config.pool.max_step_ms = 1_000).await;
    hold(pair.llms());
    let running = pair.run(ask(vec![text("a")]));
    let (busy, other) = at_work(pair.llms()).await;
    other.let_go();
    busy.load.send_modify(|load| load.step_ms = 1_001);
    assert_eq!(words(&running.await.unwrap().unwrap()), TEXT);
    assert_eq!(other.calls(), 1);
}

#[tokio::test]
async fn a_replica_without_room_passes_the_call_on() {
    let pair = Pair::start().await;
    let full = || Some(status::exhausted("queue is full", Duration::from_secs(3)));
    pair.llm.fail(full());
    for number in 0..10 {
        pair.sandbox.events(ask(vec![text(&number.to_string())])).await.unwrap();
    }
    assert!(pair.llm.calls() > 0, "it was asked");
    pair.sandbox.llm.fail(full());
    let refused = pair.sandbox.events(ask(vec![text("a")])).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(refused.get_details_retry_info().unwrap().retry_delay, Some(Duration::from_secs(3)));
}

/// Of a pool that is rolled one replica is left with the old weights, and stops: whoever it has answered nothing begins
/// anew with the new ones.
#[tokio::test]
async fn a_call_that_was_answered_nothing_begins_again_with_the_weights_that_are_left() {
    let mut pair = Pair::start().await;
    pair.llm.roll("l2");
    let asked = pair.llm.asked.load(Ordering::SeqCst);
    until("it is noticed", || async { pair.llm.asked.load(Ordering::SeqCst) > asked + 1 }).await;
    let old = &pair.sandbox.llm;
    old.fail(Some(Status::unavailable("not ready: stopping")));
    until("the old one was asked", || async {
        assert_eq!(words(&pair.sandbox.events(ask(vec![text("a")])).await.unwrap()), TEXT);
        old.calls() > 0
    })
    .await;
    pair.sandbox.llm.kill();
    assert_eq!(words(&pair.sandbox.events(ask(vec![text("a")])).await.unwrap()), TEXT);
}

#[tokio::test]
async fn a_call_that_nobody_is_left_for_says_what_to_do() {
    let sandbox = Sandbox::start().await;
    sandbox.llm.fail(Some(Status::unavailable("not ready: stopping")));
    let status = sandbox.events(ask(vec![text("a")])).await.unwrap_err();
    let text = "the llm stage was lost: not ready: stopping; nothing was answered yet, ask again";
    assert_eq!((status.code(), status.message()), (Code::Unavailable, text));
}

/// The last replica is gone: a call that has begun waits for it, one that has not is told at once.
#[tokio::test]
async fn a_call_that_has_begun_waits_for_its_replica_to_come_back() {
    let mut sandbox = Sandbox::start().await;
    sandbox.llm.hold();
    let mut stream = sandbox.client().generate(ask(vec![text("a")])).await.unwrap().into_inner();
    stream.message().await.unwrap();
    stream.message().await.unwrap();
    let address = sandbox.llm.address;
    sandbox.llm.kill();
    until("the port is free", || async { std::net::TcpListener::bind(address).is_ok() }).await;
    assert_eq!(sandbox.events(ask(vec![text("b")])).await.unwrap_err().code(), Code::Unavailable);
    // Longer than it takes to be refused a few connections.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let listener = std::net::TcpListener::bind(address).unwrap();
    sandbox.llm = Stage::start_on(listener, Role::Llm { instruct: true }, Script::new("l1"));
    assert_eq!(words(&collect(stream).await.unwrap()), ["text lo", "finished"]);
}

/// As after `kill -9` of the only llm.
#[tokio::test]
async fn a_call_whose_last_replica_refuses_connections_ends_within_two_seconds_and_says_so() {
    let mut sandbox = Sandbox::start().await;
    sandbox.llm.hold();
    let mut stream = sandbox.client().generate(ask(vec![text("a")])).await.unwrap().into_inner();
    stream.message().await.unwrap();
    stream.message().await.unwrap();
    let killed = std::time::Instant::now();
    sandbox.llm.kill();
    let lost = collect(stream).await.unwrap_err();
    assert!(killed.elapsed() < Duration::from_secs(2), "{:?}", killed.elapsed());
    assert_eq!(lost.code(), Code::Unavailable);
    assert_eq!(
        lost.message(),
        "the llm stage was lost: the llm replica refuses connections; no other has gone on"
    );
    assert!(lost.get_details_retry_info().is_some());
    let metrics = sandbox.router.metrics().await;
    for reason in ["reset", "refused"] {
        let series = format!("emu2_router_attempts_lost_total{{stage=\"llm\",reason=\"{reason}\"}}");
        assert!(metrics.contains(&series), "{metrics}");
    }
    assert!(!metrics.contains("reason=\"hung\""), "{metrics}");
}

/// What kills whoever takes it must not go through the whole pool.
#[tokio::test]
async fn a_call_that_loses_every_replica_is_given_up() {
    let more: Vec<_> = (0..5).map(|_| Stage::start(Role::Encoder, Script::new("e1"))).collect();
    let endpoints: Vec<_> = more.iter().map(Stage::endpoint).collect();
    let sandbox = Sandbox::with(|config| config.models[1].encoder.extend(endpoints)).await;
    let lost = Some(Status::unavailable("the engine has stopped"));
    more.iter().for_each(|stage| stage.fail(lost.clone()));
    sandbox.encoder.fail(lost);
    let before: usize = more.iter().map(|stage| stage.calls()).sum::<usize>() + sandbox.encoder.calls();
    assert_eq!(sandbox.embed(b"b").await.unwrap_err().code(), Code::Unavailable);
    let after: usize = more.iter().map(|stage| stage.calls()).sum::<usize>() + sandbox.encoder.calls();
    assert_eq!(after - before, 4);
}
