//! A box as the image that the model sees of it in a served prompt: drawn by the router, reduced by the encoder.

use emu2_encoder::preprocess::{decode::Rgb, resize};
use emu2_proto::v1;
use emu2_router::drawing;

use crate::data::{
    image::{Image, SIDE},
    scene::Bounds,
};

/// Returns the outline of a box as the encoder sees it: white on black.
pub fn image(bounds: Bounds) -> Image {
    let [left, top, right, bottom] = bounds.fractions();
    let region = v1::Box { left, top, right, bottom, phrase: String::new() };
    let side = drawing::SIDE as usize;
    Image::new(resize::resize(Rgb { width: side, height: side, data: drawing::outline(&region) }, SIDE).data)
}
