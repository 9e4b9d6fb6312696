//! A standalone cluster: every stage of every model and a router before them, in one process.
//!
//! | module | holds |
//! |---|---|
//! | [`cluster`] | starts a cluster, waits until it serves, stops it |
//! | [`plan`] | which stages of which models it consists of, on which devices, checked before anything starts |
//! | [`models_file`] | a file of models by name, with their folders and devices |

pub mod cluster;
pub mod models_file;
pub mod plan;
