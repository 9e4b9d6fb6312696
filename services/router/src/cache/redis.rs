//! The second level: Redis, shared by all routers. Never an error: whatever goes wrong here is a bypass. A request
//! waits for it at most one deadline, which covers everything (connecting, too); writes are off the path.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use emu2_proto::v1;
use redis::{
    AsyncCommands, RedisResult,
    aio::{ConnectionManager, ConnectionManagerConfig},
};
use tokio::{
    sync::mpsc,
    time::{error::Elapsed, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{breaker::Breaker, key::Key, value};
use crate::config::{CacheConfig, RedisUrl};

/// Writes that wait at most; 64 pictures of 64 queries in bf16 are 15 MB. More are dropped: the next miss writes again.
const WAITING_WRITES: usize = 64;
/// A write is off the path, so it may take longer than a read; but not for ever.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

pub(crate) struct Redis {
    connection: ConnectionManager,
    deadline: Duration,
    breaker: Arc<Breaker>,
    writes: mpsc::Sender<Write>,
    _writer: AbortOnDropHandle<()>,
}

/// What Redis said of a key.
#[derive(Debug, PartialEq)]
pub(crate) enum Lookup {
    Hit(v1::Tensor),
    Miss,
    /// What it held is not what was stored; it is being deleted.
    Bad,
    /// It was not asked, or did not answer in time.
    Bypassed,
}

enum Write {
    Store(Key, v1::Tensor),
    Delete(Key),
}

impl Redis {
    /// Connects in the background: Redis may come later, or never. Fails on a URL that cannot be read.
    pub(crate) fn open(url: &RedisUrl, config: &CacheConfig) -> RedisResult<Self> {
        let client = redis::Client::open(url.reveal())?;
        let manager = ConnectionManagerConfig::new()
            // Our breaker decides when to try again.
            .set_number_of_retries(0)
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(WRITE_TIMEOUT));
        let connection = ConnectionManager::new_lazy_with_config(client, manager)?;
        let breaker = Arc::new(Breaker::default());
        let (writes, waiting) = mpsc::channel(WAITING_WRITES);
        let ttl = Duration::from_secs(config.ttl_seconds);
        let writer = tokio::spawn(write(connection.clone(), Arc::clone(&breaker), waiting, ttl));
        let deadline = Duration::from_millis(config.deadline_ms);
        Ok(Self { connection, deadline, breaker, writes, _writer: AbortOnDropHandle::new(writer) })
    }

    pub(crate) async fn get(&self, key: &Key) -> Lookup {
        if !self.breaker.allows() {
            return Lookup::Bypassed;
        }
        let mut connection = self.connection.clone();
        let answer = timeout(self.deadline, connection.get::<_, Option<Vec<u8>>>(name(key))).await;
        match judge(&self.breaker, answer) {
            None => Lookup::Bypassed,
            Some(None) => Lookup::Miss,
            Some(Some(bytes)) => match value::decode(key, Bytes::from(bytes)) {
                Ok(tensor) => Lookup::Hit(tensor),
                Err(error) => {
                    tracing::warn!(%key, %error, "bad value in Redis");
                    self.queue(Write::Delete(*key));
                    Lookup::Bad
                }
            },
        }
    }

    pub(crate) fn put(&self, key: Key, tensor: v1::Tensor) {
        self.queue(Write::Store(key, tensor));
    }

    fn queue(&self, write: Write) {
        if self.writes.try_send(write).is_err() {
            tracing::debug!("too many writes wait for Redis: one dropped");
        }
    }
}

/// The writer's task: one write after the other until the cache is dropped.
async fn write(
    mut connection: ConnectionManager,
    breaker: Arc<Breaker>,
    mut writes: mpsc::Receiver<Write>,
    ttl: Duration,
) {
    // Connecting takes longer than a read may wait, with TLS above all: begin now.
    let _ = connection.ping::<()>().await;
    while let Some(write) = writes.recv().await {
        if !breaker.allows() {
            continue;
        }
        let done = async {
            match write {
                Write::Store(key, tensor) => {
                    connection
                        .set_ex::<_, _, ()>(name(&key), value::encode(&key, &tensor), ttl.as_secs())
                        .await
                }
                Write::Delete(key) => connection.del::<_, ()>(name(&key)).await,
            }
        };
        judge(&breaker, timeout(WRITE_TIMEOUT, done).await);
    }
}

/// The answer, if one came in time; the breaker learns either way.
fn judge<T>(breaker: &Breaker, answer: Result<RedisResult<T>, Elapsed>) -> Option<T> {
    let reason = match answer {
        Ok(Ok(answer)) => {
            breaker.succeeded();
            return Some(answer);
        }
        // The kind alone: an error's text may quote what was sent to it, credentials among it.
        Ok(Err(error)) => format!("{:?}", error.kind()),
        Err(_) => "no answer in time".to_owned(),
    };
    if breaker.failed() {
        tracing::warn!(reason, "Redis is bypassed for now");
    }
    None
}

fn name(key: &Key) -> String {
    format!("emu2:embeddings:{key}")
}
