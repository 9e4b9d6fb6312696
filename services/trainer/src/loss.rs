//! What is minimised: the paper's objectives, on the services' own models.
//!
//! | loss | of | paper |
//! |---|---|---|
//! | [`next_element`] | tower and llm: the next token, or the next embedding of an image | 2.1, 2.2.2 |
//! | [`autoencode`] | VAE | latent diffusion, arXiv 2112.10752; no adversary |
//! | [`denoise`] | UNet, on embeddings of the frozen tower | 2.2.3 |
//! | [`naming`] | tower: what stands where, on what background, how many; in place of the paper's CLIP | – |

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

/// Of the error of boxes, which are fractions, against the cross-entropy of names: a twentieth of a picture's side is
/// as bad as half a nat.
const BOX_WEIGHT: f64 = 10.0;

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

    /// Logs the whole under another name too.
    pub fn also_as(mut self, name: &'static str) -> Self {
        self.part(name, self.total.shallow_clone());
        self
    }

    /// For the log alone.
    fn part(&mut self, name: &'static str, value: Tensor) {
        self.parts.push((name, value.detach()));
    }
}

/// How pictures' embeddings are learned.
#[derive(Clone, Copy, Debug)]
pub struct Regression {
    /// Of their error against the tokens' cross-entropy; with 0 they are not predicted.
    pub weight: f64,
    /// Whether each is predicted from those before it too, as in serving. Otherwise zeros stand in their place, and all
    /// must come from the prompt: fed true embeddings alone, a model copies the background from the first, and in serving
    /// the first is its own, of which it has learned little.
    pub fed_back: bool,
}

/// Cross-entropy of the next token where it is learned, plus the mean squared error of the next embedding where that
/// is. Targets are the tower's embeddings as they are, and not moved by their own prediction.
///
/// `pixels`: normalised, [pictures, 3, height, width_px]
pub fn next_element(
    (tower, llm): (&EvaVit, &Llama),
    layout: &Layout,
    pixels: &Tensor,
    regression: Regression,
) -> Loss {
    let device = llm.device();
    let rows = |rows: &[i64]| Tensor::from_slice(rows).to_device(device);
    let mut x = llm.embed(&rows(&layout.ids));
    let mut embeddings = None;
    if !layout.slots.is_empty() {
        // [pictures, queries, width] -> [(pictures queries), width]
        let pixels = pixels.to_kind(tower.kind());
        let encoded = tower.encode_image(&pixels, tower.config.n_query).flatten(0, 1);
        let read = match regression.fed_back {
            true => encoded.shallow_clone(),
            false => encoded.index_fill(0, &rows(&layout.images.what), 0.0),
        };
        x = x.index_copy(0, &rows(&layout.slots), &llm.project_up(&read));
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
    let regressed = regression.weight > 0.0 && !layout.images.is_empty();
    if let Some(embeddings) = embeddings.filter(|_| regressed) {
        let predicted = llm.project_down(&hidden.index_select(0, &rows(&layout.images.from)));
        let target = embeddings.index_select(0, &rows(&layout.images.what)).detach();
        loss.add("mean_squared_error", mean_squared(&predicted, &target), regression.weight);
    }
    loss
}

/// Absolute difference of pixels, and how far latents are from standard normal.
///
/// `pixels`: [batch, 3, height, width_px] in -1..=1; `noise`: standard normal, of the latents' shape.
pub fn autoencode(model: &Model, pixels: &Tensor, noise: &Tensor, divergence_weight: f64) -> Loss {
    let latents = model.vae.encoder.forward(&pixels.to_kind(model.kind()));
    let [mean, log_variance] = [latents.mean, latents.log_variance].map(|x| x.to_kind(Kind::Float));
    let sample = &mean + (&log_variance * 0.5).exp() * noise;
    let decoded = model.vae.decoder.forward(&sample.to_kind(model.kind())).to_kind(Kind::Float);
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
    /// Standard normal, of the latents' shape: for the sample of the latents, and what is to be predicted. As many as
    /// there are pictures or a multiple of it: the pictures over and over.
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
    let kind = model.kind();
    let times = noising.sampling.size()[0] / pixels.size()[0];
    let (latents, embeddings) = tch::no_grad(|| {
        let latents = model.vae.encoder.forward(&pixels.to_kind(kind));
        let [mean, log_variance] = [latents.mean, latents.log_variance].map(|x| x.repeat([times, 1, 1, 1]));
        let sample = mean + (log_variance * 0.5).exp() * &noising.sampling;
        let encode = |pixels: &Tensor| model.tower.encode_image(&pixels.to_kind(kind), model.n_query());
        let nothing = encode(&normalised.narrow(0, 0, 1).zeros_like());
        // [batch] -> [batch, 1, 1]
        let dropped = noising.dropped.view([-1, 1, 1]);
        (sample * scale, nothing.where_self(&dropped, &encode(normalised).repeat([times, 1, 1])))
    });
    let noise = &noising.noise + &noising.offset * NOISE_OFFSET;
    let left = model.alphas_cumprod.index_select(0, &noising.timesteps).view([-1, 1, 1, 1]);
    let noisy = left.sqrt() * latents + (-&left + 1.0).sqrt() * &noise;
    let time_ids = time_ids(pixels).repeat([times, 1]);
    let predicted = model.unet.forward(&noisy.to_kind(kind), &noising.timesteps, &embeddings, &time_ids);
    let mut loss = Loss::new(model.device());
    loss.add("noise_error", mean_squared(&predicted, &noise), 1.0);
    loss
}

/// In float32, whatever the model computes in.
fn mean_squared(predicted: &Tensor, truth: &Tensor) -> Tensor {
    predicted.to_kind(Kind::Float).mse_loss(&truth.to_kind(Kind::Float), Reduction::Mean)
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
    /// And where that is: so that the embeddings say it, which names alone do not ask of them.
    pub boxes: Linear,
    /// Of all queries' mean.
    pub background: Linear,
    pub count: Linear,
}

/// What [`naming`] is to find.
#[derive(Debug)]
pub struct Named {
    /// [(batch queries)]
    pub names: Tensor,
    /// Left, top, right and bottom in fractions of the picture, [(batch queries), 4]
    pub boxes: Tensor,
    /// Whether a query has a name, and so a box: [(batch queries)], true or false
    pub covered: Tensor,
    /// [batch]
    pub backgrounds: Tensor,
    pub counts: Tensor,
}

/// `pixels`: normalised, [batch, 3, height, width_px]
pub fn naming(model: &Model, heads: &NamingHeads, pixels: &Tensor, truth: &Named) -> Loss {
    let embeddings = model.tower.encode_image(&pixels.to_kind(model.kind()), model.n_query());
    let embeddings = embeddings.to_kind(Kind::Float);
    let mean = embeddings.mean_dim(1, false, Kind::Float);
    let queries = embeddings.flatten(0, 1);
    let mut loss = Loss::new(model.device());
    let classes = [
        ("name", "name_accuracy", heads.names.forward(&queries), &truth.names),
        ("background", "background_accuracy", heads.background.forward(&mean), &truth.backgrounds),
        ("count", "count_accuracy", heads.count.forward(&mean), &truth.counts),
    ];
    for (name, accuracy_name, logits, truth) in classes {
        loss.part(accuracy_name, accuracy(&logits, truth));
        loss.add(name, logits.cross_entropy_for_logits(truth), 1.0);
    }
    let covered = truth.covered.to_kind(Kind::Float);
    let error = (heads.boxes.forward(&queries) - &truth.boxes).abs().mean_dim(-1, false, Kind::Float);
    let error = (error * &covered).sum(Kind::Float) / covered.sum(Kind::Float).clamp_min(1.0);
    loss.add("box_error", error, BOX_WEIGHT);
    loss
}

/// Share of rows whose highest logit is the right one.
fn accuracy(logits: &Tensor, truth: &Tensor) -> Tensor {
    logits.argmax(-1, false).eq_tensor(truth).to_kind(Kind::Float).mean(Kind::Float)
}
