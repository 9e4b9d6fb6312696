//! The loop that drives a stage: receive, drop who left, plan, step, report the load.
//!
//! It waits only for commands, and only when there is nothing to compute. It never waits for a caller.

use std::time::Instant;

use emu2_serve::priority::Priority;
use tokio::sync::mpsc;
use tracing::{Span, error};

use crate::{
    error::{EngineError, EngineFault, guarded},
    load::{LoadMetrics, Pace},
    stage::{Arrival, Batch, Entries, Outbox, Stage, Ticket, Told},
    thread::StepTimer,
};

#[cfg(test)]
mod tests;

/// What a handle asks of the loop.
#[derive(Debug)]
pub(crate) enum Command<S: Stage> {
    Submit(Box<Submission<S>>),
    Input {
        ticket: Ticket,
        input: S::Input,
    },
    /// Some caller left while the loop may be asleep; it looks for who.
    Left,
}

/// A request on its way into the loop.
#[derive(Debug)]
pub(crate) struct Submission<S: Stage> {
    pub(crate) ticket: Ticket,
    pub(crate) request: S::Request,
    pub(crate) priority: Priority,
    pub(crate) events: mpsc::Sender<Told<S>>,
    pub(crate) submitted: Instant,
    /// The caller's, and that of its wait as a child.
    pub(crate) span: Span,
    pub(crate) queue: Span,
}

/// The device does not work any more: the thread must end, and with it the service.
#[derive(Debug, PartialEq, Eq)]
pub struct DeviceLost;

/// What a turn of the loop found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// A step was made.
    Stepped,
    /// There is nothing to do before another command comes.
    Idle,
}

/// The loop's state, on the engine's thread.
#[derive(Debug)]
pub struct Worker<S: Stage> {
    stage: S,
    entries: Entries<S>,
    commands: mpsc::Receiver<Command<S>>,
    pace: Pace,
    metrics: LoadMetrics,
    timer: StepTimer,
}

impl<S: Stage> Worker<S> {
    pub(crate) fn new(
        stage: S,
        commands: mpsc::Receiver<Command<S>>,
        metrics: LoadMetrics,
        timer: StepTimer,
    ) -> Self {
        let entries = Entries::new(metrics.clone());
        Self { stage, entries, commands, pace: Pace::new(S::UNITS.len()), metrics, timer }
    }

    /// The stage that the loop drives.
    pub fn stage(&self) -> &S {
        &self.stage
    }

    /// Gives the stage back, with whatever it holds.
    pub fn into_stage(self) -> S {
        self.stage
    }

    /// Runs until all handles are gone, or the device is lost.
    pub fn run(mut self) {
        if self.serve() == Err(DeviceLost) {
            let tickets = self.entries.tickets();
            error!(requests = tickets.len(), "device lost, the engine stops");
            let mut outbox = Outbox::new(&mut self.entries);
            for ticket in tickets {
                outbox.fail_with(ticket, EngineError::Stopped);
            }
        }
        self.metrics.report(0.0, 0, None);
    }

    fn serve(&mut self) -> Result<(), DeviceLost> {
        loop {
            if self.turn()? == Turn::Idle {
                match self.commands.blocking_recv() {
                    Some(command) => self.obey(command)?,
                    None => return Ok(()),
                }
            }
        }
    }

    /// Takes what has come and makes at most one step. A test that drives a stage by hand calls this; the engine's
    /// thread calls [`run`](Self::run).
    pub fn turn(&mut self) -> Result<Turn, DeviceLost> {
        let timer = self.timer.clone();
        let _step = timer.start();
        // With all handles gone every caller has left, and the next wait for a command ends the loop.
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command)?;
        }
        self.drop_left();
        let turn = match self.stage.plan() {
            Some(batch) => {
                self.step(batch)?;
                Turn::Stepped
            }
            None => Turn::Idle,
        };
        let backlog = self.pace.seconds(&self.stage.units_left());
        self.metrics.report(backlog, self.entries.running(), self.stage.free_positions());
        Ok(turn)
    }

    fn obey(&mut self, command: Command<S>) -> Result<(), DeviceLost> {
        match command {
            Command::Submit(submission) => self.join(*submission),
            Command::Input { ticket, input } if self.entries.contains(ticket) => {
                let given = guarded(|| self.stage.input(ticket, input));
                self.settle(given, &[ticket])
            }
            // It has failed or left since.
            Command::Input { .. } | Command::Left => Ok(()),
        }
    }

    fn join(&mut self, submission: Submission<S>) -> Result<(), DeviceLost> {
        let Submission { ticket, request, priority, events, submitted, span, queue } = submission;
        self.entries.insert(ticket, events, submitted, queue);
        let arrival = Arrival { priority, span };
        match guarded(|| self.stage.join(ticket, request, arrival)) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(refusal)) => {
                Outbox::new(&mut self.entries).fail(ticket, refusal);
                Ok(())
            }
            Err(fault) => self.settle(Err(fault), &[ticket]),
        }
    }

    /// Whoever's caller left does not see another step.
    fn drop_left(&mut self) {
        for ticket in self.entries.left() {
            self.metrics.caller_left();
            self.entries.remove(ticket);
            self.stage.leave(ticket);
        }
    }

    fn step(&mut self, batch: Batch<S::Work>) -> Result<(), DeviceLost> {
        let Batch { tickets, kind, units, work } = batch;
        let started = Instant::now();
        let mut outbox = Outbox::new(&mut self.entries);
        let stepped = guarded(|| self.stage.step(work, &mut outbox));
        let (over, device_lost) = (outbox.over, outbox.device_lost);
        for ticket in over {
            self.stage.leave(ticket);
        }
        if stepped.is_ok() {
            let took = started.elapsed();
            self.metrics.stepped(took);
            self.pace.observe(kind, units, took);
        }
        self.settle(stepped, &tickets)?;
        if device_lost { Err(DeviceLost) } else { Ok(()) }
    }

    /// Ends the requests that a fault hit; the engine goes on unless the device is lost.
    fn settle(&mut self, done: Result<(), EngineFault>, tickets: &[Ticket]) -> Result<(), DeviceLost> {
        let Err(fault) = done else { return Ok(()) };
        let mut outbox = Outbox::new(&mut self.entries);
        for &ticket in tickets {
            outbox.fault(ticket, &fault);
        }
        for ticket in outbox.over {
            self.stage.leave(ticket);
        }
        if matches!(fault, EngineFault::Device(_)) { Err(DeviceLost) } else { Ok(()) }
    }
}
