//! A region as an image: what upstream's `draw_box` (Emu2/README.md) draws for a grounded prompt, a white outline on
//! black, which the visual encoder then reads like any other image.

use emu2_proto::v1;

use super::pixels::Rgb;

/// Pixels a side, as upstream draws it: the published encoder's own input, so that resizing changes nothing there.
const SIDE: i32 = 448;
/// `cv2.rectangle` with thickness 3 paints every pixel within this many steps (along x plus along y) of the
/// one-pixel outline: five pixels wide with clipped corners. Compared with OpenCV 4.8 on 4,000 boxes, some of them
/// thinner than the stroke or touching the border.
const REACH: i32 = 2;
const WHITE: u8 = 255;

/// Draws the outline of a region, whose edges are within 0 to 1: [448, 448, 3] bytes.
pub fn outline(region: &v1::Box) -> Rgb {
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
    Rgb { width: SIDE as usize, height: SIDE as usize, data: rgb }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(left: i32, top: i32, right: i32, bottom: i32) -> Vec<u8> {
        let [left, top, right, bottom] = [left, top, right, bottom].map(|pixel| pixel as f32 / SIDE as f32);
        outline(&v1::Box { left, top, right, bottom, phrase: String::new() }).data
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
        // A right side at 448 lies one pixel outside the image.
        assert_eq!(window(&rgb, 443..448, 443..448), ["...##", "...##", "...##", "#####", "#####"]);
    }
}
