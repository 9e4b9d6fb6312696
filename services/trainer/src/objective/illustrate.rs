//! Illustration: the UNet denoises an image's latents, given what the llm predicts of the image from a document. Its
//! predictions are means of what is still possible, which the tower's embeddings never are.

use rand::Rng;
use serde::Deserialize;
use tch::Tensor;

use super::{
    bounds,
    denoise::{NoiseSampler, denoising_loss, one_draw},
    documents::{DocumentBatch, DocumentMixture, TaskShare, task_problems},
    interface::{BatchFn, Objective},
    llm_pass::{ConditionSource, condition_embeddings},
    loss::Loss,
    random::RandomStream,
};
use crate::model::Model;

/// Section `[objective.illustrate]` of a stage.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IllustrateConfig {
    /// The mixture of tasks, whose documents each end with an image to paint, their only one.
    pub tasks: Vec<TaskShare>,
    /// How often each image is given noise in a step.
    #[serde(default = "one_draw")]
    pub draws: usize,
    /// The share of draws whose embeddings are dropped, for classifier-free guidance.
    pub condition_dropout: f64,
    /// The share of steps in which the tower's embeddings condition the UNet instead of the llm's.
    pub tower_share: f64,
}

impl IllustrateConfig {
    pub(crate) fn problems(&self) -> Vec<String> {
        let bounds = [
            bounds::share("condition_dropout", self.condition_dropout, 1.0),
            bounds::share("tower_share", self.tower_share, 1.0),
            bounds::batch_size(self.draws),
        ];
        let not_painting = self
            .tasks
            .iter()
            .filter(|share| !share.task.paints())
            .map(|share| format!("{} is no task that always paints one image", share.task.name()));
        bounds.into_iter().flatten().chain(task_problems(&self.tasks)).chain(not_painting).collect()
    }
}

/// The objective of denoising latents, given the llm's predictions.
pub struct Illustrate {
    /// Documents that each end with an image to paint, their only one.
    pub mixture: DocumentMixture,
    /// The share of steps with [`ConditionSource::Tower`].
    pub tower_share: f64,
    /// How noise is drawn.
    pub noise: NoiseSampler,
}

impl Illustrate {
    /// Returns the objective of a stage with this section, over a mixture of the section's tasks.
    pub fn new(config: &IllustrateConfig, mixture: DocumentMixture) -> Self {
        let &IllustrateConfig { draws, condition_dropout, tower_share, .. } = config;
        let noise = NoiseSampler { draws, condition_dropout, seed: mixture.seed };
        Self { mixture, tower_share, noise }
    }
}

impl Objective for Illustrate {
    type Batch = DocumentBatch;

    fn batch_fn(&self) -> BatchFn<DocumentBatch> {
        self.mixture.batch_fn()
    }

    fn loss(&self, model: &Model, batch: &DocumentBatch, step: u64) -> Loss {
        let device = model.device();
        let mut random = RandomStream::Conditioning.generator(self.noise.seed, step);
        let source =
            if random.random_bool(self.tower_share) { ConditionSource::Tower } else { ConditionSource::Llm };
        let normalised = batch.pixels.normalised(device);
        let embeddings = condition_embeddings(model, &batch.layout, &normalised, source);
        let painted = batch.layout.painted(i64::from(model.n_query()));
        let rows = Tensor::from_slice(&painted).to_device(device);
        let pixels = batch.pixels.signed(device).index_select(0, &rows);
        let noise = self.noise.sample(model, painted.len(), &pixels, step);
        let loss = denoising_loss(model, &embeddings, &pixels, &noise);
        loss.also_logged_as(match source {
            ConditionSource::Tower => "tower_condition",
            ConditionSource::Llm => batch.task.name(),
        })
    }
}
