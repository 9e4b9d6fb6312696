//! The llm's configuration: every limit by name.

use std::path::PathBuf;

use emu2_nn::checkpoint::Progress;
use emu2_serve::{config::Validate, server::ServerConfig, telemetry::TelemetryConfig};
use serde::{Deserialize, Serialize};

use crate::load::ModelConfig;

/// The port when none is configured; the admin port is 1000 above.
const PORT: u16 = 50_053;

/// The configuration of the llm.
///
/// Every duration follows from the counts here: a text takes at most (⌈prompt / prefill_chunk⌉ + max_new_tokens) steps
/// once admitted, an image (… + n_query), and no step computes more than prefill_chunk rows plus one for each running
/// sequence or beam.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The folder of a model in any layout, with its tokenizer.model; only the language model's weights are read.
    pub model_dir: PathBuf,
    /// The devices that compute, `cpu` or `cuda:N`; layers are spread over several, the first also holds the embeddings
    /// and the head.
    pub devices: Vec<String>,
    /// How many threads one torch operation takes on the CPU; 0 is as many as the process may use.
    pub cores: usize,
    /// Bytes of keys and values of all running sequences, over all devices. A position of the full model takes 1.6 MB
    /// in bfloat16: five contexts of 2,048 fit 16 GiB. Where the devices have less left after loading, what fits is
    /// used instead, and a warning says so (see `budget.rs`).
    pub kv_budget_bytes: u64,
    /// How many positions of prompts one step computes: more finishes prompts sooner, fewer lets running texts go on
    /// more evenly.
    pub prefill_chunk: usize,
    /// How many sequences may wait for the embeddings of their first chunk or for keys and values; one more is refused.
    pub max_waiting: usize,
    /// How many milliseconds a request may go without the next thing it needs from its caller: its start, or another
    /// image's embeddings. Beyond, it is refused, so that a lost caller without a deadline holds no keys and values.
    /// 330,000: a tenth more than the router's limits.shared_work_ms, the longest that an image may take it, so that it
    /// is the router that says what went wrong.
    pub input_wait_ms: u64,
    /// The most new tokens that a text may ask for.
    pub max_new_tokens: u32,
    /// The most beams that a text may ask for; upstream's default is 5.
    pub max_beams: u32,
    /// How the service listens, sheds load and stops.
    pub server: ServerConfig,
    /// Where logs and traces go.
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
    /// Returns what the engine needs of this configuration, with a progress that nobody watches.
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
