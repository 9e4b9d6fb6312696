//! A contact sheet: prompts and their answers side by side in one image.

use embedded_graphics::{
    Drawable,
    geometry::{Point, Size},
    mono_font::ascii::{FONT_7X13, FONT_7X13_BOLD},
    pixelcolor::Rgb888,
    primitives::{Primitive, PrimitiveStyle, Rectangle},
};
use image::{
    RgbImage,
    imageops::{self, FilterType},
};

use crate::canvas::Canvas;

/// Pixels of a tile's side. A tile whose text needs more is as high as its text.
const TILE: u32 = 128;
/// Pixels between tiles.
const GAP: u32 = 8;
/// Tiles in a line; a row with more goes on in another line.
const COLUMNS: usize = 8;
/// Pixels that a title takes above its tiles.
const TITLE: u32 = 20;
/// Width and height of a letter of [`FONT_7X13`], in pixels.
const LETTER: (u32, u32) = (7, 13);
/// Letters in a line of a tile's text.
const LETTERS: usize = ((TILE - GAP) / LETTER.0) as usize;
/// Frames of a prompt's tiles, and of an answer's.
const PROMPT_FRAME: Rgb888 = Rgb888::new(210, 210, 210);
const ANSWER_FRAME: Rgb888 = Rgb888::new(30, 140, 60);

/// One cell of a sheet.
#[derive(Debug, Clone, PartialEq)]
pub enum Tile {
    /// Text, wrapped to the width of a tile.
    Text(String),
    /// An image, scaled to fit the tile.
    Image(RgbImage),
}

/// One prompt with its answer.
#[derive(Debug, Clone, Default)]
pub struct Row {
    /// The heading above the tiles.
    pub title: String,
    /// The parts of the prompt, in order; their frames are grey.
    pub prompt: Vec<Tile>,
    /// The parts of the answer, which follow the prompt; their frames are green.
    pub answer: Vec<Tile>,
}

/// The tiles of a line, with the colours of their frames.
type Line<'a> = [(&'a Tile, Rgb888)];

impl Tile {
    fn height(&self) -> u32 {
        match self {
            Self::Text(text) => TILE.max(wrapped(text).lines().count() as u32 * LETTER.1 + GAP),
            Self::Image(_) => TILE,
        }
    }
}

impl Row {
    fn tiles(&self) -> Vec<(&Tile, Rgb888)> {
        let prompt = self.prompt.iter().map(|tile| (tile, PROMPT_FRAME));
        prompt.chain(self.answer.iter().map(|tile| (tile, ANSWER_FRAME))).collect()
    }

    fn height(&self) -> u32 {
        TITLE + self.tiles().chunks(COLUMNS).map(|line| height(line) + GAP).sum::<u32>()
    }
}

fn height(line: &Line<'_>) -> u32 {
    line.iter().map(|(tile, _)| tile.height()).max().unwrap_or_default()
}

/// Draws rows below each other; returns the sheet, eight tiles wide and as high as its rows.
pub fn draw(rows: &[Row]) -> RgbImage {
    let sheet_height = rows.iter().map(Row::height).sum::<u32>() + GAP;
    let mut canvas = Canvas::white(GAP + COLUMNS as u32 * (TILE + GAP), sheet_height);
    let mut top = GAP;
    for row in rows {
        canvas.paragraph(&row.title, &FONT_7X13_BOLD, point(GAP, top));
        top += TITLE;
        for line in row.tiles().chunks(COLUMNS) {
            for (column, (tile, frame)) in (0..).zip(line) {
                canvas.tile(tile, *frame, (GAP + column * (TILE + GAP), top));
            }
            top += height(line) + GAP;
        }
    }
    canvas.0
}

fn point(left: u32, top: u32) -> Point {
    Point::new(left as i32, top as i32)
}

impl Canvas {
    fn tile(&mut self, tile: &Tile, frame: Rgb888, (left, top): (u32, u32)) {
        match tile {
            Tile::Text(text) => {
                self.paragraph(&wrapped(text), &FONT_7X13, point(left + GAP / 2, top + GAP / 2))
            }
            Tile::Image(image) => {
                let fitted = fitted(image);
                let (left, top) = (left + (TILE - fitted.width()) / 2, top + (TILE - fitted.height()) / 2);
                imageops::replace(&mut self.0, &fitted, left.into(), top.into());
            }
        }
        let outline = Rectangle::new(point(left - 1, top - 1), Size::new(TILE + 2, tile.height() + 2));
        outline.into_styled(PrimitiveStyle::with_stroke(frame, 2)).draw(self).expect("infallible");
    }
}

/// Returns the image scaled to fit a tile, its aspect ratio kept.
fn fitted(image: &RgbImage) -> RgbImage {
    let longer = image.width().max(image.height()).max(1);
    let side = |pixels: u32| (pixels * TILE / longer).max(1);
    // Small images keep their pixels.
    let filter = if longer < TILE { FilterType::Nearest } else { FilterType::Triangle };
    imageops::resize(image, side(image.width()), side(image.height()), filter)
}

/// Returns the text broken into lines between words, and inside words that are longer than a line.
fn wrapped(text: &str) -> String {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let mut letters: Vec<char> = word.chars().collect();
        while !letters.is_empty() {
            let line = lines.last_mut().expect("there is a first line");
            let room = LETTERS - line.chars().count().min(LETTERS);
            let needed = letters.len() + usize::from(!line.is_empty());
            if needed > room && !line.is_empty() {
                lines.push(String::new());
                continue;
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.extend(letters.drain(..letters.len().min(LETTERS)));
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use embedded_graphics::pixelcolor::RgbColor;
    use image::Rgb;

    use super::*;

    const COLOUR: Rgb<u8> = Rgb([10, 200, 30]);
    const WHITE: Rgb<u8> = Rgb([255; 3]);

    fn image(width: u32, height: u32) -> Tile {
        Tile::Image(RgbImage::from_pixel(width, height, COLOUR))
    }

    fn text(text: &str) -> Tile {
        Tile::Text(text.to_owned())
    }

    /// Rows of a sheet, between a tile's frame, that hold something dark.
    fn dark_rows(sheet: &RgbImage, column: u32, tops: std::ops::Range<u32>) -> usize {
        let left = GAP + column * (TILE + GAP);
        let dark = |&y: &u32| (left + 2..left + TILE - 2).any(|x| sheet.get_pixel(x, y).0 == [0; 3]);
        tops.filter(dark).count()
    }

    #[test]
    fn words_are_broken_into_lines() {
        assert_eq!(wrapped("a cat left of a dog on red"), "a cat left of a\ndog on red");
        let long = "x".repeat(LETTERS + 3);
        assert_eq!(wrapped(&format!("a {long} b")), format!("a\n{}\nxxx b", &long[..LETTERS]));
        assert_eq!(wrapped(" "), "");
    }

    #[test]
    fn tiles_stand_side_by_side_and_then_below() {
        let few = Row { title: "few".to_owned(), prompt: vec![text("what?")], answer: vec![image(4, 4)] };
        let many = Row { prompt: vec![text("no"); 8], answer: vec![image(4, 4)], ..Row::default() };
        let sheet = draw(&[few, many]);
        let rows = [TITLE + TILE + GAP, TITLE + 2 * (TILE + GAP)];
        assert_eq!(sheet.dimensions(), (GAP + COLUMNS as u32 * (TILE + GAP), rows[0] + rows[1] + GAP));
        let middle = |column: u32, line_top: u32| {
            *sheet.get_pixel(GAP + column * (TILE + GAP) + TILE / 2, line_top + TILE / 2)
        };
        assert_eq!(middle(1, GAP + TITLE), COLOUR);
        assert_eq!(middle(0, GAP + rows[0] + TITLE + TILE + GAP), COLOUR);
        assert_eq!(middle(1, GAP + rows[0] + TITLE + TILE + GAP), WHITE);
    }

    #[test]
    fn words_and_frames_are_drawn() {
        let row = Row { prompt: vec![text("what?")], answer: vec![text("")], ..Row::default() };
        let sheet = draw(&[row]);
        let top = GAP + TITLE;
        assert!(dark_rows(&sheet, 0, top..top + LETTER.1 + GAP) > 5, "the question");
        assert_eq!(dark_rows(&sheet, 1, top..top + TILE), 0, "no answer");
        for (column, frame) in [(0, PROMPT_FRAME), (1, ANSWER_FRAME)] {
            let corner = *sheet.get_pixel(GAP + column * (TILE + GAP) - 1, top - 1);
            assert_eq!(corner, Rgb([frame.r(), frame.g(), frame.b()]));
        }
    }

    #[test]
    fn a_long_text_makes_its_line_higher() {
        let long = "many words ".repeat(20);
        let lines = wrapped(&long).lines().count() as u32;
        assert!(lines * LETTER.1 > TILE, "{lines} lines");
        let first = Row { prompt: vec![text(&long), image(4, 4)], ..Row::default() };
        let second = Row { prompt: vec![image(4, 4)], ..Row::default() };
        let sheet = draw(&[first, second]);
        let top = GAP + TITLE;
        let below = top + lines * LETTER.1 + GAP;
        // The last line of the text is above its frame's lower edge, and the next row below it.
        assert!(dark_rows(&sheet, 0, below - GAP - LETTER.1..below) > 5);
        let next = below + GAP + TITLE;
        assert_eq!(sheet.height(), next + TILE + GAP);
        assert_eq!(*sheet.get_pixel(GAP + TILE / 2, next + TILE / 2), COLOUR);
    }

    #[test]
    fn images_keep_their_shape() {
        let row = Row { prompt: vec![image(20, 10), image(200, 800)], ..Row::default() };
        let sheet = draw(&[row]);
        let at =
            |column: u32, x: u32, y: u32| *sheet.get_pixel(GAP + column * (TILE + GAP) + x, GAP + TITLE + y);
        let (middle, quarter) = (TILE / 2, TILE / 4);
        assert_eq!(
            [at(0, 2, middle), at(0, middle, quarter), at(0, middle, quarter - 1)],
            [COLOUR, COLOUR, WHITE]
        );
        assert_eq!(
            [at(1, middle, 2), at(1, middle - 15, middle), at(1, middle - 17, middle)],
            [COLOUR, COLOUR, WHITE]
        );
    }
}
