//! From the messages of a `Decode` stream to a request that the engine need not check again.

use bytes::BytesMut;
use emu2_proto::{
    array::{Array, ArrayError},
    stage::{DecodeRequest, RegressedEmbeddings, decode_request::Message},
    v1::{ImageOutput, ParameterLimit, Tensor},
};
use emu2_serve::{parameters, status::Violation};

use crate::{
    config::Config,
    denoise::{DenoiseRequest, ModelInfo, SizeConditions},
};

#[cfg(test)]
mod tests;

/// Upstream's size condition of SDXL when none is given, in pixels.
const ORIGINAL_SIDE: u32 = 1024;

/// What requests are checked against: the service's limits and the model's dimensions.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) model: ModelInfo,
    pub(crate) max_queries: usize,
    /// The limits of parameters as the router is told them, which refuses by them before it asks.
    pub(crate) parameters: Vec<ParameterLimit>,
}

impl Limits {
    pub(crate) fn new(config: &Config, model: ModelInfo) -> Self {
        // Dimensions and configured limits are far below 2^32.
        let (factor, default_side) = (model.scale_factor as u32, model.default_side as u32);
        let side = config.max_image_side as u32;
        // A schedule has at most the training's timesteps.
        let steps = config.max_steps.min(model.train_steps) as u32;
        let guidance = config.max_guidance_scale;
        let limit = |field, values, default| ParameterLimit::new(field, values, Some(default));
        let parameters = vec![
            limit("image.height", factor..=side, default_side).multiple_of(factor),
            limit("image.width", factor..=side, default_side).multiple_of(factor),
            limit("image.steps", 1..=steps, steps.min(50)),
            ParameterLimit::new("image.guidance_scale", 0.0..=guidance, Some(guidance.min(3.0))),
            limit("image.original_height", 0..=u32::MAX, ORIGINAL_SIDE),
            limit("image.original_width", 0..=u32::MAX, ORIGINAL_SIDE),
            limit("image.crop_top", 0..=u32::MAX, 0),
            limit("image.crop_left", 0..=u32::MAX, 0),
        ];
        Self { max_queries: config.max_queries, parameters, model }
    }
}

/// A request that is still coming in.
#[derive(Debug)]
pub(crate) struct Intake {
    /// With every default filled in.
    image: ImageOutput,
    seed: u64,
    initial_latents: Option<Array>,
    positive: Rows,
    /// The embeddings that guidance leads away from; under guidance only.
    negative: Option<Rows>,
}

impl Intake {
    /// Opens the intake with the first message of a stream.
    ///
    /// # Errors
    ///
    /// Every mistake in the message at once.
    pub(crate) fn open(message: Option<DecodeRequest>, limits: &Limits) -> Result<Self, Vec<Violation>> {
        let mut start = match message.and_then(|message| message.message) {
            Some(Message::Start(start)) => start,
            Some(other) => {
                return Err(vec![Violation::new(
                    "start",
                    format!("must be the first message, got {}", name(&other)),
                )]);
            }
            None => return Err(vec![Violation::new("start", "must be the first message, got none")]),
        };
        let asked = start.image.take().unwrap_or_default();
        let (image, mut violations) = parameters::image(&asked, &limits.parameters);
        if !(1..=limits.max_queries).contains(&(start.queries as usize)) {
            violations.push(Violation::out_of_range("start.queries", 1, limits.max_queries, start.queries));
        }
        let initial_latents = start.initial_latents.take();
        let initial_latents = initial_latents.map(|tensor| latents(tensor, &image, limits)).transpose();
        let initial_latents = initial_latents.unwrap_or_else(|violation| {
            violations.push(violation);
            None
        });
        if !violations.is_empty() {
            return Err(violations);
        }
        let rows = |field| Rows::new(field, start.queries as usize, limits);
        let negative = (image.guidance_scale() > 1.0).then(|| rows("negative"));
        Ok(Self { initial_latents, positive: rows("positive"), negative, image, seed: start.seed })
    }

    /// Takes one more message.
    pub(crate) fn push(&mut self, message: DecodeRequest) -> Result<(), Violation> {
        match (message.message, &mut self.negative) {
            (Some(Message::Positive(chunk)), _) => self.positive.push(chunk),
            (Some(Message::Negative(chunk)), Some(negative)) => negative.push(chunk),
            (Some(Message::Negative(_)), None) => {
                let description = "must not be sent when guidance_scale is 1 or below, got";
                Err(Violation::new("negative", format!("{description} {}", self.image.guidance_scale())))
            }
            (Some(Message::Start(_)), _) => Err(Violation::new("start", "must come once, got another")),
            (None, _) => Err(Violation::new("message", "must be start, positive or negative, got none")),
        }
    }

    /// Whether everything has come.
    pub(crate) fn is_complete(&self) -> bool {
        self.all_rows().all(Rows::is_complete)
    }

    /// Returns the request, once the stream has ended or everything has come.
    ///
    /// # Errors
    ///
    /// What has not come.
    pub(crate) fn finish(self) -> Result<DenoiseRequest, Vec<Violation>> {
        let missing: Vec<_> = self.all_rows().filter_map(Rows::missing).collect();
        if !missing.is_empty() {
            return Err(missing);
        }
        let image = self.image;
        Ok(DenoiseRequest {
            height: image.height() as usize,
            width: image.width() as usize,
            steps: image.steps() as usize,
            guidance_scale: image.guidance_scale(),
            conditions: SizeConditions {
                original_height: image.original_height(),
                original_width: image.original_width(),
                crop_top: image.crop_top(),
                crop_left: image.crop_left(),
            },
            seed: self.seed,
            positive: self.positive.into_array(),
            negative: self.negative.map(Rows::into_array),
            initial_latents: self.initial_latents,
        })
    }

    fn all_rows(&self) -> impl Iterator<Item = &Rows> {
        [&self.positive].into_iter().chain(&self.negative)
    }
}

fn latents(tensor: Tensor, image: &ImageOutput, limits: &Limits) -> Result<Array, Violation> {
    let factor = limits.model.scale_factor;
    let side = |pixels: u32| pixels as usize / factor;
    let shape = [limits.model.latent_channels, side(image.height()), side(image.width())];
    // Both dtypes hold standard normal noise well enough; it becomes float32 here.
    let checked = Array::try_from(tensor).and_then(|array| {
        let dtype = array.dtype();
        array.expect(dtype, &shape)
    });
    checked.map_err(|error| violation("start.initial_latents", error))
}

/// Makes a violation of an array's error, which reads on from its name; a violation reads on from the field's.
fn violation(field: &str, error: ArrayError) -> Violation {
    Violation::new(field, format!("must be a valid tensor: {error}"))
}

fn name(message: &Message) -> &'static str {
    match message {
        Message::Start(_) => "start",
        Message::Positive(_) => "positive",
        Message::Negative(_) => "negative",
    }
}

/// Embeddings that come row by row, in order.
#[derive(Debug)]
struct Rows {
    field: &'static str,
    model: ModelInfo,
    expected: usize,
    got: usize,
    data: BytesMut,
}

impl Rows {
    fn new(field: &'static str, expected: usize, limits: &Limits) -> Self {
        let bytes = expected * limits.model.width * limits.model.dtype.size();
        Self { field, model: limits.model.clone(), expected, got: 0, data: BytesMut::with_capacity(bytes) }
    }

    fn is_complete(&self) -> bool {
        self.got == self.expected
    }

    fn missing(&self) -> Option<Violation> {
        let Self { field, expected, got, .. } = self;
        let description = format!("must have {expected} rows (start.queries), the stream ended after {got}");
        (!self.is_complete()).then(|| Violation::new(*field, description))
    }

    fn push(&mut self, chunk: RegressedEmbeddings) -> Result<(), Violation> {
        let field = self.field;
        if chunk.start as usize != self.got {
            let description = format!("must be {}, the next row to come, got {}", self.got, chunk.start);
            return Err(Violation::new(format!("{field}.start"), description));
        }
        let embeddings = format!("{field}.embeddings");
        let array = Array::try_from(chunk.embeddings).map_err(|error| violation(&embeddings, error))?;
        let rows = array.shape()[0];
        let shape = [rows, self.model.width];
        let array = array.expect(self.model.dtype, &shape).map_err(|error| violation(&embeddings, error))?;
        if rows > self.expected - self.got {
            let left = self.expected - self.got;
            let description = format!("must have at most {left} more rows (start.queries), got {rows}");
            return Err(Violation::new(embeddings, description));
        }
        self.data.extend_from_slice(array.data());
        self.got += rows;
        Ok(())
    }

    fn into_array(self) -> Array {
        let shape = vec![self.got, self.model.width];
        Array::new(self.model.dtype, shape, self.data.freeze()).expect("rows of checked arrays are an array")
    }
}
