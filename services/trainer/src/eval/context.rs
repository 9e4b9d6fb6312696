//! What every case of an evaluation is made and judged with.

use crate::{data::World, judge::Judge};

/// The scenes, the judge and the models of one evaluation.
pub struct EvalContext {
    /// Where scenes and documents come from.
    pub world: World,
    /// Tells what an image shows.
    pub judge: Judge,
    /// The name of the served model that answers in text.
    pub text_model: String,
    /// The name of the served model that answers with an image.
    pub image_model: String,
    /// How images are asked for.
    pub image_settings: ImageSettings,
}

/// The parameters of requests for images.
#[derive(Debug, Clone, Copy)]
pub struct ImageSettings {
    /// Denoising steps.
    pub steps: u32,
    /// The scale of classifier-free guidance.
    pub guidance_scale: f32,
}
