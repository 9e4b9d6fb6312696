//! Values that stages would only compute again: pictures' embeddings and guidance negatives. Memory first, then
//! Redis, then the stage, and one flight per key at a time. Values are idempotent, so nothing here decides
//! correctness: a cache that is empty, slow or gone costs work only.

mod breaker;
mod flights;
mod key;
mod memory;
mod redis;
mod value;

use std::{sync::Arc, time::Duration};

use emu2_proto::v1;
use futures::{FutureExt, future::BoxFuture};

use self::{
    flights::Flights,
    memory::Memory,
    redis::{Lookup, Redis},
};
pub(crate) use self::{
    key::{Key, Kind, Recipe},
    value::is_whole,
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

#[derive(Clone)]
pub(crate) struct Cache {
    levels: Arc<Levels>,
    flights: Arc<Flights<Result<Found, Stop>>>,
    metrics: Metrics,
}

struct Levels {
    memory: Memory,
    redis: Option<Redis>,
}

impl Cache {
    /// Fails on a Redis URL that cannot be read; a Redis that does not answer is no failure.
    pub(crate) fn open(config: &CacheConfig, metrics: Metrics) -> anyhow::Result<Self> {
        let redis = config.redis_url.as_ref().map(|url| Redis::open(url, config)).transpose();
        // The parser's own words could quote the URL, which holds the password.
        let redis = redis.map_err(|_| anyhow::anyhow!("cache.redis_url cannot be read as a Redis URL"))?;
        let memory = Memory::new(config.memory_bytes, Duration::from_secs(config.ttl_seconds));
        Ok(Self { levels: Arc::new(Levels { memory, redis }), flights: Arc::new(Flights::new()), metrics })
    }

    /// The value of `key`, computed by `compute` if nobody has it and nobody is at it.
    pub(crate) async fn fetch<F>(&self, kind: Kind, key: Key, compute: F) -> Result<Found, Stop>
    where
        F: FnOnce() -> BoxFuture<'static, Computed>,
    {
        let found = match self.levels.memory.get(&key) {
            Some(tensor) => Ok(Found { tensor, outcome: Outcome::L1Hit }),
            None => {
                let levels = Arc::clone(&self.levels);
                let (flight, joined) = self.flights.join(key, || levels.obtain(key, compute()).boxed());
                let found = flight.await;
                if joined { found.map(|found| Found { outcome: Outcome::Waited, ..found }) } else { found }
            }
        };
        if let Ok(found) = &found {
            self.metrics.cache_lookup(kind, found.outcome);
        }
        found
    }
}

impl Levels {
    async fn obtain(self: Arc<Self>, key: Key, compute: BoxFuture<'static, Computed>) -> Result<Found, Stop> {
        // An earlier flight may have landed between this request's look at the memory and its joining.
        if let Some(tensor) = self.memory.get(&key) {
            return Ok(Found { tensor, outcome: Outcome::L1Hit });
        }
        let outcome = match &self.redis {
            None => Outcome::Miss,
            Some(redis) => match redis.get(&key).await {
                Lookup::Hit(tensor) => {
                    self.memory.put(key, tensor.clone());
                    return Ok(Found { tensor, outcome: Outcome::L2Hit });
                }
                Lookup::Miss => Outcome::Miss,
                Lookup::Bad => Outcome::BadValue,
                Lookup::Bypassed => Outcome::Bypassed,
            },
        };
        let (actual, tensor) = compute.await?;
        self.memory.put(actual, tensor.clone());
        if let Some(redis) = &self.redis {
            redis.put(actual, tensor.clone());
        }
        // The weights changed under the request: the value is good, but not what was asked for.
        if actual == key { Ok(Found { tensor, outcome }) } else { Err(Stop::Rolled) }
    }
}
