//! The curve of a loss as a PNG: samples across, the loss up on a logarithmic scale.

mod canvas_backend;

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use emu2_sheet::canvas::Canvas;
use plotters::prelude::{
    BLACK, ChartBuilder, Color, IntoDrawingArea, IntoFont, LineSeries, RGBColor, TRANSPARENT,
};

use canvas_backend::CanvasBackend;

const WIDTH: u32 = 960;
const HEIGHT: u32 = 540;
/// Pixels between the image's edges and whatever is drawn.
const MARGIN: u32 = 15;
/// Pixels for the labels below and left of the axes.
const LABELS_HEIGHT: u32 = 45;
const LABELS_WIDTH: u32 = 65;
/// Labels along each axis, at most.
const LABELS: usize = 6;
const GREY: RGBColor = RGBColor(210, 210, 210);
const BLUE: RGBColor = RGBColor(30, 80, 170);

/// Writes the curve through `points`, each of samples and loss, in order.
///
/// # Errors
/// When the file cannot be written.
pub(super) fn draw(path: &Path, title: &str, points: &[(f64, f64)]) -> Result<()> {
    // What is not finite has no place; a loss of 0 has none on this scale.
    let points = points.iter().filter(|(_, loss)| loss.is_finite() && *loss > 0.0);
    // Logarithms on a linear axis: plotters' logarithmic one has labels at powers of ten alone, of which most curves
    // cross none.
    let points: Vec<_> = points.map(|&(samples, loss)| (samples, loss.ln())).collect();
    let mut canvas = Canvas::white(WIDTH, HEIGHT);
    // Its error borrows the canvas, so that only its text can be passed on.
    chart(&mut canvas, title, &points).map_err(|error| anyhow!("cannot draw the curve: {error}"))?;
    canvas.0.save(path).with_context(|| format!("cannot write {}", path.display()))
}

/// Draws axes and curve. `points`: samples and the logarithm of the loss.
fn chart(canvas: &mut Canvas, title: &str, points: &[(f64, f64)]) -> Result<(), Box<dyn std::error::Error>> {
    // Its family and size are not looked at: see `CanvasBackend`.
    let font = || ("monospace", 15).into_font().color(&BLACK);
    let samples_max = points.iter().map(|point| point.0).fold(1.0, f64::max);
    let area = CanvasBackend(canvas).into_drawing_area();
    let mut chart = ChartBuilder::on(&area)
        .caption(format!("{title}: loss"), font())
        .margin(MARGIN)
        .x_label_area_size(LABELS_HEIGHT)
        .y_label_area_size(LABELS_WIDTH)
        .build_cartesian_2d(0.0..samples_max, logarithms(points))?;
    chart
        .configure_mesh()
        .x_labels(LABELS)
        .y_labels(LABELS)
        .x_label_formatter(&|samples| format!("{samples:.0}"))
        .y_label_formatter(&|logarithm| format!("{:.3}", logarithm.exp()))
        .x_desc("samples")
        .label_style(font())
        .axis_desc_style(font())
        .bold_line_style(GREY)
        .light_line_style(TRANSPARENT)
        .draw()?;
    chart.draw_series(LineSeries::new(points.iter().copied(), BLUE.stroke_width(2)))?;
    area.present()?;
    Ok(())
}

/// Returns the lowest and the highest logarithm, or a range around the only one.
fn logarithms(points: &[(f64, f64)]) -> std::ops::Range<f64> {
    let logarithms = || points.iter().map(|point| point.1);
    let (low, high) =
        (logarithms().fold(f64::INFINITY, f64::min), logarithms().fold(f64::NEG_INFINITY, f64::max));
    if low < high {
        return low..high;
    }
    let middle = if low.is_finite() { low } else { 0.0 };
    middle - 1.0..middle + 1.0
}

#[cfg(test)]
mod tests {
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
        let blue = Rgb([BLUE.0, BLUE.1, BLUE.2]);
        let rows = |column: u32| (0..HEIGHT).find(|&row| *image.get_pixel(column, row) == blue);
        let left = MARGIN + LABELS_WIDTH;
        let (first, last) = (rows(left + 20).unwrap(), rows(WIDTH - MARGIN - 5).unwrap());
        assert!(first < last, "{first} {last}");
        // Labels of both axes, and the title.
        let black = |columns: std::ops::Range<u32>, rows: std::ops::Range<u32>| {
            columns.into_iter().any(|x| rows.clone().any(|y| *image.get_pixel(x, y) == Rgb([0; 3])))
        };
        assert!(black(MARGIN..left - 10, 100..400), "labels of losses");
        assert!(black(left..WIDTH, HEIGHT - MARGIN - LABELS_HEIGHT + 10..HEIGHT), "labels of samples");
        assert!(black(left..WIDTH, 0..30), "a title");
    }
}
