//! One question: the request, and what the answer is worth.

use std::{collections::BTreeMap, io::Cursor};

use anyhow::{Context, Result, bail};
use emu2_proto::v1::{self, part::Kind};
use image::ImageFormat;
use serde::{Deserialize, Serialize};

use super::context::EvalContext;
use crate::{
    data::{Ability, Bounds, Document, Image, Piece, SIDE, Scene, Split, World, describe},
    documents::rgb,
    judge::Verdict,
};

/// No answer is longer: a described pair takes 14.
const NEW_TOKENS_MAX: u32 = 32;
/// Coordinates in text reach from 0 to this.
const COORDINATE_MAX: f32 = 224.0;

/// What is asked, of which images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Column {
    /// Compositions that training never showed, in the styles that it did.
    Trained,
    /// The style that it never showed.
    Unseen,
    /// A baseline: the images left out.
    TextOnly,
    /// A baseline: the images of another case.
    Shuffled,
}

impl Column {
    /// Every column, in the order of the table.
    pub const ALL: [Self; 4] = [Self::Trained, Self::Unseen, Self::TextOnly, Self::Shuffled];

    /// Returns whether an ability has this column. Baselines are of answers in text alone: what is painted follows from
    /// what is given.
    pub fn applies(self, ability: Ability) -> bool {
        matches!(self, Self::Trained | Self::Unseen) || !ability.answers_with_image()
    }

    fn split(self) -> Split {
        match self {
            Self::Unseen => Split::Unseen,
            Self::Trained | Self::TextOnly | Self::Shuffled => Split::Test,
        }
    }
}

/// One question of an evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Case {
    /// What it measures.
    pub ability: Ability,
    /// What it is asked of.
    pub column: Column,
    /// Its number among the cases of the same ability and column.
    pub index: u64,
}

/// Scores from 0 to 1 each, by name.
pub type Scores = BTreeMap<String, f64>;

impl Case {
    /// Returns the case as a document, with the right answer as its last piece.
    pub fn document(&self, world: &World) -> Document {
        world.case(self.column.split(), self.ability, self.index)
    }

    pub(super) fn request(&self, context: &EvalContext, document: &Document) -> Result<v1::GenerateRequest> {
        let (_, given) = document.pieces.split_last().context("a document has pieces")?;
        let other = (self.column == Column::Shuffled)
            .then(|| Case { index: self.index + 1, ..*self }.document(&context.world));
        let mut others =
            other.iter().flat_map(|other| &other.pieces).filter(|piece| has_images(piece)).cycle();
        let mut parts = Vec::new();
        for piece in given {
            match (self.column, has_images(piece)) {
                (Column::TextOnly, true) => {}
                (Column::Shuffled, true) => parts.push(part(others.next().unwrap_or(piece))?),
                _ => parts.push(part(piece)?),
            }
        }
        let output = if self.ability.answers_with_image() {
            v1::generate_request::Output::Image(v1::ImageOutput {
                steps: Some(context.image_settings.steps),
                guidance_scale: Some(context.image_settings.guidance_scale),
                ..Default::default()
            })
        } else {
            v1::generate_request::Output::Text(v1::TextOutput {
                num_beams: Some(1),
                max_new_tokens: Some(NEW_TOKENS_MAX),
                keep_special_tokens: Some(self.ability == Ability::Locate),
                ..Default::default()
            })
        };
        let model =
            if self.ability.answers_with_image() { &context.image_model } else { &context.text_model };
        Ok(v1::GenerateRequest {
            model: model.clone(),
            input: Some(v1::generate_request::Input::Prompt(v1::Prompt { parts })),
            output: Some(output),
            seed: Some(self.index),
            // People who ask the same cluster go first.
            priority: v1::Priority::Low.into(),
        })
    }

    /// Returns the scores of an answer in text.
    pub fn score_text(&self, document: &Document, answer: &str) -> Scores {
        if self.ability == Ability::Locate {
            let overlap = bounds(answer).map_or(0.0, |found| overlap(found, document.scene.things[0].bounds));
            return Scores::from([("iou".to_owned(), overlap)]);
        }
        let right = match document.pieces.last() {
            // All that is asked: the things and how they lie. A cat left of a dog is a dog right of a cat.
            Some(Piece::Text { .. }) if self.ability == Ability::Pair => {
                let told =
                    |scene: &Scene| clean(answer).starts_with(&format!("{} on", describe::things(scene)));
                told(&document.scene) || told(&document.scene.turned())
            }
            Some(Piece::Text { text, .. }) => clean(answer) == clean(text),
            _ => false,
        };
        Scores::from([("right".to_owned(), f64::from(u8::from(right)))])
    }

    /// Returns the scores of an image, by what the judge sees in it.
    pub fn score_image(&self, document: &Document, verdict: &Verdict) -> Scores {
        let scene = &document.scene;
        let (concept, count) = scene.counts()[0];
        let object = ("object", verdict.concept() == Some(concept));
        let background = ("background", verdict.background == scene.background);
        let scores = match self.ability {
            Ability::TextToImage => vec![object, ("count", verdict.count() == count as usize), background],
            Ability::Boxed => {
                let inside = verdict.things.first().is_some_and(|found| {
                    let ([x, y], inside) = (found.bounds.center(), scene.things[0].bounds);
                    (inside.left as f32..inside.right as f32).contains(&x)
                        && (inside.top as f32..inside.bottom as f32).contains(&y)
                });
                vec![object, ("inside", inside), background]
            }
            _ => vec![object, background],
        };
        scores.into_iter().map(|(name, holds)| (name.to_owned(), f64::from(u8::from(holds)))).collect()
    }
}

fn has_images(piece: &Piece) -> bool {
    matches!(piece, Piece::Image { .. } | Piece::Video { .. })
}

fn part(piece: &Piece) -> Result<v1::Part> {
    let kind = match piece {
        Piece::Text { text, .. } => Kind::Text(text.clone()),
        Piece::Tokens { .. } => bail!("a prompt's tokens are those of its text"),
        Piece::Image { image, .. } => Kind::Image(v1::Image { data: png(image)?.into() }),
        Piece::Video { frames } => {
            let frames = frames.iter().map(|frame| Ok(png(frame)?.into()));
            Kind::Video(v1::Video { frames: frames.collect::<Result<_>>()? })
        }
        Piece::Box { phrase, bounds } => {
            let [left, top, right, bottom] = bounds.fractions();
            Kind::Box(v1::Box { left, top, right, bottom, phrase: phrase.clone() })
        }
    };
    Ok(v1::Part { kind: Some(kind) })
}

fn png(image: &Image) -> Result<Vec<u8>> {
    let mut png = Cursor::new(Vec::new());
    rgb(image).write_to(&mut png, ImageFormat::Png)?;
    Ok(png.into_inner())
}

/// Returns a short answer without what is around it: upstream, too, cuts its answers to be compared.
fn clean(answer: &str) -> &str {
    answer.split('.').next().unwrap_or_default().trim()
}

/// Returns the first four coordinates of an answer, in pixels: left, top, right, bottom.
fn bounds(answer: &str) -> Option<[f32; 4]> {
    let mut coordinates = answer.split("<patch_index_").skip(1).map(|rest| {
        let number = rest.split('>').next()?.parse::<f32>().ok()?;
        Some(number / COORDINATE_MAX * SIDE as f32)
    });
    let mut next = || coordinates.next().flatten();
    Some([next()?, next()?, next()?, next()?])
}

/// Returns the intersection over the union of two boxes.
fn overlap([left, top, right, bottom]: [f32; 4], other: Bounds) -> f64 {
    let [other_left, other_top, other_right, other_bottom] =
        [other.left, other.top, other.right, other.bottom].map(|edge| edge as f32);
    let along = |low: f32, high: f32| (high - low).max(0.0);
    let both = along(left.max(other_left), right.min(other_right))
        * along(top.max(other_top), bottom.min(other_bottom));
    let one = along(left, right) * along(top, bottom);
    let either = one + along(other_left, other_right) * along(other_top, other_bottom) - both;
    f64::from(both / either)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Arrangement, tests::WORLD};
    use crate::judge::{Found, Judge};

    fn case(ability: Ability) -> Case {
        Case { ability, column: Column::Trained, index: 5 }
    }

    #[test]
    fn right_answers_are_right_and_others_wrong() {
        for ability in Ability::all().filter(|ability| !ability.answers_with_image()) {
            let case = case(ability);
            let document = case.document(&WORLD);
            let Some(Piece::Text { text, .. }) = document.pieces.last() else { panic!("{document:?}") };
            let score = |answer: &str| case.score_text(&document, answer).into_values().next().unwrap();
            assert!(score(text) > 0.95, "{ability:?}: {text}");
            assert!(score(&format!("{}. [IMG]", text.trim())) > 0.95, "{ability:?}: {text}");
            assert!(score("") < 0.05 && score(" a nothing.") < 0.05, "{ability:?}");
        }
    }

    #[test]
    fn a_pair_may_be_told_from_either_thing() {
        let case = case(Ability::Pair);
        let document = case.document(&WORLD);
        let right = |answer: String| case.score_text(&document, &answer)["right"] == 1.0;
        let Arrangement::Pair(relation) = document.scene.arrangement else { panic!("{document:?}") };
        let [first, second] = [0, 1].map(|index: usize| document.scene.things[index].concept.with_article());
        assert!(right(format!(" {first} {} {second} on a red background.", relation.name())));
        assert!(right(format!(" {second} {} {first} on a red background.", relation.turned().name())));
        assert!(!right(format!(" {second} {} {first} on a red background.", relation.name())));
        assert!(!right(format!(" {first} {} {first} on a red background.", relation.name())));
    }

    #[test]
    fn real_images_are_right() {
        let judge = Judge::new(WORLD.drawings(), WORLD.concepts(), &crate::data::Style::TRAINED);
        for ability in Ability::all().filter(|ability| ability.answers_with_image()) {
            let case = case(ability);
            let document = case.document(&WORLD);
            let verdict = judge.inspect(&rgb(&WORLD.image(&document.scene)));
            let scores = case.score_image(&document, &verdict);
            assert!(scores.values().all(|&score| score == 1.0), "{ability:?}: {scores:?}");
            let things =
                vec![Found { bounds: Bounds { left: 0, top: 0, right: 1, bottom: 1 }, ..verdict.things[0] }];
            let moved = case.score_image(&document, &Verdict { things, ..verdict });
            assert_eq!(moved.get("inside").copied().unwrap_or_default(), 0.0, "{ability:?}: {moved:?}");
        }
    }

    #[test]
    fn boxes_are_read_from_text() {
        let found =
            bounds("<patch_index_0000> <patch_index_0056><patch_index_0112><patch_index_0224></object>");
        assert_eq!(found, Some([0.0, 16.0, 32.0, 64.0]));
        assert_eq!(bounds("<patch_index_0000><patch_index_0056>"), None);
        let whole = Bounds { left: 0, top: 16, right: 32, bottom: 64 };
        assert!((overlap(found.unwrap(), whole) - 1.0).abs() < 1e-6);
        let half = Bounds { left: 16, top: 16, right: 48, bottom: 64 };
        assert!((overlap(found.unwrap(), half) - 1.0 / 3.0).abs() < 1e-6);
        assert_eq!(overlap([9.0, 9.0, 3.0, 3.0], whole), 0.0);
    }
}
