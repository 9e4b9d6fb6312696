//! Documents at random, one kind a task. A test asks for the same documents of another split: all pieces but the last
//! are the prompt, the last one is the right answer.
//!
//! | module | holds |
//! |---|---|
//! | [`telling`] | captions, questions, grounding |
//! | [`copying`] | what came earlier, to be found again, in random tokens |
//! | [`episodes`] | what a task is, shown by demonstrations |
//! | [`painting`] | images to paint |
//! | [`clips`] | one moving thing |
//! | `draw` | what a document is drawn from |
//! | [`abilities`] | the cases of a test |

pub mod abilities;
pub mod clips;
pub mod copying;
mod draw;
pub mod episodes;
pub mod painting;
pub mod telling;
#[cfg(test)]
mod tests;

pub use abilities::Ability;

use crate::data::{
    document::{Document, Task},
    world::{Split, World},
};

impl World {
    /// Returns document `index` of a task.
    pub fn document(&self, split: Split, task: Task, index: u64) -> Document {
        let mut draw = draw::Draw { world: self, split, rng: self.random(split, task.name(), index) };
        match task {
            Task::Caption => telling::caption(&mut draw),
            Task::Question => telling::question(&mut draw),
            Task::Relation => telling::relation(&mut draw),
            Task::Interview => telling::interview(&mut draw),
            Task::Grounding => telling::grounding(&mut draw),
            Task::Names => episodes::names(&mut draw, index),
            Task::Repetition => copying::repetition(&mut draw),
            Task::KeyValues => copying::key_values(&mut draw),
            Task::NamesOfTokens => episodes::names_of_tokens(&mut draw, index),
            Task::NamesOfSameImages => episodes::names_of_same_images(&mut draw, index),
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
