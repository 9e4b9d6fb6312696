//! Trains a small Emu2 ("nano") with the paper's objective, from data that anyone can get, and measures what it can.
//!
//! | module | holds |
//! |---|---|
//! | [`args`] | the command line |
//! | [`data`] | drawings → scenes → documents, endless and seeded; no torch |

pub mod args;
pub mod data;
