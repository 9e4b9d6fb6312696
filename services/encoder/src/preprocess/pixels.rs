//! What every format's decoder shares: the pixels that it gives, the limits that it keeps, and why it refuses.

use serde::{Deserialize, Serialize};

/// A decoded image: rows of red, green and blue bytes, [height, width, 3].
#[derive(Clone, Debug, PartialEq)]
pub struct Rgb {
    /// The width in pixels.
    pub width: usize,
    /// The height in pixels.
    pub height: usize,
    /// The bytes, row by row.
    pub data: Vec<u8>,
}

/// How large a picture may be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageLimits {
    /// Width times height. 2^26 admits the photographs of phones (50 megapixels) and holds one decode to about 1 GB,
    /// and an ordinary JPEG to 400 MB.
    pub max_pixels: u64,
    /// Longer of width and height, in pixels: bounds the resize's tables and rows.
    pub max_side: u32,
}

impl Default for ImageLimits {
    fn default() -> Self {
        Self { max_pixels: 1 << 26, max_side: 32_768 }
    }
}

/// Why bytes are not a picture that this service encodes.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ImageError {
    #[error("must be an encoded picture ({ACCEPTED}), got 0 bytes")]
    Empty,
    #[error("must be an encoded picture ({ACCEPTED}), got {0} bytes of something else")]
    UnknownFormat(usize),
    #[error("must have at most {max} pixels, got {width} x {height} = {pixels}")]
    TooManyPixels { width: u64, height: u64, pixels: u64, max: u64 },
    #[error("must have sides of at most {max} pixels, got {width} x {height}")]
    TooLong { width: u64, height: u64, max: u32 },
    #[error("must be a single picture, got an animated {0}: send frames as video")]
    Animated(&'static str),
    #[error("must be a whole {0} file, got a truncated one")]
    Truncated(&'static str),
    #[error("must be a well-formed {format} file: {reason}")]
    Undecodable { format: &'static str, reason: String },
}

/// The formats by name, for messages.
pub const ACCEPTED: &str = "PNG, JPEG, WebP, BMP or single-frame GIF";

impl ImageLimits {
    /// Sides as the header states them; zero sides are malformed.
    pub(super) fn check(
        &self,
        format: &'static str,
        width: u64,
        height: u64,
    ) -> Result<(usize, usize), ImageError> {
        if width == 0 || height == 0 {
            return Err(undecodable(format, format!("it is {width} x {height} pixels")));
        }
        let pixels = width.saturating_mul(height);
        if pixels > self.max_pixels {
            return Err(ImageError::TooManyPixels { width, height, pixels, max: self.max_pixels });
        }
        if width.max(height) > u64::from(self.max_side) {
            return Err(ImageError::TooLong { width, height, max: self.max_side });
        }
        Ok((width as usize, height as usize))
    }
}

pub(super) fn undecodable(format: &'static str, reason: impl ToString) -> ImageError {
    ImageError::Undecodable { format, reason: reason.to_string() }
}

/// Samples of 1, 2, 4 or 8 bits, the first in the highest bits of its byte.
pub(super) fn samples(row: &[u8], bits: usize, width: usize) -> impl Iterator<Item = u8> + '_ {
    let mask = (0xFF_u16 >> (8 - bits)) as u8;
    (0..width).map(move |x| {
        let bit = x * bits;
        row[bit / 8] >> (8 - bits - bit % 8) & mask
    })
}

/// Pillow fills what a short palette leaves open with black.
pub(super) fn colour_of(palette: &[u8], index: u8) -> [u8; 3] {
    let at = usize::from(index) * 3;
    palette.get(at..at + 3).map_or([0; 3], |colour| [colour[0], colour[1], colour[2]])
}
