//! Autoencoding: images through the VAE and back (latent diffusion, arXiv 2112.10752; without an adversary).

use std::sync::Arc;

use serde::Deserialize;
use tch::{Kind, Reduction, Tensor};

use super::{
    bounds,
    images::{ImageBatch, image_batches, latents_shape},
    interface::{BatchFn, Objective},
    loss::Loss,
    random::RandomStream,
};
use crate::{model::Model, samples::SampleSource};

/// Section `[objective.autoencode]` of a stage.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AutoencodeConfig {
    /// Images in a step.
    pub batch: usize,
    /// The weight of the latents' Kullback-Leibler divergence from a standard normal distribution, in nats a value,
    /// against the mean absolute error of pixels in -1..=1.
    pub kl_weight: f64,
}

impl AutoencodeConfig {
    pub(crate) fn problems(&self) -> Vec<String> {
        let problems = [bounds::share("kl_weight", self.kl_weight, 1e6), bounds::batch_size(self.batch)];
        problems.into_iter().flatten().collect()
    }
}

/// The objective of encoding images and decoding them again.
pub struct Autoencode {
    /// The stage's section.
    pub config: AutoencodeConfig,
    /// Where the images come from.
    pub source: Arc<dyn SampleSource>,
    /// The stage's seed.
    pub seed: u64,
}

impl Objective for Autoencode {
    type Batch = ImageBatch;

    fn batch_fn(&self) -> BatchFn<ImageBatch> {
        image_batches(&self.source, self.config.batch)
    }

    fn loss(&self, model: &Model, batch: &ImageBatch, step: u64) -> Loss {
        let pixels = batch.pixels.signed(model.device());
        let shape = latents_shape(model, batch.images, &pixels).expect("pixels have been made with four");
        let noise = RandomStream::AutoencoderLatents.normal(&shape, (self.seed, step), model.device());
        autoencoding_loss(model, &pixels, &noise, self.config.kl_weight)
    }
}

/// Returns the mean absolute error of the decoded pixels, plus `kl_weight` times how far the latents' distribution is
/// from standard normal.
///
/// `pixels`: in -1..=1, [batch, 3, height, width_px]; `noise`: standard normal, of the latents' shape
pub fn autoencoding_loss(model: &Model, pixels: &Tensor, noise: &Tensor, kl_weight: f64) -> Loss {
    let latents = model.vae.encoder.forward(&pixels.to_kind(model.kind()));
    let [mean, log_variance] = [latents.mean, latents.log_variance].map(|x| x.to_kind(Kind::Float));
    let sample = &mean + (&log_variance * 0.5).exp() * noise;
    let decoded = model.vae.decoder.forward(&sample.to_kind(model.kind())).to_kind(Kind::Float);
    let kl_divergence = (mean.square() + log_variance.exp() - 1.0 - log_variance).mean(Kind::Float) * 0.5;
    let mut loss = Loss::new(model.device());
    // `vae.scaling_factor` of the configuration is to be about the reciprocal of this.
    loss.part("latent_deviation", sample.std(false));
    loss.add("absolute_error", decoded.l1_loss(pixels, Reduction::Mean), 1.0);
    loss.add("kl_divergence", kl_divergence, kl_weight);
    loss
}
