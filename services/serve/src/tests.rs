//! The doors, tried from outside: a server on loopback and clients that should not get in, or not stay.

mod greedy;
pub(crate) mod loopback;
mod tls;
mod tokens;
