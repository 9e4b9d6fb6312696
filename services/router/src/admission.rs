//! Who is let in, once it is known what is asked: permits by class, and no work that would only wait in vain.
//!
//! | module | holds |
//! |---|---|
//! | [`backlog`] | how far behind a stage is, in seconds, by what it was seen to do |
//!
//! Before the message is read, the door of `emu2_serve` has counted the request, its tenant's rate and its bytes. Here
//! 1. its class must be one that its tenant may use;
//! 2. the requests that run must leave room for higher classes: lower ones may fill only a share of the permits;
//! 3. no stage that it needs may be further behind than `admission.max_backlog_ms`, or than the request's deadline;
//! 4. its own work must fit its deadline at the best pace that was seen of late.
//!
//! 3 and 4 go by measurements alone: a stage that has not been seen at work refuses nobody. For 4 only certain work
//! counts. Denoising steps are; a text may end at any token, and embeddings may be in the cache.

mod backlog;

use std::{
    collections::HashMap,
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
    admission::Holding,
    deadline::Deadline,
    priority::Priority,
    status::{self, ErrorCode, Violation},
    tenant::Tenant,
};
use tonic::Status;

use self::backlog::{Backlog, Work};
use crate::{
    config::{AdmissionConfig, Config},
    request::{Generation, Task},
};

/// For a permit: nobody knows when one is given back.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The router's door behind the door.
#[derive(Debug)]
pub(crate) struct Admission {
    config: AdmissionConfig,
    max_requests: usize,
    running: Arc<AtomicUsize>,
    models: HashMap<String, Stages>,
}

/// The stages of a model that are watched. Models that share replicas share what is known of them.
#[derive(Clone, Debug)]
struct Stages {
    llm: Arc<Backlog>,
    decoder: Arc<Backlog>,
}

/// Who asks, and how long it can wait.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) tenant: Tenant,
    pub(crate) priority: Priority,
    pub(crate) deadline: Deadline,
    pub(crate) holding: Holding,
}

/// A permit; given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit(Arc<AtomicUsize>);

/// A request that was let in, as its stages get on with it.
#[derive(Debug)]
pub(crate) struct Admitted {
    llm: Option<Work>,
    decoder: Option<Work>,
    /// Of one denoising step.
    step_units: f64,
    _permit: Permit,
}

impl Admission {
    pub(crate) fn new(config: &Config) -> Self {
        let mut known: HashMap<(&str, &[String]), Arc<Backlog>> = HashMap::new();
        let mut of = |stage, replicas| Arc::clone(known.entry((stage, replicas)).or_default());
        let stages = config.models.iter().map(|model| {
            let (llm, decoder) = (of("llm", model.llm.as_slice()), of("decoder", model.decoder.as_slice()));
            (model.name.clone(), Stages { llm, decoder })
        });
        let models = stages.collect();
        let max_requests = config.server.max_requests;
        Self { config: config.admission.clone(), max_requests, running: Arc::default(), models }
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
        model: &str,
        generation: &Generation,
        caller: &Caller,
    ) -> Result<Admitted, Status> {
        let _permit = self.permit(caller)?;
        let Stages { llm, decoder } =
            self.models.get(model).ok_or_else(|| status::not_found("model", model))?;
        let start = generation.task.start();
        let llm_units = match &generation.task {
            Task::Write { parameters, .. } => Some(f64::from(parameters.max_new_tokens)),
            Task::Paint { start, .. } => Some(f64::from(start.queries)),
            Task::Autoencode { .. } => None,
        };
        for (stage, backlog, _) in [("llm", llm, llm_units.is_some()), ("decoder", decoder, start.is_some())]
            .into_iter()
            .filter(|it| it.2)
        {
            self.check_backlog(stage, backlog, caller.deadline)?;
        }
        if let Some(start) = start {
            check_own_work(decoder, start, caller.deadline)?;
        }
        let is_first = llm_units.is_none();
        Ok(Admitted {
            llm: llm_units.map(|units| llm.begin(units, true)),
            decoder: start.map(|start| decoder.begin(units_of(start), is_first)),
            step_units: start.map_or(0.0, step_units),
            _permit,
        })
    }

    fn check_backlog(&self, stage: &str, backlog: &Backlog, deadline: Deadline) -> Result<(), Status> {
        let most = Duration::from_millis(self.config.max_backlog_ms);
        let Some(behind) = backlog.estimate(most / 10) else { return Ok(()) };
        let seconds = behind.as_secs_f64();
        if let Some(left) = deadline.remaining().filter(|left| *left < behind) {
            let left = left.as_secs_f64();
            let text =
                format!("the {stage} is {seconds:.1} s behind, and {left:.1} s are left until the deadline");
            return Err(ErrorCode::DeadlineExceeded.status(text));
        }
        if behind > most {
            let most = self.config.max_backlog_ms;
            let text =
                format!("the {stage} is {seconds:.1} s behind, at most {most} ms (admission.max_backlog_ms)");
            return Err(status::exhausted(text, behind));
        }
        Ok(())
    }
}

/// Against the deadline, at the best pace of late.
fn check_own_work(decoder: &Backlog, start: &DecodeStart, deadline: Deadline) -> Result<(), Status> {
    let (Some(left), Some(needed)) = (deadline.remaining(), decoder.at_best(units_of(start))) else {
        return Ok(());
    };
    if needed <= left {
        return Ok(());
    }
    let DecodeStart { steps, width, height, .. } = start;
    let (needed, left) = (needed.as_secs_f64(), left.as_secs_f64());
    let text = format!(
        "{steps} denoising steps of {width} x {height} pixels take {needed:.1} s at best, and {left:.1} s are left \
         until the deadline"
    );
    Err(ErrorCode::DeadlineExceeded.status(text))
}

/// Megapixels that the decoder computes in a step: under guidance twice those of the image.
fn step_units(start: &DecodeStart) -> f64 {
    let rows = if start.guidance_scale > 1.0 { 2.0 } else { 1.0 };
    rows * f64::from(start.width) * f64::from(start.height) / 1e6
}

fn units_of(start: &DecodeStart) -> f64 {
    f64::from(start.steps) * step_units(start)
}

impl Admitted {
    /// Notes what a stage has done, by what its client is told.
    pub(crate) fn observe(&mut self, event: &GenerateEvent) {
        let Some(event) = &event.event else { return };
        match (event, &mut self.llm, &mut self.decoder) {
            (Event::TextDelta(_), Some(llm), _) => llm.did(1.0),
            (Event::EmbeddingProgress(progress), Some(llm), decoder) => {
                llm.reached(f64::from(progress.done));
                if progress.done >= progress.total
                    && let Some(decoder) = decoder
                {
                    self.llm = None;
                    decoder.at_hand();
                }
            }
            (Event::DenoiseProgress(progress), _, Some(decoder)) => {
                decoder.reached(f64::from(progress.step) * self.step_units);
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
