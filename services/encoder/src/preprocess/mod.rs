//! An encoded image -> the pixels that the ViT reads, equal to upstream's pipeline to the byte:
//! Pillow's `convert("RGB")`, Pillow's bicubic resize to a square (aspect ratio not kept, no crop), CLIP's mean and
//! standard deviation. EXIF orientation is not applied, as upstream.
//!
//! | module | holds |
//! |---|---|
//! | [`decode`] | encoded bytes -> RGB bytes, by Pillow's colour rules; refuses by header, before it allocates |
//! | `bmp` | the one format that is decoded here rather than by a library |
//! | `foreign` | the names of formats that are not accepted |
//! | `jpeg` | JPEG over libjpeg-turbo, which Pillow uses; `libjpeg` is its safe face |
//! | `mend` | files that break their format, as far as Pillow reads them |
//! | [`outline`] | a region drawn as an image |
//! | `pixels` | what the formats share: pixels, limits, errors |
//! | `pool` | the threads that do it |
//! | [`resize`] | Pillow's antialiased bicubic in 8-bit fixed point |

mod bmp;
pub mod decode;
mod foreign;
mod jpeg;
mod libjpeg;
mod mend;
pub mod outline;
mod pixels;
pub(crate) mod pool;
pub mod resize;

#[cfg(test)]
mod tests;

use bytes::Bytes;
use emu2_proto::v1;

use pixels::{Decoded, ImageError, ImageLimits, Rgb};

/// The version of everything in this module that changes values. It is part of every cache key, so it grows with any
/// change.
pub const PREPROCESSING_VERSION: u32 = 2;

/// The mean of each channel, red, green, blue, that CLIP was trained with, of values in 0..=1 (upstream:
/// emu/constants.py).
pub const MEAN: [f32; 3] = [0.48145466, 0.4578275, 0.40821073];
/// The standard deviation of each channel, red, green, blue, that CLIP was trained with (upstream: emu/constants.py).
#[expect(clippy::excessive_precision, reason = "written as upstream writes them")]
pub const STANDARD_DEVIATION: [f32; 3] = [0.26862954, 0.26130258, 0.27577711];

/// What is to be preprocessed.
#[derive(Clone, Debug)]
pub enum Subject {
    /// An encoded image.
    Encoded(Bytes),
    /// A region, to be drawn.
    Box(v1::Box),
}

/// What the ViT reads, and what was wrong with the file that it comes from.
#[derive(Clone, Debug)]
pub struct Normalised {
    /// The normalised values in row-major order, [3, side, side].
    pub pixels: Vec<f32>,
    /// As [`pixels::Decoded::damage`].
    pub damage: Vec<&'static str>,
}

/// Decodes or draws an image, resizes it to a square of `side` pixels and normalises it.
///
/// # Errors
///
/// The bytes are no image that can be decoded, or the image is beyond a limit.
pub fn preprocess(subject: &Subject, side: usize, limits: &ImageLimits) -> Result<Normalised, ImageError> {
    let Decoded { image, damage } = match subject {
        Subject::Encoded(encoded) => decode::decode(encoded, limits)?,
        Subject::Box(region) => outline::outline(region).into(),
    };
    Ok(Normalised { pixels: normalise(&resize::resize(image, side)), damage })
}

/// Normalises bytes to (value / 255 - mean) / standard deviation: [height, width, 3] -> [3, height, width].
fn normalise(image: &Rgb) -> Vec<f32> {
    let mut pixels = Vec::with_capacity(image.data.len());
    for channel in 0..3 {
        // A byte has 256 values: two divisions for each of those, not for each pixel.
        let table: [f32; 256] =
            std::array::from_fn(|value| (value as f32 / 255.0 - MEAN[channel]) / STANDARD_DEVIATION[channel]);
        pixels.extend(image.data.iter().skip(channel).step_by(3).map(|&value| table[usize::from(value)]));
    }
    pixels
}
