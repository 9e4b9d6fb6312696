//! A box as a picture: what upstream's `draw_box` (Emu2/README.md) draws for a grounded prompt, a white outline on
//! black, which the visual encoder then reads like any other picture.

use bytes::Bytes;
use emu2_proto::v1;
use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};

/// Pixels a side: the encoder's own input, so that resizing changes nothing.
pub const SIDE: i32 = 448;
/// `cv2.rectangle` with thickness 3 paints every pixel within this many steps (along x plus along y) of the
/// one-pixel outline: five pixels wide with clipped corners. Compared with OpenCV 4.8 on 4,000 boxes, some of them
/// thinner than the stroke or touching the border.
const REACH: i32 = 2;
const WHITE: u8 = 255;

/// The box drawn as a PNG; equal boxes give equal bytes.
pub(crate) fn outline_png(region: &v1::Box) -> Bytes {
    let mut png = Vec::new();
    PngEncoder::new(&mut png)
        .write_image(&outline(region), SIDE as u32, SIDE as u32, ExtendedColorType::Rgb8)
        .expect("a buffer in memory of the right length is always writable");
    png.into()
}

/// RGB rows of the drawing.
pub fn outline(region: &v1::Box) -> Vec<u8> {
    let pixel = |fraction: f32| (fraction * SIDE as f32).round() as i32;
    let (left, right) = (pixel(region.left), pixel(region.right));
    let (top, bottom) = (pixel(region.top), pixel(region.bottom));
    let mut rgb = Vec::with_capacity((SIDE * SIDE * 3) as usize);
    for y in 0..SIDE {
        for x in 0..SIDE {
            // How far inside each side; negative outside.
            let (across, down) = ((x - left).min(right - x), (y - top).min(bottom - y));
            let steps = if across < 0 || down < 0 { -across.min(0) - down.min(0) } else { across.min(down) };
            let value = if steps <= REACH { WHITE } else { 0 };
            rgb.extend([value; 3]);
        }
    }
    rgb
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(left: i32, top: i32, right: i32, bottom: i32) -> Vec<u8> {
        let [left, top, right, bottom] = [left, top, right, bottom].map(|pixel| pixel as f32 / SIDE as f32);
        outline(&v1::Box { left, top, right, bottom, phrase: String::new() })
    }

    /// Rows of a window, `#` where white.
    fn window(rgb: &[u8], columns: std::ops::Range<i32>, rows: std::ops::Range<i32>) -> Vec<String> {
        let mark = |x: i32, y: i32| if rgb[((y * SIDE + x) * 3) as usize] == WHITE { '#' } else { '.' };
        rows.map(|y| columns.clone().map(|x| mark(x, y)).collect()).collect()
    }

    /// Windows printed by OpenCV 4.8.1: `cv2.rectangle(mask, (22, 14), (224, 224), (255, 255, 255), 3)`.
    #[test]
    fn corners_are_opencvs() {
        let rgb = drawn(22, 14, 224, 224);
        let top_left =
            ["........", "....####", "...#####", "..######", "..######", "..######", "..#####.", "..#####."];
        assert_eq!(window(&rgb, 18..26, 11..19), top_left);
        let bottom_right = [
            "....#####...",
            "....#####...",
            "#########...",
            "#########...",
            "#########...",
            "########....",
            "#######.....",
        ];
        assert_eq!(window(&rgb, 218..230, 220..227), bottom_right);
    }

    #[test]
    fn a_box_thinner_than_the_stroke_is_a_blob() {
        let rgb = drawn(10, 10, 12, 11);
        let blob =
            [".........", "..###....", ".#####...", "#######..", "#######..", ".#####...", "..###...."];
        assert_eq!(window(&rgb, 8..17, 7..14), blob);
    }

    #[test]
    fn the_stroke_is_cut_at_the_border() {
        let rgb = drawn(0, 0, SIDE, SIDE);
        assert_eq!(window(&rgb, 0..5, 0..5), ["#####", "#####", "#####", "###..", "###.."]);
        // A right side at 448 lies one pixel outside the picture.
        assert_eq!(window(&rgb, 443..448, 443..448), ["...##", "...##", "...##", "#####", "#####"]);
    }

    #[test]
    fn the_png_holds_the_drawing_and_is_the_same_every_time() {
        let region = v1::Box { left: 0.25, top: 0.5, right: 0.75, bottom: 1.0, phrase: "a dog".into() };
        let png = outline_png(&region);
        let decoded = image::load_from_memory(&png).unwrap().into_rgb8();
        assert_eq!(decoded.dimensions(), (448, 448));
        assert_eq!(decoded.into_raw(), outline(&region));
        assert_eq!(outline_png(&region), png);
    }
}
