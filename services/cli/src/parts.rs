//! Command-line words → parts of a prompt.

use std::{fs, path::Path, str::FromStr};

use anyhow::{Context, Result, bail};
use emu2_proto::v1::{self, part::Kind};

/// Endings that make a word a picture even when no such file exists: a mistyped name must not become text.
const PICTURE_ENDINGS: [&str; 6] = ["png", "jpg", "jpeg", "webp", "bmp", "gif"];

/// Files are pictures, anything else is text.
pub fn from_words(words: &[String]) -> Result<Vec<v1::Part>> {
    words.iter().map(|word| from_word(word)).collect()
}

fn from_word(word: &str) -> Result<v1::Part> {
    let path = Path::new(word);
    if path.is_file() {
        return image(path);
    }
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    if PICTURE_ENDINGS.contains(&ending.to_lowercase().as_str()) && !word.contains(' ') {
        bail!("{word}: no such picture");
    }
    Ok(text(word))
}

pub fn text(text: impl Into<String>) -> v1::Part {
    Kind::Text(text.into()).into_part()
}

pub fn image(path: &Path) -> Result<v1::Part> {
    let data = fs::read(path).with_context(|| path.display().to_string())?;
    Ok(Kind::Image(v1::Image { data: data.into() }).into_part())
}

/// Parts of `emu2 draw`. Without boxes, pictures come before the words ("[dog] wearing a hat"); with boxes, as in
/// upstream's released prompt: the words, then each box with its picture.
pub fn for_drawing(words: Vec<v1::Part>, images: Vec<v1::Part>, boxes: &[BoxArg]) -> Result<Vec<v1::Part>> {
    if boxes.is_empty() {
        return Ok(images.into_iter().chain(words).collect());
    }
    if images.len() > boxes.len() {
        bail!(
            "{} pictures for {} boxes: with --box, each --image belongs to a box",
            images.len(),
            boxes.len()
        );
    }
    let mut images = images.into_iter();
    let mut parts = words;
    for arg in boxes {
        parts.push(Kind::Box(arg.0.clone()).into_part());
        parts.extend(images.next());
    }
    Ok(parts)
}

/// `LEFT,TOP,RIGHT,BOTTOM:PHRASE`
#[derive(Clone, Debug)]
pub struct BoxArg(pub v1::Box);

impl FromStr for BoxArg {
    type Err = String;

    fn from_str(arg: &str) -> Result<Self, String> {
        let wanted = || format!("expected LEFT,TOP,RIGHT,BOTTOM:PHRASE in fractions, got `{arg}`");
        let (sides, phrase) = arg.split_once(':').ok_or_else(wanted)?;
        let sides: Vec<f32> = sides
            .split(',')
            .map(|side| side.trim().parse())
            .collect::<Result<_, _>>()
            .map_err(|_| wanted())?;
        let [left, top, right, bottom] = sides[..] else { return Err(wanted()) };
        Ok(Self(v1::Box { left, top, right, bottom, phrase: phrase.trim().to_owned() }))
    }
}

trait IntoPart {
    fn into_part(self) -> v1::Part;
}

impl IntoPart for Kind {
    fn into_part(self) -> v1::Part {
        v1::Part { kind: Some(self) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_picture_is_not_text() {
        assert!(from_words(&["no-such.png".to_owned()]).is_err());
        let parts = from_words(&["compare a.png with b.png".to_owned()]).unwrap();
        assert_eq!(parts, [text("compare a.png with b.png")]);
    }

    #[test]
    fn boxes_take_their_pictures_in_order() {
        let boxes = ["0,0,0.5,1:a dog", "0.5, 0, 1, 1: a cat"].map(|arg| arg.parse::<BoxArg>().unwrap());
        let parts = for_drawing(vec![text("two")], vec![text("dog picture")], &boxes).unwrap();
        let box_of = |arg: &BoxArg| Kind::Box(arg.0.clone()).into_part();
        assert_eq!(parts, [text("two"), box_of(&boxes[0]), text("dog picture"), box_of(&boxes[1])]);
        assert_eq!(boxes[1].0.phrase, "a cat");
        for bad in ["1,2,3:x", "0,0,1,1", "a,b,c,d:x"] {
            assert!(bad.parse::<BoxArg>().is_err(), "{bad}");
        }
    }
}
