//! Values that stages would only compute again: images' embeddings, what the llm regressed, guidance negatives.
//! Memory first, then Redis, then the stage: one flight per key in this process, and among routers one lease per key.
//! Values are idempotent, so nothing here decides correctness: a cache that is empty, slow or gone costs work only.

mod breaker;
mod flights;
mod key;
mod memory;
mod redis;
mod value;

use std::{sync::Arc, time::Duration};

use emu2_proto::v1;
use futures::{FutureExt, future::BoxFuture};
use tonic::Code;
use tracing::Instrument;

#[cfg(feature = "fuzz")]
pub(crate) use self::value::{decode, encode};
use self::{
    flights::Flights,
    memory::Memory,
    redis::{Claim, Lease, Redis, TimeoutLatch},
};
pub(crate) use self::{
    key::{Key, Kind, Recipe},
    redis::Address,
    value::{Value, is_whole},
};
use crate::{
    config::CacheConfig,
    error::Stop,
    metrics::{Metrics, Outcome},
};

/// What a stage computed, and the key of it, built from the digest that came with it.
pub(crate) type Computed = Result<(Key, v1::Tensor), Stop>;

/// A value and where it came from.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) tensor: v1::Tensor,
    pub(crate) outcome: Outcome,
}

/// One request's way to the values; a clone shares everything.
#[derive(Clone)]
pub(crate) struct Cache {
    levels: Arc<Levels>,
    flights: Arc<Flights<Result<Found, Stop>>>,
    metrics: Metrics,
    timed_out: TimeoutLatch,
}

struct Levels {
    memory: Memory,
    redis: Option<Redis>,
}

impl Cache {
    /// `max_value_bytes` is what a message may carry: no larger value is stored in Redis or read from it. Fails on a
    /// Redis URL or a CA file that cannot be read; a Redis that does not answer is no failure.
    pub(crate) fn open(
        config: &CacheConfig,
        max_value_bytes: usize,
        metrics: Metrics,
    ) -> anyhow::Result<Self> {
        let redis = Redis::open(config, max_value_bytes)?;
        let memory = Memory::new(config.memory_bytes, Duration::from_secs(config.ttl_seconds));
        let levels = Arc::new(Levels { memory, redis });
        Ok(Self { levels, flights: Arc::new(Flights::new()), metrics, timed_out: TimeoutLatch::default() })
    }

    /// The same cache for another request, with a patience of its own.
    pub(crate) fn for_request(&self) -> Self {
        Self { timed_out: TimeoutLatch::default(), ..self.clone() }
    }

    /// The value of `key`, computed by `compute` if nobody has it and nobody is at it.
    pub(crate) async fn fetch<F>(&self, kind: Kind, key: Key, compute: F) -> Result<Found, Stop>
    where
        F: FnOnce() -> BoxFuture<'static, Computed>,
    {
        let found = match self.levels.memory.get(&key) {
            Some(tensor) => Ok(Found { tensor, outcome: Outcome::L1Hit }),
            None => {
                let (levels, timed_out) = (Arc::clone(&self.levels), self.timed_out.clone());
                let start = || levels.obtain(key, timed_out, compute()).in_current_span().boxed();
                let (flight, joined) = self.flights.join(key, start);
                let found = flight.await;
                if joined { found.map(|found| Found { outcome: Outcome::Waited, ..found }) } else { found }
            }
        };
        if let Ok(found) = &found {
            self.count(kind, found.outcome);
        }
        found
    }

    /// The value of `key` if somebody has it, or what became of the lookup; nothing is computed. Whoever uses it (or
    /// not) counts it.
    pub(crate) async fn peek(&self, key: Key) -> Result<Found, Outcome> {
        let Levels { memory, redis } = &*self.levels;
        if let Some(tensor) = memory.get(&key) {
            return Ok(Found { tensor, outcome: Outcome::L1Hit });
        }
        let redis = redis.as_ref().ok_or(Outcome::Miss)?;
        let tensor = redis.read(&key, &self.timed_out).await?;
        memory.put(key, tensor.clone());
        Ok(Found { tensor, outcome: Outcome::L2Hit })
    }

    /// Keeps what was computed anyway.
    pub(crate) fn put(&self, key: Key, tensor: v1::Tensor) {
        self.levels.memory.put(key, tensor.clone());
        if let Some(redis) = &self.levels.redis {
            redis.publish(key, Value::Tensor(tensor), None);
        }
    }

    pub(crate) fn count(&self, kind: Kind, outcome: Outcome) {
        self.metrics.cache_lookup(kind, outcome);
    }
}

impl Levels {
    async fn obtain(
        self: Arc<Self>,
        key: Key,
        timed_out: TimeoutLatch,
        compute: BoxFuture<'static, Computed>,
    ) -> Result<Found, Stop> {
        // An earlier flight may have landed between this request's look at the memory and its joining.
        if let Some(tensor) = self.memory.get(&key) {
            return Ok(Found { tensor, outcome: Outcome::L1Hit });
        }
        let claim = match &self.redis {
            None => Claim::Alone(Outcome::Miss),
            Some(redis) => redis.claim(&key, &timed_out).await,
        };
        let (lease, outcome) = match claim {
            Claim::Found(Value::Tensor(tensor), outcome) => {
                self.memory.put(key, tensor.clone());
                return Ok(Found { tensor, outcome });
            }
            Claim::Found(Value::Refusal(status), _) => return Err(status.into()),
            Claim::Leased(lease, outcome) => (Some(lease), outcome),
            Claim::Alone(outcome) => (None, outcome),
        };
        let computed = match &lease {
            Some(lease) => lease.hold(compute).await,
            None => compute.await,
        };
        self.keep(key, lease, &computed);
        let (actual, tensor) = computed?;
        // The weights changed under the request: the value is good, but not what was asked for.
        if actual == key { Ok(Found { tensor, outcome }) } else { Err(Stop::WeightsChanged) }
    }

    fn keep(&self, key: Key, lease: Option<Lease>, computed: &Computed) {
        let (key, value) = match computed {
            Ok((actual, tensor)) => {
                self.memory.put(*actual, tensor.clone());
                (*actual, Value::Tensor(tensor.clone()))
            }
            // The same everywhere: others need not ask.
            Err(Stop::Failed(status)) if status.code() == Code::InvalidArgument => {
                (key, Value::Refusal(status.clone()))
            }
            // Another router may have more luck: one of those who wait gets the lease.
            Err(_) => return,
        };
        if let Some(redis) = &self.redis {
            redis.publish(key, value, lease);
        }
    }
}
