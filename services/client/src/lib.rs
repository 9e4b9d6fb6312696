//! A client of a cluster's public API, as the command line and the evaluation of models use it.
//!
//! | module | holds |
//! |---|---|
//! | [`args`] | which cluster is called and how, as arguments of a command line |
//! | [`client`] | the connection: requests with the caller's deadline and token, failures as a person reads them |
//! | [`parts`] | texts and image files as parts of a prompt |
//! | [`image`] | the chunks of a large image → its PNG |
//! | [`answer`] | the events of a request → its answer, with progress on a terminal |

pub mod answer;
pub mod args;
pub mod client;
pub mod image;
pub mod parts;

pub use answer::{Answer, follow};
pub use args::{ConnectionArgs, RouterArgs};
pub use client::{Client, explain};
