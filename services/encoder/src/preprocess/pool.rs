//! Preprocessing beside the runtime: decoding a large photograph takes as long as many requests.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::Semaphore;
use tracing::Span;

use super::{
    Normalised, Subject,
    decode::{ImageError, ImageLimits},
    preprocess,
};

/// The threads that preprocess images. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Preprocessor {
    threads: Arc<Semaphore>,
    limits: ImageLimits,
}

/// A preprocessed image, and how long that took.
#[derive(Debug)]
pub(crate) struct Preprocessed {
    /// The normalised values in row-major order, [3, side, side].
    pub(crate) pixels: Vec<f32>,
    /// What was wrong with the image's file, and was mended or left out.
    pub(crate) damage: Vec<&'static str>,
    /// The time that the image waited for a thread.
    pub(crate) waited: Duration,
    /// The time from the start of its decoding to its values.
    pub(crate) took: Duration,
}

impl Preprocessor {
    /// Makes a pool that preprocesses at most `threads` images at a time, since each may hold the memory that the
    /// limits allow.
    pub(crate) fn new(threads: usize, limits: ImageLimits) -> Self {
        Self { threads: Arc::new(Semaphore::new(threads)), limits }
    }

    /// Returns how large an image may be.
    pub(crate) fn limits(&self) -> &ImageLimits {
        &self.limits
    }

    /// Preprocesses an image to a square of `side` pixels. A caller that leaves while it waits is not worked for; a
    /// decode that has begun runs to its end.
    ///
    /// # Errors
    ///
    /// Those of [`preprocess`]; a decoder that panicked counts as an image that cannot be decoded.
    pub(crate) async fn run(&self, subject: Subject, side: usize) -> Result<Preprocessed, ImageError> {
        let arrived = Instant::now();
        let thread = Arc::clone(&self.threads).acquire_owned().await.expect("the semaphore is never closed");
        let waited = arrived.elapsed();
        let (span, limits) = (Span::current(), self.limits.clone());
        let work = move || {
            let _thread = thread;
            let _stage = tracing::info_span!(parent: &span, "preprocess").entered();
            let begun = Instant::now();
            let Normalised { pixels, damage } = preprocess(&subject, side, &limits)?;
            if !damage.is_empty() {
                tracing::warn!(?damage, "a damaged image is taken as Pillow shows it");
            }
            Ok(Preprocessed { pixels, damage, waited, took: begun.elapsed() })
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
            // The decoders are others' code and the bytes are anybody's: a decoder's defect is that image's end only.
            tracing::error!(%error, "an image's decoder panicked");
            Err(ImageError::Undecodable { format: "image", reason: "its decoder failed".to_owned() })
        })
    }
}
