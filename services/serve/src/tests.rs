//! The doors, tried from outside: a server on loopback and clients that should not get in.

mod tokens;
