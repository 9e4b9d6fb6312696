//! What can go wrong, each once, and the one place where it becomes a status.

use emu2_engine::error::{EngineError, EngineFault};
use emu2_nn::{checkpoint::CheckpointError, device::DeviceError};
use emu2_serve::status::internal;
use tonic::Status;

/// Why the model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A device cannot be opened.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The checkpoint is incomplete or contradicts itself.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A section of the configuration contradicts itself or asks for what is not built.
    #[error("section `{section}` of the model's config.json: {}", .problems.join("; "))]
    Config {
        /// The name of the section.
        section: &'static str,
        /// Every problem of the section.
        problems: Vec<String>,
    },
    /// The first image failed.
    #[error("the warm-up failed: {0}")]
    WarmUp(#[from] EngineFault),
}

impl LoadError {
    /// Makes an error of the problems of a section; none if there is no problem.
    pub(crate) fn check(section: &'static str, problems: Vec<String>) -> Result<(), Self> {
        if problems.is_empty() { Ok(()) } else { Err(Self::Config { section, problems }) }
    }
}

/// The error of latents that are not finite, which only a defect of the weights or of the device can cause.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the model's latents are not finite")]
pub struct LatentsNotFinite;

/// Why an image was not decoded.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum DecodeError {
    /// The engine refused the request or failed it.
    #[error(transparent)]
    Engine(#[from] EngineError<LatentsNotFinite>),
    /// The image was denoised, but could not be compressed.
    #[error("the image cannot be written as PNG: {0}")]
    Png(String),
}

impl From<LatentsNotFinite> for Status {
    fn from(error: LatentsNotFinite) -> Self {
        internal(error.to_string())
    }
}

impl From<DecodeError> for Status {
    fn from(error: DecodeError) -> Self {
        match error {
            DecodeError::Engine(error) => error.into(),
            DecodeError::Png(_) => internal(error.to_string()),
        }
    }
}
