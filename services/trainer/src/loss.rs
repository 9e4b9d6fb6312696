//! What is minimised: the paper's objectives, on the services' own models.
//!
//! | loss | of | paper |
//! |---|---|---|
//! | [`next_element`] | tower and llm: the next token, or the next embedding of an image | 2.1, 2.2.2 |
//! | [`autoencode`] | VAE | latent diffusion, arXiv 2112.10752; no adversary |
//! | [`denoise`] | UNet, on embeddings of the frozen tower, or on what the llm predicts of them ([`told`]) | 2.2.3 |
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
    pub fed_back: FedBack,
}

/// From what an embedding is predicted, besides the prompt: what stands in the place of those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FedBack {
    /// Those of the picture. From these alone, a model learns to copy the background and the thing from the first ones,
    /// and in serving the first ones are its own, of which it has learned little.
    Truth,
    /// Zeros: all must come from the prompt.
    Nothing,
    /// What the model predicts where nothing is fed back, much as in serving, where each is fed its own.
    Predicted,
}

impl FedBack {
    fn error_name(self) -> &'static str {
        match self {
            Self::Truth => "mean_squared_error",
            Self::Nothing => "mean_squared_error_blind",
            Self::Predicted => "mean_squared_error_served",
        }
    }
}

/// Documents as the llm reads them.
struct Reading<'a> {
    llm: &'a Llama,
    layout: &'a Layout,
    /// Of every position, with whatever a slot's token gives in slots: [(sequences tokens), hidden]
    words: Tensor,
    /// Of the pictures, if there are any: [(pictures queries), width]
    embeddings: Option<Tensor>,
}

impl<'a> Reading<'a> {
    /// `pixels`: normalised, [pictures, 3, height, width_px]
    fn new((tower, llm): (&EvaVit, &'a Llama), layout: &'a Layout, pixels: &Tensor) -> Self {
        let words = llm.embed(&rows(&layout.ids, llm.device()));
        let encode = || tower.encode_image(&pixels.to_kind(tower.kind()), tower.config.n_query).flatten(0, 1);
        Self { llm, layout, words, embeddings: (!layout.slots.is_empty()).then(encode) }
    }

    fn rows(&self, rows: &[i64]) -> Tensor {
        self::rows(rows, self.llm.device())
    }

    /// States after the last layer, [(sequences tokens), hidden]
    fn hidden(&self, fed_back: FedBack) -> Tensor {
        let Some(embeddings) = &self.embeddings else { return self.forward(&self.words) };
        // Where nothing is painted, nothing is fed back, and a second pass would be for nothing.
        let fed_back = if self.layout.images.is_empty() { FedBack::Truth } else { fed_back };
        let painted = self.rows(&self.layout.images.what);
        let looking_at = |embeddings: &Tensor| {
            let slots = self.rows(&self.layout.slots);
            self.forward(&self.words.index_copy(0, &slots, &self.llm.project_up(embeddings)))
        };
        let blind = || looking_at(&embeddings.index_fill(0, &painted, 0.0));
        match fed_back {
            FedBack::Truth => looking_at(embeddings),
            FedBack::Nothing => blind(),
            FedBack::Predicted => {
                let predicted = tch::no_grad(|| self.predicted(&blind()));
                looking_at(&embeddings.index_copy(0, &painted, &predicted))
            }
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let shape = [self.layout.sequences as i64, self.layout.tokens as i64, self.words.size()[1]];
        self.llm.forward_whole(&x.view(shape)).flatten(0, 1)
    }

    /// The embeddings of pictures to paint, [(painted queries), width]
    fn predicted(&self, hidden: &Tensor) -> Tensor {
        self.llm.project_down(&hidden.index_select(0, &self.rows(&self.layout.images.from)))
    }

    /// What they are to be.
    fn target(&self) -> Option<Tensor> {
        let embeddings = self.embeddings.as_ref().filter(|_| !self.layout.images.is_empty())?;
        Some(embeddings.index_select(0, &self.rows(&self.layout.images.what)).detach())
    }
}

fn rows(rows: &[i64], device: Device) -> Tensor {
    Tensor::from_slice(rows).to_device(device)
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
    let reading = Reading::new((tower, llm), layout, pixels);
    let hidden = reading.hidden(regression.fed_back);
    let mut loss = Loss::new(llm.device());
    if !layout.text.is_empty() {
        let logits = llm.logits(&hidden.index_select(0, &reading.rows(&layout.text.from)));
        let tokens = reading.rows(&layout.text.what);
        let entropy = logits.cross_entropy_for_logits(&tokens);
        loss.part("token_accuracy", accuracy(&logits, &tokens));
        loss.add("cross_entropy", entropy, 1.0);
    }
    if let Some(target) = reading.target().filter(|_| regression.weight > 0.0) {
        let error = mean_squared(&reading.predicted(&hidden), &target);
        loss.add(regression.fed_back.error_name(), error, regression.weight);
    }
    loss
}

/// The embeddings of pictures to paint, as the model predicts them from its own, or `truly` the tower's:
/// [painted, queries, width]. Nothing is learned through them.
///
/// # Panics
/// If nothing is to be painted.
pub fn told(model: &Model, layout: &Layout, pixels: &Tensor, truly: bool) -> Tensor {
    let embeddings = tch::no_grad(|| {
        let reading = Reading::new((&model.tower, &model.llm), layout, pixels);
        let target = reading.target().expect("something is to be painted");
        if truly { target } else { reading.predicted(&reading.hidden(FedBack::Predicted)) }
    });
    embeddings.view([-1, i64::from(model.n_query()), model.tower.config.width])
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

/// The error of the predicted noise, given embeddings. Dropped ones are those of normalised pixels that are all 0, which
/// serving takes for guidance of autoencoding.
///
/// `embeddings`: of the frozen tower, or what the llm predicts of them, [pictures, queries, width]; `pixels`: in -1..=1,
/// [pictures, 3, height, width_px]
pub fn denoise(model: &Model, embeddings: &Tensor, pixels: &Tensor, noising: &Noising) -> Loss {
    let scale = model.vae.decoder.scaling_factor;
    let kind = model.kind();
    let times = noising.sampling.size()[0] / pixels.size()[0];
    let (latents, embeddings) = tch::no_grad(|| {
        let latents = model.vae.encoder.forward(&pixels.to_kind(kind));
        let [mean, log_variance] = [latents.mean, latents.log_variance].map(|x| x.repeat([times, 1, 1, 1]));
        let sample = mean + (log_variance * 0.5).exp() * &noising.sampling;
        let blank = pixels.narrow(0, 0, 1).zeros_like();
        let nothing = model.tower.encode_image(&blank.to_kind(kind), model.n_query());
        // [batch] -> [batch, 1, 1]
        let dropped = noising.dropped.view([-1, 1, 1]);
        (sample * scale, nothing.where_self(&dropped, &embeddings.repeat([times, 1, 1])))
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
