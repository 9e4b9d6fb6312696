//! Who runs, and what each running sequence adds to the next step. No torch, no clock, no channels.
//!
//! Continuous batching: sequences join and leave between any two steps. A step is one forward over
//! - one row (or one per beam) of every sequence whose prompt is in the cache, and
//! - up to `prefill_chunk` positions of prompts, oldest first, as far as their embeddings have arrived: a long prompt
//!   never stands in the way of the running sequences for longer than one chunk.
//!
//! Keys and values are the scarce thing. A sequence is admitted once all the entries that it may ever need fit what
//! the budget has left, and keeps them to its end; so a running sequence never waits for memory. Who waits stands in a
//! line by class (see [`emu2_serve::priority`]), first come, first served within one: a large sequence is not overtaken
//! for ever by small ones, nor one of a low class by higher ones. Passed over is only who could do nothing with its
//! memory yet, because embeddings of its first chunk have not come. Running sequences are all alike: the sooner one is
//! done, the sooner its memory is free.

#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, ops::Range};

use emu2_engine::{line::Line, stage::Ticket};
use emu2_serve::priority::Priority;

/// What bounds a scheduler; every value is at least 1.
#[derive(Clone, Copy, Debug)]
pub struct SchedulerLimits {
    /// How many entries of keys and values all running sequences may have together.
    pub kv_entries: usize,
    /// How many positions of prompts one step computes.
    pub prefill_chunk: usize,
}

/// What a sequence needs.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    /// How many positions its prompt has.
    pub prompt: usize,
    /// How many leading positions of the prompt have their embeddings.
    pub ready: usize,
    /// How many entries it may ever put into its cache.
    pub kv_entries: usize,
    /// The priority class of its request.
    pub priority: Priority,
}

/// The refusal of a sequence that would not fit an empty cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it needs {needed} cache entries of {budget}")]
pub struct TooLarge {
    /// How many entries it may ever need.
    pub needed: usize,
    /// How many entries there are.
    pub budget: usize,
}

/// What a sequence adds to a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// These positions of its prompt.
    Prefill(Range<usize>),
    /// What it chose in the step before.
    Decode,
}

impl Work {
    /// Returns how many positions of a prompt the work computes.
    pub fn prefilled(&self) -> usize {
        match self {
            Self::Prefill(positions) => positions.len(),
            Self::Decode => 0,
        }
    }
}

/// The next step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The sequences that start to run with this step: they need a cache.
    pub admitted: Vec<Ticket>,
    /// What each working sequence adds.
    pub work: BTreeMap<Ticket, Work>,
}

/// The choice of who runs: the waiting and the running sequences, without their tensors.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    /// The waiting sequences, the next one first.
    waiting: Line<Sequence>,
    running: Vec<Sequence>,
    /// How many entries are promised to the running sequences.
    reserved: usize,
}

#[derive(Debug)]
struct Sequence {
    ticket: Ticket,
    demand: Demand,
    prefilled: usize,
}

impl Scheduler {
    /// Makes a scheduler without sequences.
    pub fn new(limits: SchedulerLimits) -> Self {
        Self { limits, waiting: Line::default(), running: Vec::new(), reserved: 0 }
    }

    /// Lets a sequence wait for its admission.
    ///
    /// # Errors
    ///
    /// The sequence would not fit an empty cache.
    pub fn submit(&mut self, ticket: Ticket, demand: Demand) -> Result<(), TooLarge> {
        let SchedulerLimits { kv_entries: budget, .. } = self.limits;
        if demand.kv_entries > budget {
            return Err(TooLarge { needed: demand.kv_entries, budget });
        }
        self.waiting.push(demand.priority, Sequence { ticket, demand, prefilled: 0 });
        Ok(())
    }

    /// Records that more of a prompt's embeddings are here: all before position `ready`.
    pub fn set_ready(&mut self, ticket: Ticket, ready: usize) {
        let mut all = self.waiting.iter_mut().chain(&mut self.running);
        if let Some(sequence) = all.find(|sequence| sequence.ticket == ticket) {
            sequence.demand.ready = ready;
        }
    }

    /// Removes a sequence that has finished or failed, or whose caller left.
    pub fn remove(&mut self, ticket: Ticket) {
        self.waiting.retain(|sequence| sequence.ticket != ticket);
        if let Some(index) = self.running.iter().position(|sequence| sequence.ticket == ticket) {
            self.reserved -= self.running.remove(index).demand.kv_entries;
        }
    }

    /// Plans the next step and takes it as done: whatever fails in it has to be removed.
    pub fn plan(&mut self) -> Plan {
        let mut plan = Plan { admitted: self.admit(), work: BTreeMap::new() };
        let mut chunk = self.limits.prefill_chunk;
        for sequence in &mut self.running {
            if sequence.prefilled == sequence.demand.prompt {
                plan.work.insert(sequence.ticket, Work::Decode);
                continue;
            }
            let end = sequence.demand.ready.min(sequence.prefilled + chunk);
            if end > sequence.prefilled {
                let positions = sequence.prefilled..end;
                chunk -= positions.len();
                sequence.prefilled = end;
                plan.work.insert(sequence.ticket, Work::Prefill(positions));
            }
        }
        plan
    }

    /// Returns how many sequences wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Returns how many sequences run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Returns how many entries are promised to the running sequences; at most the budget.
    pub fn reserved(&self) -> usize {
        self.reserved
    }

    /// Returns how many entries are promised to nobody.
    pub fn free(&self) -> usize {
        self.limits.kv_entries - self.reserved
    }

    /// Returns how many positions of prompts are not in a cache yet.
    pub fn prefill_left(&self) -> usize {
        self.waiting.iter().chain(&self.running).map(|it| it.demand.prompt - it.prefilled).sum()
    }

    fn admit(&mut self) -> Vec<Ticket> {
        let SchedulerLimits { kv_entries, prefill_chunk } = self.limits;
        let mut admitted = Vec::new();
        let mut index = 0;
        while let Some(next) = self.waiting.get(index) {
            if !next.can_start(prefill_chunk) {
                index += 1;
                continue;
            }
            if self.reserved + next.demand.kv_entries > kv_entries {
                break;
            }
            let next = self.waiting.remove(index).expect("it was found there");
            self.reserved += next.demand.kv_entries;
            admitted.push(next.ticket);
            self.running.push(next);
        }
        admitted
    }
}

impl Sequence {
    /// Whether everything in the sequence's first chunk is here.
    fn can_start(&self, prefill_chunk: usize) -> bool {
        self.demand.ready >= self.demand.prompt.min(prefill_chunk)
    }
}
