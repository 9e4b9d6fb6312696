//! The command `emu2`: the whole cluster in one process, and the client a person uses.
//!
//! | module | holds |
//! |---|---|
//! | [`args`] | the command line |
//! | [`loading`] | how far the stages of a cluster in this process are, on a terminal |
//! | [`parts`] | command-line words → parts of a prompt |
//! | [`show`] | events of a running request → a terminal |
//! | [`convert`] | `emu2 convert`: published weights to what is served |
//! | [`inspect`] | `emu2 inspect`: what a folder holds, and whether it can be served |
//! | [`up`], [`ask`], [`draw`], [`embed`], [`models`], [`demo`] | the other commands |

pub mod args;
pub mod ask;
pub mod convert;
pub mod demo;
pub mod draw;
pub mod embed;
pub mod inspect;
pub mod loading;
pub mod models;
pub mod parts;
pub mod show;
pub mod up;
