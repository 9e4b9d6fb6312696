//! Cases of the evaluation as the prompts that a model brings for `emu2 demo`: demo.toml, and its images in demo/.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::{
    data::{Ability, Document, Piece, Split, World},
    documents::rgb,
};

/// What is shown, under which title. A case's number says which of the held-out scenes it is of.
const STEPS: [(&str, Ability, u64); 6] = [
    ("A caption", Ability::Pair, 0),
    ("A question", Ability::Count, 0),
    ("A format, learned from three examples", Ability::Tuples, 0),
    ("A picture from words", Ability::TextToImage, 0),
    ("The same thing in another picture", Ability::Subject, 0),
    ("A picture through the visual encoder and back", Ability::Autoencode, 0),
];

const HEADER: &str = "\
# What `emu2 demo` shows of nano: scenes that its training never showed, with their right answers. Written by
# `emu2-trainer tour`; the pictures are composed of Noto Emoji and Fluent Emoji, see NOTICE.
";

/// Writes the cases into a model folder: demo.toml and the images in demo/.
///
/// # Errors
/// When a file cannot be written.
pub fn write(world: &World, folder: &Path) -> Result<()> {
    let images = folder.join("demo");
    fs::create_dir_all(&images).with_context(|| format!("cannot make {}", images.display()))?;
    let mut text = HEADER.to_owned();
    for (number, (title, ability, index)) in (1..).zip(STEPS) {
        let document = world.case(Split::Test, ability, index);
        text += &step((number, title), &document, &images)?;
    }
    let path = folder.join("demo.toml");
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// A step in TOML; its strings are JSON's, which TOML reads alike.
fn step((number, title): (usize, &str), document: &Document, images: &Path) -> Result<String> {
    let (answer, given) = document.pieces.split_last().context("a document has pieces")?;
    let mut prompt = String::new();
    for (place, piece) in (1..).zip(given) {
        prompt += &match piece {
            Piece::Text { text, .. } => format!("    {{ text = {} }},\n", json!(text)),
            Piece::Image { image, .. } => {
                let name = format!("{number}-{place}.png");
                let path = images.join(&name);
                rgb(image).save(&path).with_context(|| format!("cannot write {}", path.display()))?;
                format!("    {{ image = {} }},\n", json!(name))
            }
            Piece::Tokens { .. } | Piece::Box { .. } | Piece::Video { .. } => {
                bail!("a demo's prompt is of texts and images")
            }
        };
    }
    let answer = match answer {
        Piece::Text { text, .. } => format!("answer = \"text\"\nright = {}\n", json!(text.trim())),
        _ => "answer = \"picture\"\n".to_owned(),
    };
    Ok(format!("\n[[steps]]\ntitle = {}\nprompt = [\n{prompt}]\n{answer}", json!(title)))
}

#[cfg(test)]
mod tests {
    use emu2_sheet::demo::{self, AnswerKind};

    use super::*;
    use crate::data::tests::WORLD;

    #[test]
    fn the_demo_reads_what_is_written() {
        let folder = tempfile::tempdir().unwrap();
        write(&WORLD, folder.path()).unwrap();
        let steps = demo::steps(folder.path(), None).unwrap();
        assert_eq!(steps.len(), STEPS.len());
        for (step, (title, ability, _)) in steps.iter().zip(STEPS) {
            assert_eq!(step.title, title);
            assert_eq!(step.answer == AnswerKind::Image, ability.answers_with_image());
            assert_eq!(step.right.is_some(), !ability.answers_with_image());
        }
    }
}
