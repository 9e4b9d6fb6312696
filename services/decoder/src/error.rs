//! What can go wrong, each once, and the one place where it becomes a status.

use std::time::Duration;

use emu2_nn::{checkpoint::CheckpointError, device::DeviceError, engine::EngineFault};
use emu2_serve::status::{exhausted, internal, unavailable};
use tonic::Status;

/// About one step of a large image: then memory or a place may be free.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Why the model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Every mistake of one section at once.
    #[error("section `{section}` of the model's config.json: {}", .problems.join("; "))]
    Config { section: &'static str, problems: Vec<String> },
    #[error("the warm-up failed: {0}")]
    WarmUp(#[from] EngineFault),
}

impl LoadError {
    /// An error if there is any problem.
    pub(crate) fn check(section: &'static str, problems: Vec<String>) -> Result<(), Self> {
        if problems.is_empty() { Ok(()) } else { Err(Self::Config { section, problems }) }
    }
}

/// Why an image was not painted.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum PaintError {
    #[error("the decoder's queue is full")]
    Full,
    #[error("the decoder's engine has stopped")]
    Stopped,
    #[error(transparent)]
    Fault(#[from] EngineFault),
    #[error("the model's latents are not finite")]
    NotFinite,
    #[error("the image cannot be written as PNG: {0}")]
    Png(String),
}

impl From<PaintError> for Status {
    fn from(error: PaintError) -> Self {
        let message = error.to_string();
        match error {
            PaintError::Full | PaintError::Fault(EngineFault::OutOfMemory(_)) => {
                exhausted(message, RETRY_AFTER)
            }
            // This replica is about to exit; another may paint the image from its seed.
            PaintError::Stopped | PaintError::Fault(EngineFault::Device(_)) => unavailable(message),
            PaintError::Fault(EngineFault::Panic(_)) | PaintError::NotFinite | PaintError::Png(_) => {
                internal(message)
            }
        }
    }
}
