//! Batches of interleaved documents, which two objectives share: one task a batch, drawn by weight.

use std::sync::Arc;

use emu2_llm::tokenizer::Tokenizer;
use rand::Rng;
use serde::Deserialize;

use super::{
    bounds,
    interface::{Batch, BatchFn},
    random::{RandomStream, sample_number},
};
use crate::{
    data::{Document, Piece, Queries, Sequence, Task},
    layout::Layout,
    pixels::Pixels,
    samples::SampleSource,
};

/// One task of a mixture.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskShare {
    /// The task, by its name in snake case.
    pub task: Task,
    /// How often a batch is of this task, in proportion to the weights of the others.
    pub weight: f64,
    /// Documents in a step of this task.
    pub batch: usize,
}

/// Returns what is wrong with the tasks of a mixture.
pub(crate) fn task_problems(tasks: &[TaskShare]) -> Vec<String> {
    let mut problems: Vec<String> =
        tasks.iter().filter_map(|share| bounds::share("tasks.weight", share.weight, 1e6)).collect();
    problems.extend(tasks.iter().filter_map(|share| bounds::batch_size(share.batch)));
    let sum: f64 = tasks.iter().map(|share| share.weight).sum();
    if sum <= 0.0 || sum.is_nan() {
        problems.push(format!("the weights of tasks must add up to more than 0, is {sum}"));
    }
    problems
}

/// A mixture of tasks, from which batches of documents are drawn.
pub struct DocumentMixture {
    /// Where the documents come from.
    pub source: Arc<dyn SampleSource>,
    /// The tokenizer of the texts.
    pub tokenizer: Arc<Tokenizer>,
    /// The embeddings of an image and of a video frame.
    pub queries: Queries,
    /// The tasks; all documents of a batch are of one, because they are about equally long.
    pub tasks: Vec<TaskShare>,
    /// Whether images are left out and all of the text is learned.
    pub text_only: bool,
    /// The stage's seed.
    pub seed: u64,
}

/// The documents of one step.
pub struct DocumentBatch {
    /// The task that all of them are of.
    pub task: Task,
    /// What the llm reads, and where it predicts what.
    pub layout: Layout,
    /// The documents' images, in the order of [`Layout::slots`].
    pub pixels: Pixels,
}

impl Batch for DocumentBatch {
    fn samples(&self) -> usize {
        self.layout.sequences
    }
}

impl DocumentMixture {
    /// Returns the function that makes the batches of this mixture.
    pub fn batch_fn(&self) -> BatchFn<DocumentBatch> {
        let (source, tokenizer) = (Arc::clone(&self.source), Arc::clone(&self.tokenizer));
        let (queries, tasks, text_only, stage_seed) =
            (self.queries, self.tasks.clone(), self.text_only, self.seed);
        Box::new(move |step| {
            let TaskShare { task, batch, .. } = draw_task(&tasks, stage_seed, step);
            let sequence = |index| {
                let document = source.document(task, sample_number(step, batch, index));
                let document = if text_only { text_of(document) } else { document };
                Sequence::new(&document, &tokenizer, queries)
            };
            let sequences: Vec<_> = (0..batch).map(sequence).collect();
            let (layout, images) =
                Layout::new(&sequences, queries.n_query).expect("images and frames have as many embeddings");
            DocumentBatch { task, layout, pixels: images.into_iter().collect() }
        })
    }
}

/// Draws one of the tasks by weight.
fn draw_task(tasks: &[TaskShare], stage_seed: u64, step: u64) -> TaskShare {
    let sum: f64 = tasks.iter().map(|share| share.weight).sum();
    let mut left = RandomStream::Task.generator(stage_seed, step).random_range(0.0..sum);
    for share in tasks {
        if left < share.weight {
            return *share;
        }
        left -= share.weight;
    }
    // Rounding may leave a little.
    tasks[tasks.len() - 1]
}

/// Returns the text of a document, all of it learned.
fn text_of(document: Document) -> Document {
    let texts = document.pieces.into_iter().filter_map(|piece| match piece {
        Piece::Text { text, .. } => Some(Piece::learned(text)),
        Piece::Tokens { numbers, .. } => Some(Piece::Tokens { numbers, learn: true }),
        Piece::Image { .. } | Piece::Box { .. } | Piece::Video { .. } => None,
    });
    Document { pieces: texts.collect(), ..document }
}
