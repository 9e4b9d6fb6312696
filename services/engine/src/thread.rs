//! The thread that owns a model: how it starts, how its end is told, and how a step that hangs is seen.
//!
//! A tensor may move between threads but not be shared, so a model lives on one thread and requests go to it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use tokio::sync::oneshot;

/// Starts a thread named `name` that loads a model and serves it.
///
/// On the thread `setup` runs first and what it gives is kept until the thread ends (a guard that turns gradients off,
/// for instance); `load` builds the model and says something about it to the caller; then `serve` runs with the model
/// until it returns. Dropping the receiver does not stop the thread.
pub fn spawn<G, M, I, E>(
    name: &str,
    setup: impl FnOnce() -> G + Send + 'static,
    load: impl FnOnce() -> Result<(M, I), E> + Send + 'static,
    serve: impl FnOnce(M) + Send + 'static,
) -> oneshot::Receiver<Result<I, E>>
where
    I: Send + 'static,
    E: Send + 'static,
{
    let (report, loaded) = oneshot::channel();
    let body = move || {
        let _kept = setup();
        match load() {
            Ok((model, info)) => {
                if report.send(Ok(info)).is_ok() {
                    serve(model);
                }
            }
            Err(error) => {
                // The service stopped while it was loading: nobody is left to tell.
                let _ = report.send(Err(error));
            }
        }
    };
    thread::Builder::new().name(name.to_owned()).spawn(body).expect("the system can start a thread");
    loaded
}

/// Tells that a thread that served a model has ended, by returning or by a panic outside any guard: either way nobody
/// answers any more, and the process has to end.
#[derive(Debug)]
pub struct EndNotice(oneshot::Sender<()>);

impl EndNotice {
    /// Makes a notice and the receiver that it will be told at. The receiver errs if the thread never served.
    pub fn channel() -> (Self, oneshot::Receiver<()>) {
        let (sender, ended) = oneshot::channel();
        (Self(sender), ended)
    }

    /// Makes the guard that the thread holds while it serves; dropping it tells of the end.
    pub fn arm(self) -> EndGuard {
        EndGuard(Some(self.0))
    }
}

/// Tells of the end of a thread that served when it is dropped.
#[derive(Debug)]
pub struct EndGuard(Option<oneshot::Sender<()>>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        if let Some(notice) = self.0.take() {
            // Whoever started the engine may be gone already.
            let _ = notice.send(());
        }
    }
}

/// How long the step that an engine is at has been running: a step that never ends is a hang that the network does
/// not show. Clones share it.
#[derive(Clone, Debug)]
pub struct StepTimer {
    origin: Instant,
    /// Milliseconds from `origin` to the step's begin, plus one; 0 between steps.
    began: Arc<AtomicU64>,
}

impl Default for StepTimer {
    fn default() -> Self {
        Self { origin: Instant::now(), began: Arc::default() }
    }
}

impl StepTimer {
    /// Begins a step, which lasts until the guard is dropped.
    pub fn start(&self) -> StepGuard {
        self.began.store(self.elapsed_ms() + 1, Ordering::Relaxed);
        StepGuard(Arc::clone(&self.began))
    }

    /// Milliseconds that the current step has been running; 0 between steps.
    pub fn step_ms(&self) -> u64 {
        match self.began.load(Ordering::Relaxed) {
            0 => 0,
            began => (self.elapsed_ms() + 1).saturating_sub(began),
        }
    }

    fn elapsed_ms(&self) -> u64 {
        self.origin.elapsed().as_millis() as u64
    }
}

/// A step that is running, until dropped.
#[derive(Debug)]
pub struct StepGuard(Arc<AtomicU64>);

impl Drop for StepGuard {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, time::Duration};

    use super::*;

    std::thread_local! {
        static SET_UP: Cell<bool> = const { Cell::new(false) };
    }

    #[tokio::test]
    async fn the_model_is_loaded_and_served_on_one_thread_that_was_set_up() {
        let (answer, answered) = oneshot::channel();
        let here = || (SET_UP.get(), thread::current().name().map(str::to_owned));
        let load = move || Ok::<_, String>((7, here()));
        let loaded = spawn(
            "engine",
            || SET_UP.set(true),
            load,
            move |model| {
                answer.send((model, here())).unwrap();
            },
        );
        let expected = (true, Some("engine".to_owned()));
        assert_eq!(loaded.await.unwrap().unwrap(), expected);
        assert_eq!(answered.await.unwrap(), (7, expected));
    }

    #[tokio::test]
    async fn a_load_error_reaches_the_caller() {
        let loaded = spawn("engine", || (), || Err::<((), ()), _>("no weights"), |()| unreachable!());
        assert_eq!(loaded.await.unwrap(), Err("no weights"));
    }

    #[tokio::test]
    async fn the_end_of_a_thread_that_served_is_told_even_when_it_panics() {
        let (notice, ended) = EndNotice::channel();
        let serve = move |()| {
            let _serving = notice.arm();
            panic!("outside any guard");
        };
        spawn("engine", || (), || Ok::<_, String>(((), ())), serve).await.unwrap().unwrap();
        assert_eq!(ended.await, Ok(()));

        let (notice, ended) = EndNotice::channel();
        let load = || Err::<((), ()), _>("no weights");
        let never = spawn("engine", || (), load, move |()| drop(notice.arm()));
        assert!(never.await.unwrap().is_err() && ended.await.is_err());
    }

    #[test]
    #[expect(
        clippy::disallowed_methods,
        reason = "a step holds its thread, which is no thread of the runtime"
    )]
    fn a_step_is_timed_while_it_runs() {
        let timer = StepTimer::default();
        assert_eq!(timer.step_ms(), 0);
        let step = timer.start();
        thread::sleep(Duration::from_millis(20));
        assert!(timer.clone().step_ms() >= 20);
        drop(step);
        assert_eq!(timer.step_ms(), 0);
    }
}
