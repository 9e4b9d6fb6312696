//! Whether Redis is worth asking: after failures in a row it is left alone for a while, then one question decides.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Failures in a row that open the breaker: one may be a blip, and each costs a request the whole deadline.
const TOLERATED: u32 = 3;
/// How long Redis is left alone.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(crate) struct Breaker(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    failures: u32,
    closed_again: Option<Instant>,
}

impl Breaker {
    /// Whether to ask. When a pause is over, one caller a pause is let through to find out.
    pub(crate) fn allows(&self) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match state.closed_again {
            Some(at) if now < at => false,
            Some(_) => {
                state.closed_again = Some(now + PAUSE);
                true
            }
            None => true,
        }
    }

    pub(crate) fn succeeded(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = State::default();
    }

    /// Says whether this failure opened the breaker.
    pub(crate) fn failed(&self) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.failures += 1;
        if state.failures < TOLERATED {
            return false;
        }
        state.closed_again = Some(Instant::now() + PAUSE);
        state.failures == TOLERATED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_opens_after_failures_in_a_row_and_lets_one_question_through_a_pause() {
        let breaker = Breaker::default();
        assert!(!breaker.failed() && !breaker.failed());
        breaker.succeeded();
        assert!(!breaker.failed() && !breaker.failed());
        assert!(breaker.allows());
        assert!(breaker.failed());
        assert!(!breaker.allows());

        tokio::time::advance(PAUSE).await;
        assert!(breaker.allows(), "one may find out");
        assert!(!breaker.allows(), "the others wait for what it finds");
        assert!(!breaker.failed(), "it was open already");
        assert!(!breaker.allows());

        tokio::time::advance(PAUSE).await;
        assert!(breaker.allows());
        breaker.succeeded();
        assert!(breaker.allows() && breaker.allows());
    }
}
