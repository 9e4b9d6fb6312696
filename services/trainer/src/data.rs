//! The training data: drawings of things, composed into scenes, told as interleaved documents. Nothing is stored: a
//! sample is a function of (seed, split, index), the same on every machine and for any number of threads.
//!
//! | module | holds |
//! |---|---|
//! | [`picture`] | the pixels of one image |
//! | [`document`] | a document as the model reads it, and what is learned of it |
//! | [`sequence`] | a document → token ids, slots for embeddings, where the losses fall |
//! | [`loader`] | worker threads that make batches ahead |

pub mod document;
pub mod loader;
pub mod picture;
pub mod sequence;

pub use document::{Document, Piece, Task};
pub use loader::Loader;
pub use picture::{Picture, SIDE};
pub use sequence::{PictureSlot, Queries, Sequence};
