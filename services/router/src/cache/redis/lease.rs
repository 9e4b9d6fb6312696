//! What tells other routers that this one is computing a value. It ends by itself where its router dies, and saves
//! work only: two routers that both believe they hold it compute the same value twice.

use std::{convert::Infallible, sync::Arc};

use tokio::time::sleep;

use super::{BackgroundWrite, Redis, WRITE_TIMEOUT, ask, questions};
use crate::cache::key::Key;

/// Random, so that nobody ends another's lease.
pub(super) type Token = [u8; 16];

/// Given back when dropped: then one of those who wait takes it over.
pub(crate) struct Lease {
    redis: Arc<Redis>,
    key: Key,
    token: Token,
    is_handed_over: bool,
}

impl Lease {
    pub(super) fn new(redis: Arc<Redis>, key: Key, token: Token) -> Self {
        Self { redis, key, token, is_handed_over: false }
    }

    pub(super) fn key(&self) -> &Key {
        &self.key
    }

    /// To whoever publishes the value, which ends it.
    pub(super) fn hand_over(mut self) -> Token {
        self.is_handed_over = true;
        self.token
    }

    /// Does the work, the lease renewed meanwhile.
    pub(crate) async fn hold<T>(&self, work: impl Future<Output = T>) -> T {
        tokio::select! {
            biased;
            done = work => done,
            never = self.renew() => match never {},
        }
    }

    /// Thrice in its life, so that one renewal may fail.
    async fn renew(&self) -> Infallible {
        let third = self.redis.lease / 3;
        loop {
            sleep(third).await;
            let renewal = questions::renew(&self.key, &self.token, self.redis.lease);
            let renewed =
                ask::<bool>(&self.redis.link, &self.redis.breaker, &renewal, third.min(WRITE_TIMEOUT)).await;
            if renewed == Some(false) {
                tracing::debug!(key = %self.key, "another router took this value over");
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.is_handed_over {
            self.redis.queue(BackgroundWrite::Release { key: self.key, token: self.token });
        }
    }
}
