use std::{
    sync::{Arc, Mutex},
    thread,
};

use emu2_nn::golden;
use emu2_proto::array::{Array, Dtype};
use prometheus_client::registry::Registry;
use tracing::span::{Attributes, Id};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
};

use super::*;
use crate::denoise::tests::{painter, request};

/// An engine whose turns the test takes.
fn worker(queue: usize, max_batch_pixels: u64) -> (Engine, Worker) {
    let (jobs, queue) = mpsc::channel(queue);
    let metrics = Metrics::register(&mut Registry::default());
    (Engine { jobs, pulse: Pulse::default() }, Worker::new(painter().0, queue, max_batch_pixels, metrics))
}

fn steps(worker: &Worker) -> Vec<usize> {
    worker.active.iter().map(|active| active.sample.steps_done()).collect()
}

fn drain(events: &mut mpsc::Receiver<Event>) -> Vec<Event> {
    std::iter::from_fn(|| events.try_recv().ok()).collect()
}

#[test]
fn requests_join_and_leave_the_batch_at_any_step() {
    let (engine, mut worker) = worker(8, 1 << 20);
    let mut first = engine.submit(request(1, 3, 3.0), Priority::Normal).unwrap();
    worker.turn().unwrap();
    let mut second = engine.submit(request(2, 5, 1.0), Priority::Normal).unwrap();
    worker.turn().unwrap();
    assert_eq!(steps(&worker), [2, 1]);
    worker.turn().unwrap();
    assert_eq!(steps(&worker), [2], "the first is done and painted");
    let events = drain(&mut first);
    assert_eq!(events[..3], [Event::Step(1), Event::Step(2), Event::Step(3)]);
    let Event::Painted(painted) = &events[3] else { panic!("{events:?}") };
    assert_eq!((painted.picture.height, painted.picture.rgb.len()), (64, 64 * 64 * 3));
    assert!(painted.denoise > Duration::ZERO && painted.vae > Duration::ZERO);
    while !worker.active.is_empty() {
        worker.turn().unwrap();
    }
    assert_eq!(drain(&mut second).len(), 6);
    assert_eq!((worker.metrics.steps.get(), worker.metrics.images.get()), (8, 2));
}

#[test]
fn whoever_has_left_takes_no_further_step() {
    let (engine, mut worker) = worker(8, 1 << 20);
    let leaving = engine.submit(request(1, 100, 3.0), Priority::Normal).unwrap();
    let _staying = engine.submit(request(2, 100, 3.0), Priority::Normal).unwrap();
    let never_begun = engine.submit(request(3, 100, 3.0), Priority::Normal).unwrap();
    drop(never_begun);
    worker.turn().unwrap();
    assert_eq!(steps(&worker), [1, 1]);
    drop(leaving);
    worker.turn().unwrap();
    assert_eq!(steps(&worker), [2]);
    assert_eq!((worker.metrics.steps.get(), worker.metrics.abandoned.get()), (3, 2));
    assert!(worker.metrics.backlog.get() > 0.0);
}

#[test]
fn whoever_leaves_after_the_last_step_is_not_decoded() {
    let (engine, mut worker) = worker(8, 1 << 20);
    let (_kept, leaving) = (
        engine.submit(request(1, 1, 1.0), Priority::Normal).unwrap(),
        engine.submit(request(2, 1, 1.0), Priority::Normal).unwrap(),
    );
    worker.turn().unwrap();
    drop(leaving);
    worker.turn().unwrap();
    assert!(worker.active.is_empty());
    assert_eq!(worker.metrics.images.get(), 1);
}

#[test]
fn images_do_not_stop_the_steps_of_others() {
    let (engine, mut worker) = worker(8, 1 << 20);
    let mut short: Vec<_> =
        (0..3).map(|seed| engine.submit(request(seed, 1, 1.0), Priority::Normal).unwrap()).collect();
    let mut long = engine.submit(request(9, 20, 3.0), Priority::Normal).unwrap();
    for turn in 1..=3 {
        worker.turn().unwrap();
        let painted = short.iter_mut().filter_map(|events| drain(events).pop());
        assert_eq!(painted.filter(|event| matches!(event, Event::Painted(_))).count(), 1, "turn {turn}");
        assert_eq!(drain(&mut long), [Event::Step(turn)]);
    }
}

#[test]
fn other_sizes_and_other_numbers_of_embeddings_take_turns() {
    let (engine, mut worker) = worker(8, 1 << 20);
    let wide = PaintRequest { width: 96, ..request(2, 9, 3.0) };
    let rows = Array::new(Dtype::F32, vec![3, 64], vec![0; 3 * 64 * 4].into()).unwrap();
    let few = PaintRequest { positive: rows, ..request(3, 9, 1.0) };
    let _events: Vec<_> = [request(1, 9, 3.0), wide, few, request(4, 9, 3.0)]
        .map(|request| engine.submit(request, Priority::Normal).unwrap())
        .into();
    for expected in [[1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1], [2, 1, 1, 2]] {
        worker.turn().unwrap();
        assert_eq!(steps(&worker), expected);
    }
}

#[test]
fn a_batch_is_bounded_in_pixels() {
    // Two guided images at 64².
    let (engine, mut worker) = worker(8, 4 * 64 * 64);
    let _events: Vec<_> =
        (0..3).map(|seed| engine.submit(request(seed, 2, 3.0), Priority::Normal).unwrap()).collect();
    for expected in [&[1, 1, 0][..], &[2, 0]] {
        worker.turn().unwrap();
        assert_eq!(steps(&worker), expected);
    }
}

#[test]
fn a_fault_ends_its_batch_and_nobody_else() {
    let (engine, mut worker) = worker(8, 1 << 20);
    let rows = Array::new(Dtype::F32, vec![16, 7], vec![0; 16 * 7 * 4].into()).unwrap();
    let mut broken =
        engine.submit(PaintRequest { positive: rows, ..request(1, 2, 1.0) }, Priority::Normal).unwrap();
    let mut other =
        engine.submit(PaintRequest { height: 96, ..request(2, 1, 3.0) }, Priority::Normal).unwrap();
    worker.turn().unwrap();
    worker.turn().unwrap();
    let failed = drain(&mut broken);
    assert!(matches!(failed[..], [Event::Failed(PaintError::Fault(EngineFault::Panic(_)))]), "{failed:?}");
    assert!(matches!(drain(&mut other)[..], [Event::Step(1), Event::Painted(_)]));
    assert_eq!(worker.metrics.failed.get(), 1);
}

#[test]
fn a_lost_device_ends_the_engine() {
    let (engine, mut worker) = worker(8, 1 << 20);
    let mut events = engine.submit(request(1, 2, 1.0), Priority::Normal).unwrap();
    worker.turn().unwrap();
    let told = [worker.active[0].events.clone()];
    assert!(worker.fail(&told, EngineFault::Device("CUDA error".into())).is_err());
    drop(told);
    assert!(matches!(drain(&mut events)[..], [Event::Step(1), Event::Failed(_)]));
    drop(worker);
    assert_eq!(engine.submit(request(2, 1, 1.0), Priority::Normal).unwrap_err(), PaintError::Stopped);
}

#[test]
fn a_full_queue_says_so_at_once() {
    let (engine, _worker) = worker(1, 1 << 20);
    let _waiting = engine.submit(request(1, 1, 1.0), Priority::Normal).unwrap();
    assert_eq!(engine.submit(request(2, 1, 1.0), Priority::Normal).unwrap_err(), PaintError::Full);
}

#[test]
fn a_reader_who_never_reads_holds_up_nobody() {
    let (engine, worker) = worker(8, 1 << 20);
    let mut slow = engine.submit(request(1, 40, 3.0), Priority::Normal).unwrap();
    let mut fast = engine.submit(request(2, 40, 3.0), Priority::Normal).unwrap();
    drop(engine);
    let engine = thread::spawn(|| worker.run(&Pulse::default()));
    let count = std::iter::from_fn(|| fast.blocking_recv()).count();
    engine.join().unwrap();
    let all = drain(&mut slow);
    assert_eq!((count, all.len()), (41, 41));
    assert!(all[..40].iter().enumerate().all(|(i, event)| *event == Event::Step(i + 1)));
    assert!(matches!(all[40], Event::Painted(_)));
}

/// Writes down each span with its parent.
#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Vec<(String, String)>>>);

impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Spans {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let span = context.span(id).unwrap();
        let parent = span.parent().map_or_else(String::new, |parent| parent.name().to_owned());
        self.0.lock().unwrap().push((attributes.metadata().name().to_owned(), parent));
    }
}

#[test]
fn stages_are_children_of_the_callers_span() {
    let (engine, mut worker) = worker(8, 1 << 20);
    let spans = Spans::default();
    // While there is only one subscriber, a span that another test's thread meets first is off for every thread.
    let _second = tracing::Dispatch::new(tracing_subscriber::registry());
    tracing::subscriber::with_default(tracing_subscriber::registry().with(spans.clone()), || {
        let events = tracing::info_span!("caller")
            .in_scope(|| engine.submit(request(1, 3, 3.0), Priority::Normal).unwrap());
        for _ in 0..4 {
            worker.turn().unwrap();
        }
        drop(events);
    });
    let expected = [("caller", ""), ("queue", "caller"), ("denoise_steps", "caller"), ("vae", "caller")];
    assert_eq!(*spans.0.lock().unwrap(), expected.map(|(name, parent)| (name.to_owned(), parent.to_owned())));
}

#[tokio::test]
async fn an_engine_loads_paints_and_stops_with_its_last_handle() {
    let config = Config { model_dir: golden::model_dir("emu2-gen"), ..Config::default() };
    let started = start(&config, Progress::default(), Metrics::register(&mut Registry::default()));
    assert_eq!(started.loaded.await.unwrap().unwrap().scale_factor, 8);
    let mut events = started.engine.submit(request(1, 2, 3.0), Priority::Normal).unwrap();
    drop(started.engine);
    let mut last = None;
    while let Some(event) = events.recv().await {
        last = Some(event);
    }
    assert!(matches!(last, Some(Event::Painted(_))), "what is queued is painted");
    started.ended.await.unwrap();
}

#[tokio::test]
async fn a_model_without_a_decoder_is_a_load_error() {
    let config = Config { model_dir: golden::model_dir("emu2-base"), ..Config::default() };
    let started = start(&config, Progress::default(), Metrics::register(&mut Registry::default()));
    let error = started.loaded.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("unet"), "{error}");
}
