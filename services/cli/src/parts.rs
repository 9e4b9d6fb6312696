//! Words of the command line as parts of a prompt.

use std::{path::Path, str::FromStr};

use anyhow::{Result, bail};
use emu2_client::parts::{image_part, text};
use emu2_proto::v1::{self, part::Kind};

/// Endings that make a word an image even when no such file exists: a mistyped name must not become text.
const IMAGE_ENDINGS: [&str; 6] = ["png", "jpg", "jpeg", "webp", "bmp", "gif"];

/// Returns a part for each word: an image where it names a file, else text.
pub(crate) fn from_words(words: &[String]) -> Result<Vec<v1::Part>> {
    words.iter().map(|word| from_word(word)).collect()
}

fn from_word(word: &str) -> Result<v1::Part> {
    let path = Path::new(word);
    if path.is_file() {
        return image_part(path);
    }
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    if IMAGE_ENDINGS.contains(&ending.to_lowercase().as_str()) && !word.contains(' ') {
        bail!("{word}: no such image");
    }
    Ok(text(word))
}

/// Returns the prompt of `emu2 draw`. Without boxes, images come before the words ("[dog] wearing a hat"); with boxes,
/// as in upstream's released prompt, the words come first, then each box with its image.
pub(crate) fn for_drawing(
    words: Vec<v1::Part>,
    images: Vec<v1::Part>,
    boxes: &[BoxArg],
) -> Result<Vec<v1::Part>> {
    if boxes.is_empty() {
        return Ok(images.into_iter().chain(words).collect());
    }
    if images.len() > boxes.len() {
        bail!("{} images for {} boxes: with --box, each --image belongs to a box", images.len(), boxes.len());
    }
    let mut images = images.into_iter();
    let mut parts = words;
    for arg in boxes {
        parts.push(v1::Part { kind: Some(Kind::Box(arg.0.clone())) });
        parts.extend(images.next());
    }
    Ok(parts)
}

/// A box of the command line, written `LEFT,TOP,RIGHT,BOTTOM:PHRASE` in fractions of the image.
#[derive(Clone, Debug)]
pub(crate) struct BoxArg(pub(crate) v1::Box);

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_image_is_not_text() {
        assert!(from_words(&["no-such.png".to_owned()]).is_err());
        let parts = from_words(&["compare a.png with b.png".to_owned()]).unwrap();
        assert_eq!(parts, [text("compare a.png with b.png")]);
    }

    #[test]
    fn boxes_take_their_images_in_order() {
        let boxes = ["0,0,0.5,1:a dog", "0.5, 0, 1, 1: a cat"].map(|arg| arg.parse::<BoxArg>().unwrap());
        let parts = for_drawing(vec![text("two")], vec![text("dog image")], &boxes).unwrap();
        let box_of = |arg: &BoxArg| v1::Part { kind: Some(Kind::Box(arg.0.clone())) };
        assert_eq!(parts, [text("two"), box_of(&boxes[0]), text("dog image"), box_of(&boxes[1])]);
        assert_eq!(boxes[1].0.phrase, "a cat");
        for bad in ["1,2,3:x", "0,0,1,1", "a,b,c,d:x"] {
            assert!(bad.parse::<BoxArg>().is_err(), "{bad}");
        }
    }
}
