//! How far the loading of a model is.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Least time between two log lines: tiny models load without any.
const QUIET: Duration = Duration::from_secs(1);
/// Least difference between two log lines.
const STEP_PERCENT: u8 = 10;

/// Counts the bytes loaded of those expected, at the kind that is computed in. Clones share the count, so that one
/// thread loads and another shows it; displayed, it is "loading 42 %". It is also logged, about every tenth percent.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<State>);

struct State {
    done: AtomicU64,
    total: AtomicU64,
    /// The last percent that the observer heard of.
    told: AtomicU8,
    observer: Option<Box<dyn Fn(u8) + Send + Sync>>,
    /// When the last line was logged, and of what percent.
    logged: Mutex<(Instant, u8)>,
}

impl Progress {
    /// Makes a count whose `observer` is called on the loading thread with every new percent, and never with a smaller
    /// one.
    pub fn observed(observer: impl Fn(u8) + Send + Sync + 'static) -> Self {
        Self(Arc::new(State { observer: Some(Box::new(observer)), ..State::default() }))
    }

    /// Returns how many bytes have been loaded.
    pub fn bytes_done(&self) -> u64 {
        self.0.done.load(Relaxed)
    }

    /// Returns how many bytes are known so far to be loaded; it grows while parts are added.
    pub fn bytes_total(&self) -> u64 {
        self.0.total.load(Relaxed)
    }

    /// Returns the loaded share of the known total in percent, 0 to 100; 0 as long as nothing is expected.
    pub fn percent(&self) -> u8 {
        let (done, total) = (self.bytes_done(), self.bytes_total());
        let percent = (u128::from(done) * 100).checked_div(u128::from(total)).unwrap_or(0);
        u8::try_from(percent.min(100)).expect("it is at most 100")
    }

    /// Adds to the bytes that are to be loaded.
    pub(super) fn expect(&self, bytes: u64) {
        self.0.total.fetch_add(bytes, Relaxed);
    }

    /// Adds to the bytes that have been loaded, and tells the observer and the log of a new percent.
    pub(crate) fn advance(&self, bytes: u64) {
        self.0.done.fetch_add(bytes, Relaxed);
        let percent = self.percent();
        if self.0.told.fetch_max(percent, Relaxed) >= percent {
            return;
        }
        if let Some(observer) = &self.0.observer {
            observer(percent);
        }
        let mut logged = self.0.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if percent >= logged.1 + STEP_PERCENT && logged.0.elapsed() >= QUIET {
            *logged = (Instant::now(), percent);
            tracing::info!(
                percent,
                bytes_done = self.bytes_done(),
                bytes_total = self.bytes_total(),
                "loading weights"
            );
        }
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "loading {} %", self.percent())
    }
}

impl Default for State {
    fn default() -> Self {
        let (done, total, told) = Default::default();
        Self { done, total, told, observer: None, logged: Mutex::new((Instant::now(), 0)) }
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { done, total, .. } = self;
        f.debug_struct("State").field("done", done).field("total", total).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_new_percent_is_told_once_and_never_a_smaller_one() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let heard = told.clone();
        let progress = Progress::observed(move |percent| heard.lock().unwrap().push(percent));
        assert_eq!((progress.percent(), progress.to_string()), (0, "loading 0 %".to_owned()));
        progress.expect(1000);
        for _ in 0..10 {
            progress.advance(42);
        }
        assert_eq!(progress.to_string(), "loading 42 %");
        // A second part comes up: the share shrinks, but is not told.
        progress.expect(1000);
        progress.advance(20);
        assert_eq!((progress.percent(), progress.bytes_done(), progress.bytes_total()), (22, 440, 2000));
        progress.advance(1560);
        assert_eq!(*told.lock().unwrap(), [4, 8, 12, 16, 21, 25, 29, 33, 37, 42, 100]);
    }
}
