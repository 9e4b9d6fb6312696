//! The best pace at which a stage was seen to work of late: what a request that is not held up can hope for.
//!
//! Work is counted in units that take a stage about the same time each: tokens and rows of embeddings, megapixels of a
//! denoising step. Paces are seen from outside, by what clients are told, so they hold whatever a request meets on its
//! way. Work that is done as a whole (an image to encode) shows no pace.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// The factor by which the best pace is forgotten with each request that was slower.
const FORGOTTEN: f64 = 1.05;

/// Seconds a unit took the fastest request of late; none before any was measured.
#[derive(Debug, Default)]
pub(crate) struct BestPace(Mutex<Option<f64>>);

/// One request's work as it is done; its pace counts when it is dropped.
#[derive(Debug)]
pub(crate) struct PaceSample {
    best: Arc<BestPace>,
    /// Units that it has in all.
    total: f64,
    done: f64,
    /// When the first units were seen, and how many they were.
    first: Option<(Instant, f64)>,
    last: Option<Instant>,
}

impl BestPace {
    /// What `units` take a request that is not held up. None without measurements.
    pub(crate) fn at_best(&self, units: f64) -> Option<Duration> {
        let seconds = (*self.0.lock().unwrap_or_else(PoisonError::into_inner))? * units;
        Some(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
    }

    /// A request of `total` units begins.
    pub(crate) fn sample(self: &Arc<Self>, total: f64) -> PaceSample {
        PaceSample { best: Arc::clone(self), total, done: 0.0, first: None, last: None }
    }

    fn observe(&self, pace: f64) {
        let mut best = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *best = Some(best.map_or(pace, |best| pace.min(best * FORGOTTEN)));
    }
}

impl PaceSample {
    /// So many more units are done.
    pub(crate) fn did(&mut self, units: f64) {
        self.reached(self.done + units);
    }

    /// So many units are done in all; never back, and never beyond the total.
    pub(crate) fn reached(&mut self, done: f64) {
        let done = done.min(self.total);
        if done <= self.done {
            return;
        }
        let now = Instant::now();
        self.first.get_or_insert((now, done));
        (self.done, self.last) = (done, Some(now));
    }

    /// Seconds a unit, if there were enough of them.
    fn pace(&self) -> Option<f64> {
        let ((first, before), last) = (self.first?, self.last?);
        let units = self.done - before;
        // When the first event's units began nobody has seen: in two events there is no pace.
        (units > before && last > first).then(|| (last - first).as_secs_f64() / units)
    }
}

impl Drop for PaceSample {
    fn drop(&mut self) {
        if let Some(pace) = self.pace() {
            self.best.observe(pace);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn near(got: Option<Duration>, want: f64) {
        let got = got.expect("a measurement").as_secs_f64();
        assert!((got - want).abs() < 0.15 * want, "{got} instead of {want}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_best_pace_is_the_fastest_of_late() {
        let best = Arc::new(BestPace::default());
        assert_eq!(best.at_best(1.0), None);
        let paint = async |step: Duration| {
            let mut sample = best.sample(20.0);
            for done in 1..=20 {
                advance(step).await;
                sample.reached(f64::from(done));
            }
        };
        paint(Duration::from_millis(100)).await;
        near(best.at_best(50.0), 5.0);
        paint(Duration::from_millis(200)).await;
        near(best.at_best(50.0), 5.25);
        for _ in 0..40 {
            paint(Duration::from_millis(200)).await;
        }
        near(best.at_best(50.0), 10.0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_at_once_has_no_pace() {
        let best = Arc::new(BestPace::default());
        let mut sample = best.sample(20.0);
        advance(Duration::from_secs(1)).await;
        sample.reached(20.0);
        drop(sample);
        assert_eq!(best.at_best(1.0), None);
    }
}
