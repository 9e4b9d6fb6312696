//! The training data: drawings of things, composed into scenes, told as interleaved documents. Nothing is stored: a
//! sample is a function of (seed, split, index), the same on every machine and for any number of threads.
//!
//! | module | holds |
//! |---|---|
//! | [`concept`] | the things, by name |
//! | [`atlas`], [`drawings`] | how each looks, in every style |
//! | [`background`] | the colours that scenes stand on |
//! | [`scene`] | what is where on which background, and its pixels |
//! | [`compose`], [`held_out`] | scenes at random; what training never shows |
//! | [`world`] | all of that opened, and the random numbers of each sample |
//! | [`image`] | the pixels of one image |
//! | [`describe`] | scenes in words |
//! | [`tasks`] | documents at random: captions, questions, episodes, images to paint, clips |
//! | [`outline`] | a box as the model sees it |
//! | [`vocabulary`] | the tokenizer, learned from the documents |
//! | [`document`] | a document as the model reads it, and what is learned of it |
//! | [`sequence`] | a document → token ids, slots for embeddings, where the losses fall |
//! | [`loader`] | worker threads that make batches ahead |

pub mod atlas;
pub mod background;
pub mod compose;
pub mod concept;
pub mod describe;
pub mod document;
pub mod drawings;
pub mod held_out;
pub mod image;
pub mod loader;
pub mod outline;
pub mod scene;
pub mod sequence;
pub mod tasks;
#[cfg(test)]
pub(crate) mod tests;
pub mod vocabulary;
pub mod world;

pub use self::image::{Image, SIDE};
pub use atlas::{Atlas, Style};
pub use background::Background;
pub use compose::{Composer, Novelty};
pub use concept::Concept;
pub use document::{Document, Piece, Task};
pub use drawings::Drawings;
pub use loader::Loader;
pub use scene::{Arrangement, Bounds, Place, Relation, Scene, Thing};
pub use sequence::{ImageSlot, Queries, Sequence};
pub use tasks::Ability;
pub use vocabulary::Vocabulary;
pub use world::{Split, World};
