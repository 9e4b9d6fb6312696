//! Images as the models read them.

use emu2_encoder::preprocess::{MEAN, STANDARD_DEVIATION};
use tch::{Device, Kind, Tensor};

use crate::data::{Image, SIDE};

/// The bytes of images, one after the other.
#[derive(Clone, Debug, Default)]
pub struct Pixels {
    bytes: Vec<u8>,
}

impl FromIterator<Image> for Pixels {
    fn from_iter<I: IntoIterator<Item = Image>>(images: I) -> Self {
        let mut bytes = Vec::new();
        images.into_iter().for_each(|image| bytes.extend_from_slice(image.rgb()));
        Self { bytes }
    }
}

impl Pixels {
    /// Returns the images as the encoder normalises them: [batch, 3, height, width_px]
    pub fn normalised(&self, device: Device) -> Tensor {
        // [3] -> [1, 3, 1, 1]
        let channels = |values: &[f32; 3]| Tensor::from_slice(values).to_device(device).view([1, 3, 1, 1]);
        (self.shares(device) - channels(&MEAN)) / channels(&STANDARD_DEVIATION)
    }

    /// Returns the images as the VAE takes them, in -1..=1: [batch, 3, height, width_px]
    pub fn signed(&self, device: Device) -> Tensor {
        self.shares(device) * 2.0 - 1.0
    }

    /// 0..=1
    fn shares(&self, device: Device) -> Tensor {
        let side = SIDE as i64;
        let bytes = Tensor::from_slice(&self.bytes).to_device(device).view([-1, side, side, 3]);
        // [batch, height, width_px, 3] -> [batch, 3, height, width_px]
        bytes.permute([0, 3, 1, 2]).contiguous().to_kind(Kind::Float) / 255.0
    }
}
