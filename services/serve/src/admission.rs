//! Permits: work is bounded at the door. A full service says so at once, so that its caller can go elsewhere; a queue
//! that nobody sees would only turn overload into timeouts.

use std::{sync::Arc, time::Duration};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;

use crate::status;

/// Long enough for a text request to leave, short enough that a caller's own deadline survives it.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The door: cloning shares its permits.
#[derive(Clone, Debug)]
pub struct Admission {
    permits: Arc<Semaphore>,
    max: usize,
}

/// The right to occupy the service; given back when dropped.
#[derive(Debug)]
pub struct Permit(#[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

impl Admission {
    /// At most `max` requests at a time.
    pub fn new(max: usize) -> Self {
        Self { permits: Arc::new(Semaphore::new(max)), max }
    }

    /// A permit now, or RESOURCE_EXHAUSTED with RetryInfo.
    pub fn try_enter(&self) -> Result<Permit, Status> {
        match Arc::clone(&self.permits).try_acquire_owned() {
            Ok(permit) => Ok(Permit(permit)),
            Err(_) => Err(status::exhausted(
                format!("all {} permits of this service are taken (server.max_requests)", self.max),
                RETRY_AFTER,
            )),
        }
    }

    /// Permits taken now.
    pub fn in_flight(&self) -> usize {
        self.max - self.permits.available_permits()
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tonic_types::StatusExt;

    use super::*;

    #[test]
    fn a_full_service_refuses_at_once_and_opens_again_when_a_permit_is_dropped() {
        let admission = Admission::new(2);
        let first = admission.try_enter().unwrap();
        let _second = admission.try_enter().unwrap();
        let refused = admission.try_enter().unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert_eq!(refused.get_details_retry_info().unwrap().retry_delay, Some(RETRY_AFTER));
        assert_eq!(admission.in_flight(), 2);
        drop(first);
        assert_eq!(admission.in_flight(), 1);
        admission.try_enter().unwrap();
    }
}
