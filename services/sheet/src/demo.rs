//! The prompts of `emu2 demo`: those that a model folder brings in a file demo.toml, else prompts about photographs.
//!
//! ```toml
//! # demo.toml in a model folder
//! [[steps]]
//! title = "A caption"
//! prompt = [{ image = "pair.png" }, { text = "Describe the image in details:" }]  # files in the folder demo/
//! answer = "text"                                                                 # or "image"
//! right = "a cat left of a dog on a red background."                              # the right text, if known
//! ```

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use config::{Config, File, FileFormat};
use serde::Deserialize;

/// The file of a model folder that lists its prompts, and the folder with their images.
const FILE: &str = "demo.toml";
const IMAGES: &str = "demo";

/// One prompt of a demo.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DemoStep {
    /// The heading that is printed, and drawn on the sheet.
    pub title: String,
    /// The parts of the prompt, in order; at least one.
    pub prompt: Vec<PromptPart>,
    /// The modality of the answer.
    pub answer: AnswerKind,
    /// The right answer, where it is known and a text.
    pub right: Option<String>,
}

/// One part of a prompt.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptPart {
    /// Literal text.
    Text(String),
    /// The path of an image file; in demo.toml relative to the folder `demo/` beside it.
    Image(PathBuf),
}

/// The modality of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AnswerKind {
    /// Generated text.
    Text,
    /// A generated image; `picture` is its name in older files.
    #[serde(alias = "picture")]
    Image,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tour {
    steps: Vec<DemoStep>,
}

/// Returns the prompts of a model folder's demo.toml or, where it has none, prompts about the images chelsea.png and
/// coffee.png in the folder `photos`.
///
/// # Errors
///
/// Before anything is loaded: a demo.toml that cannot be read or is inconsistent, an image that is absent or none, no
/// demo.toml and no `photos`.
pub fn steps(model_dir: &Path, photos: Option<&Path>) -> Result<Vec<DemoStep>> {
    let path = model_dir.join(FILE);
    if path.is_file() {
        let own = own(&path, &model_dir.join(IMAGES));
        return own.and_then(checked).with_context(|| path.display().to_string());
    }
    let photos = photos.with_context(|| {
        format!(
            "{} has no {FILE}: --photos is needed, a folder with chelsea.png and coffee.png",
            model_dir.display()
        )
    })?;
    checked(about_photographs(photos)).context("--photos")
}

fn own(path: &Path, images: &Path) -> Result<Vec<DemoStep>> {
    let text = fs::read_to_string(path)?;
    let file = Config::builder().add_source(File::from_str(&text, FileFormat::Toml)).build()?;
    let Tour { mut steps } = file.try_deserialize()?;
    for part in steps.iter_mut().flat_map(|step| &mut step.prompt) {
        if let PromptPart::Image(image) = part {
            *image = images.join(&*image);
        }
    }
    Ok(steps)
}

fn checked(steps: Vec<DemoStep>) -> Result<Vec<DemoStep>> {
    ensure!(!steps.is_empty(), "names no step");
    for (number, step) in (1..).zip(&steps) {
        step.check().with_context(|| format!("step {number}"))?;
    }
    Ok(steps)
}

impl DemoStep {
    fn check(&self) -> Result<()> {
        ensure!(!self.prompt.is_empty(), "its prompt is empty");
        let told = self.right.is_none() || self.answer == AnswerKind::Text;
        ensure!(told, "`right` is what a text should be, but an image is asked for");
        for part in &self.prompt {
            if let PromptPart::Image(path) = part {
                // Only the header is read: enough to know that the file exists and is an image.
                image::image_dimensions(path).with_context(|| path.display().to_string())?;
            }
        }
        Ok(())
    }
}

fn about_photographs(photos: &Path) -> Vec<DemoStep> {
    let cat = || PromptPart::Image(photos.join("chelsea.png"));
    let cup = || PromptPart::Image(photos.join("coffee.png"));
    let text = |text: &str| PromptPart::Text(text.to_owned());
    let step =
        |title: &str, prompt, answer| DemoStep { title: title.to_owned(), prompt, answer, right: None };
    vec![
        step(
            "A question about a photograph",
            vec![cat(), text("Describe the image in details:")],
            AnswerKind::Text,
        ),
        step(
            "The task shown by two examples",
            vec![cup(), text("[cup: 1]."), cat(), text("[cat: 1]."), cup()],
            AnswerKind::Text,
        ),
        step("An image from words", vec![text("a cup of coffee on a wooden table")], AnswerKind::Image),
        step(
            "An image from a photograph and words",
            vec![cat(), text("wearing a red hat on the beach")],
            AnswerKind::Image,
        ),
        step("The photograph through the visual encoder and back", vec![cat()], AnswerKind::Image),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make_image(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        image::RgbImage::new(2, 2).save(path).unwrap();
    }

    fn refusal(model_dir: &Path, photos: Option<&Path>) -> String {
        format!("{:#}", steps(model_dir, photos).unwrap_err())
    }

    #[test]
    fn photographs_are_needed_where_a_model_brings_no_prompts() {
        let folder = tempfile::tempdir().unwrap();
        let (model, photos) = (folder.path().join("model"), folder.path().join("photos"));
        assert!(refusal(&model, None).contains("--photos"));
        make_image(&photos.join("chelsea.png"));
        let error = refusal(&model, Some(&photos));
        assert!(error.contains("step 2") && error.contains("coffee.png"), "{error}");
        make_image(&photos.join("coffee.png"));
        assert_eq!(steps(&model, Some(&photos)).unwrap().len(), 5);
    }

    #[test]
    fn a_model_brings_its_own_prompts() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("demo/a.png");
        make_image(&image);
        let text = r#"
            [[steps]]
            title = "One"
            prompt = [{ image = "a.png" }, { text = "what?" }]
            answer = "text"
            right = "cat"
        "#;
        fs::write(folder.path().join(FILE), text).unwrap();
        let step = DemoStep {
            title: "One".to_owned(),
            prompt: vec![PromptPart::Image(image), PromptPart::Text("what?".to_owned())],
            answer: AnswerKind::Text,
            right: Some("cat".to_owned()),
        };
        assert_eq!(steps(folder.path(), None).unwrap(), [step]);

        let painted = text.replace("\"text\"", "\"image\"");
        for (wrong, told) in [
            ("steps = []".to_owned(), "names no step"),
            (text.replace("\"text\"", "\"song\""), "song"),
            (format!("{text}{}", text.replace("a.png", "b.png")), "step 2: "),
            (text.replace("a.png", "b.png"), "b.png"),
            (text.replace("{ image = \"a.png\" }, { text = \"what?\" }", ""), "step 1: its prompt is empty"),
            (painted, "step 1: `right`"),
        ] {
            fs::write(folder.path().join(FILE), wrong).unwrap();
            let error = refusal(folder.path(), None);
            assert!(error.contains(told), "{told} not in {error}");
        }
    }
}
