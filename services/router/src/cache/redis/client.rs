//! One question to Redis, answered in time or given up; the breaker learns from each.

use std::{pin::pin, sync::Arc, time::Duration};

use redis::{Cmd, FromRedisValue};
use tokio::time::{Instant, timeout, timeout_at};

use super::link::Link;
use crate::cache::breaker::Breaker;

/// The connection and its breaker. Clones share both.
#[derive(Clone)]
pub(super) struct Client {
    link: Arc<Link>,
    breaker: Arc<Breaker>,
}

impl Client {
    pub(super) fn new(link: Link) -> Self {
        Self { link: Arc::new(link), breaker: Arc::default() }
    }

    /// The answer, if one comes in time.
    pub(super) async fn ask<T: FromRedisValue>(&self, question: &Cmd, within: Duration) -> Option<T> {
        let Self { link, breaker } = self;
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
            #[expect(clippy::disallowed_methods, reason = "the process is busy")]
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
