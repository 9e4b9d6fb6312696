//! The second level: Redis, shared by all routers. Never an error: whatever goes wrong here is a bypass. A request
//! waits for it at most one deadline in vain, which covers everything (connecting, too); what need not be waited for
//! is off the path. By the leases in it, a value that many routers want is computed by one of them.

mod address;
mod certificates;
mod lease;
mod link;
mod questions;

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use emu2_proto::v1;
use redis::{Cmd, FromRedisValue};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;

pub(crate) use self::{address::Address, lease::Lease};
use self::{
    certificates::Certificates,
    lease::Token,
    link::Link,
    questions::{Look, LookupReply},
};
use super::{
    breaker::Breaker,
    key::Key,
    value::{self, Value},
};
use crate::{config::CacheConfig, metrics::Outcome};

/// Errands that wait at most; 64 pictures of 64 queries in bf16 are 15 MB. More are dropped: the next miss writes
/// again, and a lease ends by itself.
const WAITING_WRITES: usize = 64;
/// An errand is off the path, so it may take longer than a question; but not for ever.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two looks for a value that another router is computing: a quarter of what has been waited, so that a
/// value is seen at most about a quarter later than it came, within these.
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

pub(crate) struct Redis {
    link: Arc<Link>,
    breaker: Arc<Breaker>,
    background_writes: mpsc::Sender<BackgroundWrite>,
    deadline: Duration,
    lease: Duration,
    wait: Duration,
    ttl: Duration,
    refusal_ttl: Duration,
    max_value_bytes: usize,
    _errand_runner: AbortOnDropHandle<()>,
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

/// What nobody waits for.
enum BackgroundWrite {
    Publish { key: Key, token: Option<Token>, value: Value, ttl: Duration },
    Release { key: Key, token: Token },
}

impl Redis {
    /// None where the configuration has none. Connects in the background: Redis may come later, or never. Fails on an
    /// address or certificates that cannot be read.
    pub(crate) fn open(config: &CacheConfig, max_value_bytes: usize) -> anyhow::Result<Option<Arc<Self>>> {
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
        let (link, breaker) = (Arc::new(link), Arc::new(Breaker::default()));
        let (background_writes, waiting) = mpsc::channel(WAITING_WRITES);
        let runner =
            tokio::spawn(run_errands(Arc::clone(&link), Arc::clone(&breaker), waiting, max_value_bytes));
        Ok(Some(Arc::new(Self {
            link,
            breaker,
            background_writes,
            deadline: Duration::from_millis(config.deadline_ms),
            lease: Duration::from_millis(config.lease_ms),
            wait: Duration::from_millis(config.wait_ms),
            ttl: Duration::from_secs(config.ttl_seconds),
            refusal_ttl: Duration::from_millis(config.refusal_ttl_ms),
            max_value_bytes,
            _errand_runner: AbortOnDropHandle::new(runner),
        })))
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
    pub(crate) async fn claim(self: &Arc<Self>, key: &Key, timed_out: &TimeoutLatch) -> Claim {
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
                    return Claim::Leased(Lease::new(Arc::clone(self), *key, token), missed);
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
        self.queue(BackgroundWrite::Publish { key, token, value, ttl });
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
        let said = ask(&self.link, &self.breaker, &questions::look(key, look), self.deadline).await;
        timed_out.0.fetch_or(said.is_none(), Ordering::Relaxed);
        said
    }

    fn queue(&self, write: BackgroundWrite) {
        if self.background_writes.try_send(write).is_err() {
            tracing::debug!("too many background writes wait for Redis: one dropped");
        }
    }
}

fn pause(waited: Duration) -> Duration {
    // Drawn, so that routers do not come together.
    (waited / 4).clamp(SHORTEST_PAUSE, LONGEST_PAUSE).mul_f64(rand::random_range(0.5..1.5))
}

/// The errand runner's task: one after the other until the cache is dropped.
async fn run_errands(
    link: Arc<Link>,
    breaker: Arc<Breaker>,
    mut background_writes: mpsc::Receiver<BackgroundWrite>,
    max_value_bytes: usize,
) {
    while let Some(write) = background_writes.recv().await {
        if let Some(question) = write.question(max_value_bytes) {
            ask::<redis::Value>(&link, &breaker, &question, WRITE_TIMEOUT).await;
        }
    }
}

impl BackgroundWrite {
    /// A value that is not worth storing only ends its lease.
    fn question(self, max_value_bytes: usize) -> Option<Cmd> {
        let (key, token) = match self {
            Self::Release { key, token } => (key, Some(token)),
            Self::Publish { key, token, value, ttl } => {
                let stored = value::encode(&key, &value).filter(|bytes| bytes.len() <= max_value_bytes);
                if let Some(bytes) = stored {
                    let token = token.as_ref().map_or(&[] as &[u8], |token| token);
                    return Some(questions::publish(&key, token, &bytes, ttl));
                }
                (key, token)
            }
        };
        Some(questions::release(&key, &token?))
    }
}

/// The answer, if one comes in time; the breaker learns either way.
async fn ask<T: FromRedisValue>(
    link: &Link,
    breaker: &Breaker,
    question: &Cmd,
    within: Duration,
) -> Option<T> {
    if !breaker.allows() {
        return None;
    }
    let reason = match heard(within, link.ask(question)).await {
        Some(Ok(answer)) => {
            breaker.succeeded();
            return Some(answer);
        }
        // The kind alone: an error's text may quote what was sent to it, credentials among it.
        Some(Err(error)) => format!("{:?}", error.kind()),
        None => "no answer in time".to_owned(),
    };
    if breaker.failed() {
        tracing::warn!(reason, "Redis is bypassed for now");
        // It may be half dead: a connection whose other end has gone without a word never fails by itself.
        link.renew();
    }
    None
}

/// An answer that comes in time. A process so busy that its timer fires late may have the answer unread: it has as long
/// again as the timer was late, for to compute what another router computes would make the machine busier still.
async fn heard<T>(within: Duration, answer: impl Future<Output = T>) -> Option<T> {
    let mut answer = pin!(answer);
    let until = Instant::now() + within;
    match timeout_at(until, answer.as_mut()).await {
        Ok(answer) => Some(answer),
        Err(_) => timeout(until.elapsed(), answer).await.ok(),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{sync::oneshot, task::yield_now};

    use super::*;

    const DEADLINE: Duration = Duration::from_millis(20);

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_does_not_come_is_waited_for_as_long_as_the_deadline_says() {
        let began = Instant::now();
        assert_eq!(heard(DEADLINE, std::future::pending::<()>()).await, None);
        // Timers go by milliseconds.
        assert!(began.elapsed() <= DEADLINE + Duration::from_millis(2), "{:?}", began.elapsed());
        assert_eq!(heard(DEADLINE, async { 7 }).await, Some(7));
    }

    /// As when many requests come at once: the answer is there in time, and its reader's turn is late.
    #[tokio::test]
    async fn an_answer_that_lay_unread_while_the_process_was_busy_counts() {
        let (answer, comes) = oneshot::channel();
        tokio::spawn(async move {
            std::thread::sleep(3 * DEADLINE);
            // Whoever waits has its turn first, and finds its deadline passed.
            for _ in 0..3 {
                yield_now().await;
            }
            answer.send(7).unwrap();
        });
        assert_eq!(heard(DEADLINE, comes).await, Some(Ok(7)));
    }
}
