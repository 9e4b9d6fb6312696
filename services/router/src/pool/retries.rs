//! How often a pool is asked again. Each call earns a share of a retry; whoever lost a replica spends one. A pool
//! that is merely missing a replica never notices, and one that is sick is not stormed.

use std::sync::{Mutex, PoisonError};

/// What a pool has in hand at first and at most: the streams of one lost replica all go on elsewhere.
const RESERVE: f64 = 256.0;
/// What a call earns.
const EARNED: f64 = 0.2;

#[derive(Debug)]
pub(super) struct Retries(Mutex<f64>);

impl Default for Retries {
    fn default() -> Self {
        Self(Mutex::new(RESERVE))
    }
}

impl Retries {
    pub(super) fn earn(&self) {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *left = (*left + EARNED).min(RESERVE);
    }

    /// Whether there was one to spend.
    pub(super) fn spend(&self) -> bool {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let enough = *left >= 1.0;
        if enough {
            *left -= 1.0;
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserve_then_a_share_of_the_calls() {
        let retries = Retries::default();
        assert_eq!((0..1000).filter(|_| retries.spend()).count(), 256);
        (0..9).for_each(|_| retries.earn());
        assert!(retries.spend());
        assert!(!retries.spend());
    }
}
