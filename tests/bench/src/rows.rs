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

mod kills;
mod latency;
mod overload;
mod redis_faults;
mod reuse;
mod rolling;
mod router_killed;
mod scaling;
mod single_flight;
mod throughput;

use std::{collections::HashMap, time::Duration};

use blake3::Hash;
use futures::{FutureExt, future::BoxFuture};

use crate::{
    cluster::Plan,
    figures::{Figure, Row},
    load::Record,
};

/// What every row goes by.
#[derive(Clone, Debug)]
pub struct Setup {
    pub rounds: usize,
    /// Short windows, for whoever works on the bench; no figure of it is worth anything.
    pub brief: bool,
    /// The router's core, and what stands in its place; none where there is only one.
    pub router_core: Option<usize>,
}

/// What a row's module hands back.
#[derive(Debug, Default)]
struct Measured {
    conditions: String,
    figures: Vec<Figure>,
    notes: Vec<String>,
}

type Measure = for<'a> fn(&'a Setup) -> BoxFuture<'a, anyhow::Result<Measured>>;

/// Name, bars, measurement.
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

pub fn names() -> impl Iterator<Item = &'static str> {
    ROWS.iter().map(|(name, _, _)| *name)
}

/// Runs one row; that it could not run is part of its result.
pub async fn run(name: &str, setup: &Setup) -> Option<Row> {
    let (name, bars, measure) = ROWS.iter().find(|(known, _, _)| *known == name)?;
    let row =
        Row { name, conditions: String::new(), figures: vec![], notes: vec![], failed: None, bars: *bars };
    Some(match measure(setup).await {
        Ok(Measured { conditions, figures, notes }) => Row { conditions, figures, notes, ..row },
        Err(error) => Row { failed: Some(format!("{error:#}")), ..row },
    })
}

impl Setup {
    fn plan(&self) -> Plan {
        Plan { router_core: self.router_core, ..Plan::default() }
    }

    fn pinning(&self) -> String {
        match self.router_core {
            Some(core) => format!("router alone on core {core}, stages and clients on the others"),
            None => "one core for everything".into(),
        }
    }

    /// So many seconds, or a few while someone works on the bench.
    fn window(&self, seconds: u64) -> Duration {
        Duration::from_secs(if self.brief { seconds.div_ceil(8).max(2) } else { seconds })
    }
}

/// Answers of the same request under two runs: those that differ, by number.
fn differences(undisturbed: &HashMap<u64, Hash>, record: &Record, cycle: u64) -> Vec<u64> {
    let answered =
        record.0.iter().filter_map(|sent| Some((sent.number % cycle, sent.outcome.as_ref().ok()?)));
    let differ = answered.filter(|(number, answer)| undisturbed.get(number) != Some(&answer.digest));
    differ.map(|(number, _)| number).collect()
}

/// The digest of every request's answer.
fn digests(record: &Record) -> HashMap<u64, Hash> {
    let answered = record.0.iter().filter_map(|sent| Some((sent.number, sent.outcome.as_ref().ok()?.digest)));
    answered.collect()
}
