//! How busy a replica is, by what it last reported and by what this router has sent it since.
//!
//! A report counts the work of all routers but is some milliseconds old; what this router has sent is known at once but
//! is its own alone. A replica that reports nothing (it runs an earlier release, or its stream is broken) is as busy as
//! this router keeps it.

use std::{
    cmp::Ordering,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use emu2_proto::stage::Load;
use tokio::time::Instant;

/// What one replica has to do.
#[derive(Debug, Default)]
pub(super) struct ReplicaLoad(Mutex<State>);

#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// Calls of this router that are open.
    outstanding: usize,
    reported: Load,
    /// Calls of this router that were open when the report came.
    outstanding_then: usize,
    /// The time since which every report has said that requests wait.
    waiting_since: Option<Instant>,
}

/// How busy a replica is estimated to be now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Busy {
    /// Requests that it has, whoever sent them.
    pub(super) requests: usize,
    /// Requests and seconds of work that it last reported.
    reported: usize,
    backlog_seconds: f64,
    free_positions: u64,
}

impl ReplicaLoad {
    /// A call of this router is opened.
    pub(super) fn open(&self) {
        self.lock().outstanding += 1;
    }

    /// A call of this router has ended.
    pub(super) fn close(&self) {
        self.lock().outstanding -= 1;
    }

    /// The replica has told its load.
    pub(super) fn report(&self, load: Load) {
        let mut state = self.lock();
        state.outstanding_then = state.outstanding;
        state.waiting_since = match load.waiting {
            0 => None,
            _ => Some(state.waiting_since.unwrap_or_else(Instant::now)),
        };
        state.reported = load;
    }

    /// How far behind the replica says it is, once requests have waited there for longer than `patience`; before that,
    /// and while nothing waits, a new request would soon begin, so the answer is zero.
    pub(super) fn behind(&self, patience: Duration) -> Duration {
        let State { reported, waiting_since, .. } = *self.lock();
        let waits = waiting_since.is_some_and(|since| since.elapsed() > patience);
        let seconds = if waits { reported.backlog_seconds } else { 0.0 };
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    pub(super) fn busy(&self) -> Busy {
        let State { outstanding, reported, outstanding_then, .. } = *self.lock();
        let held = usize::try_from(reported.running.saturating_add(reported.waiting)).unwrap_or(usize::MAX);
        // Calls that have been opened and are not in the engine yet are nobody's but ours to count.
        let requests = outstanding.max(held.saturating_add(outstanding).saturating_sub(outstanding_then));
        Busy {
            requests,
            reported: held,
            backlog_seconds: reported.backlog_seconds,
            free_positions: reported.free_positions.unwrap_or_default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Busy {
    /// Which of two replicas a new request would wait longer for. Seconds decide, those of requests that are in no
    /// report at what a reported one of the two takes; then requests; then room for keys and values.
    pub(super) fn cmp(&self, other: &Self) -> Ordering {
        let reported = (self.reported + other.reported) as f64;
        let seconds = self.backlog_seconds + other.backlog_seconds;
        let each = if reported > 0.0 { seconds / reported } else { 0.0 };
        let cost = |busy: &Self| busy.backlog_seconds + (busy.requests as f64 - busy.reported as f64) * each;
        let by_seconds = cost(self).total_cmp(&cost(other));
        by_seconds
            .then(self.requests.cmp(&other.requests))
            .then(other.free_positions.cmp(&self.free_positions))
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn load(running: u64, waiting: u64, backlog_seconds: f64) -> Load {
        Load { running, waiting, backlog_seconds, ..Default::default() }
    }

    fn reporting(load: Load) -> ReplicaLoad {
        let replica = ReplicaLoad::default();
        replica.report(load);
        replica
    }

    #[test]
    fn requests_of_other_routers_count_with_those_of_this_one() {
        let replica = ReplicaLoad::default();
        replica.open();
        assert_eq!(replica.busy().requests, 1, "nothing was reported");
        // Three of others; ours is not in the engine yet.
        replica.report(load(2, 1, 0.0));
        assert_eq!(replica.busy().requests, 3);
        (0..2).for_each(|_| replica.open());
        assert_eq!(replica.busy().requests, 5, "two more since the report");
        (0..3).for_each(|_| replica.close());
        assert_eq!(replica.busy().requests, 2);
        replica.report(load(0, 0, 0.0));
        assert_eq!(replica.busy().requests, 0);
    }

    #[test]
    fn the_less_busy_is_who_has_fewer_seconds_of_work_left() {
        let (long, short) = (reporting(load(1, 0, 20.0)), reporting(load(3, 2, 4.0)));
        assert_eq!(short.busy().cmp(&long.busy()), Ordering::Less);
        // Four seconds each by what these two report: five more make the short one the busier.
        (0..5).for_each(|_| short.open());
        assert_eq!(short.busy().cmp(&long.busy()), Ordering::Greater);
    }

    #[test]
    fn without_seconds_requests_decide_and_then_room_for_keys_and_values() {
        let (one, two) = (reporting(load(1, 0, 0.0)), reporting(load(2, 0, 0.0)));
        assert_eq!(one.busy().cmp(&two.busy()), Ordering::Less);
        let roomy = reporting(Load { free_positions: Some(4096), ..load(1, 0, 0.0) });
        assert_eq!(roomy.busy().cmp(&one.busy()), Ordering::Less);
    }

    #[tokio::test(start_paused = true)]
    async fn a_replica_is_behind_once_requests_have_waited_there_for_some_time() {
        let patience = Duration::from_secs(3);
        let replica = reporting(load(4, 0, 90.0));
        advance(2 * patience).await;
        assert_eq!(replica.behind(patience), Duration::ZERO, "all have begun");
        replica.report(load(4, 1, 90.0));
        advance(patience).await;
        assert_eq!(replica.behind(patience), Duration::ZERO);
        replica.report(load(4, 2, 80.0));
        advance(Duration::from_millis(1)).await;
        assert_eq!(replica.behind(patience), Duration::from_secs(80));
        replica.report(load(4, 0, 70.0));
        assert_eq!(replica.behind(patience), Duration::ZERO);
        replica.report(load(4, 1, 70.0));
        assert_eq!(replica.behind(patience), Duration::ZERO, "the wait is a new one");
    }
}
