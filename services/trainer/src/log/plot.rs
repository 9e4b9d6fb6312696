//! A curve as a PNG: samples across, loss up on a logarithmic scale.

use std::path::Path;

use anyhow::{Context, Result};
use embedded_graphics::{
    Drawable,
    geometry::Point,
    mono_font::ascii::FONT_9X15,
    pixelcolor::Rgb888,
    primitives::{Line, Primitive, PrimitiveStyle},
    text::Alignment,
};
use emu2_sheet::canvas::Canvas;

const WIDTH: u32 = 960;
const HEIGHT: u32 = 540;
/// Between the image's edges and the axes.
const LEFT: i32 = 80;
const RIGHT: i32 = 40;
const TOP: i32 = 40;
const BOTTOM: i32 = 50;
/// Labelled lines along each axis.
const TICKS: i32 = 5;
const GREY: Rgb888 = Rgb888::new(210, 210, 210);
const BLUE: Rgb888 = Rgb888::new(30, 80, 170);

/// `points`: samples and loss, in order.
pub(super) fn draw(path: &Path, title: &str, points: &[(f64, f64)]) -> Result<()> {
    let mut canvas = Canvas::white(WIDTH, HEIGHT);
    // What is not finite has no place; a loss of 0 has none on this scale.
    let points: Vec<_> = points.iter().copied().filter(|&(_, loss)| loss.is_finite() && loss > 0.0).collect();
    let axes = Axes::around(&points);
    frame(&mut canvas, title, &axes);
    let curve: Vec<_> = points.iter().map(|&point| axes.place(point)).collect();
    // Line by line: joints of a thick polyline overflow on sharp angles.
    for ends in curve.windows(2) {
        let line = Line::new(ends[0], ends[1]).into_styled(PrimitiveStyle::with_stroke(BLUE, 2));
        line.draw(&mut canvas).expect("infallible");
    }
    canvas.0.save(path).with_context(|| format!("cannot write {}", path.display()))
}

/// What the image's edges stand for.
struct Axes {
    samples_max: f64,
    /// Logarithms.
    low: f64,
    high: f64,
}

impl Axes {
    fn around(points: &[(f64, f64)]) -> Self {
        let samples_max = points.iter().map(|point| point.0).fold(1.0, f64::max);
        let logarithms = || points.iter().map(|point| point.1.ln());
        let (low, high) =
            (logarithms().fold(f64::INFINITY, f64::min), logarithms().fold(f64::NEG_INFINITY, f64::max));
        if low.is_finite() && high > low {
            Self { samples_max, low, high }
        } else {
            // One point, or none: any scale around it.
            let middle = if low.is_finite() { low } else { 0.0 };
            Self { samples_max, low: middle - 1.0, high: middle + 1.0 }
        }
    }

    fn place(&self, (samples, loss): (f64, f64)) -> Point {
        let up = (loss.ln() - self.low) / (self.high - self.low);
        Self::at(samples / self.samples_max, up)
    }

    /// Shares of the way across and up.
    fn at(across: f64, up: f64) -> Point {
        let (width, height) = (WIDTH as i32 - LEFT - RIGHT, HEIGHT as i32 - TOP - BOTTOM);
        Point::new(LEFT + (across * f64::from(width)) as i32, TOP + ((1.0 - up) * f64::from(height)) as i32)
    }
}

/// Lines, numbers and titles.
fn frame(canvas: &mut Canvas, title: &str, axes: &Axes) {
    let grey = PrimitiveStyle::with_stroke(GREY, 1);
    let mut text = |text: &str, at, alignment| canvas.label(text, &FONT_9X15, at, alignment);
    text(title, Point::new(LEFT, 25), Alignment::Left);
    text("samples", Axes::at(0.5, 0.0) + Point::new(0, 40), Alignment::Center);
    text("loss", Point::new(LEFT - 8, 25), Alignment::Right);
    for tick in 0..=TICKS {
        let share = f64::from(tick) / f64::from(TICKS);
        let samples = format!("{:.0}", share * axes.samples_max);
        text(&samples, Axes::at(share, 0.0) + Point::new(0, 20), Alignment::Center);
        let loss = format!("{:.3}", (axes.low + share * (axes.high - axes.low)).exp());
        text(&loss, Axes::at(0.0, share) + Point::new(-8, 5), Alignment::Right);
    }
    for tick in 0..=TICKS {
        let share = f64::from(tick) / f64::from(TICKS);
        for (x, y, x_end, y_end) in [(share, 0.0, share, 1.0), (0.0, share, 1.0, share)] {
            let line = Line::new(Axes::at(x, y), Axes::at(x_end, y_end));
            line.into_styled(grey).draw(canvas).expect("infallible");
        }
    }
}

#[cfg(test)]
mod tests {
    use embedded_graphics::pixelcolor::RgbColor;
    use image::Rgb;

    use super::*;

    #[test]
    fn a_curve_falls_and_odd_values_do_no_harm() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.png");
        for points in [vec![], vec![(10.0, 2.0)], vec![(10.0, f64::NAN), (20.0, 0.0)]] {
            draw(&path, "few", &points).unwrap();
        }
        let points: Vec<_> = (1..=100).map(|i| (f64::from(i), 100.0 / f64::from(i))).collect();
        draw(&path, "a curve", &points).unwrap();
        let image = image::open(&path).unwrap().to_rgb8();
        let blue = Rgb([BLUE.r(), BLUE.g(), BLUE.b()]);
        let rows = |column: u32| (0..HEIGHT).find(|&row| *image.get_pixel(column, row) == blue);
        let (first, last) = (rows(LEFT as u32 + 20).unwrap(), rows(WIDTH - RIGHT as u32 - 5).unwrap());
        assert!(first < last, "{first} {last}");
    }
}
