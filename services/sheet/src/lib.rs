//! What is shown of a model: the prompts of a demo, and a contact sheet of prompts and answers.
//!
//! | module | holds |
//! |---|---|
//! | [`canvas`] | an image on which lines and words are drawn |
//! | [`sheet`] | the contact sheet: a row for each prompt with its answer |
//! | [`demo`] | the prompts of `emu2 demo`: those of a model folder (demo.toml), or prompts about photographs |

pub mod canvas;
pub mod demo;
pub mod sheet;
