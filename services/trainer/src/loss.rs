//! What is minimised: the paper's objectives, on the services' own models.
//!
//! | loss | of | paper |
//! |---|---|---|
//! | [`next_element`] | tower and llm: the next token, or the next embedding of an image | 2.1, 2.2.2 |
//! | [`autoencode`] | VAE | latent diffusion, arXiv 2112.10752; no adversary |
//! | [`denoise`] | UNet, on embeddings of the frozen tower | 2.2.3 |
//! | [`naming`] | tower: what stands where, on what background; in place of the CLIP that the paper begins from | – |

#[cfg(test)]
mod tests;

use emu2_encoder::eva_vit::EvaVit;
use emu2_llm::llama::Llama;
use emu2_nn::layers::Linear;
use tch::{Device, Kind, Reduction, Tensor};

use crate::{layout::Layout, model::Model};

/// Of the noise that is one value for a whole channel (paper, 2.2.3): without it no picture is very dark or bright.
const NOISE_OFFSET: f64 = 0.1;
/// Height, width, crop top, crop left, height, width; the first two are what a request leaves out, see `emu2.proto`.
const ORIGINAL_SIDE: i64 = 1024;

/// A loss and what it is made of, for the log.
#[derive(Debug)]
pub struct Loss {
    pub total: Tensor,
    pub parts: Vec<(&'static str, Tensor)>,
}

impl Loss {
    fn new(device: Device) -> Self {
        Self { total: Tensor::zeros([], (Kind::Float, device)), parts: Vec::new() }
    }

    fn add(&mut self, name: &'static str, value: Tensor, weight: f64) {
        self.total = &self.total + &value * weight;
        self.part(name, value);
    }

    /// For the log alone.
    fn part(&mut self, name: &'static str, value: Tensor) {
        self.parts.push((name, value.detach()));
    }
}

/// Cross-entropy of the next token where it is learned, plus the mean squared error of the next embedding where that
/// is. Targets are the tower's embeddings as they are, and not moved by their own prediction.
///
/// `pixels`: normalised, [pictures, 3, height, width_px]
pub fn next_element(
    (tower, llm): (&EvaVit, &Llama),
    layout: &Layout,
    pixels: &Tensor,
    regression_weight: f64,
) -> Loss {
    let device = llm.device();
    let rows = |rows: &[i64]| Tensor::from_slice(rows).to_device(device);
    let mut x = llm.embed(&rows(&layout.ids));
    let mut embeddings = None;
    if !layout.slots.is_empty() {
        // [pictures, queries, width] -> [(pictures queries), width]
        let encoded = tower.encode_image(pixels, tower.config.n_query).flatten(0, 1);
        x = x.index_copy(0, &rows(&layout.slots), &llm.project_up(&encoded));
        embeddings = Some(encoded);
    }
    let x = x.view([layout.sequences as i64, layout.tokens as i64, -1]);
    let hidden = llm.forward_whole(&x).flatten(0, 1);

    let mut loss = Loss::new(device);
    if !layout.text.is_empty() {
        let logits = llm.logits(&hidden.index_select(0, &rows(&layout.text.from)));
        let tokens = rows(&layout.text.what);
        let entropy = logits.cross_entropy_for_logits(&tokens);
        loss.part("token_accuracy", accuracy(&logits, &tokens));
        loss.add("cross_entropy", entropy, 1.0);
    }
    if let Some(embeddings) = embeddings.filter(|_| !layout.images.is_empty()) {
        let predicted = llm.project_down(&hidden.index_select(0, &rows(&layout.images.from)));
        let target = embeddings.index_select(0, &rows(&layout.images.what)).detach();
        loss.add("mean_squared_error", predicted.mse_loss(&target, Reduction::Mean), regression_weight);
    }
    loss
}

/// Absolute difference of pixels, and how far latents are from standard normal.
///
/// `pixels`: [batch, 3, height, width_px] in -1..=1; `noise`: standard normal, of the latents' shape.
pub fn autoencode(model: &Model, pixels: &Tensor, noise: &Tensor, divergence_weight: f64) -> Loss {
    let latents = model.vae.encoder.forward(pixels);
    let (mean, log_variance) = (&latents.mean, &latents.log_variance);
    let sample = mean + (log_variance * 0.5).exp() * noise;
    let decoded = model.vae.decoder.forward(&sample);
    let divergence = (mean.square() + log_variance.exp() - 1.0 - log_variance).mean(Kind::Float) * 0.5;
    let mut loss = Loss::new(model.device());
    // What the scaling factor is to be the reciprocal of.
    loss.part("latent_deviation", sample.std(false));
    loss.add("absolute_error", decoded.l1_loss(pixels, Reduction::Mean), 1.0);
    loss.add("divergence", divergence, divergence_weight);
    loss
}

/// What decides one batch of [`denoise`], all drawn beforehand.
#[derive(Debug)]
pub struct Noising {
    /// Standard normal, of the latents' shape: for the sample of the latents, and what is to be predicted.
    pub sampling: Tensor,
    pub noise: Tensor,
    /// Standard normal, [batch, channels, 1, 1]
    pub offset: Tensor,
    /// [batch], indices of the training schedule
    pub timesteps: Tensor,
    /// Which pictures the UNet must paint without being told what, [batch], true or false
    pub dropped: Tensor,
}

/// The error of the predicted noise, given the frozen tower's embeddings of the same picture. Dropped embeddings are
/// those of normalised pixels that are all 0, which serving takes for guidance of autoencoding.
///
/// `normalised`: for the tower, [batch, 3, height, width_px]; `pixels`: the same in -1..=1
pub fn denoise(model: &Model, normalised: &Tensor, pixels: &Tensor, noising: &Noising) -> Loss {
    let scale = model.vae.decoder.scaling_factor;
    let (latents, embeddings) = tch::no_grad(|| {
        let latents = model.vae.encoder.forward(pixels);
        let sample = latents.mean + (latents.log_variance * 0.5).exp() * &noising.sampling;
        let encode = |pixels: &Tensor| model.tower.encode_image(pixels, model.n_query());
        let nothing = encode(&normalised.narrow(0, 0, 1).zeros_like());
        // [batch] -> [batch, 1, 1]
        let dropped = noising.dropped.view([-1, 1, 1]);
        (sample * scale, nothing.where_self(&dropped, &encode(normalised)))
    });
    let noise = &noising.noise + &noising.offset * NOISE_OFFSET;
    let left = model.alphas_cumprod.index_select(0, &noising.timesteps).view([-1, 1, 1, 1]);
    let noisy = left.sqrt() * latents + (-&left + 1.0).sqrt() * &noise;
    let time_ids = time_ids(pixels);
    let predicted = model.unet.forward(&noisy, &noising.timesteps, &embeddings, &time_ids);
    let mut loss = Loss::new(model.device());
    loss.add("noise_error", predicted.mse_loss(&noise, Reduction::Mean), 1.0);
    loss
}

/// SDXL's size conditions, as a request that names none has them: [batch, 6]
fn time_ids(pixels: &Tensor) -> Tensor {
    let (batch, _, height, width_px) = pixels.size4().expect("pixels have four dimensions");
    let ids = Tensor::from_slice(&[ORIGINAL_SIDE, ORIGINAL_SIDE, 0, 0, height, width_px]);
    ids.to_device(pixels.device()).unsqueeze(0).expand([batch, 6], false)
}

/// The layers that [`naming`] reads the tower through; they are thrown away with their stage.
#[derive(Debug)]
pub struct NamingHeads {
    /// Of each query: a concept, or none of them.
    pub names: Linear,
    /// Of all queries' mean.
    pub background: Linear,
    pub count: Linear,
}

/// `pixels`: normalised, [batch, 3, height, width_px]; `names`: [(batch queries)]; `backgrounds`, `counts`: [batch]
pub fn naming(model: &Model, heads: &NamingHeads, pixels: &Tensor, truth: [&Tensor; 3]) -> Loss {
    let embeddings = model.tower.encode_image(pixels, model.n_query());
    let mean = embeddings.mean_dim(1, false, Kind::Float);
    let mut loss = Loss::new(model.device());
    let heads = [
        ("name", "name_accuracy", heads.names.forward(&embeddings.flatten(0, 1))),
        ("background", "background_accuracy", heads.background.forward(&mean)),
        ("count", "count_accuracy", heads.count.forward(&mean)),
    ];
    for ((name, accuracy_name, logits), truth) in heads.into_iter().zip(truth) {
        loss.part(accuracy_name, accuracy(&logits, truth));
        loss.add(name, logits.cross_entropy_for_logits(truth), 1.0);
    }
    loss
}

/// Share of rows whose highest logit is the right one.
fn accuracy(logits: &Tensor, truth: &Tensor) -> Tensor {
    logits.argmax(-1, false).eq_tensor(truth).to_kind(Kind::Float).mean(Kind::Float)
}
