//! Batches of images without text, which two objectives share.

use std::sync::Arc;

use anyhow::{Context, Result};
use tch::Tensor;

use super::{
    interface::{Batch, BatchFn},
    random::sample_number,
};
use crate::{model::Model, pixels::Pixels, samples::SampleSource};

/// The images of one step.
pub struct ImageBatch {
    /// The images one after the other.
    pub pixels: Pixels,
    /// The number of images.
    pub images: usize,
}

impl Batch for ImageBatch {
    fn samples(&self) -> usize {
        self.images
    }
}

/// Returns the function that makes batches of `batch` scenes' images.
pub(crate) fn image_batches(source: &Arc<dyn SampleSource>, batch: usize) -> BatchFn<ImageBatch> {
    let source = Arc::clone(source);
    Box::new(move |step| {
        let image = |index| source.scene(sample_number(step, batch, index)).image;
        ImageBatch { pixels: (0..batch).map(image).collect(), images: batch }
    })
}

/// Returns the shape of the latents of `count` images: [count, channels, height, width] in latent pixels.
///
/// # Errors
/// When `pixels` is not [batch, 3, height, width_px].
pub(crate) fn latents_shape(model: &Model, count: usize, pixels: &Tensor) -> Result<[i64; 4]> {
    let (_, _, height, width_px) = pixels.size4().context("pixels have four dimensions")?;
    // Each level of the VAE but the first halves both sides.
    let halvings = model.vae.decoder.up_blocks.len() - 1;
    Ok([count as i64, model.unet.config.in_channels, height >> halvings, width_px >> halvings])
}
