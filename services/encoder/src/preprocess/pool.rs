//! Preprocessing beside the runtime: decoding a large photograph takes as long as many requests.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::Semaphore;
use tracing::Span;

use super::{
    decode::{ImageError, ImageLimits},
    preprocess,
};

/// Cloning shares the threads.
#[derive(Clone, Debug)]
pub struct Preprocessor {
    threads: Arc<Semaphore>,
    limits: ImageLimits,
}

/// Pixels [3, side, side], and how long they took.
#[derive(Debug)]
pub struct Preprocessed {
    pub pixels: Vec<f32>,
    /// For a thread.
    pub waited: Duration,
    pub took: Duration,
}

impl Preprocessor {
    /// At most `threads` pictures at a time, since each may hold the memory that the limits allow.
    pub fn new(threads: usize, limits: ImageLimits) -> Self {
        Self { threads: Arc::new(Semaphore::new(threads)), limits }
    }

    pub fn limits(&self) -> &ImageLimits {
        &self.limits
    }

    /// A caller that leaves while it waits is not worked for; a decode that has begun runs to its end.
    pub async fn run(&self, encoded: Bytes, side: usize) -> Result<Preprocessed, ImageError> {
        let arrived = Instant::now();
        let thread = Arc::clone(&self.threads).acquire_owned().await.expect("the semaphore is never closed");
        let waited = arrived.elapsed();
        let (span, limits) = (Span::current(), self.limits.clone());
        let work = move || {
            let _thread = thread;
            let _stage = tracing::info_span!(parent: &span, "preprocess", bytes = encoded.len()).entered();
            let begun = Instant::now();
            let pixels = preprocess(&encoded, side, &limits)?;
            Ok(Preprocessed { pixels, waited, took: begun.elapsed() })
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
            // The decoders are others' code and the bytes are anybody's: a decoder's defect is that picture's end only.
            tracing::error!(%error, "a picture's decoder panicked");
            Err(ImageError::Undecodable { format: "image", reason: "its decoder failed".to_owned() })
        })
    }
}
