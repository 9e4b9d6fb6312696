//! A client of a cluster's public API, as the command line and the evaluation of models use it.
//!
//! | module | holds |
//! |---|---|
//! | [`args`] | which cluster is called and how, as arguments of a command line |
//! | [`client`] | the connection: requests with the caller's deadline and token, failures as a person reads them |

#![warn(missing_docs)]

pub mod args;
pub mod client;

pub use args::{ConnectionArgs, RouterArgs};
pub use client::{Client, explain};
