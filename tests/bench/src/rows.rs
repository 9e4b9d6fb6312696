//! The rows of `make bench-router`, one module each.
//!
//! | module | question |
//! |---|---|
//! | `latency` | what a hop through the router adds to 229 KB, and what nginx adds |
//! | `throughput` | embeddings through one core, against a raw relay |
//! | `single_flight` | ten routers, one new image: how many encodes |
//! | `reuse` | what the cache gives at 0, 50 and 80 % of images seen before |
//! | `kills` | a replica killed every second |
//! | `router_killed` | how a killed router's streams end |
//! | `redis_faults` | Redis killed, paused, back |
//! | `overload` | ten times what fits |
//! | `scaling` | 64 replicas a stage against 8 |
//! | `rolling` | every replica restarted in order |
//!
//! `setup` is what they share.

mod kills;
mod latency;
mod overload;
mod redis_faults;
mod reuse;
mod rolling;
mod router_killed;
mod scaling;
mod setup;
mod single_flight;
mod throughput;

use futures::{FutureExt, future::BoxFuture};

pub use setup::Setup;

use self::setup::Measured;
use crate::figures::Row;

type Measure = for<'a> fn(&'a Setup) -> BoxFuture<'a, anyhow::Result<Measured>>;

/// The name of every row, its number of bars, and its measurement.
const ROWS: [(&str, usize, Measure); 10] = [
    ("latency", 3, |setup| latency::measure(setup).boxed()),
    ("throughput", 1, |setup| throughput::measure(setup).boxed()),
    ("single_flight", 1, |setup| single_flight::measure(setup).boxed()),
    ("reuse", 2, |setup| reuse::measure(setup).boxed()),
    ("kills", 2, |setup| kills::measure(setup).boxed()),
    ("router_killed", 2, |setup| router_killed::measure(setup).boxed()),
    ("redis_faults", 3, |setup| redis_faults::measure(setup).boxed()),
    ("overload", 3, |setup| overload::measure(setup).boxed()),
    ("scaling", 1, |setup| scaling::measure(setup).boxed()),
    ("rolling", 1, |setup| rolling::measure(setup).boxed()),
];

/// Returns the names of all rows, in the order in which they are measured.
pub fn names() -> impl Iterator<Item = &'static str> {
    ROWS.iter().map(|(name, _, _)| *name)
}

/// Runs the row of this name, or returns none where no row has it; that a row could not run is part of its result.
pub async fn run(name: &str, setup: &Setup) -> Option<Row> {
    let (name, bars, measure) = ROWS.iter().find(|(known, _, _)| *known == name)?;
    let row =
        Row { name, conditions: String::new(), figures: vec![], notes: vec![], failed: None, bars: *bars };
    Some(match measure(setup).await {
        Ok(Measured { conditions, figures, notes }) => Row { conditions, figures, notes, ..row },
        Err(error) => Row { failed: Some(format!("{error:#}")), ..row },
    })
}
