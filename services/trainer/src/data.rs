//! The training data: drawings of things, composed into scenes, told as interleaved documents. Nothing is stored: a
//! sample is a function of (seed, split, index), the same on every machine and for any number of threads.
//!
//! | module | holds |
//! |---|---|
//! | [`concept`] | the things, by name |
//! | [`atlas`], [`drawings`] | how each looks, in every style |
//! | [`scene`] | what is where on which background, and its pixels |
//! | [`compose`], [`held_out`] | scenes at random; what training never shows |
//! | [`world`] | all of that opened, and the random numbers of each sample |
//! | [`picture`] | the pixels of one image |
//! | [`document`] | a document as the model reads it, and what is learned of it |
//! | [`sequence`] | a document → token ids, slots for embeddings, where the losses fall |
//! | [`loader`] | worker threads that make batches ahead |

pub mod atlas;
pub mod compose;
pub mod concept;
pub mod document;
pub mod drawings;
pub mod held_out;
pub mod loader;
pub mod picture;
pub mod scene;
pub mod sequence;
#[cfg(test)]
mod tests;
pub mod world;

pub use atlas::{Atlas, Style};
pub use compose::{Composer, Novelty};
pub use concept::Concept;
pub use document::{Document, Piece, Task};
pub use drawings::Drawings;
pub use loader::Loader;
pub use picture::{Picture, SIDE};
pub use scene::{Background, Bounds, Layout, Place, Relation, Scene, Thing};
pub use sequence::{PictureSlot, Queries, Sequence};
pub use world::{Labels, Split, World};
