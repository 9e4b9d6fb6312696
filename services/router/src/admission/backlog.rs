//! How far behind a stage is, in seconds, by what it was seen to do.
//!
//! Work is counted in units that take a stage about the same time each: pictures to encode, tokens and rows of
//! embeddings, megapixels of a denoising step. What was admitted and is not done yet, divided by the units that the
//! stage did a second of late, is its backlog.
//!
//! A rate that was measured under light load is no measure of what a stage can do: it works for many at a time. So an
//! estimate is made only while somebody has waited for the stage for some time without a first unit, and it goes by what
//! the stage did meanwhile. A crowd that comes at once finds no estimate and is let in as far as permits go.
//!
//! Of a piece of work that is done as a whole (a picture to encode) nothing is seen before its end: it may be waiting or
//! at work all the while, and has no pace.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::time::Instant;

/// How long a measurement counts: it fades to a third in this time.
const MEMORY: Duration = Duration::from_secs(10);
/// Fewer are an accident.
const MEASURED_UNITS_MIN: f64 = 8.0;
/// By how much the best pace is forgotten with each request that was slower.
const FORGOTTEN: f64 = 1.05;

#[derive(Debug, Default)]
pub(super) struct Backlog(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Units admitted and not done.
    outstanding: f64,
    /// Requests that the stage has begun with.
    working: usize,
    /// Since when each other that has reached the stage waits.
    waiting: BTreeMap<u64, Instant>,
    next: u64,
    /// Fading: units done, and seconds in which there were any to do.
    units: f64,
    busy_seconds: f64,
    counted: Instant,
    /// Seconds a unit took the fastest request of late.
    best: Option<f64>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            outstanding: 0.0,
            working: 0,
            waiting: BTreeMap::new(),
            next: 0,
            units: 0.0,
            busy_seconds: 0.0,
            counted: Instant::now(),
            best: None,
        }
    }
}

impl State {
    /// Moves the measurement on to now.
    fn count(&mut self) {
        let passed = self.counted.elapsed().as_secs_f64();
        self.counted = Instant::now();
        let fade = (-passed / MEMORY.as_secs_f64()).exp();
        self.units *= fade;
        self.busy_seconds *= fade;
        if self.working > 0 {
            self.busy_seconds += passed;
        }
    }
}

impl Backlog {
    /// Admits work; `at_hand`: whether the stage could begin now, or waits for another.
    pub(super) fn begin(self: &Arc<Self>, units: f64, at_hand: bool) -> Work {
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        state.outstanding += units;
        drop(state);
        let work = Work {
            backlog: Arc::clone(self),
            number,
            total: units,
            done: 0.0,
            whole: false,
            first: None,
            last: None,
        };
        if at_hand {
            work.wait();
        }
        work
    }

    /// Admits work that is done as a whole.
    pub(super) fn begin_whole(self: &Arc<Self>, units: f64) -> Work {
        let mut work = self.begin(units, true);
        work.whole = true;
        let mut state = self.lock();
        state.count();
        state.working += 1;
        drop(state);
        work
    }

    /// None without measurements, and while nobody has waited for longer than `patience`.
    pub(super) fn estimate(&self, patience: Duration) -> Option<Duration> {
        let mut state = self.lock();
        state.count();
        // Admitted first is not at hand first: a painting is at hand once it has been regressed.
        let waited = state.waiting.values().min()?.elapsed();
        let measured = state.units >= MEASURED_UNITS_MIN && state.busy_seconds > 0.0;
        (measured && waited > patience).then(|| {
            let seconds = state.outstanding * state.busy_seconds / state.units;
            Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
        })
    }

    /// What so many units take a request that is not held up. None without measurements.
    pub(super) fn at_best(&self, units: f64) -> Option<Duration> {
        let seconds = self.lock().best? * units;
        Some(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nobody panics while counting")
    }
}

/// One request's work for a stage; what is left of it is forgotten when it is dropped.
#[derive(Debug)]
pub(crate) struct Work {
    backlog: Arc<Backlog>,
    number: u64,
    total: f64,
    done: f64,
    whole: bool,
    /// When the first units were seen, and how many they were.
    first: Option<(Instant, f64)>,
    last: Option<Instant>,
}

impl Work {
    /// The stage could begin now.
    pub(super) fn at_hand(&self) {
        if self.first.is_none() {
            self.wait();
        }
    }

    pub(super) fn did(&mut self, units: f64) {
        self.reached(self.done + units);
    }

    /// So many units are done in all; never back, and never beyond what was admitted.
    pub(super) fn reached(&mut self, done: f64) {
        let done = done.min(self.total);
        if done <= self.done {
            return;
        }
        let did = done - self.done;
        let now = Instant::now();
        let mut state = self.backlog.lock();
        state.count();
        state.outstanding -= did;
        if self.whole {
            state.waiting.remove(&self.number);
            state.units += did;
        } else if self.first.is_none() {
            state.waiting.remove(&self.number);
            state.working += 1;
            self.first = Some((now, done));
        } else {
            state.units += did;
        }
        (self.done, self.last) = (done, Some(now));
    }

    /// All of it.
    pub(crate) fn finish(mut self) {
        self.reached(self.total);
    }

    fn wait(&self) {
        self.backlog.lock().waiting.insert(self.number, Instant::now());
    }

    /// Seconds a unit, if there were enough of them.
    fn pace(&self) -> Option<f64> {
        let ((first, before), last) = (self.first?, self.last?);
        let units = self.done - before;
        // As with rates: in two events there is no pace.
        (units > before && last > first).then(|| (last - first).as_secs_f64() / units)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let pace = self.pace();
        let mut state = self.backlog.lock();
        state.count();
        state.outstanding = (state.outstanding - (self.total - self.done)).max(0.0);
        state.waiting.remove(&self.number);
        state.working -= usize::from(self.whole || self.first.is_some());
        if let Some(pace) = pace {
            state.best = Some(state.best.map_or(pace, |best| pace.min(best * FORGOTTEN)));
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(1);

    fn near(got: Option<Duration>, want: f64) {
        let got = got.expect("an estimate").as_secs_f64();
        assert!((got - want).abs() < 0.15 * want, "{got} instead of {want}");
    }

    /// Ten units a second between all that have begun.
    async fn run(works: &mut [Work], seconds: u64) {
        for _ in 0..seconds * 10 {
            advance(Duration::from_millis(100)).await;
            let share = 1.0 / works.len() as f64;
            works.iter_mut().for_each(|work| work.did(share));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_measurements_or_without_a_wait_there_is_no_estimate() {
        let backlog = Arc::new(Backlog::default());
        let crowd: Vec<_> = (0..100).map(|_| backlog.begin(1_000.0, true)).collect();
        advance(Duration::from_secs(60)).await;
        assert_eq!(backlog.estimate(PATIENCE), None, "nothing was measured");
        assert_eq!(backlog.at_best(1.0), None);
        drop(crowd);
        let mut alone = [backlog.begin(1_000.0, true)];
        run(&mut alone, 10).await;
        let _crowd: Vec<_> = (0..100).map(|_| backlog.begin(1_000.0, true)).collect();
        assert_eq!(backlog.estimate(PATIENCE), None, "nobody has waited yet");
        advance(PATIENCE * 2).await;
        assert!(backlog.estimate(PATIENCE).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn the_estimate_is_what_is_left_by_what_was_done_a_second() {
        let backlog = Arc::new(Backlog::default());
        let mut running = [backlog.begin(500.0, true), backlog.begin(500.0, true)];
        let waiting = [backlog.begin(300.0, true), backlog.begin(300.0, true)];
        run(&mut running, 20).await;
        // 1,600 units less the 200 that are done, at ten a second.
        near(backlog.estimate(PATIENCE), 140.0);
        drop(waiting);
        assert_eq!(backlog.estimate(PATIENCE), None, "nobody waits any more");
        drop(running);
        let state = backlog.lock();
        assert_eq!((state.outstanding, state.working, state.waiting.len()), (0.0, 0, 0));
    }

    /// What the stage could do under load is what counts, not what it did for one.
    #[tokio::test(start_paused = true)]
    async fn the_rate_follows_the_load() {
        let backlog = Arc::new(Backlog::default());
        let mut alone = [backlog.begin(10_000.0, true)];
        for _ in 0..100 {
            advance(Duration::from_secs(1)).await;
            alone[0].did(1.0);
        }
        let _waiting = backlog.begin(100.0, true);
        let mut many: Vec<_> = (0..10).map(|_| backlog.begin(1_000.0, true)).collect();
        run(&mut many, 30).await;
        // 9,900 + 100 + 9,700 units are left, at ten a second by now.
        near(backlog.estimate(PATIENCE), 1_970.0);
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_waits_for_another_stage_is_not_waiting_for_this_one() {
        let backlog = Arc::new(Backlog::default());
        let mut running = [backlog.begin(500.0, true)];
        let [earlier, later] = [backlog.begin(50.0, false), backlog.begin(50.0, false)];
        run(&mut running, 10).await;
        assert_eq!(backlog.estimate(PATIENCE), None);
        later.at_hand();
        run(&mut running, 2).await;
        near(backlog.estimate(PATIENCE), 48.0);
        earlier.at_hand();
        near(backlog.estimate(PATIENCE), 48.0);
    }

    #[tokio::test(start_paused = true)]
    async fn whole_pieces_are_estimated_by_what_was_ended_a_second() {
        let backlog = Arc::new(Backlog::default());
        let mut waiting: Vec<_> = (0..100).map(|_| backlog.begin_whole(1.0)).collect();
        assert_eq!(backlog.estimate(PATIENCE), None);
        for _ in 0..40 {
            advance(Duration::from_millis(500)).await;
            waiting.remove(0).finish();
        }
        near(backlog.estimate(PATIENCE), 30.0);
        assert_eq!(backlog.at_best(1.0), None);
        // Given up: nothing was done.
        waiting.truncate(10);
        near(backlog.estimate(PATIENCE), 5.0);
        waiting.clear();
        let state = backlog.lock();
        assert_eq!((state.outstanding, state.working, state.waiting.len()), (0.0, 0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn the_best_pace_is_the_fastest_of_late() {
        let backlog = Arc::new(Backlog::default());
        let paint = async |step: Duration| {
            let mut work = backlog.begin(20.0, true);
            for done in 1..=20 {
                advance(step).await;
                work.reached(f64::from(done));
            }
        };
        paint(Duration::from_millis(100)).await;
        near(backlog.at_best(50.0), 5.0);
        paint(Duration::from_millis(200)).await;
        near(backlog.at_best(50.0), 5.25);
        for _ in 0..40 {
            paint(Duration::from_millis(200)).await;
        }
        near(backlog.at_best(50.0), 10.0);
    }
}
