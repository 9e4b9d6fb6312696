//! The little torch that the model services share. It knows no model.
//!
//! | module | holds |
//! |---|---|
//! | [`mod@array`] | wire arrays to tensors and back |
//! | [`device`] | "cpu", "cuda:0" → devices, CUDA libraries found at run time |
//! | [`checkpoint`] | a model folder in any layout, memory-mapped; the one table of names |
//! | [`random`] | weights out of a seed in place of a folder |
//! | [`weights`] | the ledger that models are built from: every mistake in one error, and the digest |
//! | [`layers`] | linear, norms, convolution, embedding, built from loaded tensors |
//! | [`attention`] | the one attention function |
//! | [`thread`] | what a thread that computes with torch sets up |
//! | `golden` | numbers of the official model, for tests (feature `golden`) |
//!
//! Words for shapes, used in every model: batch, tokens, width, heads, head_width, queries (embeddings of one
//! image, 64), channels, height, width_px.

pub mod array;
pub mod attention;
pub mod checkpoint;
pub mod device;
#[cfg(feature = "golden")]
pub mod golden;
pub mod layers;
pub mod random;
pub mod thread;
pub mod weights;
