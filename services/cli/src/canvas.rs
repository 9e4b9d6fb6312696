//! A picture to draw lines and words on.

use embedded_graphics::{
    Drawable, Pixel,
    draw_target::DrawTarget,
    geometry::{OriginDimensions, Point, Size},
    mono_font::{MonoFont, MonoTextStyle},
    pixelcolor::{Rgb888, RgbColor},
    text::{Alignment, Baseline, Text, TextStyleBuilder},
};
use image::{Rgb, RgbImage};

#[derive(Debug)]
pub struct Canvas(pub RgbImage);

impl Canvas {
    pub fn white(width: u32, height: u32) -> Self {
        Self(RgbImage::from_pixel(width, height, Rgb([255; 3])))
    }

    /// One line; `at`: where its baseline begins, is centred or ends.
    pub fn label(&mut self, text: &str, font: &MonoFont<'_>, at: Point, alignment: Alignment) {
        let style = MonoTextStyle::new(font, Rgb888::BLACK);
        Text::with_alignment(text, at, style, alignment).draw(self).expect("infallible");
    }

    /// Several lines; `at`: their top left.
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

    /// What lies outside is left out.
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
