//! What can go wrong in this service, and the one match from that to the API's terms.

use std::{path::PathBuf, time::Duration};

use emu2_engine::error::EngineFault;
use emu2_nn::{checkpoint::CheckpointError, device::DeviceError};
use emu2_proto::array::ArrayError;
use emu2_serve::status::{self, ErrorCode, Violation};
use tonic::Status;

use crate::{prompt::PromptError, scheduler::TooLarge, tokenizer::ModelError};

/// Why the model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A device cannot be opened.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The checkpoint is incomplete or contradicts itself.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The tokenizer's file is not one of LLaMA's kind.
    #[error("tokenizer model {} cannot be used", path.display())]
    Tokenizer {
        /// The tokenizer's file, or the model that has none.
        path: PathBuf,
        /// What is wrong with it.
        source: ModelError,
    },
    /// The configured budget holds less than one whole context.
    #[error("kv_budget_bytes must hold one context of {positions} positions, {needed} bytes, is {budget}")]
    KvBudget {
        /// The positions of one whole context.
        positions: usize,
        /// The bytes that its keys and values take.
        needed: u64,
        /// The configured bytes.
        budget: u64,
    },
    /// The devices have less memory left than one whole context takes.
    #[error(
        "the devices must have memory for one context of {positions} positions, {needed} bytes of keys and values; \
         what is left of them after loading holds {room}"
    )]
    KvMemory {
        /// The positions of one whole context.
        positions: usize,
        /// The bytes that its keys and values take.
        needed: u64,
        /// The bytes of keys and values that fit.
        room: u64,
    },
    /// The first forward failed.
    #[error("the warm-up failed")]
    WarmUp(#[source] EngineFault),
    /// The engine's thread ended without a word.
    #[error("the engine thread ended while loading")]
    Ended,
}

/// Why the stage refused a sequence or failed it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SequenceError {
    /// The sequence would not fit an empty cache.
    #[error("{0}")]
    TooLarge(#[from] TooLarge),
    /// The model computed a value that is not finite.
    #[error("the model computed a value that is not finite")]
    NotFinite,
}

impl From<ArrayError> for SequenceError {
    /// An array of what the model computed: shape and dtype are its own, so it can only be the values.
    fn from(_: ArrayError) -> Self {
        Self::NotFinite
    }
}

impl From<SequenceError> for Status {
    fn from(error: SequenceError) -> Self {
        match error {
            SequenceError::TooLarge(TooLarge { needed, budget }) => Violation::new(
                "text.num_beams",
                format!(
                    "must let the prompt and every beam's new tokens fit {budget} cache entries \
                     (kv_budget_bytes), got {needed}"
                ),
            )
            .into(),
            SequenceError::NotFinite => status::internal(error.to_string()),
        }
    }
}

/// Makes the status of a caller that leaves its request waiting for `what`.
pub(crate) fn input_late(what: &str, limit: Duration) -> Status {
    let limit = limit.as_millis();
    ErrorCode::DeadlineExceeded.status(format!("{what} must come within {limit} ms (input_wait_ms)"))
}

/// Makes the status of a prompt that breaks a rule, INVALID_ARGUMENT.
pub(crate) fn prompt_status(error: PromptError) -> Status {
    let violation = match error {
        PromptError::Invalid { field, problem } => Violation::new(field, problem.to_string()),
        PromptError::TooManyBytes { field, bytes, limit } => Violation::new(
            field,
            format!("must hold at most {limit} bytes of text (max_text_bytes), got {bytes}"),
        ),
        PromptError::TooLong { prompt, requested, limit } => Violation::new(
            "prompt",
            format!(
                "must leave room for the output within {limit} positions, got {prompt} positions of prompt \
                 and {requested} requested"
            ),
        ),
    };
    violation.into()
}
