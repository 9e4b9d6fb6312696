//! What can go wrong, each once, and the one place where it becomes a status.

use emu2_engine::error::{EngineError, EngineFault, RETRY_AFTER};
use emu2_nn::{checkpoint::CheckpointError, device::DeviceError};
use emu2_proto::array::ArrayError;
use emu2_serve::status::{self, Violation};
use tonic::Status;

use crate::preprocess::decode::ImageError;

/// Why the model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A device cannot be opened.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The checkpoint is incomplete or contradicts itself.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The first forward failed.
    #[error("the warm-up failed: {0}")]
    WarmUp(#[from] EngineFault),
}

/// The error of embeddings that are no sound array: a value that the model computed is not finite.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("the embeddings are not sound: {0}")]
pub struct UnsoundEmbeddings(#[from] pub ArrayError);

/// Why an image was not encoded.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EncodeError {
    /// The file could not be decoded, or is beyond a limit.
    #[error("image {0}")]
    Image(#[from] ImageError),
    /// The edges of a box are out of order or out of the image.
    #[error("box is no region of an image")]
    Box(Vec<Violation>),
    /// The request names nothing to encode.
    #[error("source must be image, mean_colour or box, got nothing")]
    NoSource,
    /// Pooling cannot leave that many embeddings; it holds the reason.
    #[error("n_query {0}")]
    Queries(String),
    /// As many images are in the service as `max_images` allows.
    #[error("all {max} places for images are taken (max_images)")]
    Full {
        /// The value of `max_images`.
        max: usize,
    },
    /// The model is still loading.
    #[error("the model is still loading")]
    Loading,
    /// The engine refused the image or failed it.
    #[error(transparent)]
    Engine(#[from] EngineError<UnsoundEmbeddings>),
}

impl From<UnsoundEmbeddings> for Status {
    fn from(error: UnsoundEmbeddings) -> Self {
        status::internal(error.to_string())
    }
}

impl From<EncodeError> for Status {
    fn from(error: EncodeError) -> Self {
        let message = error.to_string();
        match error {
            EncodeError::Image(error) => Violation::new("image", error.to_string()).into(),
            EncodeError::Box(wrong) => status::invalid(wrong),
            EncodeError::NoSource => {
                Violation::new("source", "must be image, mean_colour or box, got nothing").into()
            }
            EncodeError::Queries(problem) => Violation::new("n_query", problem).into(),
            EncodeError::Full { .. } => status::exhausted(message, RETRY_AFTER),
            // Another replica may have the answer.
            EncodeError::Loading => status::unavailable(message),
            EncodeError::Engine(error) => error.into(),
        }
    }
}
