//! The loop with a stage that counts: random schedules, faults, callers that leave.

use std::collections::BTreeMap;

use prometheus_client::registry::Registry;
use proptest::prelude::*;

use super::*;
use crate::engine::{Engine, Options, RequestHandle};

/// Counts to what was asked, everybody a step further at a time; `waits` for an input first where that is asked.
#[derive(Debug, Default)]
struct Counter {
    active: BTreeMap<Ticket, Count>,
    /// What the next step panics with.
    broken: Option<&'static str>,
}

#[derive(Debug)]
struct Count {
    done: usize,
    wanted: usize,
    waits: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Ask {
    wanted: usize,
    waits: bool,
}

impl Stage for Counter {
    const UNITS: &'static [&'static str] = &["count"];
    type Request = Ask;
    type Input = ();
    type Event = usize;
    type Error = String;
    type Work = Vec<Ticket>;

    fn max_events(ask: &Ask) -> usize {
        ask.wanted
    }

    fn join(&mut self, ticket: Ticket, ask: Ask, _: Arrival) -> Result<(), String> {
        assert_ne!(ask.wanted, 13, "the secret of the thirteenth");
        if ask.wanted == 0 {
            return Err("must be at least 1, got 0".to_owned());
        }
        self.active.insert(ticket, Count { done: 0, wanted: ask.wanted, waits: ask.waits });
        Ok(())
    }

    fn input(&mut self, ticket: Ticket, (): ()) {
        self.active.get_mut(&ticket).expect("only the living get input").waits = false;
    }

    fn plan(&mut self) -> Option<Batch<Vec<Ticket>>> {
        let ready = self.active.iter().filter(|(_, count)| !count.waits);
        let tickets: Vec<Ticket> = ready.map(|(&ticket, _)| ticket).collect();
        let units = tickets.len() as f64;
        (!tickets.is_empty()).then(|| Batch { work: tickets.clone(), tickets, kind: 0, units })
    }

    fn step(&mut self, work: Vec<Ticket>, outbox: &mut Outbox<'_, Self>) {
        if let Some(text) = self.broken.take() {
            panic!("{text}");
        }
        for ticket in work {
            outbox.begin(ticket);
            let count = self.active.get_mut(&ticket).expect("what is planned is active");
            count.done += 1;
            if count.done == count.wanted {
                outbox.finish(ticket, count.done);
            } else {
                outbox.send(ticket, count.done);
            }
        }
    }

    fn leave(&mut self, ticket: Ticket) {
        self.active.remove(&ticket);
    }

    fn units_left(&self) -> Vec<f64> {
        vec![self.active.values().map(|count| (count.wanted - count.done) as f64).sum()]
    }
}

fn by_hand(max_waiting: usize) -> (Engine<Counter>, Worker<Counter>) {
    let metrics = LoadMetrics::register(&mut Registry::default(), "counter");
    let options = Options { name: "counter", max_waiting, limit_name: "max_counts" };
    Engine::by_hand(options, metrics, Counter::default())
}

fn count(engine: &Engine<Counter>, wanted: usize) -> RequestHandle<Counter> {
    engine.submit(Ask { wanted, waits: false }, Priority::Normal).unwrap()
}

fn told(request: &mut RequestHandle<Counter>) -> Vec<Told<Counter>> {
    std::iter::from_fn(|| request.try_next()).collect()
}

#[test]
fn a_refusal_reaches_its_caller_alone() {
    let (engine, mut worker) = by_hand(8);
    let (mut refused, mut other) = (count(&engine, 0), count(&engine, 1));
    assert_eq!(worker.turn(), Ok(Turn::Stepped));
    assert_eq!(told(&mut refused), [Err(EngineError::Stage("must be at least 1, got 0".to_owned()))]);
    assert_eq!(told(&mut other), [Ok(1)]);
    assert_eq!(worker.turn(), Ok(Turn::Idle));
    assert_eq!(engine.load().current().waiting, 0);
}

#[test]
fn a_panic_fails_its_requests_and_says_nothing_of_itself() {
    let (engine, mut worker) = by_hand(8);
    let mut broken = [count(&engine, 3), count(&engine, 13)];
    worker.stage.broken = Some("a secret");
    assert_eq!(worker.turn(), Ok(Turn::Stepped));
    for request in &mut broken {
        assert_eq!(told(request), [Err(EngineError::StepFailed)]);
    }
    let mut next = count(&engine, 1);
    worker.turn().unwrap();
    assert_eq!(told(&mut next), [Ok(1)]);
    assert_eq!(worker.metrics.failed(), 2);
}

#[test]
fn out_of_memory_is_told_as_such() {
    let (engine, mut worker) = by_hand(8);
    let mut request = count(&engine, 3);
    worker.stage.broken = Some("CUDA out of memory. Tried to allocate 2 GiB");
    worker.turn().unwrap();
    assert_eq!(told(&mut request), [Err(EngineError::OutOfMemory)]);
}

#[test]
fn a_lost_device_ends_the_engine_and_everybodys_request() {
    let (engine, mut worker) = by_hand(8);
    worker.stage.broken = Some("CUDA error: an illegal memory access was encountered");
    let mut hit = count(&engine, 3);
    let mut waiting = engine.submit(Ask { wanted: 3, waits: true }, Priority::Normal).unwrap();
    worker.run();
    assert_eq!(told(&mut hit), [Err(EngineError::Stopped)]);
    assert_eq!(told(&mut waiting), [Err(EngineError::Stopped)]);
    let late = engine.submit(Ask { wanted: 1, waits: false }, Priority::Normal);
    assert_eq!(late.unwrap_err(), EngineError::Stopped);
}

#[test]
fn places_to_wait_are_bounded_and_come_back() {
    let (engine, mut worker) = by_hand(2);
    let waiting = [count(&engine, 5), count(&engine, 5)];
    let ask = Ask { wanted: 5, waits: false };
    let full = EngineError::Full { max: 2, limit_name: "max_counts" };
    assert_eq!(engine.submit(ask, Priority::Normal).unwrap_err(), full);
    worker.turn().unwrap();
    let _running = waiting;
    let left = count(&engine, 5);
    drop(left);
    worker.turn().unwrap();
    let _waiting = [count(&engine, 5), count(&engine, 5)];
    assert_eq!(engine.submit(ask, Priority::Normal).unwrap_err(), full);
    assert_eq!(worker.metrics.callers_left(), 1);
}

#[tokio::test]
async fn a_caller_that_leaves_wakes_a_sleeping_engine() {
    let metrics = LoadMetrics::register(&mut Registry::default(), "counter");
    let options = Options { name: "counter", max_waiting: 8, limit_name: "max_counts" };
    let load = || Ok::<_, String>((Counter::default(), ()));
    let started = Engine::start(options, metrics.clone(), || (), load);
    started.loaded.await.unwrap().unwrap();
    let mut load = metrics.watch();
    let request = started.engine.submit(Ask { wanted: 1, waits: true }, Priority::Normal).unwrap();
    load.wait_for(|load| load.waiting == 1).await.unwrap();
    drop(request);
    load.wait_for(|load| load.waiting == 0).await.unwrap();
    assert_eq!(metrics.callers_left(), 1);
    drop(started.engine);
    started.ended.await.unwrap();
}

/// What a random schedule does next.
#[derive(Clone, Debug)]
enum Action {
    Submit(Ask),
    Input(usize),
    Drop(usize),
    Turn,
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        (1..5_usize, any::<bool>()).prop_map(|(wanted, waits)| Action::Submit(Ask { wanted, waits })),
        (0..20_usize).prop_map(Action::Input),
        (0..20_usize).prop_map(Action::Drop),
        Just(Action::Turn),
    ]
}

proptest! {
    /// Under any schedule everybody who stays is told 1, 2, … to the end, the load says who is there, and in the end
    /// nobody is.
    #[test]
    fn everybody_who_stays_is_served(actions in proptest::collection::vec(action(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (engine, mut worker) = by_hand(100);
        let mut requests: Vec<(Ask, RequestHandle<Counter>)> = Vec::new();
        for action in actions {
            match action {
                Action::Submit(ask) => requests.push((ask, engine.submit(ask, Priority::Normal).unwrap())),
                Action::Input(index) if index < requests.len() => {
                    runtime.block_on(requests[index].1.input(())).unwrap();
                }
                Action::Drop(index) if index < requests.len() => drop(requests.remove(index)),
                Action::Input(_) | Action::Drop(_) => {}
                Action::Turn => {
                    worker.turn().unwrap();
                    let load = engine.load().current();
                    prop_assert_eq!(load.running + load.waiting, worker.stage.active.len());
                    prop_assert!(load.backlog_seconds.is_finite() && load.backlog_seconds >= 0.0);
                }
            }
        }
        for (_, request) in &requests {
            runtime.block_on(request.input(())).unwrap();
        }
        while worker.turn().unwrap() == Turn::Stepped {}
        for (ask, request) in &mut requests {
            prop_assert_eq!(told(request), (1..=ask.wanted).map(Ok).collect::<Vec<_>>());
        }
        let load = engine.load().current();
        prop_assert_eq!((load.running, load.waiting, load.backlog_seconds), (0, 0, 0.0));
    }
}
