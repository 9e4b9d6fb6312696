//! Who is let in, once it is known what is asked: permits by class, and no work that would only wait in vain.
//!
//! Before the message is read, the door of `emu2_serve` has counted the request, its tenant's rate and its bytes. Here
//! 1. its class must be one that its tenant may use;
//! 2. the requests that run must leave room for higher classes: lower ones may fill only a share of the permits;
//! 3. neither the llm nor the decoder, where it needs them, may be further behind than `admission.max_backlog_ms`, or
//!    than the request's deadline;
//! 4. its own work must fit its deadline at the best pace that was seen of late.
//!
//! 3 goes by what the stages report of their load, so that all routers refuse alike; a stage is behind once requests
//! wait at each of its replicas. 4 goes by what this router saw: a stage that it has not seen at work refuses nobody,
//! and only certain work counts: denoising steps, and of a text, which may end at any token, those before `min_length`.
//! What the cache may hold is certain only after a look: then rows to be regressed count with the steps that come after
//! them, and the encoder may not be further behind than `admission.max_backlog_ms`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use emu2_proto::{
    stage::DecodeStart,
    v1::{GenerateEvent, generate_event::Event},
};
use emu2_serve::{
    deadline::Deadline,
    status::{self, ErrorCode, Violation},
};
use tonic::Status;

use crate::{
    config::{AdmissionConfig, Config},
    context::Caller,
    model::Model,
    pool::{PaceSample, Pool, Stage},
    request::{Generation, Task},
};

/// When to ask again for a permit: nobody knows when one is given back.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The router's door behind the door.
#[derive(Debug)]
pub(crate) struct Admission {
    config: AdmissionConfig,
    max_requests: usize,
    running: Arc<AtomicUsize>,
}

/// A permit; given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit(Arc<AtomicUsize>);

/// A request that was let in, as its stages get on with it.
#[derive(Debug)]
pub(crate) struct Admitted {
    llm: Option<PaceSample>,
    decoder: Option<PaceSample>,
    /// Whether each token is told as it comes; a beam search's come together at its end.
    tells_tokens: bool,
    /// Units of work of one denoising step.
    step_units: f64,
    _permit: Permit,
}

impl Admission {
    pub(crate) fn new(config: &Config) -> Self {
        let max_requests = config.server.max_requests;
        Self { config: config.admission.clone(), max_requests, running: Arc::default() }
    }

    /// A permit now, or why not.
    pub(crate) fn permit(&self, caller: &Caller) -> Result<Permit, Status> {
        let (asked, highest) = (caller.priority, caller.tenant.highest_priority());
        if asked > highest {
            let (tenant, highest, asked) = (&caller.tenant, highest.name(), asked.name());
            let description = format!("must be at most {highest} for tenant {tenant}, got {asked}");
            return Err(Violation::new("priority", description).into());
        }
        let most = self.config.permits(asked, self.max_requests);
        let entered = self.running.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |running| {
            (running < most).then_some(running + 1)
        });
        match entered {
            Ok(_) => Ok(Permit(Arc::clone(&self.running))),
            Err(running) => {
                let class = asked.name();
                let text =
                    format!("{running} requests run, and {class} may fill {most} permits of this router");
                Err(status::exhausted(text, RETRY_AFTER))
            }
        }
    }

    /// Lets a checked request in, or says at once why not.
    pub(crate) fn enter(
        &self,
        model: &Model,
        generation: &Generation,
        caller: &Caller,
    ) -> Result<Admitted, Status> {
        let _permit = self.permit(caller)?;
        self.check(model, &generation.task, caller.deadline)?;
        let start = generation.task.start();
        let (llm_units, tells_tokens) = match &generation.task {
            Task::Write { parameters, .. } => {
                (Some(f64::from(parameters.max_new_tokens())), parameters.num_beams() <= 1)
            }
            Task::Paint { start, .. } => (Some(f64::from(start.queries)), false),
            Task::Autoencode { .. } => (None, false),
        };
        let decoder = model.decoder.as_ref().zip(start);
        Ok(Admitted {
            llm: llm_units.map(|units| model.llm.best_pace().sample(units)),
            decoder: decoder.map(|(pool, start)| pool.best_pace().sample(units_of(start))),
            tells_tokens,
            step_units: start.map_or(0.0, step_units),
            _permit,
        })
    }

    /// What a task needs for certain, whatever the cache holds.
    fn check(&self, model: &Model, task: &Task, deadline: Deadline) -> Result<(), Status> {
        let max_backlog = self.config.max_backlog();
        if !matches!(task, Task::Autoencode { .. }) {
            check_behind(&model.llm, max_backlog, deadline)?;
        }
        match task {
            Task::Write { parameters, .. } => {
                // The invisible leading id counts as one.
                let tokens = parameters.min_length().saturating_sub(1);
                let needed = model.llm.best_pace().at_best(f64::from(tokens)).unwrap_or_default();
                in_time(needed, deadline, || format!("the {tokens} tokens of text.min_length"))
            }
            Task::Paint { start, .. } | Task::Autoencode { start } => {
                if let Some(decoder) = &model.decoder {
                    check_behind(decoder, max_backlog, deadline)?;
                }
                check_painting(model, start, 0, deadline)
            }
        }
    }
}

/// Whether an image that the cache does not hold may be encoded. The work is shared by all who want it, so that it goes
/// by nobody's deadline.
pub(crate) fn check_encoder(model: &Model, max_backlog: Duration) -> Result<(), Status> {
    check_behind(&model.encoder, max_backlog, Deadline::none())
}

fn check_behind<S: Stage>(pool: &Pool<S>, max_backlog: Duration, deadline: Deadline) -> Result<(), Status> {
    // A wait that short is no backlog.
    let behind = pool.behind(max_backlog / 10);
    let (stage, seconds) = (S::NAME, behind.as_secs_f64());
    if let Some(left) = deadline.remaining().filter(|left| *left < behind) {
        let left = left.as_secs_f64();
        let text =
            format!("the {stage} is {seconds:.1} s behind, and {left:.1} s are left until the deadline");
        return Err(ErrorCode::DeadlineExceeded.status(text));
    }
    if behind > max_backlog {
        let most = max_backlog.as_millis();
        let text =
            format!("the {stage} is {seconds:.1} s behind, at most {most} ms (admission.max_backlog_ms)");
        return Err(status::exhausted(text, behind));
    }
    Ok(())
}

/// Whether there is time for `rows` to be regressed and for the denoising that comes after them.
pub(crate) fn check_painting(
    model: &Model,
    start: &DecodeStart,
    rows: u32,
    deadline: Deadline,
) -> Result<(), Status> {
    let regressing = model.llm.best_pace().at_best(f64::from(rows));
    let denoising = model.decoder.as_ref().and_then(|pool| pool.best_pace().at_best(units_of(start)));
    let needed = regressing.unwrap_or_default().saturating_add(denoising.unwrap_or_default());
    in_time(needed, deadline, || {
        let image = start.image.unwrap_or_default();
        let (steps, width, height) = (image.steps(), image.width(), image.height());
        let rows = if rows > 0 { format!("{rows} embeddings to regress and ") } else { String::new() };
        format!("{rows}{steps} denoising steps of {width} x {height} pixels")
    })
}

/// Whether what is needed at the best pace of late is left until the deadline.
fn in_time(needed: Duration, deadline: Deadline, what: impl Fn() -> String) -> Result<(), Status> {
    let Some(left) = deadline.remaining().filter(|left| *left < needed) else { return Ok(()) };
    let (what, needed, left) = (what(), needed.as_secs_f64(), left.as_secs_f64());
    let text = format!("{what} take {needed:.1} s at best, and {left:.1} s are left until the deadline");
    Err(ErrorCode::DeadlineExceeded.status(text))
}

/// Megapixels that the decoder computes in a step: under guidance twice those of the image.
fn step_units(start: &DecodeStart) -> f64 {
    let image = start.image.unwrap_or_default();
    let rows = if image.guidance_scale() > 1.0 { 2.0 } else { 1.0 };
    rows * f64::from(image.width()) * f64::from(image.height()) / 1e6
}

fn units_of(start: &DecodeStart) -> f64 {
    f64::from(start.image.unwrap_or_default().steps()) * step_units(start)
}

impl Admitted {
    /// Notes what a stage has done, by what its client is told.
    pub(crate) fn observe(&mut self, event: &GenerateEvent) {
        let Some(event) = &event.event else { return };
        match (event, &mut self.llm, &mut self.decoder) {
            (Event::TextDelta(_), Some(llm), _) => llm.did(1.0),
            (Event::EmbeddingProgress(progress), Some(llm), _) => {
                llm.reached(f64::from(progress.done));
                if progress.done >= progress.total {
                    self.llm = None;
                }
            }
            (Event::DenoiseProgress(progress), _, Some(decoder)) => {
                decoder.reached(f64::from(progress.step) * self.step_units);
            }
            // An event may be of several tokens, or of none that is shown.
            (Event::Finished(finished), Some(llm), None) if self.tells_tokens => {
                llm.reached(f64::from(finished.usage.unwrap_or_default().generated_tokens));
                self.llm = None;
            }
            (Event::Image(_) | Event::Finished(_), ..) => (self.llm, self.decoder) = (None, None),
            _ => {}
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
