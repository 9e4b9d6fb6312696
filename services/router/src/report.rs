//! The last event of an answer: what it took, and with which parameters.

use std::time::Instant;

use emu2_proto::{
    stage::{DecodeFinished, DecodeStart, LlmFinished},
    v1::{FinishReason, Finished, Timings, Usage, finished::Parameters},
};

use crate::cache::Found;

/// The last event as the stages fill it in.
#[derive(Debug)]
pub(crate) struct Report {
    began: Instant,
    finished: Finished,
    usage: Usage,
    timings: Timings,
}

/// What became of a request's images.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ImageCounts {
    images: u32,
    cached: u32,
    /// Milliseconds from the first lookup to the last image that the cache did not hold.
    encode_ms: f64,
}

impl ImageCounts {
    pub(crate) fn all_cached(found: &[Found]) -> Self {
        let images = found.len() as u32;
        Self { images, cached: images, encode_ms: 0.0 }
    }

    /// One more; `began`: when the first was looked up.
    pub(crate) fn count(&mut self, found: &Found, began: Instant) {
        self.images += 1;
        if found.outcome.is_hit() {
            self.cached += 1;
        } else {
            self.encode_ms = began.elapsed().as_secs_f64() * 1e3;
        }
    }
}

impl Report {
    pub(crate) fn new(seed: u64) -> Self {
        let finished = Finished { seed, ..Default::default() };
        Self { began: Instant::now(), finished, usage: Usage::default(), timings: Timings::default() }
    }

    pub(crate) fn prompt(&mut self, positions: u32) {
        self.usage.prompt_tokens = positions;
    }

    pub(crate) fn regressed(&mut self, embeddings: u32) {
        self.usage.regressed_embeddings = embeddings;
    }

    /// Nothing was asked of the llm.
    pub(crate) fn regressed_before(&mut self, embeddings: u32) {
        self.usage.regressed_embeddings = embeddings;
        self.usage.cached_embeddings = embeddings;
    }

    pub(crate) fn llm(&mut self, llm: &LlmFinished) {
        self.usage.generated_tokens = llm.generated_tokens;
        self.timings.llm_queue_ms = llm.queue_ms;
        self.timings.prefill_ms = llm.prefill_ms;
        self.timings.generate_ms = llm.generate_ms;
    }

    pub(crate) fn images(&mut self, counts: ImageCounts) {
        let ImageCounts { images, cached, encode_ms } = counts;
        self.usage.images = images;
        self.usage.cached_images = cached;
        self.timings.encode_ms = encode_ms;
    }

    pub(crate) fn painted(&mut self, decoder: &DecodeFinished, start: &DecodeStart) {
        self.timings.decoder_queue_ms = decoder.queue_ms;
        self.timings.denoise_ms = decoder.denoise_ms;
        self.timings.vae_ms = decoder.vae_ms;
        self.result(FinishReason::Image, Parameters::Image(start.image.unwrap_or_default()));
    }

    pub(crate) fn result(&mut self, reason: FinishReason, parameters: Parameters) {
        self.finished.reason = reason.into();
        self.finished.parameters = Some(parameters);
    }

    pub(crate) fn finished(mut self) -> Finished {
        self.timings.total_ms = self.began.elapsed().as_secs_f64() * 1e3;
        Finished { usage: Some(self.usage), timings: Some(self.timings), ..self.finished }
    }
}
