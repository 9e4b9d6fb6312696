//! The body of a response: an RPC ends when it does. It outlives neither the deadline, nor the shutdown grace, nor the
//! patience with a caller that does not read.
//!
//! HTTP/2 does not ask a body for more while its caller's window is shut, so a body cannot end itself: a task beside it
//! does. What the RPC occupied is free from then on, though the stream stays open for as long as the caller keeps it.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, Weak},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Status, body::Body};

use super::{ending::Ending, stop::Stop};
use crate::{connections::Call, status::ErrorCode};

/// The body of a response, which can be cut from outside.
pub(crate) struct RpcBody {
    state: Arc<Mutex<State>>,
    _watch: Option<AbortOnDropHandle<()>>,
}

struct State {
    inner: Option<Body>,
    ending: Option<Ending>,
    call: Option<Call>,
    /// The end of a body that has been cut, until its caller has been told.
    trailers: Option<HeaderMap>,
    /// When a frame was handed out; none once the next is asked for.
    handed: Option<Instant>,
    waker: Option<Waker>,
}

impl RpcBody {
    /// Wraps the body `inner`, and cuts it when `stop` resolves or its caller takes longer than `stalled` over one
    /// frame.
    pub(crate) fn new(
        inner: Body,
        stop: Stop,
        stalled: Duration,
        ending: Option<Ending>,
        call: Option<Call>,
    ) -> Self {
        let is_over = http_body::Body::is_end_stream(&inner);
        let state = State { inner: Some(inner), ending, call, trailers: None, handed: None, waker: None };
        let state = Arc::new(Mutex::new(state));
        // A refusal has no body, and nothing to watch.
        let watching = (!is_over).then(|| tokio::spawn(watch(Arc::downgrade(&state), stop, stalled)));
        Self { state, _watch: watching.map(AbortOnDropHandle::new) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // A handler's stream that panics takes its connection with it; what it left is still sound.
    state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl http_body::Body for RpcBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let state = &mut *self.lock();
        state.handed = None;
        if let Some(trailers) = state.trailers.take() {
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        let _entered = state.ending.as_ref().map(|ending| ending.span.clone().entered());
        let Some(inner) = &mut state.inner else { return Poll::Ready(None) };
        state.waker = Some(context.waker().clone());
        let Some(frame) = ready!(Pin::new(inner).poll_frame(context)) else { return Poll::Ready(None) };
        state.handed = Some(Instant::now());
        Poll::Ready(Some(frame.map(|frame| match frame.into_trailers() {
            Err(data) => data,
            Ok(mut trailers) => {
                if let Some(ending) = &mut state.ending {
                    ending.settle(&mut trailers);
                }
                Frame::trailers(trailers)
            }
        })))
    }

    fn is_end_stream(&self) -> bool {
        let state = self.lock();
        state.trailers.is_none() && state.inner.as_ref().is_none_or(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        // A body that may be cut has no size to promise.
        let state = self.lock();
        let is_over = state.inner.as_ref().is_none_or(http_body::Body::is_end_stream);
        if is_over && state.trailers.is_none() { SizeHint::with_exact(0) } else { SizeHint::new() }
    }
}

/// Watches a body until it ends, or until it has to be cut.
async fn watch(state: Weak<Mutex<State>>, mut stop: Stop, stalled: Duration) {
    let mut look = Box::pin(sleep(stalled));
    let status = loop {
        tokio::select! {
            biased;
            status = &mut stop => break status,
            () = &mut look => {}
        }
        let Some(state) = state.upgrade() else { return };
        let begun = lock(&state).handed;
        match begun {
            Some(begun) if begun.elapsed() >= stalled => {
                let text =
                    format!("the caller has not read for {} ms (server.stalled_ms)", stalled.as_millis());
                break ErrorCode::Cancelled.status(text);
            }
            begun => look.as_mut().reset(begun.unwrap_or_else(Instant::now) + stalled),
        }
    };
    if let Some(state) = state.upgrade() {
        cut(&state, &status);
    }
}

fn cut(state: &Mutex<State>, status: &Status) {
    let mut trailers = HeaderMap::new();
    // A status of ours is always a header.
    let _ = status.add_header(&mut trailers);
    let mut state = lock(state);
    if let Some(ending) = &mut state.ending {
        ending.settle(&mut trailers);
    }
    state.trailers = Some(trailers);
    // Dropping the handler's stream tells whoever computes for it; the ending gives the permit back and reports.
    let freed = (state.inner.take(), state.ending.take(), state.call.take());
    let waker = state.waker.take();
    drop(state);
    drop(freed);
    if let Some(waker) = waker {
        waker.wake();
    }
}
