//! What Redis is told and nobody waits for: values to keep, and leases that end. One after the other, off the path.

use std::{sync::Arc, time::Duration};

use redis::Cmd;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::{
    client::Client,
    questions::{self, Token},
};
use crate::cache::{
    key::Key,
    value::{self, Value},
};

/// Writes that wait at most; 64 images of 64 queries in bf16 are 15 MB. More are dropped: the next miss writes again,
/// and a lease ends by itself.
const WAITING_WRITES: usize = 64;
/// A write is off the path, so it may take longer than a question; but not for ever.
pub(super) const WRITE_TIMEOUT: Duration = Duration::from_secs(2);

/// One thing that Redis is told.
pub(super) enum BackgroundWrite {
    Publish { key: Key, token: Option<Token>, value: Value, ttl: Duration },
    Release { key: Key, token: Token },
}

/// The queue of writes, and the task that makes them for as long as any clone lives.
#[derive(Clone)]
pub(super) struct BackgroundWrites {
    queue: mpsc::Sender<BackgroundWrite>,
    _writer: Arc<AbortOnDropHandle<()>>,
}

impl BackgroundWrites {
    /// Begins the task; values of more than `max_value_bytes` are not stored.
    pub(super) fn start(client: Client, max_value_bytes: usize) -> Self {
        let (queue, mut waiting) = mpsc::channel::<BackgroundWrite>(WAITING_WRITES);
        let writing = async move {
            while let Some(write) = waiting.recv().await {
                if let Some(question) = write.question(max_value_bytes) {
                    client.ask::<redis::Value>(&question, WRITE_TIMEOUT).await;
                }
            }
        };
        Self { queue, _writer: Arc::new(AbortOnDropHandle::new(tokio::spawn(writing))) }
    }

    /// Queues a write, or drops it where too many wait.
    pub(super) fn queue(&self, write: BackgroundWrite) {
        if self.queue.try_send(write).is_err() {
            tracing::debug!("too many background writes wait for Redis: one dropped");
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
