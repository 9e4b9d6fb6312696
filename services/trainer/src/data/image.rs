//! The pixels of one image.

use std::{fmt, sync::Arc};

/// Width and height of every image, in pixels.
pub const SIDE: usize = 64;

/// An RGB image of [`SIDE`] × [`SIDE`] pixels, cheap to clone.
#[derive(Clone, PartialEq, Eq)]
pub struct Image(Arc<[u8]>);

impl Image {
    /// The number of bytes of an image.
    pub const BYTES: usize = SIDE * SIDE * 3;

    /// Returns the image with these bytes, row by row from the top.
    ///
    /// # Panics
    /// If `rgb` has another length than [`Self::BYTES`].
    pub fn new(rgb: Vec<u8>) -> Self {
        assert_eq!(rgb.len(), Self::BYTES, "an image is {SIDE} x {SIDE} x 3 bytes");
        Self(rgb.into())
    }

    /// Returns the bytes: RGB, row by row from the top.
    pub fn rgb(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").finish_non_exhaustive()
    }
}
