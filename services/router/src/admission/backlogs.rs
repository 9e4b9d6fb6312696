//! A model's stages as they are watched, and what may not be asked of them now.

use std::{sync::Arc, time::Duration};

use emu2_proto::stage::DecodeStart;
use emu2_serve::{
    deadline::Deadline,
    status::{self, ErrorCode},
};
use tonic::Status;

use super::backlog::{Backlog, Work};
use crate::request::Task;

/// Models that share replicas share what is known of them.
#[derive(Clone, Debug)]
pub(crate) struct Backlogs {
    pub(super) encoder: Arc<Backlog>,
    pub(super) llm: Arc<Backlog>,
    pub(super) decoder: Arc<Backlog>,
    pub(super) max_backlog: Duration,
}

impl Backlogs {
    /// What a task needs for certain, whatever the cache holds.
    pub(super) fn check(&self, task: &Task, deadline: Deadline) -> Result<(), Status> {
        if !matches!(task, Task::Autoencode { .. }) {
            self.check_behind("llm", &self.llm, deadline)?;
        }
        match task {
            Task::Write { parameters, .. } => {
                // The invisible leading id counts as one.
                let tokens = parameters.min_length.saturating_sub(1);
                let needed = self.llm.at_best(f64::from(tokens)).unwrap_or_default();
                in_time(needed, deadline, || format!("the {tokens} tokens of text.min_length"))
            }
            Task::Paint { start, .. } | Task::Autoencode { start } => {
                self.check_behind("decoder", &self.decoder, deadline)?;
                self.check_painting(start, 0, deadline)
            }
        }
    }

    /// Rows to be regressed, and the denoising that comes after them.
    pub(crate) fn check_painting(
        &self,
        start: &DecodeStart,
        rows: u32,
        deadline: Deadline,
    ) -> Result<(), Status> {
        let regressing = self.llm.at_best(f64::from(rows)).unwrap_or_default();
        let denoising = self.decoder.at_best(units_of(start)).unwrap_or_default();
        let needed = regressing.saturating_add(denoising);
        in_time(needed, deadline, || {
            let DecodeStart { steps, width, height, .. } = start;
            let rows = if rows > 0 { format!("{rows} embeddings to regress and ") } else { String::new() };
            format!("{rows}{steps} denoising steps of {width} x {height} pixels")
        })
    }

    /// Admits a picture that the cache does not hold. The work is shared by all who want it, so that it goes by nobody's
    /// deadline.
    pub(crate) fn encode(&self) -> Result<Work, Status> {
        self.check_behind("encoder", &self.encoder, Deadline::none())?;
        Ok(self.encoder.begin_whole(1.0))
    }

    fn check_behind(&self, stage: &str, backlog: &Backlog, deadline: Deadline) -> Result<(), Status> {
        let most = self.max_backlog;
        let Some(behind) = backlog.estimate(most / 10) else { return Ok(()) };
        let seconds = behind.as_secs_f64();
        if let Some(left) = deadline.remaining().filter(|left| *left < behind) {
            let left = left.as_secs_f64();
            let text =
                format!("the {stage} is {seconds:.1} s behind, and {left:.1} s are left until the deadline");
            return Err(ErrorCode::DeadlineExceeded.status(text));
        }
        if behind > most {
            let most = most.as_millis();
            let text =
                format!("the {stage} is {seconds:.1} s behind, at most {most} ms (admission.max_backlog_ms)");
            return Err(status::exhausted(text, behind));
        }
        Ok(())
    }
}

/// Whether what is needed at the best pace of late is left until the deadline.
fn in_time(needed: Duration, deadline: Deadline, what: impl Fn() -> String) -> Result<(), Status> {
    let Some(left) = deadline.remaining().filter(|left| *left < needed) else { return Ok(()) };
    let (what, needed, left) = (what(), needed.as_secs_f64(), left.as_secs_f64());
    let text = format!("{what} take {needed:.1} s at best, and {left:.1} s are left until the deadline");
    Err(ErrorCode::DeadlineExceeded.status(text))
}

/// Megapixels that the decoder computes in a step: under guidance twice those of the image.
pub(super) fn step_units(start: &DecodeStart) -> f64 {
    let rows = if start.guidance_scale > 1.0 { 2.0 } else { 1.0 };
    rows * f64::from(start.width) * f64::from(start.height) / 1e6
}

pub(super) fn units_of(start: &DecodeStart) -> f64 {
    f64::from(start.steps) * step_units(start)
}
