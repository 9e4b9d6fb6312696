//! Permits: work is bounded at the door, before a message is read. A full service says so at once, so that its caller
//! can go elsewhere; a queue that nobody sees would only turn overload into timeouts.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Sleep, sleep},
};
use tonic::{Status, body::Body};

use crate::{
    server::ServerConfig,
    status::{self, ErrorCode},
    tenant::Place,
};

/// How long a refused caller is told to wait: long enough for a text request to leave, short enough that the caller's
/// own deadline survives it.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The bounds of one service: so many requests at a time, and so many bytes of them. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Admission {
    requests: Arc<Semaphore>,
    max_requests: usize,
    bytes: Arc<Semaphore>,
    max_held_bytes: usize,
    receive: Duration,
}

/// A request's part of `server.max_held_bytes`, for what a service fetches for the request beside its message. All of
/// it is given back when the request is over and every clone is dropped.
#[derive(Clone, Debug, Default)]
pub struct MemoryReservation(Option<Arc<Held>>);

/// A request's right to occupy the service, and the bytes that it holds; both are given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    _request: Option<(OwnedSemaphorePermit, Place)>,
    held: Arc<Held>,
}

#[derive(Debug)]
struct Held {
    admission: Admission,
    bytes: AtomicUsize,
}

impl Admission {
    pub(crate) fn new(config: &ServerConfig) -> Self {
        Self {
            requests: Arc::new(Semaphore::new(config.max_requests)),
            max_requests: config.max_requests,
            bytes: Arc::new(Semaphore::new(config.max_held_bytes)),
            max_held_bytes: config.max_held_bytes,
            receive: Duration::from_millis(config.receive_ms),
        }
    }

    /// Returns a permit now, or RESOURCE_EXHAUSTED with RetryInfo.
    pub(crate) fn try_enter(&self, place: Place) -> Result<Permit, Status> {
        let request = Arc::clone(&self.requests).try_acquire_owned().map_err(|_| {
            let max = self.max_requests;
            status::exhausted(
                format!("all {max} permits of this service are taken (server.max_requests)"),
                RETRY_AFTER,
            )
        })?;
        Ok(Permit { _request: Some((request, place)), held: self.held() })
    }

    /// Returns a permit for a question that costs nothing, because a full service still says what it is. Its bytes
    /// count all the same.
    pub(crate) fn question(&self) -> Permit {
        Permit { _request: None, held: self.held() }
    }

    fn held(&self) -> Arc<Held> {
        Arc::new(Held { admission: self.clone(), bytes: AtomicUsize::new(0) })
    }
}

impl MemoryReservation {
    /// Returns the reservation of an incoming request. Outside of a server of this crate it counts nothing.
    pub fn of<T>(request: &tonic::Request<T>) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_default()
    }

    /// Counts so many more bytes. Returns RESOURCE_EXHAUSTED with RetryInfo, and counts nothing, where
    /// `server.max_held_bytes` has no room for them.
    pub fn take(&self, bytes: usize) -> Result<(), Status> {
        self.0.as_ref().map_or(Ok(()), |held| held.take(bytes))
    }
}

impl Permit {
    pub(crate) fn holding(&self) -> MemoryReservation {
        MemoryReservation(Some(Arc::clone(&self.held)))
    }

    /// Wraps the request's body so that its bytes are counted as they come and cut where they come too late: tonic
    /// collects a whole message before any handler sees it.
    pub(crate) fn hold(&self, body: Body) -> Body {
        let late = Box::pin(sleep(self.held.admission.receive));
        Body::new(HeldBody { inner: body, held: Arc::clone(&self.held), late })
    }
}

impl Held {
    fn take(&self, bytes: usize) -> Result<(), Status> {
        let Admission { bytes: budget, max_held_bytes, .. } = &self.admission;
        // What no semaphore can count at once is too much as well.
        match u32::try_from(bytes).ok().and_then(|bytes| budget.try_acquire_many(bytes).ok()) {
            Some(taken) => {
                taken.forget();
                self.bytes.fetch_add(bytes, Ordering::Relaxed);
                Ok(())
            }
            None => Err(status::exhausted(
                format!("the requests of this service hold {max_held_bytes} bytes (server.max_held_bytes)"),
                RETRY_AFTER,
            )),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.admission.bytes.add_permits(*self.bytes.get_mut());
    }
}

struct HeldBody {
    inner: Body,
    held: Arc<Held>,
    /// Fires when the caller has taken longer than `server.receive_ms`.
    late: Pin<Box<Sleep>>,
}

impl http_body::Body for HeldBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(context) else {
            ready!(self.late.as_mut().poll(context));
            let limit = self.held.admission.receive.as_millis();
            let text = format!("a message must arrive within {limit} ms (server.receive_ms)");
            return Poll::Ready(Some(Err(ErrorCode::DeadlineExceeded.status(text))));
        };
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
            && let Err(full) = self.held.take(data.len())
        {
            return Poll::Ready(Some(Err(full)));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use tonic::Code;
    use tonic_types::StatusExt;

    use super::*;
    use crate::tenant::Guest;

    fn door(max_requests: usize, max_held_bytes: usize) -> Admission {
        Admission::new(&ServerConfig { max_requests, max_held_bytes, ..ServerConfig::default() })
    }

    fn place() -> Place {
        Guest::default().enter().unwrap()
    }

    fn body(bytes: usize) -> Body {
        Body::new(http_body_util::Full::new(Bytes::from(vec![0; bytes])))
    }

    #[test]
    fn a_full_service_refuses_at_once_and_opens_again_when_a_permit_is_dropped() {
        let admission = door(2, 1 << 20);
        let first = admission.try_enter(place()).unwrap();
        let _second = admission.try_enter(place()).unwrap();
        let refused = admission.try_enter(place()).unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert_eq!(refused.get_details_retry_info().unwrap().retry_delay, Some(RETRY_AFTER));
        drop(first);
        admission.try_enter(place()).unwrap();
    }

    #[tokio::test]
    async fn bytes_are_held_until_the_permit_is_dropped() {
        let admission = door(8, 100);
        let permit = admission.try_enter(place()).unwrap();
        permit.hold(body(60)).collect().await.unwrap();
        let other = admission.try_enter(place()).unwrap();
        let refused = other.hold(body(60)).collect().await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
        assert!(refused.message().contains("hold 100 bytes (server.max_held_bytes)"), "{refused:?}");
        assert!(refused.get_details_retry_info().is_some());
        other.hold(body(40)).collect().await.unwrap();
        drop(permit);
        other.hold(body(60)).collect().await.unwrap();
    }

    #[tokio::test]
    async fn what_is_fetched_for_a_request_counts_with_its_message_and_until_nobody_holds_it() {
        let admission = door(8, 100);
        let permit = admission.try_enter(place()).unwrap();
        permit.hold(body(60)).collect().await.unwrap();
        let holding = permit.holding();
        holding.take(30).unwrap();
        assert_eq!(holding.take(20).unwrap_err().code(), Code::ResourceExhausted);
        drop(permit);
        assert!(admission.question().holding().take(20).is_err(), "it is held still");
        drop(holding);
        admission.question().holding().take(100).unwrap();
        MemoryReservation::default().take(usize::MAX).unwrap();
    }
}
