//! A canvas that plotters draws on. Text is written in a font of fixed width that is part of this program, so that no
//! font of the system is needed.

use std::convert::Infallible;

use embedded_graphics::{
    geometry::Point,
    mono_font::{MonoFont, ascii::FONT_9X15},
};
use emu2_sheet::canvas::Canvas;
use image::Rgb;
use plotters_backend::{
    BackendColor, BackendCoord, BackendTextStyle, DrawingBackend, DrawingErrorKind,
    text_anchor::{HPos, VPos},
};

const FONT: MonoFont<'_> = FONT_9X15;

/// A [`Canvas`] as a backend of plotters. Of a text's style only its anchor counts: text is black, upright and in
/// [`FONT`].
pub(super) struct CanvasBackend<'a>(pub(super) &'a mut Canvas);

type Drawn<T> = Result<T, DrawingErrorKind<Infallible>>;

impl DrawingBackend for CanvasBackend<'_> {
    type ErrorType = Infallible;

    fn get_size(&self) -> (u32, u32) {
        self.0.0.dimensions()
    }

    fn ensure_prepared(&mut self) -> Drawn<()> {
        Ok(())
    }

    fn present(&mut self) -> Drawn<()> {
        Ok(())
    }

    fn draw_pixel(&mut self, (x, y): BackendCoord, color: BackendColor) -> Drawn<()> {
        let inside = u32::try_from(x).ok().zip(u32::try_from(y).ok());
        if let Some(pixel) = inside.and_then(|(x, y)| self.0.0.get_pixel_mut_checked(x, y)) {
            let (red, green, blue) = color.rgb;
            let over = Rgb([red, green, blue]);
            for (under, over) in pixel.0.iter_mut().zip(over.0) {
                let mixed = f64::from(over) * color.alpha + f64::from(*under) * (1.0 - color.alpha);
                *under = mixed.round() as u8;
            }
        }
        Ok(())
    }

    fn draw_text<S: BackendTextStyle>(&mut self, text: &str, style: &S, (x, y): BackendCoord) -> Drawn<()> {
        let (width, height) = self.estimate_text_size(text, style)?;
        let anchor = style.anchor();
        let left = match anchor.h_pos {
            HPos::Left => x,
            HPos::Center => x - width as i32 / 2,
            HPos::Right => x - width as i32,
        };
        let top = match anchor.v_pos {
            VPos::Top => y,
            VPos::Center => y - height as i32 / 2,
            VPos::Bottom => y - height as i32,
        };
        self.0.paragraph(text, &FONT, Point::new(left, top));
        Ok(())
    }

    fn estimate_text_size<S: BackendTextStyle>(&self, text: &str, _style: &S) -> Drawn<(u32, u32)> {
        let letter = FONT.character_size;
        Ok((letter.width * text.chars().count() as u32, letter.height))
    }
}
