//! Whether this replica wants work: not before its weights are in and warm, not while its device is broken, not once
//! shutdown has begun. Health checks, `/readyz` and the RPC layer all ask here.

use std::sync::Arc;

use tokio::sync::watch;

/// What a replica says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It wants work.
    Ready,
    /// It wants no work now; the text says why, for people.
    NotReady(String),
    /// It wants no work any more: shutdown has begun.
    Stopping,
}

/// Whether a replica wants work, which begins with "not ready". Clones share the state.
#[derive(Clone, Debug)]
pub struct Readiness(Arc<watch::Sender<State>>);

impl Readiness {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(State::NotReady("starting".into()))))
    }

    /// Makes the replica ready, unless its shutdown has begun.
    pub fn ready(&self) {
        self.become_state(State::Ready);
    }

    /// Makes the replica not ready, for a reason that health pages tell people.
    pub fn not_ready(&self, reason: impl Into<String>) {
        self.become_state(State::NotReady(reason.into()));
    }

    /// Makes the replica not ready because it is loading its weights, of which so many percent are in.
    pub fn loading(&self, percent: u8) {
        self.not_ready(format!("loading {percent} %"));
    }

    pub(crate) fn stop(&self) {
        self.become_state(State::Stopping);
    }

    pub(crate) fn state(&self) -> State {
        self.0.borrow().clone()
    }

    /// Returns whether the replica wants work now.
    pub fn is_ready(&self) -> bool {
        *self.0.borrow() == State::Ready
    }

    /// Waits until the replica is ready: for ever if it never will be.
    pub async fn became_ready(&self) {
        let mut changes = self.0.subscribe();
        changes.wait_for(|state| *state == State::Ready).await.expect("self holds the sender");
    }

    pub(crate) fn changes(&self) -> watch::Receiver<State> {
        self.0.subscribe()
    }

    fn become_state(&self, next: State) {
        self.0.send_if_modified(|state| {
            // An engine that finishes loading during shutdown must not call traffic back.
            if *state == State::Stopping || *state == next {
                return false;
            }
            // A new reason alone is not worth a line: loading gives a hundred of them.
            if std::mem::discriminant(state) == std::mem::discriminant(&next) {
                tracing::debug!(state = ?next, "readiness changed");
            } else {
                tracing::info!(state = ?next, "readiness changed");
            }
            *state = next;
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stopping_is_for_good() {
        let readiness = Readiness::new();
        assert_eq!(readiness.state(), State::NotReady("starting".into()));
        readiness.ready();
        assert!(readiness.is_ready());
        readiness.not_ready("device lost");
        assert_eq!(readiness.state(), State::NotReady("device lost".into()));
        readiness.loading(42);
        assert_eq!(readiness.state(), State::NotReady("loading 42 %".into()));
        readiness.stop();
        readiness.ready();
        assert_eq!(readiness.state(), State::Stopping);
    }
}
