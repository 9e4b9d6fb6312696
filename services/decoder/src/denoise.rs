//! From noise to an image, one step at a time: what the UNet, the VAE and the schedule do together.
//!
//! Upstream is baaivision/Emu@13c395e `Emu2/emu/diffusion.py`, which runs all steps of one image. Here the unit is
//! one step of a batch whose samples are each at a step, with a guidance and a schedule, of their own. Latents stay
//! float32 between steps whatever the UNet computes in: steps add up, their rounding should not.

use std::rc::Rc;

use emu2_nn::{
    array::to_tensor,
    checkpoint::{ModelDir, Part},
    weights::combined_digest,
};
use emu2_proto::array::{Array, Dtype};
use tch::{Cuda, Device, Kind, Tensor};

use crate::{
    error::LoadError,
    noise::standard_normal,
    schedule::{EulerDiscrete, Schedule, SchedulerConfig, Step},
    unet::{TIME_IDS, Unet, UnetConfig},
    vae::{self, VaeConfig},
};

#[cfg(test)]
pub(crate) mod tests;

/// Side of the latents of the warm-up's image: small enough for a CPU.
const WARM_UP_LATENTS: usize = 8;

/// An image to generate: everything that decides its pixels.
#[derive(Clone, Debug)]
pub struct DenoiseRequest {
    /// The height in pixels, a multiple of [`ModelInfo::scale_factor`].
    pub height: usize,
    /// The width in pixels, a multiple of [`ModelInfo::scale_factor`].
    pub width: usize,
    /// How many denoising steps to take, 1 to [`ModelInfo::train_steps`].
    pub steps: usize,
    /// The scale of classifier-free guidance; above 1 exactly when there is a negative.
    pub guidance_scale: f32,
    /// The sizes that the UNet is conditioned on.
    pub conditions: SizeConditions,
    /// The seed of the initial noise.
    pub seed: u64,
    /// The embeddings of the image, [queries, width].
    pub positive: Array,
    /// The embeddings that guidance leads away from, [queries, width]; none without guidance.
    pub negative: Option<Array>,
    /// Standard normal values in place of the seed's noise, [channels, height / scale_factor, width / scale_factor].
    pub initial_latents: Option<Array>,
}

/// What SDXL tells its UNet of the training image that it should imitate, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SizeConditions {
    /// The height of the training image before it was cropped.
    pub original_height: u32,
    /// The width of the training image before it was cropped.
    pub original_width: u32,
    /// How much of the training image was cropped at the top.
    pub crop_top: u32,
    /// How much of the training image was cropped on the left.
    pub crop_left: u32,
}

/// What the service and its clients have to know of the loaded model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelInfo {
    /// The digest of the weights as they are computed with, UNet and VAE combined, 64 hexadecimal digits.
    pub weights_digest: String,
    /// The dtype of embeddings.
    pub dtype: Dtype,
    /// The width of one embedding.
    pub width: usize,
    /// The height and width of an image when none is asked for, in pixels.
    pub default_side: usize,
    /// How many pixels, in height and in width, one position of the latents becomes.
    pub scale_factor: usize,
    /// The channels of latents.
    pub latent_channels: usize,
    /// The most steps that a schedule can have.
    pub train_steps: usize,
}

/// A finished image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RgbImage {
    /// Red, green and blue bytes in row-major order, [height, width, 3].
    pub rgb: Vec<u8>,
    /// The height in pixels.
    pub height: usize,
    /// The width in pixels.
    pub width: usize,
}

/// What the samples of one batch have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BatchShape {
    /// The height of the latents.
    pub height: usize,
    /// The width of the latents.
    pub width: usize,
    /// How many embeddings each sample has.
    pub queries: usize,
}

/// An image while it is generated.
#[derive(Debug)]
pub struct Sample {
    /// What the sample must have in common with others of its batch.
    pub shape: BatchShape,
    /// The pixels of the image, once for each row that the sample takes in the UNet's batch: under guidance it takes
    /// two.
    pub pixels: u64,
    /// The latents, [1, channels, height, width_px], float32.
    latents: Tensor,
    /// The embeddings of the image, [1, queries, width].
    positive: Tensor,
    negative: Option<Tensor>,
    time_ids: [f32; TIME_IDS as usize],
    guidance_scale: f32,
    schedule: Schedule,
    /// How many steps are done.
    step: usize,
}

impl Sample {
    /// Returns how many rows the sample takes in the UNet's batch: two under guidance, else one.
    pub fn rows(&self) -> usize {
        1 + usize::from(self.negative.is_some())
    }

    /// Returns the pixels of the image, counted once.
    pub fn image_pixels(&self) -> u64 {
        self.pixels / self.rows() as u64
    }

    /// Returns how many denoising steps are done.
    pub fn steps_done(&self) -> usize {
        self.step
    }

    /// Returns how many denoising steps are left.
    pub fn steps_left(&self) -> usize {
        self.schedule.steps() - self.step
    }

    fn next_step(&self) -> Step {
        self.schedule.step(self.step)
    }
}

/// The image decoder of Emu2 on its device: UNet, VAE and noise schedule.
#[derive(Debug)]
pub struct DiffusionPipeline {
    pub(crate) unet: Unet,
    pub(crate) vae: vae::Decoder,
    scheduler: EulerDiscrete,
    scale_factor: usize,
    device: Device,
    kind: Kind,
}

impl DiffusionPipeline {
    /// Loads UNet and VAE to a device, computing in `kind`.
    ///
    /// # Errors
    ///
    /// The model has neither, its configuration contradicts itself or asks for what is not built, or the weights do not
    /// fit it.
    pub fn load(dir: &Rc<ModelDir>, device: Device, kind: Kind) -> Result<(Self, ModelInfo), LoadError> {
        if !(dir.has(Part::Unet) && dir.has(Part::Vae)) {
            return Err(dir.unsupported("the model has no `unet` and `vae`: it generates no images").into());
        }
        let scheduler_config: SchedulerConfig = dir.section("scheduler")?;
        let unet_config: UnetConfig = dir.section("unet")?;
        let vae_config: VaeConfig = dir.section("vae")?;
        check_fit(&unet_config, &vae_config)?;
        let scheduler = EulerDiscrete::new(&scheduler_config)?;

        let w = dir.weights(Part::Unet, device, kind);
        let unet = Unet::load(&w, unet_config)?;
        let unet_digest = w.finish()?;

        let w = dir.weights(Part::Vae, device, kind);
        let vae = vae::Decoder::load(&w, &vae_config)?;
        vae::Encoder::NAMES.iter().for_each(|name| w.skip(name));
        let vae_digest = w.finish()?;

        let scale_factor = vae_config.scale_factor();
        let info = ModelInfo {
            weights_digest: combined_digest(&[&unet_digest, &vae_digest]),
            dtype: emu2_nn::array::dtype(kind),
            width: unet.config.cross_attention_dim as usize,
            default_side: unet.config.sample_size as usize * scale_factor,
            scale_factor,
            latent_channels: unet.config.in_channels as usize,
            train_steps: scheduler.alphas_cumprod().len(),
        };
        Ok((Self { unet, vae, scheduler, scale_factor, device, kind }, info))
    }

    /// Generates one small image, so that the first request does not pay for what libraries set up on first use.
    pub fn warm_up(&self) {
        let width = self.unet.config.cross_attention_dim as usize;
        let nothing =
            Array::new(Dtype::F32, vec![1, width], vec![0; 4 * width].into()).expect("zeros are an array");
        let side = WARM_UP_LATENTS * self.scale_factor;
        let request = DenoiseRequest {
            height: side,
            width: side,
            steps: 1,
            guidance_scale: 2.0,
            conditions: SizeConditions { original_height: 0, original_width: 0, crop_top: 0, crop_left: 0 },
            seed: 0,
            positive: nothing.clone(),
            negative: Some(nothing),
            initial_latents: None,
        };
        let mut sample = self.start(&request);
        self.step(&mut [&mut sample]);
        self.image(&sample);
    }

    /// Puts the embeddings and the initial noise of a request on the device; nothing is computed yet. The request must
    /// have been checked.
    ///
    /// # Panics
    ///
    /// The arrays do not have the shapes that [`DenoiseRequest`] states.
    pub fn start(&self, request: &DenoiseRequest) -> Sample {
        let schedule = self.scheduler.schedule(request.steps);
        let (height, width) = (request.height / self.scale_factor, request.width / self.scale_factor);
        let channels = self.unet.config.in_channels as usize;
        let noise: Vec<f32> = match &request.initial_latents {
            Some(latents) => latents.values().collect(),
            None => standard_normal(request.seed, channels * height * width),
        };
        let noise = Tensor::from_slice(&noise).view([1, channels as i64, height as i64, width as i64]);
        let embeddings = |array: &Array| to_tensor(array, self.device, self.kind).unsqueeze(0);
        let SizeConditions { original_height, original_width, crop_top, crop_left } = request.conditions;
        let rows = 1 + usize::from(request.negative.is_some());
        Sample {
            shape: BatchShape { height, width, queries: request.positive.shape()[0] },
            pixels: (request.height * request.width * rows) as u64,
            latents: noise.to_device(self.device) * f64::from(schedule.init_noise_sigma()),
            positive: embeddings(&request.positive),
            negative: request.negative.as_ref().map(embeddings),
            // Height before width, unlike most interfaces.
            time_ids: [
                original_height as f32,
                original_width as f32,
                crop_top as f32,
                crop_left as f32,
                request.height as f32,
                request.width as f32,
            ],
            guidance_scale: request.guidance_scale,
            schedule,
            step: 0,
        }
    }

    /// Takes one denoising step of every sample. All must be of one shape, and none may be done.
    pub fn step(&self, batch: &mut [&mut Sample]) {
        let samples: Vec<&Sample> = batch.iter().map(|sample| &**sample).collect();
        let latents = Tensor::cat(&samples.iter().map(|sample| &sample.latents).collect::<Vec<_>>(), 0);
        let noise = self.predict(&samples, &latents);
        let next = self.advance(&samples, &latents, &noise);
        for (sample, latents) in batch.iter_mut().zip(next.split(1, 0)) {
            sample.latents = latents;
            sample.step += 1;
        }
        self.synchronize();
    }

    /// Decodes the latents of a sample to its image; none when they are not finite, which only a defect of the weights
    /// or of the device can cause.
    pub fn image(&self, sample: &Sample) -> Option<RgbImage> {
        if !bool::try_from(sample.latents.isfinite().all()).expect("one truth value") {
            return None;
        }
        let levels = vae::levels(&self.vae.image(&sample.latents));
        let (_, height, width, _) = levels.size4().expect("images have four dimensions");
        let rgb = Vec::try_from(levels.flatten(0, -1)).expect("levels are bytes");
        Some(RgbImage { rgb, height: height as usize, width: width as usize })
    }

    /// Predicts the noise in latents, after guidance: [batch, channels, height, width_px] -> the same shape.
    ///
    /// Conditional rows come first, then an unconditional one for each sample under guidance, all in one batch.
    fn predict(&self, batch: &[&Sample], latents: &Tensor) -> Tensor {
        let guided: Vec<usize> = (0..batch.len()).filter(|&i| batch[i].negative.is_some()).collect();
        let rows: Vec<usize> = (0..batch.len()).chain(guided.iter().copied()).collect();
        let scale = self.column(batch, |sample| sample.next_step().input_scale());
        let input = (latents / scale).index_select(0, &self.indices(&rows)).to_kind(self.kind);
        let timesteps: Vec<f32> = rows.iter().map(|&row| batch[row].next_step().timestep).collect();
        let time_ids: Vec<f32> = rows.iter().flat_map(|&row| batch[row].time_ids).collect();
        let positive = batch.iter().map(|sample| &sample.positive);
        let negative = batch.iter().filter_map(|sample| sample.negative.as_ref());
        let embeddings = Tensor::cat(&positive.chain(negative).collect::<Vec<_>>(), 0);
        let (timesteps, time_ids) = (self.tensor(&timesteps), self.tensor(&time_ids).view([-1, TIME_IDS]));

        let noise = self.unet.forward(&input, &timesteps, &embeddings, &time_ids).to_kind(Kind::Float);
        let count = batch.len() as i64;
        let conditional = noise.narrow(0, 0, count);
        let unconditional = noise.narrow(0, count, guided.len() as i64);
        // A sample without guidance is its own unconditional: the difference is zero.
        let unconditional = conditional.index_copy(0, &self.indices(&guided), &unconditional);
        let guidance = self.column(batch, |sample| sample.guidance_scale);
        &unconditional + guidance * (conditional - &unconditional)
    }

    /// Takes Euler's step along dx/dσ = (x − x₀) / σ: [batch, channels, height, width_px] -> the same shape.
    fn advance(&self, batch: &[&Sample], latents: &Tensor, noise: &Tensor) -> Tensor {
        let sigma = self.column(batch, |sample| sample.next_step().sigma);
        let distance = self.column(batch, |sample| sample.next_step().sigma_next - sample.next_step().sigma);
        // The derivative is the noise itself, but upstream comes to it by way of the image, and rounds there.
        let image = latents - &sigma * noise;
        let derivative = (latents - image) / sigma;
        latents + derivative * distance
    }

    /// Puts a number of each sample into a tensor, [batch, 1, 1, 1].
    fn column(&self, batch: &[&Sample], value: impl Fn(&Sample) -> f32) -> Tensor {
        self.tensor(&batch.iter().map(|sample| value(sample)).collect::<Vec<_>>()).view([-1, 1, 1, 1])
    }

    fn tensor(&self, values: &[f32]) -> Tensor {
        Tensor::from_slice(values).to_device(self.device)
    }

    fn indices(&self, values: &[usize]) -> Tensor {
        Tensor::from_slice(&values.iter().map(|&index| index as i64).collect::<Vec<_>>())
            .to_device(self.device)
    }

    /// Waits for the device: CUDA runs behind the thread that drives it. Waiting once a step costs one launch gap, and
    /// makes progress, timings and "left within one step" mean what they say.
    fn synchronize(&self) {
        if let Device::Cuda(index) = self.device {
            Cuda::synchronize(index as i64);
        }
    }
}

/// Checks that the configurations of UNet and VAE fit each other.
fn check_fit(unet: &UnetConfig, vae: &VaeConfig) -> Result<(), LoadError> {
    vae.check()?;
    let (made, read) = (unet.in_channels, vae.latent_channels);
    let problem = format!("`latent_channels` must be the UNet's {made} `in_channels`, got {read}");
    LoadError::check("vae", if made == read { Vec::new() } else { vec![problem] })
}
