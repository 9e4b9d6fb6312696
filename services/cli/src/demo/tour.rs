//! What the demo shows: a model's own prompts, where its folder brings some, else prompts about photographs.
//!
//! ```toml
//! # demo.toml in a model folder
//! [[steps]]
//! title = "A caption"
//! prompt = [{ image = "pair.png" }, { text = "Describe the image in details:" }]  # files in the folder demo/
//! answer = "text"                                                                 # or "picture"
//! right = "a cat left of a dog on a red background."                              # of a text, if known
//! ```

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use config::{Config, File, FileFormat};
use serde::Deserialize;

/// Of a model folder.
const FILE: &str = "demo.toml";
const PICTURES: &str = "demo";

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    pub title: String,
    pub prompt: Vec<Piece>,
    pub answer: Answer,
    pub right: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Piece {
    Text(String),
    Image(PathBuf),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    Text,
    Picture,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tour {
    steps: Vec<Step>,
}

/// The model's own, or else those about photographs. What they need is looked for here, before anything is loaded.
pub fn steps(model_dir: &Path, photos: Option<&Path>) -> Result<Vec<Step>> {
    let path = model_dir.join(FILE);
    if path.is_file() {
        let own = own(&path, &model_dir.join(PICTURES));
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

fn own(path: &Path, pictures: &Path) -> Result<Vec<Step>> {
    let text = fs::read_to_string(path)?;
    let file = Config::builder().add_source(File::from_str(&text, FileFormat::Toml)).build()?;
    let Tour { mut steps } = file.try_deserialize()?;
    for piece in steps.iter_mut().flat_map(|step| &mut step.prompt) {
        if let Piece::Image(picture) = piece {
            *picture = pictures.join(&*picture);
        }
    }
    Ok(steps)
}

fn checked(steps: Vec<Step>) -> Result<Vec<Step>> {
    ensure!(!steps.is_empty(), "names no step");
    for (number, step) in (1..).zip(&steps) {
        step.check().with_context(|| format!("step {number}"))?;
    }
    Ok(steps)
}

impl Step {
    fn check(&self) -> Result<()> {
        ensure!(!self.prompt.is_empty(), "its prompt is empty");
        let told = self.right.is_none() || self.answer == Answer::Text;
        ensure!(told, "`right` is what a text should be, but a picture is asked for");
        for piece in &self.prompt {
            if let Piece::Image(path) = piece {
                // Its header: that it is there, and a picture.
                image::image_dimensions(path).with_context(|| path.display().to_string())?;
            }
        }
        Ok(())
    }
}

fn about_photographs(photos: &Path) -> Vec<Step> {
    let cat = || Piece::Image(photos.join("chelsea.png"));
    let cup = || Piece::Image(photos.join("coffee.png"));
    let text = |text: &str| Piece::Text(text.to_owned());
    let step = |title: &str, prompt, answer| Step { title: title.to_owned(), prompt, answer, right: None };
    vec![
        step(
            "A question about a photograph",
            vec![cat(), text("Describe the image in details:")],
            Answer::Text,
        ),
        step(
            "The task shown by two examples",
            vec![cup(), text("[cup: 1]."), cat(), text("[cat: 1]."), cup()],
            Answer::Text,
        ),
        step("A picture from words", vec![text("a cup of coffee on a wooden table")], Answer::Picture),
        step(
            "A picture from a photograph and words",
            vec![cat(), text("wearing a red hat on the beach")],
            Answer::Picture,
        ),
        step("The photograph through the visual encoder and back", vec![cat()], Answer::Picture),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make_picture(path: &Path) {
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
        make_picture(&photos.join("chelsea.png"));
        let error = refusal(&model, Some(&photos));
        assert!(error.contains("step 2") && error.contains("coffee.png"), "{error}");
        make_picture(&photos.join("coffee.png"));
        assert_eq!(steps(&model, Some(&photos)).unwrap().len(), 5);
    }

    #[test]
    fn a_model_brings_its_own_prompts() {
        let folder = tempfile::tempdir().unwrap();
        let picture = folder.path().join("demo/a.png");
        make_picture(&picture);
        let text = r#"
            [[steps]]
            title = "One"
            prompt = [{ image = "a.png" }, { text = "what?" }]
            answer = "text"
            right = "cat"
        "#;
        fs::write(folder.path().join(FILE), text).unwrap();
        let step = Step {
            title: "One".to_owned(),
            prompt: vec![Piece::Image(picture), Piece::Text("what?".to_owned())],
            answer: Answer::Text,
            right: Some("cat".to_owned()),
        };
        assert_eq!(steps(folder.path(), None).unwrap(), [step]);

        let pictured = text.replace("\"text\"", "\"picture\"");
        for (wrong, told) in [
            ("steps = []".to_owned(), "names no step"),
            (text.replace("\"text\"", "\"song\""), "song"),
            (format!("{text}{}", text.replace("a.png", "b.png")), "step 2: "),
            (text.replace("a.png", "b.png"), "b.png"),
            (text.replace("{ image = \"a.png\" }, { text = \"what?\" }", ""), "step 1: its prompt is empty"),
            (pictured, "step 1: `right`"),
        ] {
            fs::write(folder.path().join(FILE), wrong).unwrap();
            let error = refusal(folder.path(), None);
            assert!(error.contains(told), "{told} not in {error}");
        }
    }
}
