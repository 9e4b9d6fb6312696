//! The router measured and broken from outside: real router processes between clients and stages that compute
//! nothing. `make bench-router` runs the measurements, `make test` the failures (`failures/`).
//!
//! | module | holds |
//! |---|---|
//! | [`mock`] | the binary `mock-stage`: encoder, llm or decoder with set costs and answers that can be compared |
//! | [`processes`] | one process: pinned, killed, paused; it ends with whoever started it |
//! | [`cluster`] | pools of mock stages, routers in front of them, Redis |
//! | [`load`] | requests by number, their answers' digests, and clients that send them |
//! | [`figures`] | percentiles, medians over rounds, bars, the table |
//! | [`rows`] | one module a row of the table |
//! | [`relay`] | bytes from one socket to another: what a hop costs at least |
//!
//! It links no torch.

pub mod cluster;
pub mod figures;
pub mod load;
pub mod mock;
pub mod processes;
pub mod relay;
pub mod rows;
