//! Configuration of the service.

use std::path::PathBuf;

use emu2_nn::checkpoint::Progress;
use emu2_serve::{config::Validate, server::ServerConfig, telemetry::TelemetryConfig};
use serde::{Deserialize, Serialize};

use crate::load::ModelConfig;

/// Port when none is configured; the admin port is 1000 above.
const PORT: u16 = 50_053;

/// Every duration follows from the counts here: a text takes at most (ceil(prompt / prefill_chunk) +
/// max_new_tokens) steps once admitted, an image (… + n_query), and no step computes more than prefill_chunk rows
/// plus one for each running sequence or beam.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Folder with config.json, *.safetensors and tokenizer.model.
    pub model_dir: PathBuf,
    /// `cpu` or `cuda:N`; layers are spread over several, the first also holds the embeddings and the head.
    pub devices: Vec<String>,
    /// Threads of one torch operation on the CPU; 0 is all cores.
    pub cores: usize,
    /// Bytes of keys and values of all running sequences, over all devices. A position of the full model takes
    /// 1.6 MB in bfloat16: five contexts of 2,048 fit 16 GiB. Where the devices have less left after loading, what
    /// fits is used instead, and a warning says so (see `budget.rs`).
    pub kv_budget_bytes: u64,
    /// Positions of prompts in one step: more finishes prompts sooner, fewer lets running texts go on more evenly.
    pub prefill_chunk: usize,
    /// Sequences that may wait for the embeddings of their first chunk or for keys and values; one more is refused.
    pub max_waiting: usize,
    /// Milliseconds that a request may go without the next thing it needs from its caller: its start, or another
    /// picture's embeddings. Beyond, it is refused, so that a lost caller without a deadline holds no keys and values.
    /// 330,000: a tenth more than the router's limits.shared_work_ms, the longest that a picture may take it, so that
    /// it is the router that says what went wrong.
    pub input_wait_ms: u64,
    /// Most new tokens that a text may ask for.
    pub max_new_tokens: u32,
    /// Most beams; upstream's default is 5.
    pub max_beams: u32,
    pub server: ServerConfig,
    pub telemetry: TelemetryConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            model_dir: PathBuf::from("model"),
            devices: vec!["cpu".to_owned()],
            cores: 0,
            kv_budget_bytes: 16 << 30,
            prefill_chunk: 512,
            max_waiting: 256,
            input_wait_ms: 330_000,
            max_new_tokens: 1024,
            max_beams: 8,
            server: ServerConfig::on_port(PORT),
            telemetry: TelemetryConfig::default(),
        }
    }
}

impl Config {
    /// What the engine needs.
    pub fn model(&self) -> ModelConfig {
        ModelConfig {
            model_dir: self.model_dir.clone(),
            devices: self.devices.clone(),
            cores: self.cores,
            kv_budget_bytes: self.kv_budget_bytes,
            prefill_chunk: self.prefill_chunk,
            max_waiting: self.max_waiting,
            progress: Progress::default(),
        }
    }
}

impl Validate for Config {
    fn problems(&self) -> Vec<String> {
        let mut problems = self.server.problems();
        problems.extend(self.telemetry.problems());
        let mut range = |key, min: u64, max: u64, value: u64| {
            if !(min..=max).contains(&value) {
                problems.push(format!("{key} must be {min} to {max}, got {value}"));
            }
        };
        range("prefill_chunk", 1, 65_536, self.prefill_chunk as u64);
        range("max_waiting", 1, 65_536, self.max_waiting as u64);
        range("input_wait_ms", 1, 86_400_000, self.input_wait_ms);
        range("max_new_tokens", 1, 65_536, self.max_new_tokens.into());
        // A search needs twice as many candidates; the special tokens alone are more.
        range("max_beams", 1, 64, self.max_beams.into());
        range("cores", 0, 4_096, self.cores as u64);
        if self.devices.is_empty() {
            problems.push("devices must name at least one".to_owned());
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_mistakes_are_told_at_once() {
        assert_eq!(Config::default().problems(), Vec::<String>::new());
        let wrong = Config { prefill_chunk: 0, max_beams: 1000, devices: Vec::new(), ..Config::default() };
        let problems = wrong.problems();
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(problems[1].contains("max_beams must be 1 to 64, got 1000"), "{problems:?}");
    }
}
