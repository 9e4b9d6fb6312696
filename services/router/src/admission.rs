//! Who is let in, once it is known what is asked: permits by class, and no work that would only wait in vain.
//!
//! | module | holds |
//! |---|---|
//! | [`backlog`] | how far behind a stage is, in seconds, by what it was seen to do |
//! | [`backlogs`] | a model's stages as they are watched, and what may not be asked of them now |
//!
//! Before the message is read, the door of `emu2_serve` has counted the request, its tenant's rate and its bytes. Here
//! 1. its class must be one that its tenant may use;
//! 2. the requests that run must leave room for higher classes: lower ones may fill only a share of the permits;
//! 3. neither the llm nor the decoder, where it needs them, may be further behind than `admission.max_backlog_ms`, or
//!    than the request's deadline;
//! 4. its own work must fit its deadline at the best pace that was seen of late.
//!
//! 3 and 4 go by measurements alone: a stage that has not been seen at work refuses nobody. For 4 only certain work
//! counts: denoising steps, and of a text, which may end at any token, those before `min_length`. What the cache may hold
//! is certain only after a look: then rows to be regressed count with the steps that come after them, and the encoder
//! may not be further behind than `admission.max_backlog_ms`. Pictures of one request are encoded in batches with those
//! of others, and how many positions a prompt has only the llm knows: what these take a single request is nowhere
//! counted.

mod backlog;
mod backlogs;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use emu2_proto::v1::{GenerateEvent, generate_event::Event};
use emu2_serve::{
    admission::MemoryReservation,
    deadline::Deadline,
    priority::Priority,
    status::{self, Violation},
    tenant::Tenant,
};
use tonic::Status;

pub(crate) use self::backlogs::Backlogs;
use self::{
    backlog::{Backlog, Work},
    backlogs::{step_units, units_of},
};
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
    models: HashMap<String, Backlogs>,
}

/// Who asks, and how long it can wait.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) tenant: Tenant,
    pub(crate) priority: Priority,
    pub(crate) deadline: Deadline,
    pub(crate) holding: MemoryReservation,
}

/// A permit; given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit(Arc<AtomicUsize>);

/// A request that was let in, as its stages get on with it.
#[derive(Debug)]
pub(crate) struct Admitted {
    llm: Option<Work>,
    decoder: Option<Work>,
    /// Whether each token is told as it comes; a beam search's come together at its end.
    tells_tokens: bool,
    /// Of one denoising step.
    step_units: f64,
    _permit: Permit,
}

impl Admission {
    pub(crate) fn new(config: &Config) -> Self {
        let mut known: HashMap<(&str, &[String]), Arc<Backlog>> = HashMap::new();
        let mut of = |stage, replicas| Arc::clone(known.entry((stage, replicas)).or_default());
        let max_backlog = Duration::from_millis(config.admission.max_backlog_ms);
        let backlogs = config.models.iter().map(|model| {
            let backlogs = Backlogs {
                encoder: of("encoder", &model.encoder),
                llm: of("llm", &model.llm),
                decoder: of("decoder", &model.decoder),
                max_backlog,
            };
            (model.name.clone(), backlogs)
        });
        let models = backlogs.collect();
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

    /// Of a model that is configured.
    pub(crate) fn backlogs(&self, model: &str) -> Result<&Backlogs, Status> {
        self.models.get(model).ok_or_else(|| status::not_found("model", model))
    }

    /// Lets a checked request in, or says at once why not.
    pub(crate) fn enter(
        &self,
        model: &str,
        generation: &Generation,
        caller: &Caller,
    ) -> Result<Admitted, Status> {
        let _permit = self.permit(caller)?;
        let backlogs = self.backlogs(model)?;
        backlogs.check(&generation.task, caller.deadline)?;
        let start = generation.task.start();
        let (llm_units, tells_tokens) = match &generation.task {
            Task::Write { parameters, .. } => {
                (Some(f64::from(parameters.max_new_tokens)), parameters.num_beams <= 1)
            }
            Task::Paint { start, .. } => (Some(f64::from(start.queries)), false),
            Task::Autoencode { .. } => (None, false),
        };
        let is_first = llm_units.is_none();
        Ok(Admitted {
            llm: llm_units.map(|units| backlogs.llm.begin(units, true)),
            decoder: start.map(|start| backlogs.decoder.begin(units_of(start), is_first)),
            tells_tokens,
            step_units: start.map_or(0.0, step_units),
            _permit,
        })
    }
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
