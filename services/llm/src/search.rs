//! Which token comes next: greedy, sampling and beam search over rows of logits. No torch.
//!
//! Exactly what transformers 4.31.0, which upstream pins, does when a prompt is given as embeddings only: the ids
//! start with one beginning-of-text that the model never sees, but that counts as length (for `min_length` and
//! `length_penalty`) and as seen (for `repetition_penalty`); the prompt's own ids count as neither.
//!
//! A `Search` is fed the logits of the rows that it asked for, and answers with the rows to compute next: each a
//! token that continues one of the rows before. Greedy and sampling keep one row; a beam search keeps `num_beams`
//! and its rows form a tree (see `kv.rs`).

mod beam;
mod processors;
mod step;
#[cfg(test)]
mod tests;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;

use beam::BeamSearch;
use processors::Processors;
pub use processors::Warpers;
pub(crate) use step::{Next, Row, Step};

/// How a text is generated; the service keeps every value within its limits.
#[derive(Clone, Debug, PartialEq)]
pub struct TextParameters {
    /// The most tokens that are generated, at least 1.
    pub max_new_tokens: usize,
    /// How many ids there must be before the text may end, the unseen first one included.
    pub min_length: usize,
    /// The factor by which ids that were already chosen become less likely; 1 is off.
    pub repetition_penalty: f32,
    /// How the next token is chosen.
    pub strategy: Strategy,
}

/// How the next token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub enum Strategy {
    /// The likeliest token.
    Greedy,
    /// A token drawn from the distribution.
    Sample {
        /// What narrows the distribution.
        warpers: Warpers,
        /// The seed that the draws follow from.
        seed: u64,
    },
    /// The likeliest text that a beam search finds.
    Beam {
        /// How many beams the search keeps, at least 2.
        num_beams: usize,
        /// The power of its length that a text's log-probability is divided by; below 0, short texts are preferred.
        length_penalty: f64,
    },
}

impl TextParameters {
    /// Returns how many rows a decode step has: the beams, or 1.
    pub fn rows(&self) -> usize {
        match self.strategy {
            Strategy::Beam { num_beams, .. } => num_beams,
            Strategy::Greedy | Strategy::Sample { .. } => 1,
        }
    }
}

/// The two ids that a search must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextIds {
    /// The id of the beginning of text.
    pub begin: u32,
    /// The id of the end of text.
    pub end: u32,
}

/// The state of one text that is being generated.
#[derive(Debug)]
pub(crate) enum Search {
    /// One line of tokens.
    Line(Line),
    /// Several beams.
    Beam(BeamSearch),
}

impl Search {
    /// Begins a text after a prompt.
    pub(crate) fn new(parameters: &TextParameters, ids: TextIds) -> Self {
        let processors = Processors {
            repetition_penalty: parameters.repetition_penalty,
            min_length: parameters.min_length,
            end: ids.end,
        };
        let line = |draw| {
            let ids = vec![ids.begin];
            Self::Line(Line { ids, max_new_tokens: parameters.max_new_tokens, processors, draw })
        };
        match &parameters.strategy {
            Strategy::Greedy => line(None),
            Strategy::Sample { warpers, seed } => line(Some((*warpers, *seed))),
            &Strategy::Beam { num_beams, length_penalty } => {
                let max_length = parameters.max_new_tokens + 1;
                Self::Beam(BeamSearch::new(num_beams, length_penalty, max_length, processors, ids.begin))
            }
        }
    }

    /// Takes ids as chosen that were chosen elsewhere. A beam search has none: it begins again.
    pub(crate) fn resume(&mut self, chosen: &[u32]) {
        match self {
            Self::Line(line) => line.ids.extend(chosen),
            Self::Beam(_) => debug_assert!(chosen.is_empty(), "beams tell their ids at the end"),
        }
    }

    /// Chooses by the logits of the rows that the step before asked for (one row after the prompt): [rows, vocabulary],
    /// finite. They are worked on in place.
    pub(crate) fn step(&mut self, logits: &mut [f32]) -> Step {
        match self {
            Self::Line(line) => line.step(logits),
            Self::Beam(beam) => beam.step(logits),
        }
    }
}

/// A search along one line of tokens, greedy or sampled.
#[derive(Debug)]
pub(crate) struct Line {
    ids: Vec<u32>,
    max_new_tokens: usize,
    processors: Processors,
    draw: Option<(Warpers, u64)>,
}

impl Line {
    fn step(&mut self, logits: &mut [f32]) -> Step {
        self.processors.apply(&self.ids, logits);
        let generated = self.ids.len() - 1;
        let token = match &self.draw {
            None => argmax(logits),
            Some((warpers, seed)) => {
                warpers.apply(logits);
                draw(logits, uniform(*seed, generated as u64))
            }
        };
        self.ids.push(token);
        let complete = token == self.processors.end;
        let next = if complete || generated + 1 == self.max_new_tokens {
            Next::End { complete, score: None }
        } else {
            Next::Rows(vec![Row { parent: 0, token }])
        };
        Step { ids: vec![token], next }
    }
}

/// Returns the index of the first of the largest scores.
fn argmax(scores: &[f32]) -> u32 {
    let mut best = 0;
    for (index, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = index;
        }
    }
    best as u32
}

/// Returns the number in [0, 1) that decides the token at `position`. It is counted, not drawn in sequence: a replica
/// that takes a request over after n tokens continues with the same choices.
fn uniform(seed: u64, position: u64) -> f64 {
    let mut generator = ChaCha12Rng::seed_from_u64(seed);
    // A double takes two 32-bit words.
    generator.set_word_pos(2 * u128::from(position));
    generator.random()
}

/// Returns the token at which the cumulated softmax of `scores` passes `uniform`.
fn draw(scores: &[f32], uniform: f64) -> u32 {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |score: f32| f64::from((score - max).exp());
    let total: f64 = scores.iter().copied().map(weight).sum();
    let mut left = uniform * total;
    let mut last = 0;
    for (index, &score) in scores.iter().enumerate().filter(|(_, score)| **score > f32::NEG_INFINITY) {
        last = index;
        left -= weight(score);
        if left < 0.0 {
            break;
        }
    }
    last as u32
}
