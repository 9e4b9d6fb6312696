//! Faults of a step, and the errors that callers see.
//!
//! A fault carries the text of what failed; it goes to the log and nowhere else. A caller learns what kind of fault it
//! was, so a panic in a stage never shows a stranger what is inside.

use std::{
    panic::{self, AssertUnwindSafe},
    time::Duration,
};

use emu2_serve::status;
use tonic::Status;

/// When a refused caller should ask again: about one batch or one step of a large image later, a place or memory may
/// be free.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Why a step, or what prepares one, failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EngineFault {
    /// The batch did not fit into memory; the engine keeps serving.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// The device failed. A CUDA context may be poisoned by it, so the engine ends and the service exits.
    #[error("device failed: {0}")]
    Device(String),
    /// Any other panic is a defect, but only this batch's.
    #[error("batch failed: {0}")]
    Panic(String),
}

/// Runs `batch` and turns a panic in it into a fault.
///
/// Models use plain (panicking) torch operations, so that a forward reads like the paper.
pub fn guarded<T>(batch: impl FnOnce() -> T) -> Result<T, EngineFault> {
    // A model is not changed by a forward, and what a batch was building is dropped with it.
    panic::catch_unwind(AssertUnwindSafe(batch)).map_err(|payload| {
        let text = payload.downcast_ref::<String>().cloned();
        let text = text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        classify(text.unwrap_or_else(|| "panic without a message".to_owned()))
    })
}

fn classify(text: String) -> EngineFault {
    // libtorch's C++ messages carry a back trace; the first line says it. In a failed unwrap's text line ends are
    // written out.
    let line = text.lines().next().unwrap_or_default();
    let line = line.split("\\n").next().unwrap_or_default().to_owned();
    if text.contains("out of memory") || text.contains("can't allocate memory") {
        EngineFault::OutOfMemory(line)
    } else if ["CUDA error", "cuBLAS", "CUBLAS", "cuDNN", "CUDNN"].iter().any(|sign| text.contains(sign)) {
        EngineFault::Device(line)
    } else {
        EngineFault::Panic(line)
    }
}

/// Why a request got no answer, or no further one. `E` is what the stage itself refuses or fails with.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EngineError<E> {
    /// As many requests are waiting as may wait.
    #[error("all {max} places to wait are taken ({limit_name})")]
    Full {
        /// Requests that may wait.
        max: usize,
        /// The setting that says so.
        limit_name: &'static str,
    },
    /// The engine has ended, or is about to: its device failed or its service stops.
    #[error("the engine has stopped")]
    Stopped,
    /// The request's batch did not fit into the device's memory.
    #[error("the device is out of memory")]
    OutOfMemory,
    /// The request's step panicked; the log says more.
    #[error("the step failed")]
    StepFailed,
    /// The stage refused the request or failed it.
    #[error("{0}")]
    Stage(E),
}

impl<E> From<&EngineFault> for EngineError<E> {
    fn from(fault: &EngineFault) -> Self {
        match fault {
            EngineFault::OutOfMemory(_) => Self::OutOfMemory,
            // This replica is about to exit; another may have the answer.
            EngineFault::Device(_) => Self::Stopped,
            EngineFault::Panic(_) => Self::StepFailed,
        }
    }
}

impl<E: Into<Status>> From<EngineError<E>> for Status {
    fn from(error: EngineError<E>) -> Self {
        let full = |max, limit_name| {
            status::exhausted(format!("all {max} places to wait are taken ({limit_name})"), RETRY_AFTER)
        };
        match error {
            EngineError::Stage(error) => error.into(),
            EngineError::Full { max, limit_name } => full(max, limit_name),
            EngineError::OutOfMemory => status::exhausted("the device is out of memory", RETRY_AFTER),
            EngineError::Stopped => status::unavailable("the engine has stopped"),
            EngineError::StepFailed => status::internal("the step failed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_told_apart() {
        let fault = |text: &str| guarded(|| panic!("{text}")).unwrap_err();
        assert!(matches!(fault("CUDA out of memory. Tried to allocate"), EngineFault::OutOfMemory(_)));
        assert_eq!(
            fault("CUDA error: an illegal memory access\nframe #0: at x"),
            EngineFault::Device("CUDA error: an illegal memory access".to_owned())
        );
        assert_eq!(fault("shapes differ\\nframe #0"), EngineFault::Panic("shapes differ".to_owned()));
        assert_eq!(guarded(|| 7), Ok(7));
    }

    #[test]
    fn a_status_never_carries_a_faults_text() {
        let faults = [
            (EngineFault::OutOfMemory("secret".into()), tonic::Code::ResourceExhausted),
            (EngineFault::Device("secret".into()), tonic::Code::Unavailable),
            (EngineFault::Panic("secret".into()), tonic::Code::Internal),
        ];
        for (fault, code) in faults {
            let status = Status::from(EngineError::<Status>::from(&fault));
            assert_eq!(status.code(), code);
            assert!(!status.message().contains("secret"), "{status:?}");
        }
    }
}
