//! The command `emu2`: the whole cluster in one process, and the client a person uses.
//!
//! | module | holds |
//! |---|---|
//! | [`args`] | the command line |
//! | [`cluster`] | `emu2 up`: every service in one process; tests start clusters with it too |
//! | [`plan`], [`models_file`] | which stages of which models it consists of, and the file that says so |
//! | [`loading`] | how far its stages are, on a terminal |
//! | [`client`] | a connection to any cluster's public API |
//! | [`parts`] | command-line words → parts of a prompt |
//! | [`sheet`], [`canvas`] | a contact sheet of prompts and answers, and what it is drawn on |
//! | [`show`] | events of a running request → a terminal |
//! | [`convert`] | `emu2 convert`: published weights to what is served |
//! | [`inspect`] | `emu2 inspect`: what a folder holds, and whether it can be served |
//! | [`up`], [`ask`], [`draw`], [`embed`], [`models`], [`demo`] | the other commands |

pub mod args;
pub mod ask;
pub mod canvas;
pub mod client;
pub mod cluster;
pub mod convert;
pub mod demo;
pub mod draw;
pub mod embed;
pub mod inspect;
pub mod loading;
pub mod models;
pub mod models_file;
pub mod parts;
pub mod plan;
pub mod sheet;
pub mod show;
pub mod up;
