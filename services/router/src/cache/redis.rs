//! The second level: Redis, shared by all routers. Never an error: whatever goes wrong here is a bypass. A request
//! waits for it at most one deadline in vain, which covers everything (connecting, too); what need not be waited for
//! is off the path. By the leases in it, a value that many routers want is computed by one of them.

mod address;
mod background;
mod certificates;
mod client;
mod lease;
mod link;
mod questions;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use emu2_proto::v1;
use tokio::time::{Instant, sleep};

pub(crate) use self::{address::Address, lease::Lease};
use self::{
    background::{BackgroundWrite, BackgroundWrites, WRITE_TIMEOUT},
    certificates::Certificates,
    client::Client,
    link::Link,
    questions::{Look, LookupReply, Token},
};
use super::{
    key::Key,
    value::{self, Value},
};
use crate::{config::CacheConfig, metrics::Outcome};

/// Between two looks for a value that another router is computing: a quarter of what has been waited, so that a
/// value is seen at most about a quarter later than it came, within these.
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

pub(crate) struct Redis {
    client: Client,
    background_writes: BackgroundWrites,
    deadline: Duration,
    lease: Duration,
    wait: Duration,
    ttl: Duration,
    refusal_ttl: Duration,
    max_value_bytes: usize,
}

/// Whether a request has waited for Redis in vain: then it asks no more, so that all its questions together cost at
/// most one deadline more than they are worth.
#[derive(Clone, Debug, Default)]
pub(crate) struct TimeoutLatch(Arc<AtomicBool>);

/// Who has a value, or is to compute it.
pub(crate) enum Claim {
    Found(Value, Outcome),
    /// Nobody: the asker computes it, and every other router knows.
    Leased(Lease, Outcome),
    /// The asker computes it, and nobody knows.
    Alone(Outcome),
}

impl Redis {
    /// None where the configuration has none. Connects in the background: Redis may come later, or never. Fails on an
    /// address or certificates that cannot be read.
    pub(crate) fn open(config: &CacheConfig, max_value_bytes: usize) -> anyhow::Result<Option<Self>> {
        let Some(url) = &config.redis_url else { return Ok(None) };
        // The parser's own words could quote the URL, which holds the password.
        let address =
            Address::parse(url.reveal()).context("cache.redis_url cannot be read as a Redis URL")?;
        let certificates = Certificates::of(config);
        certificates.read().context("a certificate of cache.redis_url cannot be read")?;
        let link = Link::open(address, certificates, WRITE_TIMEOUT).map_err(|error| {
            anyhow::anyhow!(
                "cache.redis_url and its certificates do not make a connection: {:?}",
                error.kind()
            )
        })?;
        let client = Client::new(link);
        Ok(Some(Self {
            background_writes: BackgroundWrites::start(client.clone(), max_value_bytes),
            client,
            deadline: Duration::from_millis(config.deadline_ms),
            lease: Duration::from_millis(config.lease_ms),
            wait: Duration::from_millis(config.wait_ms),
            ttl: Duration::from_secs(config.ttl_seconds),
            refusal_ttl: Duration::from_millis(config.refusal_ttl_ms),
            max_value_bytes,
        }))
    }

    /// The tensor of `key`, or what became of the lookup. Takes no lease and waits for nobody.
    pub(crate) async fn read(&self, key: &Key, timed_out: &TimeoutLatch) -> Result<v1::Tensor, Outcome> {
        match self.look(key, &[], false, timed_out).await {
            None => Err(Outcome::Bypassed),
            Some(LookupReply::Value(bytes)) => match value::decode(key, bytes) {
                Ok(Value::Tensor(tensor)) => Ok(tensor),
                Ok(Value::Refusal(_)) => Err(Outcome::Miss),
                Err(_) => Err(Outcome::BadValue),
            },
            Some(LookupReply::TooLarge) => Err(Outcome::BadValue),
            Some(LookupReply::Leased | LookupReply::Busy | LookupReply::Nothing) => Err(Outcome::Miss),
        }
    }

    /// The value of `key`, or the task to compute it. Waits while another router is at it.
    pub(crate) async fn claim(&self, key: &Key, timed_out: &TimeoutLatch) -> Claim {
        let token: Token = rand::random();
        let began = Instant::now();
        let (mut has_waited, mut was_bad, mut discards) = (false, false, false);
        loop {
            let Some(said) = self.look(key, &token, discards, timed_out).await else {
                return Claim::Alone(Outcome::Bypassed);
            };
            discards = false;
            let missed = if was_bad { Outcome::BadValue } else { Outcome::Miss };
            let problem = match said {
                LookupReply::Value(bytes) => match value::decode(key, bytes) {
                    Ok(value) if has_waited => return Claim::Found(value, Outcome::Waited),
                    Ok(value) => return Claim::Found(value, Outcome::L2Hit),
                    Err(problem) => problem.to_string(),
                },
                LookupReply::TooLarge => format!("it has more than {} bytes", self.max_value_bytes),
                LookupReply::Leased => {
                    let holder = (self.client.clone(), self.background_writes.clone());
                    return Claim::Leased(Lease::new(holder, *key, token, self.lease), missed);
                }
                LookupReply::Nothing => return Claim::Alone(missed),
                LookupReply::Busy if began.elapsed() >= self.wait => {
                    return Claim::Alone(Outcome::WaitedTooLong);
                }
                LookupReply::Busy => {
                    has_waited = true;
                    sleep(pause(began.elapsed())).await;
                    continue;
                }
            };
            tracing::warn!(%key, problem, "bad value in Redis");
            (was_bad, discards) = (true, true);
        }
    }

    /// Stores a value under the key that it was computed for, off the path, and ends the lease with it.
    pub(crate) fn publish(&self, key: Key, value: Value, lease: Option<Lease>) {
        let ttl = match value {
            Value::Tensor(_) => self.ttl,
            Value::Refusal(_) => self.refusal_ttl,
        };
        let token = lease.filter(|lease| *lease.key() == key).map(Lease::hand_over);
        self.background_writes.queue(BackgroundWrite::Publish { key, token, value, ttl });
    }

    async fn look(
        &self,
        key: &Key,
        token: &[u8],
        discards: bool,
        timed_out: &TimeoutLatch,
    ) -> Option<LookupReply> {
        if timed_out.0.load(Ordering::Relaxed) {
            return None;
        }
        let look = Look { token, lease: self.lease, max_value_bytes: self.max_value_bytes, discards };
        let said = self.client.ask(&questions::look(key, look), self.deadline).await;
        timed_out.0.fetch_or(said.is_none(), Ordering::Relaxed);
        said
    }
}

fn pause(waited: Duration) -> Duration {
    // Drawn, so that routers do not come together.
    (waited / 4).clamp(SHORTEST_PAUSE, LONGEST_PAUSE).mul_f64(rand::random_range(0.5..1.5))
}
