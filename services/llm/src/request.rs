//! What the engine is asked, what it is given later, and what it tells.

use emu2_proto::array::Array;

use crate::{prompt::Prompt, search::TextParameters};

/// A prompt to continue.
#[derive(Debug)]
pub struct Request {
    /// The prompt, extended by what `resumed` counts: ids of a text, or a last slot for rows of an image.
    pub prompt: Prompt,
    /// What is to follow the prompt.
    pub output: Output,
    /// Tokens or rows of the output that another replica has given: positions at the prompt's end.
    pub resumed: usize,
}

/// What is to follow a prompt.
#[derive(Clone, Debug)]
pub enum Output {
    /// A text.
    Text(TextParameters),
    /// The embeddings of an image, by regression.
    Image {
        /// How many.
        queries: usize,
    },
}

impl Output {
    /// Tokens or embeddings at most.
    pub fn max_len(&self) -> usize {
        match self {
            Self::Text(parameters) => parameters.max_new_tokens,
            Self::Image { queries } => *queries,
        }
    }
}

/// The embeddings of one of the prompt's slots.
#[derive(Debug)]
pub struct SlotEmbeddings {
    /// Index into the prompt's slots.
    pub slot: usize,
    /// [slot length, embedding_width], of the engine's dtype.
    pub embeddings: Array,
}

/// What a request is told: tokens or embeddings in order, then `Finished`.
#[derive(Debug)]
pub enum Event {
    /// Ids that are certain now.
    Tokens(Vec<u32>),
    /// One more embedding of the image.
    Embeddings {
        /// Its index in the image.
        start: usize,
        /// [1, embedding_width]
        rows: Array,
    },
    /// Nothing comes after it.
    Finished {
        /// Whether it ended by itself rather than at `max_new_tokens`.
        complete: bool,
        /// Tokens generated, by whichever replica; 0 for an image.
        generated_tokens: usize,
        /// Where its time went.
        timings: Timings,
    },
}

/// Milliseconds that a request spent in each stage.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// From submission to admission.
    pub queue_ms: f64,
    /// From admission to the first logits or embedding.
    pub prefill_ms: f64,
    /// From there to the end.
    pub generate_ms: f64,
}
