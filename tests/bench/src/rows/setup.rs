//! What the rows share: under which conditions they measure, what they return, and how answers are compared.

use std::{collections::HashMap, time::Duration};

use blake3::Hash;

use crate::{cluster::Plan, figures::Figure, load::Record};

/// The conditions under which every row is measured.
#[derive(Clone, Debug)]
pub struct Setup {
    /// How many times a row is measured; its figures are medians over them.
    pub rounds: usize,
    /// Whether windows are short, for whoever works on the bench; no figure of it is worth anything.
    pub brief: bool,
    /// The number of the core on which the router runs alone; none where the machine has only one.
    pub router_core: Option<usize>,
}

/// What a row's module measured.
#[derive(Debug, Default)]
pub(super) struct Measured {
    pub(super) conditions: String,
    pub(super) figures: Vec<Figure>,
    pub(super) notes: Vec<String>,
}

impl Setup {
    pub(super) fn plan(&self) -> Plan {
        Plan { router_core: self.router_core, ..Plan::default() }
    }

    pub(super) fn pinning(&self) -> String {
        match self.router_core {
            Some(core) => format!("router alone on core {core}, stages and clients on the others"),
            None => "one core for everything".into(),
        }
    }

    /// Returns so many seconds, or a few while someone works on the bench.
    pub(super) fn window(&self, seconds: u64) -> Duration {
        Duration::from_secs(if self.brief { seconds.div_ceil(8).max(2) } else { seconds })
    }
}

/// Answers of the same request under two runs: those that differ, by number.
pub(super) fn differences(undisturbed: &HashMap<u64, Hash>, record: &Record, cycle: u64) -> Vec<u64> {
    let answered =
        record.0.iter().filter_map(|sent| Some((sent.number % cycle, sent.outcome.as_ref().ok()?)));
    let differ = answered.filter(|(number, answer)| undisturbed.get(number) != Some(&answer.digest));
    differ.map(|(number, _)| number).collect()
}

/// The digest of every request's answer.
pub(super) fn digests(record: &Record) -> HashMap<u64, Hash> {
    let answered = record.0.iter().filter_map(|sent| Some((sent.number, sent.outcome.as_ref().ok()?.digest)));
    answered.collect()
}
