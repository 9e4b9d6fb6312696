//! The metrics of this service alone; those of its RPCs are `emu2-serve`'s, those of its load `emu2-engine`'s.

use prometheus_client::{
    metrics::{
        counter::Counter,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use crate::{scheduler::Work, step::StepOutput};

/// Rows of a step: from one token to a chunk of a prompt beside many beams.
const ROWS_MAX_LOG2: u16 = 13;

/// The llm's metrics. Clones share the values.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// `emu2_llm_kv_reserved_bytes`: keys and values promised to running sequences.
    pub kv_reserved: Gauge,
    /// `emu2_llm_kv_budget_bytes`: keys and values that may be promised.
    pub kv_budget: Gauge,
    /// `emu2_llm_step_rows`: rows of one forward, over all sequences.
    pub step_rows: Histogram,
    /// `emu2_llm_prefilled_positions_total`: positions of prompts computed.
    pub prefilled: Counter,
    /// `emu2_llm_text_steps_total`: steps in which a text sequence chose tokens; beams count once.
    pub text_steps: Counter,
    /// `emu2_llm_regressed_embeddings_total`: embeddings of images computed.
    pub embeddings: Counter,
}

impl Metrics {
    /// Registers the metrics under the prefix `emu2_llm`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            kv_reserved: Gauge::default(),
            kv_budget: Gauge::default(),
            step_rows: Histogram::new(exponential_buckets(1.0, 2.0, ROWS_MAX_LOG2)),
            prefilled: Counter::default(),
            text_steps: Counter::default(),
            embeddings: Counter::default(),
        };
        let all = &metrics;
        let mut bytes = |name, help, gauge: &Gauge| {
            registry.register_with_unit(name, help, Unit::Bytes, gauge.clone());
        };
        bytes("emu2_llm_kv_reserved", "Keys and values promised to running sequences", &all.kv_reserved);
        bytes("emu2_llm_kv_budget", "Keys and values that may be promised", &all.kv_budget);
        registry.register("emu2_llm_step_rows", "Rows of one forward", all.step_rows.clone());
        let mut count = |name, help, counter: &Counter| registry.register(name, help, counter.clone());
        count("emu2_llm_prefilled_positions", "Positions of prompts computed", &all.prefilled);
        count("emu2_llm_text_steps", "Steps in which a text sequence chose tokens", &all.text_steps);
        count("emu2_llm_regressed_embeddings", "Embeddings of images computed", &all.embeddings);
        metrics
    }

    /// Counts what one sequence did in a step.
    pub(crate) fn count(&self, work: &Work, answer: &StepOutput) {
        self.prefilled.inc_by(work.prefilled() as u64);
        match answer {
            StepOutput::Nothing => {}
            StepOutput::Logits(_) => drop(self.text_steps.inc()),
            StepOutput::Embedding(_) => drop(self.embeddings.inc()),
        }
    }
}
