//! What tells other routers that this one is computing a value. It ends by itself where its router dies, and saves
//! work only: two routers that both believe they hold it compute the same value twice.

use std::{convert::Infallible, time::Duration};

use tokio::time::sleep;

use super::{
    background::{BackgroundWrite, BackgroundWrites, WRITE_TIMEOUT},
    client::Client,
    questions::{self, Token},
};
use crate::cache::key::Key;

/// Given back when dropped: then one of those who wait takes it over.
pub(crate) struct Lease {
    client: Client,
    background_writes: BackgroundWrites,
    key: Key,
    token: Token,
    /// How long it lasts unless it is renewed.
    duration: Duration,
    is_handed_over: bool,
}

impl Lease {
    /// A lease that Redis has granted to the holder of `token`.
    pub(super) fn new(
        (client, background_writes): (Client, BackgroundWrites),
        key: Key,
        token: Token,
        duration: Duration,
    ) -> Self {
        Self { client, background_writes, key, token, duration, is_handed_over: false }
    }

    pub(super) fn key(&self) -> &Key {
        &self.key
    }

    /// Gives the lease's token to whoever publishes the value, which ends the lease.
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

    /// Renews the lease thrice in its life, so that one renewal may fail.
    async fn renew(&self) -> Infallible {
        let third = self.duration / 3;
        loop {
            sleep(third).await;
            let renewal = questions::renew(&self.key, &self.token, self.duration);
            let renewed = self.client.ask::<bool>(&renewal, third.min(WRITE_TIMEOUT)).await;
            if renewed == Some(false) {
                tracing::debug!(key = %self.key, "another router took this value over");
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.is_handed_over {
            self.background_writes.queue(BackgroundWrite::Release { key: self.key, token: self.token });
        }
    }
}
