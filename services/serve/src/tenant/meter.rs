//! What one tenant takes at a time and over time.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::time::Instant;
use tonic::Status;

use super::{Tenant, TenantLimits};
use crate::status;

/// How long a tenant with all of its requests running is told to wait: nobody knows when one of them ends.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What a tenant has taken; it outlives changes of the tenant's limits.
#[derive(Debug, Default)]
pub(super) struct Meter(Mutex<Count>);

#[derive(Debug)]
struct Count {
    running: usize,
    /// Requests that may begin now: a token bucket, filled up to the burst at the rate. By hand, because the crate
    /// governor gives a fresh burst with new limits, even where its state is carried over from the old ones.
    ready: Option<f64>,
    filled: Instant,
}

impl Default for Count {
    fn default() -> Self {
        Self { running: 0, ready: None, filled: Instant::now() }
    }
}

impl Meter {
    /// Returns a place now, or RESOURCE_EXHAUSTED with RetryInfo: how long until the rate allows one more.
    pub(super) fn enter(self: &Arc<Self>, tenant: &Tenant, limits: &TenantLimits) -> Result<Place, Status> {
        let mut count = self.lock();
        if let Some(max) = limits.max_requests.filter(|max| count.running >= *max) {
            let text = format!("tenant {tenant} has {max} requests running already (max_requests)");
            return Err(status::exhausted(text, RETRY_AFTER));
        }
        if let Some(rate) = limits.requests_per_second {
            let burst = f64::from(limits.burst_requests.unwrap_or(1).max(1));
            let now = Instant::now();
            let gained = (now - count.filled).as_secs_f64() * rate;
            let ready = (count.ready.unwrap_or(burst) + gained).min(burst);
            (count.ready, count.filled) = (Some(ready), now);
            if ready < 1.0 {
                let text = format!("tenant {tenant} may make {rate} requests a second (requests_per_second)");
                return Err(status::exhausted(text, Duration::from_secs_f64((1.0 - ready) / rate)));
            }
            count.ready = Some(ready - 1.0);
        }
        count.running += 1;
        Ok(Place(Arc::clone(self)))
    }

    fn lock(&self) -> MutexGuard<'_, Count> {
        self.0.lock().expect("nobody panics while counting")
    }
}

/// One of a tenant's requests, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place(Arc<Meter>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.lock().running -= 1;
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tonic_types::StatusExt;

    use super::*;

    fn enter(meter: &Arc<Meter>, limits: &TenantLimits) -> Result<Place, Duration> {
        meter.enter(&Tenant::default(), limits).map_err(|status| {
            assert_eq!(status.code(), Code::ResourceExhausted);
            status.get_details_retry_info().unwrap().retry_delay.unwrap()
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_allows_a_burst_and_then_its_share_of_time() {
        let limits =
            TenantLimits { requests_per_second: Some(2.0), burst_requests: Some(3), ..Default::default() };
        let meter = Arc::default();
        for _ in 0..3 {
            enter(&meter, &limits).unwrap();
        }
        assert_eq!(enter(&meter, &limits).unwrap_err(), Duration::from_millis(500));
        tokio::time::advance(Duration::from_millis(400)).await;
        let left = enter(&meter, &limits).unwrap_err();
        assert!(left.abs_diff(Duration::from_millis(100)) < Duration::from_millis(1), "{left:?}");
        tokio::time::advance(Duration::from_millis(100)).await;
        enter(&meter, &limits).unwrap();
        enter(&meter, &limits).unwrap_err();
        // However long nobody comes, no more than a burst is saved up.
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!((0..10).filter(|_| enter(&meter, &limits).is_ok()).count(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn new_limits_give_no_fresh_burst() {
        let limits = |rate, burst| TenantLimits {
            requests_per_second: Some(rate),
            burst_requests: Some(burst),
            ..Default::default()
        };
        let old = limits(2.0, 3);
        for new in [limits(2.0, 10), limits(4.0, 3), limits(0.001, 3), limits(2.0, 1), old] {
            let meter = Arc::default();
            assert_eq!((0..10).filter(|_| enter(&meter, &old).is_ok()).count(), 3);
            enter(&meter, &new).expect_err("what the old limits allowed is taken");
            // From then on the new rate fills it, up to the new burst.
            let rate = new.requests_per_second.unwrap();
            tokio::time::advance(Duration::from_secs_f64(1.001 / rate)).await;
            enter(&meter, &new).unwrap();
            enter(&meter, &new).unwrap_err();
            tokio::time::advance(Duration::from_secs_f64(100.0 / rate)).await;
            let burst = new.burst_requests.unwrap() as usize;
            assert_eq!((0..20).filter(|_| enter(&meter, &new).is_ok()).count(), burst);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn over_any_time_the_rate_holds() {
        let limits =
            TenantLimits { requests_per_second: Some(5.0), burst_requests: Some(2), ..Default::default() };
        let (meter, mut entered) = (Arc::default(), 0);
        for _ in 0..10_000 {
            entered += usize::from(enter(&meter, &limits).is_ok());
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        assert!((50..=52).contains(&entered), "{entered}");
    }

    #[tokio::test]
    async fn so_many_at_a_time() {
        let limits = TenantLimits { max_requests: Some(2), ..Default::default() };
        let meter = Arc::default();
        let first = enter(&meter, &limits).unwrap();
        let _second = enter(&meter, &limits).unwrap();
        assert_eq!(enter(&meter, &limits).unwrap_err(), RETRY_AFTER);
        drop(first);
        enter(&meter, &limits).unwrap();
    }
}
