//! A model of a named size with weights out of a seed loads, reads a prompt and writes; and how long that takes.
//!
//! `EMU2_LLM_TEST_MODEL=random:emu2-third` takes another size, for a measurement by hand:
//! `cargo test --package emu2-llm --test sizes -- --nocapture`.

use std::{fs, time::Instant};

use emu2_engine::load::LoadMetrics;
use emu2_llm::{
    Config,
    engine::{self, Started},
    load::ModelConfig,
    metrics::Metrics,
    prompt::Prompt,
    request::{Event, Output, Request},
    search::{Strategy, TextParameters},
};
use emu2_serve::priority::Priority;
use prometheus_client::registry::Registry;

/// Positions, and tokens after them; a few hundred of each measure more than the start.
const PROMPT: u32 = 256;
const NEW_TOKENS: usize = 16;

/// Bytes; `VmHWM` is the peak of the resident ones.
fn status(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[tokio::test]
async fn a_named_size_loads_and_writes() {
    let model = std::env::var("EMU2_LLM_TEST_MODEL").unwrap_or_else(|_| "random:emu2-tiny".to_owned());
    let config = Config { model_dir: model.clone().into(), kv_budget_bytes: 4 << 30, ..Config::default() };
    let begun = Instant::now();
    let config = ModelConfig { ..config.model() };
    let progress = config.progress.clone();
    let registry = &mut Registry::default();
    let load_metrics = LoadMetrics::register(registry, "llm");
    let Started { engine, loaded, .. } = engine::start(config, load_metrics, Metrics::register(registry));
    let loaded = loaded.await.unwrap().unwrap();
    println!(
        "{model}: loaded {:.1} GB in {:.1} s; resident {:.1} GB, at most {:.1} GB",
        progress.bytes_done() as f64 / 1e9,
        begun.elapsed().as_secs_f64(),
        status("VmRSS") as f64 / 1e9,
        status("VmHWM") as f64 / 1e9,
    );
    assert_eq!((progress.percent(), progress.bytes_done()), (100, progress.bytes_total()));

    let ids = (0..PROMPT).map(|position| if position == 0 { loaded.text_ids.begin } else { 300 + position });
    let parameters = TextParameters {
        max_new_tokens: NEW_TOKENS,
        // Not over before that many.
        min_length: NEW_TOKENS + 2,
        repetition_penalty: 1.0,
        strategy: Strategy::Greedy,
    };
    let request = Request {
        prompt: Prompt { ids: ids.collect(), slots: Vec::new() },
        output: Output::Text(parameters),
        resumed: 0,
    };
    let mut generation = engine.submit(request, Priority::Normal).unwrap();
    loop {
        let event = generation.next().await.expect("it ends with `finished`").unwrap();
        if let Event::Finished { generated_tokens, timings, .. } = event {
            println!(
                "prefill {PROMPT} positions: {:.0} ms, {:.1} a second; decode: {:.2} tokens a second",
                timings.prefill_ms,
                f64::from(PROMPT) / timings.prefill_ms * 1e3,
                generated_tokens as f64 / timings.generate_ms * 1e3,
            );
            assert_eq!(generated_tokens, NEW_TOKENS);
            return;
        }
    }
}
