//! Documents as rows of a contact sheet: what is given, then what is learned.

use emu2_sheet::sheet::{Row, Tile};
use image::RgbImage;

use crate::data::{Document, Image, Piece, SIDE, outline};

/// Returns a document as a row of a sheet: its last piece as the answer, all before it as the prompt.
pub fn row(document: &Document) -> Row {
    let title = format!("{} on {}", document.task.name(), document.scene.background.name());
    let Some((last, given)) = document.pieces.split_last() else { return Row { title, ..Row::default() } };
    Row { title, prompt: given.iter().flat_map(tiles).collect(), answer: tiles(last) }
}

fn tiles(piece: &Piece) -> Vec<Tile> {
    match piece {
        Piece::Text { text, .. } => vec![Tile::Text(text.clone())],
        Piece::Tokens { numbers, .. } => {
            vec![Tile::Text(numbers.iter().map(|number| format!(" #{number}")).collect())]
        }
        Piece::Image { image, .. } => vec![Tile::Image(rgb(image))],
        Piece::Box { phrase, bounds } => {
            vec![Tile::Text(phrase.clone()), Tile::Image(rgb(&outline::image(*bounds)))]
        }
        Piece::Video { frames } => frames.iter().map(|frame| Tile::Image(rgb(frame))).collect(),
    }
}

/// Returns the image as one of the crate `image`.
pub fn rgb(image: &Image) -> RgbImage {
    let side = SIDE as u32;
    RgbImage::from_raw(side, side, image.rgb().to_vec()).expect("an image is SIDE x SIDE x 3 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Bounds, Scene, Split, Task, tests::WORLD};

    fn document(pieces: Vec<Piece>) -> Document {
        let scene: Scene = WORLD.scene(Split::Train, 1);
        Document { task: Task::Caption, pieces, scene, ends: true }
    }

    #[test]
    fn the_last_piece_is_what_is_learned() {
        let scene = WORLD.scene(Split::Train, 1);
        let image = WORLD.image(&scene);
        let bounds = Bounds { left: 0, top: 0, right: 32, bottom: 32 };
        let shown = Tile::Image(rgb(&image));
        let video = document(vec![
            Piece::Text { text: "a".to_owned(), learn: false },
            Piece::Box { phrase: "cat".to_owned(), bounds },
            Piece::Video { frames: vec![image.clone(), image.clone()] },
            Piece::Text { text: " b".to_owned(), learn: true },
        ]);
        let told = row(&video);
        assert_eq!(told.title, format!("caption on {}", scene.background.name()));
        assert_eq!(told.answer, [Tile::Text(" b".to_owned())]);
        assert_eq!(told.prompt.len(), 5);
        let outline = Tile::Image(rgb(&outline::image(bounds)));
        assert_eq!(told.prompt[..3], [Tile::Text("a".to_owned()), Tile::Text("cat".to_owned()), outline]);
        assert_eq!(told.prompt[3..], [shown.clone(), shown.clone()]);
        let painted = row(&document(vec![Piece::Image { image, learn: true }]));
        assert_eq!((painted.prompt.len(), painted.answer), (0, vec![shown]));
        assert!(row(&document(Vec::new())).answer.is_empty());
    }
}
