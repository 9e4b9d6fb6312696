//! The response stream of an RPC: a bounded queue between whoever computes (an engine thread, a task) and the
//! connection. It ends at the caller's deadline, and its sender knows when nobody listens any more: engines ask
//! [`Sender::is_closed`] once a step, and [`Sender::run`] drops a future that works for nobody.
//!
//! Work that sends two events and fails:
//!
//! ```
//! use std::time::Duration;
//!
//! use emu2_serve::{deadline::Deadline, status, stream};
//! use futures::StreamExt;
//! use tonic::Code;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! let (sender, mut events) = stream::channel(4, Deadline::after(Duration::from_secs(60)));
//! tokio::spawn(async move {
//!     let work = async {
//!         for step in 1..=2 {
//!             sender.send(Ok(step)).await.map_err(|_| sender.closed_status())?;
//!         }
//!         Err(status::internal("the device is lost"))
//!     };
//!     sender.run(work).await;
//! });
//! assert_eq!(events.next().await.unwrap().unwrap(), 1);
//! assert_eq!(events.next().await.unwrap().unwrap(), 2);
//! // The error of the work is the last event.
//! assert_eq!(events.next().await.unwrap().unwrap_err().code(), Code::Internal);
//! assert!(events.next().await.is_none());
//! # }
//! ```

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Future, Stream};
use tokio::{
    sync::{mpsc, watch},
    time::sleep,
};
use tonic::Status;

use crate::{deadline::Deadline, status};

/// Opens a response stream in which at most `capacity` events wait for a slow reader.
pub fn channel<T>(capacity: usize, deadline: Deadline) -> (Sender<T>, Events<T>) {
    let (queue, events) = mpsc::channel(capacity);
    let passed = Box::pin(deadline.passed());
    (Sender { queue, deadline }, Events { events, passed, ended: false })
}

/// The computing end of a response stream. The stream ends when every clone of it is dropped.
#[derive(Debug)]
pub struct Sender<T> {
    queue: mpsc::Sender<Result<T, Status>>,
    deadline: Deadline,
}

/// The error of sending to a stream that nobody listens to: its caller has left or its deadline has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the caller has left or its deadline has passed")]
pub struct Closed;

/// Returns a response stream that tells a watched value through `tell`: at once, and again after each change, at most
/// one event every `interval` and then the latest value. It ends with its caller, or when nobody can change the value
/// any more.
pub fn watched<W, T>(
    mut changes: watch::Receiver<W>,
    tell: impl Fn(&W) -> T + Send + Sync + 'static,
    interval: Duration,
    deadline: Deadline,
) -> Events<T>
where
    W: Send + Sync + 'static,
    T: Send + 'static,
{
    let (sender, events) = channel(1, deadline);
    tokio::spawn(async move {
        let work = async {
            loop {
                let event = tell(&changes.borrow_and_update());
                sender.send(Ok(event)).await.map_err(|_| sender.closed_status())?;
                sleep(interval).await;
                if changes.changed().await.is_err() {
                    return Ok(());
                }
            }
        };
        sender.run(work).await;
    });
    events
}

impl<T> Sender<T> {
    /// Sends an event, and waits while the queue is full. An error is the last event that arrives. Fails once nobody
    /// listens any more.
    pub async fn send(&self, event: Result<T, Status>) -> Result<(), Closed> {
        tokio::select! {
            biased;
            () = self.deadline.passed() => Err(Closed),
            sent = self.queue.send(event) => sent.map_err(|_| Closed),
        }
    }

    /// Runs the work that fills this stream until it ends, or until nobody listens: then the work is dropped at once,
    /// before it is polled again. The work's error is sent as the last event.
    pub async fn run(&self, work: impl Future<Output = Result<(), Status>>) {
        let outcome = tokio::select! {
            biased;
            () = self.closed() => return,
            outcome = work => outcome,
        };
        if let Err(status) = outcome {
            // A caller that has left meanwhile needs no status.
            let _ = self.send(Err(status)).await;
        }
    }

    /// Returns whether work for this stream is wasted. It is cheap enough to be asked once a step.
    pub fn is_closed(&self) -> bool {
        self.queue.is_closed() || self.deadline.is_passed()
    }

    /// Waits until nobody listens any more.
    pub async fn closed(&self) {
        tokio::select! {
            () = self.queue.closed() => {}
            () = self.deadline.passed() => {}
        }
    }

    /// Returns why nobody listens, for whoever has to name it: DEADLINE_EXCEEDED or CANCELLED.
    pub fn closed_status(&self) -> Status {
        if self.deadline.is_passed() { status::deadline_exceeded() } else { status::cancelled() }
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), deadline: self.deadline }
    }
}

/// The connection's end of a response stream, which a streaming RPC returns. It yields events as they were sent, and
/// ends after the first error; where the deadline passes before, that error is DEADLINE_EXCEEDED.
pub struct Events<T> {
    events: mpsc::Receiver<Result<T, Status>>,
    passed: Pin<Box<dyn Future<Output = ()> + Send>>,
    ended: bool,
}

impl<T> Stream for Events<T> {
    type Item = Result<T, Status>;

    /// The deadline goes first: events that come faster than the caller reads must not outlive it.
    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if self.passed.as_mut().poll(context).is_ready() {
            self.ended = true;
            self.events.close();
            return Poll::Ready(Some(Err(status::deadline_exceeded())));
        }
        let event = std::task::ready!(self.events.poll_recv(context));
        if !matches!(event, Some(Ok(_))) {
            self.ended = true;
            self.events.close();
        }
        Poll::Ready(event)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        time::Duration,
    };

    use futures::StreamExt;
    use tonic::Code;

    use super::*;

    #[tokio::test]
    async fn events_arrive_in_order_and_the_last_sender_ends_the_stream() {
        let (sender, events) = channel(4, Deadline::none());
        sender.send(Ok(1)).await.unwrap();
        sender.clone().send(Ok(2)).await.unwrap();
        drop(sender);
        let got: Vec<_> = events.map(Result::unwrap).collect().await;
        assert_eq!(got, [1, 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_deadline_ends_the_stream_and_closes_the_sender() {
        let (sender, mut events) = channel(4, Deadline::after(Duration::from_secs(5)));
        sender.send(Ok(1)).await.unwrap();
        assert_eq!(events.next().await.unwrap().unwrap(), 1);
        let error = events.next().await.unwrap().unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded);
        assert!(events.next().await.is_none());
        assert!(sender.is_closed());
        sender.closed().await;
        assert_eq!(sender.closed_status().code(), Code::DeadlineExceeded);
        assert_eq!(sender.send(Ok(2)).await, Err(Closed));
    }

    #[tokio::test]
    async fn dropping_the_stream_closes_the_sender() {
        let (sender, events) = channel::<u32>(1, Deadline::none());
        assert!(!sender.is_closed());
        drop(events);
        assert!(sender.is_closed());
        sender.closed().await;
        assert_eq!(sender.send(Ok(1)).await, Err(Closed));
        assert_eq!(sender.closed_status().code(), Code::Cancelled);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_is_waited_for_but_not_past_the_deadline() {
        let (sender, _events) = channel(1, Deadline::after(Duration::from_secs(5)));
        sender.send(Ok(1)).await.unwrap();
        assert_eq!(sender.send(Ok(2)).await, Err(Closed));
    }

    #[tokio::test]
    async fn an_error_is_the_last_event() {
        let (sender, mut events) = channel(4, Deadline::none());
        sender.send(Err(status::internal("engine stopped"))).await.unwrap();
        sender.send(Ok(1)).await.unwrap();
        assert_eq!(events.next().await.unwrap().unwrap_err().code(), Code::Internal);
        assert!(events.next().await.is_none());
        assert!(sender.is_closed());
    }

    #[tokio::test]
    async fn work_that_succeeds_ends_the_stream() {
        let (sender, events) = channel(4, Deadline::none());
        let work = async {
            sender.send(Ok(1)).await.unwrap();
            Ok(())
        };
        sender.run(work).await;
        drop(sender);
        let got: Vec<_> = events.map(Result::unwrap).collect().await;
        assert_eq!(got, [1]);
    }

    #[tokio::test]
    async fn the_error_of_work_is_the_last_event() {
        let (sender, mut events) = channel(4, Deadline::none());
        let work = async {
            sender.send(Ok(1)).await.unwrap();
            Err(status::internal("engine stopped"))
        };
        sender.run(work).await;
        assert_eq!(events.next().await.unwrap().unwrap(), 1);
        assert_eq!(events.next().await.unwrap().unwrap_err().code(), Code::Internal);
        assert!(events.next().await.is_none());
    }

    /// A future that never ends, and a flag that is raised when it is dropped.
    fn endless() -> (impl Future<Output = Result<(), Status>>, Arc<AtomicBool>) {
        struct Raise(Arc<AtomicBool>);
        impl Drop for Raise {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let dropped = Arc::new(AtomicBool::new(false));
        let raise = Raise(Arc::clone(&dropped));
        let work = async move {
            let _raise = raise;
            std::future::pending().await
        };
        (work, dropped)
    }

    #[tokio::test]
    async fn work_is_dropped_at_once_when_its_caller_leaves() {
        let (sender, events) = channel::<u32>(4, Deadline::none());
        let (work, dropped) = endless();
        let mut running = Box::pin(sender.run(work));
        assert!(futures::poll!(&mut running).is_pending());
        assert!(!dropped.load(Ordering::Relaxed));
        drop(events);
        assert!(futures::poll!(&mut running).is_ready());
        assert!(dropped.load(Ordering::Relaxed));
    }

    #[tokio::test(start_paused = true)]
    async fn work_is_dropped_when_its_deadline_passes() {
        let budget = Duration::from_secs(5);
        let (sender, mut events) = channel::<u32>(4, Deadline::after(budget));
        let (work, dropped) = endless();
        let begun = tokio::time::Instant::now();
        sender.run(work).await;
        assert!(dropped.load(Ordering::Relaxed));
        // tokio's timers tick once a millisecond.
        assert!(begun.elapsed() <= budget + Duration::from_millis(1), "{:?}", begun.elapsed());
        assert_eq!(events.next().await.unwrap().unwrap_err().code(), Code::DeadlineExceeded);
    }

    #[tokio::test]
    async fn work_whose_caller_has_left_is_never_polled() {
        let (sender, events) = channel::<u32>(4, Deadline::none());
        drop(events);
        sender.run(async { panic!("work for nobody") }).await;
    }
}
