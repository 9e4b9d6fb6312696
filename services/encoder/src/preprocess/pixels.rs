//! What every format's decoder shares: the pixels that it gives, the limits that it keeps, and why it refuses.

use serde::{Deserialize, Serialize};

/// A decoded image: rows of red, green and blue bytes, [height, width, 3].
#[derive(Clone, Debug, PartialEq)]
pub struct Rgb {
    /// The width in pixels.
    pub width: usize,
    /// The height in pixels.
    pub height: usize,
    /// The bytes in row-major order, three for each pixel.
    pub data: Vec<u8>,
}

/// An image, and what was wrong with its file.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    /// The pixels, as Pillow shows them.
    pub image: Rgb,
    /// What is damaged in the file and was mended or left out, as sentences without a full stop; empty for a sound
    /// file.
    pub damage: Vec<&'static str>,
}

impl From<Rgb> for Decoded {
    fn from(image: Rgb) -> Self {
        Self { image, damage: Vec::new() }
    }
}

/// How large an image may be, and how sound its file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageLimits {
    /// The largest width times height. 2^26 admits the photographs of phones (50 megapixels) and holds one decode to
    /// about 1 GB, and an ordinary JPEG to 400 MB.
    pub max_pixels: u64,
    /// The largest width and the largest height, in pixels: bounds the resize's tables and rows.
    pub max_side: u32,
    /// Whether a file is refused that is damaged, yet that Pillow shows; otherwise its answer carries warnings.
    pub refuse_damaged: bool,
}

impl Default for ImageLimits {
    fn default() -> Self {
        Self { max_pixels: 1 << 26, max_side: 32_768, refuse_damaged: false }
    }
}

/// Why bytes are not an image that this service encodes. The messages read on from the name of a field.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ImageError {
    /// There are no bytes.
    #[error("must be an encoded image ({ACCEPTED}), got 0 bytes")]
    Empty,
    /// The first bytes are those of no format that is decoded; it holds the number of bytes.
    #[error("must be an encoded image ({ACCEPTED}), got {0} bytes of something else")]
    UnknownFormat(usize),
    /// The file is an image of a format that is known and not accepted.
    #[error("must be an encoded image ({ACCEPTED}), got {format}: {advice}")]
    NotAccepted {
        /// The file's format.
        format: &'static str,
        /// How to convert the file.
        advice: &'static str,
    },
    /// The image has more pixels than [`ImageLimits::max_pixels`].
    #[error("must have at most {max} pixels, got {width} x {height} = {pixels}")]
    TooManyPixels {
        /// The width in pixels.
        width: u64,
        /// The height in pixels.
        height: u64,
        /// Width times height.
        pixels: u64,
        /// The limit.
        max: u64,
    },
    /// A side of the image is longer than [`ImageLimits::max_side`].
    #[error("must have sides of at most {max} pixels, got {width} x {height}")]
    TooLong {
        /// The width in pixels.
        width: u64,
        /// The height in pixels.
        height: u64,
        /// The limit in pixels.
        max: u32,
    },
    /// The file, whose format it holds, has more than one frame.
    #[error("must be a single image, got an animated {0}: send frames as video")]
    Animated(&'static str),
    /// The file, whose format it holds, ends too early.
    #[error("must be a whole {0} file, got a truncated one")]
    Truncated(&'static str),
    /// The file is damaged, though it can be shown, and [`ImageLimits::refuse_damaged`] is set; it holds the damage.
    #[error("must be an undamaged file: {0} (image.refuse_damaged)")]
    Damaged(String),
    /// The file breaks its format, or is of a variant that is not decoded.
    #[error("must be a well-formed {format} file: {reason}")]
    Undecodable {
        /// The file's format.
        format: &'static str,
        /// What is wrong with the file.
        reason: String,
    },
}

/// The formats by name, for messages.
const ACCEPTED: &str = "PNG, JPEG, WebP, BMP or single-frame GIF";

impl ImageLimits {
    /// Checks the sides that a header states, in pixels; a side of zero is malformed.
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

/// Reads samples of 1, 2, 4 or 8 bits, the first in the highest bits of its byte.
pub(super) fn samples(row: &[u8], bits: usize, width: usize) -> impl Iterator<Item = u8> + '_ {
    let mask = (0xFF_u16 >> (8 - bits)) as u8;
    (0..width).map(move |x| {
        let bit = x * bits;
        row[bit / 8] >> (8 - bits - bit % 8) & mask
    })
}

/// Returns the colour of an index; Pillow fills what a short palette leaves open with black.
pub(super) fn colour_of(palette: &[u8], index: u8) -> [u8; 3] {
    let at = usize::from(index) * 3;
    palette.get(at..at + 3).map_or([0; 3], |colour| [colour[0], colour[1], colour[2]])
}
