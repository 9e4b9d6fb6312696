//! An image on which lines and words are drawn.

use embedded_graphics::{
    Drawable, Pixel,
    draw_target::DrawTarget,
    geometry::{OriginDimensions, Point, Size},
    mono_font::{MonoFont, MonoTextStyle},
    pixelcolor::{Rgb888, RgbColor},
    text::{Baseline, Text, TextStyleBuilder},
};
use image::{Rgb, RgbImage};

/// An RGB image that `embedded-graphics` draws on; whatever lies outside of it is left out.
#[derive(Debug)]
pub struct Canvas(pub RgbImage);

impl Canvas {
    /// Returns a white canvas of `width` × `height` pixels.
    pub fn white(width: u32, height: u32) -> Self {
        Self(RgbImage::from_pixel(width, height, Rgb([255; 3])))
    }

    /// Draws lines of text in black, with the top left corner of the first at `at`.
    pub fn paragraph(&mut self, text: &str, font: &MonoFont<'_>, at: Point) {
        let place = TextStyleBuilder::new().baseline(Baseline::Top).build();
        let style = MonoTextStyle::new(font, Rgb888::BLACK);
        Text::with_text_style(text, at, style, place).draw(self).expect("infallible");
    }
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        Size::new(self.0.width(), self.0.height())
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = std::convert::Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> Result<(), Self::Error> {
        for Pixel(Point { x, y }, colour) in pixels {
            let inside = u32::try_from(x).ok().zip(u32::try_from(y).ok());
            if let Some(pixel) = inside.and_then(|(x, y)| self.0.get_pixel_mut_checked(x, y)) {
                *pixel = Rgb([colour.r(), colour.g(), colour.b()]);
            }
        }
        Ok(())
    }
}
