//! The cases of a test: documents of one kind each, whose answer the model is to find.

use rand::Rng;

use crate::data::{
    document::{Document, Task},
    tasks::{
        clips,
        draw::{Draw, document},
        episodes, painting,
        telling::{self, Asked},
    },
    world::{Split, World},
};

/// Demonstrations of each name that are tried.
pub const SHOTS: [u32; 5] = [0, 1, 2, 4, 8];

/// What an evaluation measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ability {
    /// One thing's name.
    Name,
    /// 1 to 4 of a thing.
    Count,
    /// Two things and how they lie.
    Pair,
    /// The background's colour.
    Background,
    /// Four made-up names, each shown so often.
    Names {
        /// Demonstrations of each name.
        shots: u32,
    },
    /// Background, thing, count and place in the format of three demonstrations.
    Tuples,
    /// A named thing's box.
    Locate,
    /// What stands in a red circle.
    Circle,
    /// An image from its own embeddings.
    Autoencode,
    /// An image of 1 to 4 of a thing on a background.
    TextToImage,
    /// An image's thing on another background.
    Subject,
    /// A thing in a box.
    Boxed,
    /// Which way something moves.
    Direction,
}

impl Ability {
    /// Iterates over every ability; that of names once for each of [`SHOTS`].
    pub fn all() -> impl Iterator<Item = Self> {
        let names = SHOTS.into_iter().map(|shots| Self::Names { shots });
        [Self::Name, Self::Count, Self::Pair, Self::Background].into_iter().chain(names).chain([
            Self::Tuples,
            Self::Locate,
            Self::Circle,
            Self::Autoencode,
            Self::TextToImage,
            Self::Subject,
            Self::Boxed,
            Self::Direction,
        ])
    }

    /// Returns the ability's name in results. It also seeds the random numbers of its cases, so that those with another
    /// number of shots are alike.
    pub fn name(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Count => "count",
            Self::Pair => "pair",
            Self::Background => "background",
            Self::Names { .. } => "names",
            Self::Tuples => "tuples",
            Self::Locate => "locate",
            Self::Circle => "circle",
            Self::Autoencode => "autoencode",
            Self::TextToImage => "text_to_image",
            Self::Subject => "subject",
            Self::Boxed => "boxed",
            Self::Direction => "direction",
        }
    }

    /// Returns whether the answer is an image.
    pub fn answers_with_image(self) -> bool {
        matches!(self, Self::Autoencode | Self::TextToImage | Self::Subject | Self::Boxed)
    }
}

impl World {
    /// Returns case `index` of an ability: all pieces but the last are the prompt, the last is the right answer.
    pub fn case(&self, split: Split, ability: Ability, index: u64) -> Document {
        let stream = format!("case {}", ability.name());
        let mut draw = Draw { world: self, split, rng: self.random(split, &stream, index) };
        let draw = &mut draw;
        match ability {
            Ability::Name => telling::question_about(draw, Asked::What, false),
            Ability::Count => telling::question_about(draw, Asked::HowMany, false),
            Ability::Background => telling::question_about(draw, Asked::Colour, false),
            Ability::Pair => {
                let scene = self.composer(split).pair(&mut draw.rng);
                telling::description(draw, scene)
            }
            Ability::Names { shots } => episodes::names_shown(draw, episodes::NAMES_IN_EPISODE, shots),
            Ability::Tuples => episodes::tuples(draw),
            Ability::Locate => telling::locate(draw),
            Ability::Circle => episodes::circled(draw, 2),
            Ability::Autoencode => {
                let scene = self.composer(split).single(&mut draw.rng);
                let pieces = vec![draw.given(&scene), draw.painted(&scene)];
                document(Task::TextToImage, scene, pieces)
            }
            Ability::TextToImage => {
                let painter = self.painter(split);
                let spread = draw.rng.random_bool(0.5);
                let scene =
                    if spread { painter.spread(&mut draw.rng) } else { painter.gathered(&mut draw.rng) };
                painting::told(draw, scene)
            }
            Ability::Subject => painting::subject(draw),
            Ability::Boxed => painting::boxed(draw, 1, false),
            Ability::Direction => clips::direction(draw),
        }
    }
}
