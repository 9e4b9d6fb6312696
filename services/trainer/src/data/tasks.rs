//! Documents at random, one kind a task. A test asks for the same documents of another split: all pieces but the last
//! are the prompt, the last one is the right answer.
//!
//! | module | holds |
//! |---|---|
//! | [`telling`] | captions, questions, grounding |
//! | [`episodes`] | what a task is, shown by demonstrations |
//! | [`painting`] | pictures to paint |
//! | [`clips`] | one moving thing |
//! | [`abilities`] | the cases of a test |

pub mod abilities;
pub mod clips;
pub mod episodes;
pub mod painting;
pub mod telling;
#[cfg(test)]
mod tests;

pub use abilities::Ability;
use rand_chacha::ChaCha8Rng;

use super::{Document, Piece, Scene, Split, Task, World, sequence::EOS};

impl Task {
    pub const ALL: [Self; 14] = [
        Self::Caption,
        Self::Question,
        Self::Relation,
        Self::Interview,
        Self::Grounding,
        Self::Names,
        Self::NamesInWords,
        Self::Tuples,
        Self::Circle,
        Self::TextToImage,
        Self::Subject,
        Self::BoxToImage,
        Self::Editing,
        Self::Clip,
    ];

    /// In logs; also names the random numbers that its documents draw.
    pub fn name(self) -> &'static str {
        match self {
            Self::Caption => "caption",
            Self::Question => "question",
            Self::Relation => "relation",
            Self::Interview => "interview",
            Self::Grounding => "grounding",
            Self::Names => "names",
            Self::NamesInWords => "names in words",
            Self::Tuples => "tuples",
            Self::Circle => "circle",
            Self::TextToImage => "text to image",
            Self::Subject => "subject",
            Self::BoxToImage => "box to image",
            Self::Editing => "editing",
            Self::Clip => "clip",
        }
    }

    /// Whether every document ends with a picture to paint.
    pub fn paints(self) -> bool {
        matches!(self, Self::TextToImage | Self::Subject | Self::BoxToImage | Self::Editing)
    }
}

/// What a document is drawn from.
pub(super) struct Draw<'a> {
    pub(super) world: &'a World,
    pub(super) split: Split,
    pub(super) rng: ChaCha8Rng,
}

impl World {
    /// Document `index` of a task.
    pub fn document(&self, split: Split, task: Task, index: u64) -> Document {
        let mut draw = Draw { world: self, split, rng: self.random(split, task.name(), index) };
        match task {
            Task::Caption => telling::caption(&mut draw),
            Task::Question => telling::question(&mut draw),
            Task::Relation => telling::relation(&mut draw),
            Task::Interview => telling::interview(&mut draw),
            Task::Grounding => telling::grounding(&mut draw),
            Task::Names => episodes::names(&mut draw, index),
            Task::NamesInWords => episodes::names_in_words(&mut draw, index),
            Task::Tuples => episodes::tuples(&mut draw),
            Task::Circle => episodes::circle(&mut draw),
            Task::TextToImage => painting::text_to_image(&mut draw),
            Task::Subject => painting::subject(&mut draw),
            Task::BoxToImage => painting::box_to_image(&mut draw),
            Task::Editing => painting::editing(&mut draw),
            Task::Clip => clips::clip(&mut draw),
        }
    }
}

impl Draw<'_> {
    fn given(&self, scene: &Scene) -> Piece {
        Piece::Image { picture: self.world.picture(scene), learn: false }
    }

    /// Questions about what is given before them, each with its answer and the end of it.
    fn asked(pieces: &mut Vec<Piece>, turns: impl IntoIterator<Item = (String, String)>) {
        for (index, (question, answer)) in turns.into_iter().enumerate() {
            // The last one's end is the document's.
            if index > 0
                && let Some(Piece::Text { text, .. }) = pieces.last_mut()
            {
                text.push_str(EOS);
            }
            pieces.extend([Piece::given(question), Piece::learned(answer)]);
        }
    }

    fn painted(&self, scene: &Scene) -> Piece {
        Piece::Image { picture: self.world.picture(scene), learn: true }
    }
}

fn document(task: Task, scene: Scene, pieces: Vec<Piece>) -> Document {
    Document { task, pieces, scene, ends: true }
}
