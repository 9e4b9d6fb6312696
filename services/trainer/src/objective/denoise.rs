//! Denoising: the UNet predicts the noise in an image's latents, given the frozen tower's embeddings of the image
//! (paper, 2.2.3). Some embeddings are dropped, so that serving can use classifier-free guidance (arXiv 2207.12598).

use std::sync::Arc;

use rand::Rng;
use serde::Deserialize;
use tch::Tensor;

use super::{
    bounds,
    images::{ImageBatch, image_batches, latents_shape},
    interface::{BatchFn, Objective},
    loss::{Loss, mean_squared_error},
    random::RandomStream,
};
use crate::{model::Model, samples::SampleSource};

/// The weight of the noise that is one value for a whole channel (paper, 2.2.3): without it no image is very dark or
/// very bright.
const NOISE_OFFSET: f64 = 0.1;
/// Original height and width of SDXL's size conditions for a request that names none, in pixels; see `emu2.proto`.
const ORIGINAL_SIDE: i64 = 1024;

/// Section `[objective.denoise]` of a stage.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DenoiseConfig {
    /// Images in a step.
    pub batch: usize,
    /// How often each image is given noise in a step: what it costs to encode it is paid once.
    #[serde(default = "one_draw")]
    pub draws: usize,
    /// The share of draws whose embeddings are dropped, for classifier-free guidance.
    pub condition_dropout: f64,
}

pub(crate) fn one_draw() -> usize {
    1
}

impl DenoiseConfig {
    pub(crate) fn problems(&self) -> Vec<String> {
        let problems = [
            bounds::share("condition_dropout", self.condition_dropout, 1.0),
            bounds::batch_size(self.batch),
            bounds::batch_size(self.draws),
        ];
        problems.into_iter().flatten().collect()
    }
}

/// The objective of denoising latents, given the tower's embeddings.
pub struct Denoise {
    /// The number of images in a step.
    pub batch: usize,
    /// Where the images come from.
    pub source: Arc<dyn SampleSource>,
    /// How noise is drawn.
    pub noise: NoiseSampler,
}

impl Denoise {
    /// Returns the objective of a stage with this section and seed.
    pub fn new(config: DenoiseConfig, source: Arc<dyn SampleSource>, seed: u64) -> Self {
        let DenoiseConfig { batch, draws, condition_dropout } = config;
        Self { batch, source, noise: NoiseSampler { draws, condition_dropout, seed } }
    }
}

impl Objective for Denoise {
    type Batch = ImageBatch;

    fn batch_fn(&self) -> BatchFn<ImageBatch> {
        image_batches(&self.source, self.batch)
    }

    fn loss(&self, model: &Model, batch: &ImageBatch, step: u64) -> Loss {
        let device = model.device();
        let normalised = batch.pixels.normalised(device).to_kind(model.kind());
        let embeddings = tch::no_grad(|| model.tower.encode_image(&normalised, model.n_query()));
        let pixels = batch.pixels.signed(device);
        let noise = self.noise.sample(model, batch.images, &pixels, step);
        denoising_loss(model, &embeddings, &pixels, &noise)
    }
}

/// How the noise of a step is drawn.
#[derive(Clone, Copy, Debug)]
pub struct NoiseSampler {
    /// How often each image is given noise.
    pub draws: usize,
    /// The share of draws whose embeddings are dropped.
    pub condition_dropout: f64,
    /// The stage's seed.
    pub seed: u64,
}

impl NoiseSampler {
    /// Returns the noise of a step for `images` images.
    ///
    /// `pixels`: [images, 3, height, width_px]
    pub(crate) fn sample(self, model: &Model, images: usize, pixels: &Tensor, step: u64) -> NoiseSample {
        let device = model.device();
        let count = images * self.draws;
        let shape = latents_shape(model, count, pixels).expect("pixels have been made with four");
        let normal = |stream: RandomStream, shape: &[i64]| stream.normal(shape, (self.seed, step), device);
        let mut random = RandomStream::TimestepsAndDropout.generator(self.seed, step);
        let timestep_count = model.alphas_cumprod.numel() as i64;
        let timesteps: Vec<i64> = (0..count).map(|_| random.random_range(0..timestep_count)).collect();
        let dropped: Vec<bool> = (0..count).map(|_| random.random_bool(self.condition_dropout)).collect();
        NoiseSample {
            latents: normal(RandomStream::DiffusionLatents, &shape),
            noise: normal(RandomStream::DiffusionNoise, &shape),
            offset: normal(RandomStream::NoiseOffset, &[shape[0], shape[1], 1, 1]),
            timesteps: Tensor::from_slice(&timesteps).to_device(device),
            dropped: Tensor::from_slice(&dropped).to_device(device),
        }
    }
}

/// The random values of one step of [`denoising_loss`]. Its batch is the number of images or a multiple of it: the
/// images over and over.
#[derive(Debug)]
pub struct NoiseSample {
    /// Standard normal values that choose the sample of the latents' distribution: [batch, channels, height, width]
    pub latents: Tensor,
    /// Standard normal noise, which is to be predicted: [batch, channels, height, width]
    pub noise: Tensor,
    /// Standard normal noise that is one value for a whole channel: [batch, channels, 1, 1]
    pub offset: Tensor,
    /// Indices of the training schedule: [batch]
    pub timesteps: Tensor,
    /// Whether the UNet must do without the image's embeddings: [batch], true or false
    pub dropped: Tensor,
}

/// Returns the mean squared error of the predicted noise, given embeddings. In the place of dropped ones stand those of
/// normalised pixels that are all 0, which serving takes for classifier-free guidance of autoencoding.
///
/// `embeddings`: of the frozen tower, or as the llm predicts them, [images, queries, width]; `pixels`: in -1..=1,
/// [images, 3, height, width_px]
pub fn denoising_loss(model: &Model, embeddings: &Tensor, pixels: &Tensor, sample: &NoiseSample) -> Loss {
    let scale = model.vae.decoder.scaling_factor;
    let kind = model.kind();
    let (batch, _, _, _) = sample.latents.size4().expect("latents have four dimensions");
    let (images, _, _, _) = pixels.size4().expect("pixels have four dimensions");
    let times = batch / images;
    let (latents, embeddings) = tch::no_grad(|| {
        let latents = model.vae.encoder.forward(&pixels.to_kind(kind));
        let [mean, log_variance] = [latents.mean, latents.log_variance].map(|x| x.repeat([times, 1, 1, 1]));
        let latents = mean + (log_variance * 0.5).exp() * &sample.latents;
        let blank = pixels.narrow(0, 0, 1).zeros_like();
        let unconditional = model.tower.encode_image(&blank.to_kind(kind), model.n_query());
        // [batch] -> [batch, 1, 1]
        let dropped = sample.dropped.view([-1, 1, 1]);
        (latents * scale, unconditional.where_self(&dropped, &embeddings.repeat([times, 1, 1])))
    });
    let noise = &sample.noise + &sample.offset * NOISE_OFFSET;
    let alphas = model.alphas_cumprod.index_select(0, &sample.timesteps).view([-1, 1, 1, 1]);
    let noisy = alphas.sqrt() * latents + (-&alphas + 1.0).sqrt() * &noise;
    let time_ids = time_ids(pixels).repeat([times, 1]);
    let predicted = model.unet.forward(&noisy.to_kind(kind), &sample.timesteps, &embeddings, &time_ids);
    let mut loss = Loss::new(model.device());
    loss.add("noise_error", mean_squared_error(&predicted, &noise), 1.0);
    loss
}

/// SDXL's size conditions, as a request that names none has them: [batch, 6]
fn time_ids(pixels: &Tensor) -> Tensor {
    let (batch, _, height, width_px) = pixels.size4().expect("pixels have four dimensions");
    // Original height and width, top and left of the crop, height and width.
    let ids = Tensor::from_slice(&[ORIGINAL_SIDE, ORIGINAL_SIDE, 0, 0, height, width_px]);
    ids.to_device(pixels.device()).unsqueeze(0).expand([batch, 6], false)
}
