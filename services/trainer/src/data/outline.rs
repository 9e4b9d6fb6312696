//! A box as the image that the model sees of it in a served prompt: drawn and reduced by the encoder.

use emu2_encoder::preprocess::{outline, resize};
use emu2_proto::v1;

use crate::data::{
    image::{Image, SIDE},
    scene::Bounds,
};

/// Returns the outline of a box as the encoder sees it: white on black.
pub fn image(bounds: Bounds) -> Image {
    let [left, top, right, bottom] = bounds.fractions();
    let region = v1::Box { left, top, right, bottom, phrase: String::new() };
    Image::new(resize::resize(outline::outline(&region), SIDE).data)
}
