//! What can go wrong, each once, and the one place where it becomes a status.

use std::time::Duration;

use emu2_nn::{checkpoint::CheckpointError, device::DeviceError, engine::EngineFault};
use emu2_proto::array::ArrayError;
use emu2_serve::status::{Violation, exhausted, internal, unavailable};
use tonic::Status;

use crate::preprocess::decode::ImageError;

/// About one batch: then a place, or memory, may be free.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Why the model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("the warm-up failed: {0}")]
    WarmUp(#[from] EngineFault),
}

/// Why a picture was not encoded.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EncodeError {
    #[error("image {0}")]
    Image(#[from] ImageError),
    #[error("source must be image or mean_colour, got nothing")]
    NoSource,
    #[error("n_query {0}")]
    Queries(String),
    #[error("all {max} places for images are taken (max_images)")]
    Full { max: usize },
    #[error("the model is still loading")]
    Loading,
    #[error("the encoder's engine has stopped")]
    Stopped,
    #[error(transparent)]
    Fault(#[from] EngineFault),
    #[error("the embeddings are not sound: {0}")]
    Unsound(#[from] ArrayError),
}

impl From<EncodeError> for Status {
    fn from(error: EncodeError) -> Self {
        let message = error.to_string();
        match error {
            EncodeError::Image(error) => Violation::new("image", error.to_string()).into(),
            EncodeError::NoSource => {
                Violation::new("source", "must be image or mean_colour, got nothing").into()
            }
            EncodeError::Queries(problem) => Violation::new("n_query", problem).into(),
            EncodeError::Full { .. } | EncodeError::Fault(EngineFault::OutOfMemory(_)) => {
                exhausted(message, RETRY_AFTER)
            }
            // This replica is about to exit, or is not there yet; another may have the answer.
            EncodeError::Loading | EncodeError::Stopped | EncodeError::Fault(EngineFault::Device(_)) => {
                unavailable(message)
            }
            EncodeError::Fault(EngineFault::Panic(_)) | EncodeError::Unsound(_) => internal(message),
        }
    }
}
