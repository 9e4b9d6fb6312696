//! Next element: the next token or the next embedding of interleaved documents (paper, 2.1 and 2.2.2).

#[cfg(test)]
mod tests;

use emu2_encoder::eva_vit::EvaVit;
use emu2_llm::llama::Llama;
use rand::Rng;
use serde::Deserialize;
use tch::Tensor;

use super::{
    bounds,
    documents::{DocumentBatch, DocumentMixture, TaskShare, task_problems},
    interface::{BatchFn, Objective},
    llm_pass::{EmbeddingInput, LlmPass},
    loss::{Loss, accuracy, mean_squared_error},
    random::RandomStream,
};
use crate::{layout::Layout, model::Model};

/// Section `[objective.next_element]` of a stage.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NextElementConfig {
    /// The mixture of tasks; every step is of one.
    pub tasks: Vec<TaskShare>,
    /// Whether images are left out and all of the text is learned: the language before the images.
    #[serde(default)]
    pub text_only: bool,
    /// The weight of the embeddings' mean squared error against the tokens' cross-entropy; the paper gives none.
    #[serde(default = "one")]
    pub regression_weight: f64,
    /// The share of steps with [`EmbeddingInput::Blind`].
    #[serde(default)]
    pub blind_share: f64,
    /// The share of steps with [`EmbeddingInput::ScheduledSampling`]; the rest is teacher forcing.
    #[serde(default)]
    pub scheduled_sampling_share: f64,
}

fn one() -> f64 {
    1.0
}

impl NextElementConfig {
    pub(crate) fn problems(&self) -> Vec<String> {
        let shares = [
            bounds::share("regression_weight", self.regression_weight, 1e6),
            bounds::share("blind_share", self.blind_share, 1.0),
            bounds::share("scheduled_sampling_share", self.scheduled_sampling_share, 1.0 - self.blind_share),
        ];
        shares.into_iter().flatten().chain(task_problems(&self.tasks)).collect()
    }
}

/// The objective of predicting the next token or embedding of interleaved documents.
pub struct NextElement {
    /// Where the documents come from.
    pub mixture: DocumentMixture,
    /// The weight of the embeddings' mean squared error; with 0 they are not predicted.
    pub regression_weight: f64,
    /// The share of steps with [`EmbeddingInput::Blind`].
    pub blind_share: f64,
    /// The share of steps with [`EmbeddingInput::ScheduledSampling`].
    pub scheduled_sampling_share: f64,
}

impl NextElement {
    /// Returns the objective of a stage with this section, over a mixture of the section's tasks.
    pub fn new(config: &NextElementConfig, mixture: DocumentMixture) -> Self {
        Self {
            mixture,
            regression_weight: config.regression_weight,
            blind_share: config.blind_share,
            scheduled_sampling_share: config.scheduled_sampling_share,
        }
    }

    fn embedding_input(&self, step: u64) -> EmbeddingInput {
        let drawn = RandomStream::Conditioning.generator(self.mixture.seed, step).random_range(0.0..1.0);
        match drawn {
            _ if drawn < self.blind_share => EmbeddingInput::Blind,
            _ if drawn < self.blind_share + self.scheduled_sampling_share => {
                EmbeddingInput::ScheduledSampling
            }
            _ => EmbeddingInput::TeacherForcing,
        }
    }
}

impl Objective for NextElement {
    type Batch = DocumentBatch;

    fn batch_fn(&self) -> BatchFn<DocumentBatch> {
        self.mixture.batch_fn()
    }

    fn loss(&self, model: &Model, batch: &DocumentBatch, step: u64) -> Loss {
        let pixels = batch.pixels.normalised(model.device());
        let regression = Regression { weight: self.regression_weight, input: self.embedding_input(step) };
        let loss = next_element_loss((&model.tower, &model.llm), &batch.layout, &pixels, regression);
        // Each task's own loss is in the log too: their mean hides the one that does not learn.
        loss.also_logged_as(batch.task.name())
    }
}

/// How the embeddings of images are learned.
#[derive(Clone, Copy, Debug)]
pub struct Regression {
    /// The weight of their mean squared error against the tokens' cross-entropy; with 0 they are not predicted.
    pub weight: f64,
    /// What the llm reads in the place of the embeddings that it is to predict.
    pub input: EmbeddingInput,
}

/// Returns the cross-entropy of the next token where it is learned, plus the weighted mean squared error of the next
/// embedding where that is. Targets are the tower's embeddings, detached: they are not moved by their own prediction.
///
/// `pixels`: normalised, [images, 3, height, width_px]
pub fn next_element_loss(
    (tower, llm): (&EvaVit, &Llama),
    layout: &Layout,
    pixels: &Tensor,
    regression: Regression,
) -> Loss {
    let pass = LlmPass::new((tower, llm), layout, pixels);
    let hidden = pass.hidden(regression.input);
    let mut loss = Loss::new(llm.device());
    if !layout.text.is_empty() {
        let logits = llm.logits(&hidden.index_select(0, &pass.rows(&layout.text.rows)));
        let tokens = pass.rows(&layout.text.targets);
        let entropy = logits.cross_entropy_for_logits(&tokens);
        loss.part("token_accuracy", accuracy(&logits, &tokens));
        loss.add("cross_entropy", entropy, 1.0);
    }
    if let Some(target) = pass.target().filter(|_| regression.weight > 0.0) {
        let error = mean_squared_error(&pass.predicted(&hidden), &target);
        loss.add(regression.input.error_name(), error, regression.weight);
    }
    loss
}
