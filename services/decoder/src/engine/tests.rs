use std::{
    sync::{Arc, Mutex},
    thread,
};

use emu2_engine::{engine::RequestHandle, error::EngineError, worker::Worker};
use emu2_nn::golden;
use emu2_proto::array::{Array, Dtype};
use emu2_serve::priority::Priority;
use prometheus_client::registry::Registry;
use tracing::span::{Attributes, Id};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
};

use super::*;
use crate::denoise::tests::{pipeline, request};

/// An engine whose turns the test takes.
struct Bench {
    engine: Engine,
    worker: Worker<Decoder>,
    metrics: Metrics,
}

impl Bench {
    fn new(max_waiting: usize, max_batch_pixels: u64) -> Self {
        let registry = &mut Registry::default();
        let (metrics, load) = (Metrics::register(registry), LoadMetrics::register(registry, "decoder"));
        let options = Options { name: "decoder", max_waiting, limit_name: "server.max_requests" };
        let decoder = Decoder::new(pipeline().0, max_batch_pixels, metrics.clone());
        let (engine, worker) = Engine::by_hand(options, load, decoder);
        Self { engine, worker, metrics }
    }

    fn submit(&self, request: DenoiseRequest) -> RequestHandle<Decoder> {
        self.engine.submit(request, Priority::Normal).unwrap()
    }

    /// A denoising step, and the pixels of an image if one is due.
    fn turn(&mut self) {
        self.worker.turn().unwrap();
        let decoder = self.worker.stage();
        if decoder.denoised && decoder.denoised_first().is_some() {
            self.worker.turn().unwrap();
        }
    }

    /// Steps done of each request.
    fn steps(&self) -> Vec<usize> {
        self.worker.stage().active.iter().map(|active| active.sample.steps_done()).collect()
    }
}

/// What a request has been told, none of it an error.
fn drain(request: &mut RequestHandle<Decoder>) -> Vec<Event> {
    std::iter::from_fn(|| request.try_next()).map(Result::unwrap).collect()
}

#[test]
fn requests_join_and_leave_the_batch_at_any_step() {
    let mut bench = Bench::new(8, 1 << 20);
    let mut first = bench.submit(request(1, 3, 3.0));
    bench.turn();
    let mut second = bench.submit(request(2, 5, 1.0));
    bench.turn();
    assert_eq!(bench.steps(), [2, 1]);
    bench.turn();
    assert_eq!(bench.steps(), [2], "the first is done and painted");
    let events = drain(&mut first);
    assert_eq!(events[..3], [Event::Step(1), Event::Step(2), Event::Step(3)]);
    let Event::Finished(image) = &events[3] else { panic!("{events:?}") };
    assert_eq!((image.image.height, image.image.rgb.len()), (64, 64 * 64 * 3));
    assert!(image.denoise > Duration::ZERO && image.vae > Duration::ZERO);
    while !bench.steps().is_empty() {
        bench.turn();
    }
    assert_eq!(drain(&mut second).len(), 6);
    assert_eq!((bench.metrics.steps.get(), bench.metrics.images.get()), (8, 2));
}

#[test]
fn whoever_has_left_takes_no_further_step() {
    let mut bench = Bench::new(8, 1 << 20);
    let leaving = bench.submit(request(1, 100, 3.0));
    let _staying = bench.submit(request(2, 100, 3.0));
    let never_begun = bench.submit(request(3, 100, 3.0));
    drop(never_begun);
    bench.turn();
    assert_eq!(bench.steps(), [1, 1]);
    drop(leaving);
    bench.turn();
    assert_eq!(bench.steps(), [2]);
    assert_eq!((bench.metrics.steps.get(), bench.engine.load().callers_left()), (3, 2));
    assert!(bench.engine.load().current().backlog_seconds > 0.0);
}

#[test]
fn whoever_leaves_after_the_last_step_is_not_decoded() {
    let mut bench = Bench::new(8, 1 << 20);
    let (_kept, leaving) = (bench.submit(request(1, 1, 1.0)), bench.submit(request(2, 1, 1.0)));
    bench.turn();
    drop(leaving);
    bench.turn();
    assert!(bench.steps().is_empty());
    assert_eq!(bench.metrics.images.get(), 1);
}

#[test]
fn images_do_not_stop_the_steps_of_others() {
    let mut bench = Bench::new(8, 1 << 20);
    let mut short: Vec<_> = (0..3).map(|seed| bench.submit(request(seed, 1, 1.0))).collect();
    let mut long = bench.submit(request(9, 20, 3.0));
    for turn in 1..=3 {
        bench.turn();
        let painted = short.iter_mut().filter_map(|events| drain(events).pop());
        assert_eq!(painted.filter(|event| matches!(event, Event::Finished(_))).count(), 1, "turn {turn}");
        assert_eq!(drain(&mut long), [Event::Step(turn)]);
    }
}

#[test]
fn other_sizes_and_other_numbers_of_embeddings_take_turns() {
    let mut bench = Bench::new(8, 1 << 20);
    let wide = DenoiseRequest { width: 96, ..request(2, 9, 3.0) };
    let rows = Array::new(Dtype::F32, vec![3, 64], vec![0; 3 * 64 * 4].into()).unwrap();
    let few = DenoiseRequest { positive: rows, ..request(3, 9, 1.0) };
    let _events: Vec<_> =
        [request(1, 9, 3.0), wide, few, request(4, 9, 3.0)].map(|request| bench.submit(request)).into();
    for expected in [[1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1], [2, 1, 1, 2]] {
        bench.turn();
        assert_eq!(bench.steps(), expected);
    }
}

#[test]
fn a_batch_is_bounded_in_pixels() {
    // Two guided images at 64².
    let mut bench = Bench::new(8, 4 * 64 * 64);
    let _events: Vec<_> = (0..3).map(|seed| bench.submit(request(seed, 2, 3.0))).collect();
    for expected in [&[1, 1, 0][..], &[2, 0]] {
        bench.turn();
        assert_eq!(bench.steps(), expected);
    }
}

#[test]
fn a_fault_ends_its_batch_and_nobody_else() {
    let mut bench = Bench::new(8, 1 << 20);
    let rows = Array::new(Dtype::F32, vec![16, 7], vec![0; 16 * 7 * 4].into()).unwrap();
    let mut broken = bench.submit(DenoiseRequest { positive: rows, ..request(1, 2, 1.0) });
    let mut other = bench.submit(DenoiseRequest { height: 96, ..request(2, 1, 3.0) });
    bench.turn();
    bench.turn();
    let failed = broken.try_next().unwrap().unwrap_err();
    assert_eq!(failed, EngineError::StepFailed);
    let status = tonic::Status::from(failed);
    assert_eq!((status.code(), status.message()), (tonic::Code::Internal, "the step failed"));
    assert!(matches!(drain(&mut other)[..], [Event::Step(1), Event::Finished(_)]));
    assert_eq!(bench.engine.load().failed(), 1);
}

#[test]
fn a_full_queue_says_so_at_once() {
    let bench = Bench::new(1, 1 << 20);
    let _waiting = bench.submit(request(1, 1, 1.0));
    let refused = bench.engine.submit(request(2, 1, 1.0), Priority::Normal);
    assert_eq!(refused.unwrap_err(), EngineError::Full { max: 1, limit_name: "server.max_requests" });
}

#[test]
fn a_reader_who_never_reads_holds_up_nobody() {
    let Bench { engine, worker, .. } = Bench::new(8, 1 << 20);
    let submit = |seed| engine.submit(request(seed, 40, 3.0), Priority::Normal).unwrap();
    let (mut slow, mut fast) = (submit(1), submit(2));
    drop(engine);
    let thread = thread::spawn(|| worker.run());
    assert_eq!(std::iter::from_fn(|| fast.blocking_next()).count(), 41);
    let all: Vec<_> = std::iter::from_fn(|| slow.blocking_next()).map(Result::unwrap).collect();
    assert_eq!(all.len(), 41);
    assert!(all[..40].iter().enumerate().all(|(i, event)| *event == Event::Step(i + 1)));
    assert!(matches!(all[40], Event::Finished(_)));
    drop((slow, fast));
    thread.join().unwrap();
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
    let mut bench = Bench::new(8, 1 << 20);
    let spans = Spans::default();
    // While there is only one subscriber, a span that another test's thread meets first is off for every thread.
    let _second = tracing::Dispatch::new(tracing_subscriber::registry());
    tracing::subscriber::with_default(tracing_subscriber::registry().with(spans.clone()), || {
        let events = tracing::info_span!("caller").in_scope(|| bench.submit(request(1, 3, 3.0)));
        for _ in 0..4 {
            bench.turn();
        }
        drop(events);
    });
    let expected = [("caller", ""), ("queue", "caller"), ("denoise_steps", "caller"), ("vae", "caller")];
    assert_eq!(*spans.0.lock().unwrap(), expected.map(|(name, parent)| (name.to_owned(), parent.to_owned())));
}

fn started(config: &Config) -> Started {
    let registry = &mut Registry::default();
    let load_metrics = LoadMetrics::register(registry, "decoder");
    start(config, Progress::default(), load_metrics, Metrics::register(registry))
}

#[tokio::test]
async fn an_engine_loads_paints_and_stops_with_its_last_handle() {
    let config = Config { model_dir: golden::model_dir("emu2-gen"), ..Config::default() };
    let started = started(&config);
    assert_eq!(started.loaded.await.unwrap().unwrap().scale_factor, 8);
    let mut events = started.engine.submit(request(1, 2, 3.0), Priority::Normal).unwrap();
    drop(started.engine);
    let mut last = None;
    while let Some(event) = events.next().await {
        last = Some(event.unwrap());
    }
    assert!(matches!(last, Some(Event::Finished(_))), "what is queued is painted");
    drop(events);
    started.ended.await.unwrap();
}

#[tokio::test]
async fn a_model_without_a_decoder_is_a_load_error() {
    let config = Config { model_dir: golden::model_dir("emu2-base"), ..Config::default() };
    let started = started(&config);
    let error = started.loaded.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("unet"), "{error}");
}
