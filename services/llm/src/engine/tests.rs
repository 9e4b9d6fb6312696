//! The engine with the tiny models of the golden set. `parity` compares with the official model's numbers; here is
//! how requests share a batch.

mod faults;
mod parity;
mod schedules;
mod spans;

use std::time::Duration;

use emu2_engine::{error::EngineError, load::Load, worker::Worker};
use emu2_nn::{checkpoint::Progress, golden};
use emu2_serve::priority::Priority;
use prometheus_client::registry::Registry;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};

use super::*;
use crate::{
    prompt::{Prompt, Slot},
    request::Output,
    scheduler::TooLarge,
    search::{Strategy, TextParameters, Warpers},
};

/// Longer than any test's work; a hang fails instead.
const PATIENCE: Duration = Duration::from_secs(60);
/// Keys and values of one position of the tiny models.
const ENTRY_BYTES: u64 = 2 * 3 * 96 * 4;

fn config(model: &str) -> ModelConfig {
    ModelConfig {
        model_dir: golden::model_dir(model),
        devices: vec!["cpu".to_owned()],
        cores: 1,
        kv_budget_bytes: 8192 * ENTRY_BYTES,
        prefill_chunk: 16,
        max_waiting: 64,
        progress: Progress::default(),
    }
}

struct Running {
    engine: Engine,
    loaded: Loaded,
    metrics: Metrics,
    ended: oneshot::Receiver<()>,
}

impl Running {
    async fn start(config: ModelConfig) -> Self {
        Self::start_on(DEVICE, config).await
    }

    async fn start_on(on_device: OnDevice, config: ModelConfig) -> Self {
        let (load_metrics, metrics) = registered();
        let Started { engine, loaded, ended } = start_on(on_device, config, load_metrics, metrics.clone());
        Self { engine, loaded: loaded.await.unwrap().unwrap(), metrics, ended }
    }

    fn submit(&self, prompt: Prompt, output: Output) -> Generation {
        self.engine.submit(Request { prompt, output, resumed: 0 }, Priority::Normal).unwrap()
    }

    async fn runs(&self, sequences: usize) {
        self.comes_to(|load| load.running == sequences).await;
    }

    async fn waits(&self, sequences: usize) {
        self.comes_to(|load| load.waiting == sequences).await;
    }

    /// The load is told after a step, when its events are already out.
    async fn comes_to(&self, wanted: impl FnMut(&Load) -> bool) {
        let mut load = self.engine.load().watch();
        let reached = timeout(PATIENCE, load.wait_for(wanted)).await.is_ok();
        assert!(reached, "{:?}", self.engine.load().current());
    }

    async fn answer(&self, prompt: Prompt, output: Output) -> Answer {
        collect(self.submit(prompt, output)).await.unwrap()
    }
}

fn registered() -> (LoadMetrics, Metrics) {
    let registry = &mut Registry::default();
    (LoadMetrics::register(registry, "llm"), Metrics::register(registry))
}

fn rows_of(slot: usize, embeddings: Array) -> SlotEmbeddings {
    SlotEmbeddings { slot, embeddings }
}

/// All that a request got.
#[derive(Clone, Debug, Default)]
struct Answer {
    ids: Vec<u32>,
    embeddings: Vec<f32>,
    complete: bool,
    generated_tokens: usize,
}

/// Four embeddings, of which no two of different `value` are equal.
fn rows(loaded: &Loaded, value: f32) -> Array {
    let data: Vec<u8> = (0..4 * 64).flat_map(|i| (value * (i % 7) as f32).to_le_bytes()).collect();
    Array::new(loaded.dtype, vec![4, 64], data.into()).unwrap()
}

async fn collect(mut generation: Generation) -> Result<Answer, EngineError<SequenceError>> {
    let mut answer = Answer::default();
    let mut rows_seen = 0;
    loop {
        match timeout(PATIENCE, generation.next()).await.expect("the engine hangs").transpose()? {
            Some(Event::Tokens(ids)) => answer.ids.extend(ids),
            Some(Event::Embeddings { start, rows }) => {
                assert_eq!(start, rows_seen, "in order, none left out");
                rows_seen += rows.shape()[0];
                answer.embeddings.extend(rows.values());
            }
            Some(Event::Finished { complete, generated_tokens, .. }) => {
                assert!(generation.next().await.is_none());
                return Ok(Answer { complete, generated_tokens, ..answer });
            }
            None => panic!("the stream broke off"),
        }
    }
}

fn written(ids: &[u32]) -> Prompt {
    Prompt { ids: ids.to_vec(), slots: Vec::new() }
}

fn text(strategy: Strategy, max_new_tokens: usize) -> Output {
    Output::Text(TextParameters { max_new_tokens, min_length: 1, repetition_penalty: 1.0, strategy })
}

/// Never ends by itself.
fn endless(max_new_tokens: usize) -> Output {
    let strategy = Strategy::Greedy;
    let min_length = max_new_tokens + 2;
    Output::Text(TextParameters { max_new_tokens, min_length, repetition_penalty: 1.0, strategy })
}

fn random_request(random: &mut ChaCha12Rng) -> (Prompt, Output) {
    let length = random.random_range(1..60);
    let mut ids: Vec<u32> = (0..length).map(|_| random.random_range(3..890)).collect();
    ids.insert(0, 1);
    let new = random.random_range(1..20);
    let warpers = Warpers { temperature: 0.9, top_k: Some(40), top_p: Some(0.9) };
    let output = match random.random_range(0..4) {
        0 => text(Strategy::Greedy, new),
        1 => text(Strategy::Sample { warpers, seed: random.random() }, new),
        2 => text(Strategy::Beam { num_beams: random.random_range(2..6), length_penalty: -1.0 }, new),
        _ => Output::Image { queries: 4 },
    };
    (written(&ids), output)
}

#[tokio::test]
async fn whoever_joins_or_leaves_nobody_elses_answer_changes() {
    let running = Running::start(config("emu2-base")).await;
    let mut random = ChaCha12Rng::seed_from_u64(1);
    let requests: Vec<_> = (0..40).map(|_| random_request(&mut random)).collect();
    let mut alone = Vec::new();
    for (prompt, output) in &requests {
        alone.push(running.answer(prompt.clone(), output.clone()).await);
    }
    let mut together = Vec::new();
    for (prompt, output) in &requests {
        together.push(tokio::spawn(collect(running.submit(prompt.clone(), output.clone()))));
        if random.random_ratio(1, 2) {
            // Someone who leaves after a random number of events.
            let (prompt, output) = random_request(&mut random);
            let (mut generation, events) = (running.submit(prompt, output), random.random_range(0..5));
            tokio::spawn(async move {
                for _ in 0..events {
                    generation.next().await;
                }
            });
        }
        sleep(Duration::from_millis(random.random_range(0..4))).await;
    }
    for (index, (alone, together)) in alone.into_iter().zip(together).enumerate() {
        let together = together.await.unwrap().unwrap();
        assert_eq!((&alone.ids, alone.complete), (&together.ids, together.complete), "request {index}");
        for (alone, together) in alone.embeddings.iter().zip(&together.embeddings) {
            assert!((alone - together).abs() < 1e-3, "request {index}: {alone} {together}");
        }
    }
}

#[tokio::test]
async fn chunks_of_any_size_and_two_devices_give_the_same_answers() {
    let mut random = ChaCha12Rng::seed_from_u64(2);
    let requests: Vec<_> = (0..8).map(|_| random_request(&mut random)).collect();
    let mut answers: Vec<Vec<Vec<u32>>> = Vec::new();
    for (prefill_chunk, devices) in [(512, 1), (1, 1), (7, 2)] {
        let devices = vec!["cpu".to_owned(); devices];
        let running = Running::start(ModelConfig { prefill_chunk, devices, ..config("emu2-base") }).await;
        let generations =
            requests.iter().map(|(prompt, output)| running.submit(prompt.clone(), output.clone()));
        let mut ids = Vec::new();
        for generation in generations.collect::<Vec<_>>() {
            ids.push(collect(generation).await.unwrap().ids);
        }
        answers.push(ids);
    }
    assert_eq!(answers[0], answers[1]);
    assert_eq!(answers[0], answers[2]);
}

#[tokio::test]
async fn a_prompt_waits_only_for_the_embeddings_that_it_has_reached() {
    let running = Running::start(ModelConfig { prefill_chunk: 4, ..config("emu2-base") }).await;
    let slots = vec![Slot { start: 5, len: 4 }, Slot { start: 12, len: 4 }];
    let prompt = Prompt { ids: (1..20).collect(), slots };
    let rows = |value| rows(&running.loaded, value);
    let output = text(Strategy::Greedy, 10);
    let in_order = running.submit(prompt.clone(), output.clone());
    in_order.input(rows_of(0, rows(0.5))).await.unwrap();
    in_order.input(rows_of(1, rows(-0.25))).await.unwrap();
    let want = collect(in_order).await.unwrap();

    let prefilled = running.metrics.prefilled.get();
    let late = running.submit(prompt, output.clone());
    let reaches = async |positions| {
        while running.metrics.prefilled.get() - prefilled != positions {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, reaches(5)).await.expect("the prompt is computed up to its first slot");
    late.input(rows_of(1, rows(-0.25))).await.unwrap();
    let other = running.answer(written(&[1, 5, 9]), output).await;
    assert!(!other.ids.is_empty(), "others go on meanwhile");
    assert_eq!(running.metrics.prefilled.get() - prefilled, 5 + 3);
    late.input(rows_of(0, rows(0.5))).await.unwrap();
    assert_eq!(collect(late).await.unwrap().ids, want.ids);
}

#[tokio::test]
async fn a_caller_who_leaves_frees_the_memory_before_the_next_step() {
    let tight = ModelConfig { kv_budget_bytes: 2048 * ENTRY_BYTES, ..config("emu2-base") };
    let running = Running::start(tight).await;
    let mut large = running.submit(written(&[1; 1000]), endless(1048));
    let waiting = running.submit(written(&[1, 2]), endless(1000));
    for _ in 0..3 {
        assert!(matches!(large.next().await, Some(Ok(Event::Tokens(_)))));
    }
    running.runs(1).await;
    assert_eq!(running.engine.load().current().waiting, 1);
    drop(large);
    // However far the large one had come by then.
    let before = running.metrics.text_steps.get();
    assert_eq!(collect(waiting).await.unwrap().generated_tokens, 1000);
    assert_eq!(running.engine.load().callers_left(), 1);
    // The step that was under way, and then the second's own: none of the large one beside them.
    let steps = running.metrics.text_steps.get() - before;
    assert!(steps <= 1001, "{steps} steps");
}

#[tokio::test]
async fn a_caller_who_leaves_wakes_an_engine_with_nothing_to_do() {
    let running = Running::start(config("emu2-base")).await;
    let prompt = Prompt { ids: vec![1; 8], slots: vec![Slot { start: 4, len: 4 }] };
    let blocked = running.submit(prompt, text(Strategy::Greedy, 5));
    running.waits(1).await;
    assert_eq!(running.metrics.kv_reserved.get(), 0, "it could do nothing with memory yet");
    drop(blocked);
    running.waits(0).await;

    let chunk_by_chunk = ModelConfig { prefill_chunk: 4, ..config("emu2-base") };
    let running = Running::start(chunk_by_chunk).await;
    let prompt = Prompt { ids: vec![1; 8], slots: vec![Slot { start: 4, len: 4 }] };
    let begun = running.submit(prompt, text(Strategy::Greedy, 5));
    running.runs(1).await;
    drop(begun);
    running.runs(0).await;
    assert_eq!(running.metrics.kv_reserved.get(), 0);
}

#[tokio::test]
async fn a_caller_who_does_not_read_holds_nobody_up() {
    let running = Running::start(config("emu2-base")).await;
    let unread = running.submit(written(&[1, 7, 7]), endless(300));
    let read = running.answer(written(&[1, 8, 8]), endless(300)).await;
    assert_eq!(read.generated_tokens, 300);
    let late = collect(unread).await.unwrap();
    assert_eq!(late.ids.len(), 300, "all of it was kept");
}

#[tokio::test]
async fn what_cannot_be_served_is_refused_by_name() {
    let tight = ModelConfig { kv_budget_bytes: 2048 * ENTRY_BYTES, max_waiting: 1, ..config("emu2-base") };
    let running = Running::start(tight).await;
    let beams = text(Strategy::Beam { num_beams: 5, length_penalty: 1.0 }, 501);
    let refused = collect(running.submit(written(&[1; 10]), beams)).await.unwrap_err();
    assert_eq!(refused, EngineError::Stage(TooLarge { needed: 10 + 5 * 500, budget: 2048 }.into()));

    let mut first = running.submit(written(&[1; 10]), endless(2000));
    first.next().await;
    let _second = running.submit(written(&[1; 10]), endless(100));
    let third = Request { prompt: written(&[1; 10]), output: endless(100), resumed: 0 };
    let refused = running.engine.submit(third, Priority::Normal).unwrap_err();
    assert_eq!(refused, EngineError::Full { max: 1, limit_name: "max_waiting" });
}

#[tokio::test]
async fn a_step_that_fails_fails_its_requests_and_the_engine_goes_on() {
    let running = Running::start(config("emu2-base")).await;
    let beyond_vocabulary = written(&[1, 99_999]);
    let failed = collect(running.submit(beyond_vocabulary, endless(5))).await.unwrap_err();
    assert_eq!(failed, EngineError::StepFailed);
    let status = tonic::Status::from(failed);
    assert_eq!((status.code(), status.message()), (tonic::Code::Internal, "the step failed"));
    assert_eq!(running.answer(written(&[1, 5]), endless(5)).await.generated_tokens, 5);
    running.runs(0).await;
    assert_eq!(running.metrics.kv_reserved.get(), 0);
}

#[tokio::test]
async fn a_model_that_cannot_be_served_says_why() {
    let error = async |config| {
        let (load_metrics, metrics) = registered();
        let Started { loaded, .. } = start(config, load_metrics, metrics);
        loaded.await.unwrap().unwrap_err().to_string()
    };
    let little = ModelConfig { kv_budget_bytes: 1000, ..config("emu2-base") };
    let text = error(little).await;
    assert!(text.contains("kv_budget_bytes") && text.contains("1000"), "{text}");
    let folder = tempfile::tempdir().unwrap();
    let absent = ModelConfig { model_dir: folder.path().to_owned(), ..config("emu2-base") };
    assert!(error(absent).await.contains("config.json"));

    // The base model's weights under the chat model's vocabulary.
    for file in ["model.safetensors", "tokenizer.model"] {
        std::fs::copy(golden::model_dir("emu2-base").join(file), folder.path().join(file)).unwrap();
    }
    let chat = std::fs::read(golden::model_dir("emu2-chat").join("config.json")).unwrap();
    std::fs::write(
        folder.path().join("config.json"),
        String::from_utf8(chat).unwrap().replace("true", "false"),
    )
    .unwrap();
    let mixed = ModelConfig { model_dir: folder.path().to_owned(), ..config("emu2-base") };
    let text = error(mixed).await;
    assert!(text.contains("llama.vocab_size is 1173, but the tokenizer has 1171 ids"), "{text}");
}

#[tokio::test]
async fn the_thread_ends_with_its_last_handle() {
    let (load_metrics, metrics) = registered();
    let Started { engine, loaded, ended } = start(config("emu2-base"), load_metrics, metrics);
    loaded.await.unwrap().unwrap();
    drop(engine);
    timeout(PATIENCE, ended).await.expect("it ends").unwrap();
}
