//! The thread that owns a model, and the guard around its batches.
//!
//! A tensor may move between threads but not be shared, so a model lives on one thread and requests go to it. The
//! model uses plain (panicking) torch operations, so that a forward reads like the paper; [`guarded`] turns a
//! batch's panic into a fault, and the thread goes on.

use std::{
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use tokio::sync::oneshot;

/// Starts the thread that owns a model.
///
/// `load` builds the model on the thread and says something about it to the caller; then `serve` runs until its
/// queue closes. `cores` bounds the threads of one torch operation; 0 means all. Dropping the receiver does not stop
/// the thread: closing its queue does.
pub fn spawn<M, I, E>(
    name: &str,
    cores: usize,
    load: impl FnOnce() -> Result<(M, I), E> + Send + 'static,
    serve: impl FnOnce(M) + Send + 'static,
) -> oneshot::Receiver<Result<I, E>>
where
    I: Send + 'static,
    E: Send + 'static,
{
    let (report, loaded) = oneshot::channel();
    let body = move || {
        // The count is kept per calling thread, so that engines in one process can share its cores.
        tch::set_num_threads(cores_or_all(cores));
        let _no_grad = tch::no_grad_guard();
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

fn cores_or_all(cores: usize) -> i32 {
    let all = || thread::available_parallelism().map_or(1, |all| all.get());
    i32::try_from(if cores == 0 { all() } else { cores }).unwrap_or(i32::MAX)
}

/// Tells that a thread that served a model has ended, by returning or by a panic outside any guard: either way nobody
/// answers any more, and the process has to end.
#[derive(Debug)]
pub struct Ending(oneshot::Sender<()>);

impl Ending {
    /// What is told arrives at the receiver; an ending that never begins (the load failed) drops its half.
    pub fn channel() -> (Self, oneshot::Receiver<()>) {
        let (sender, ended) = oneshot::channel();
        (Self(sender), ended)
    }

    /// To be held by the thread while it serves.
    pub fn begin(self) -> Serving {
        Serving(Some(self.0))
    }
}

/// Tells of the end when dropped.
#[derive(Debug)]
pub struct Serving(Option<oneshot::Sender<()>>);

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some(ending) = self.0.take() {
            // Whoever started the engine may be gone already.
            let _ = ending.send(());
        }
    }
}

/// How long the step that an engine is at has been running: a step that never ends is a hang that the network does
/// not show. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Pulse {
    origin: Instant,
    /// Milliseconds from `origin` to the step's begin, plus one; 0 between steps.
    began: Arc<AtomicU64>,
}

impl Default for Pulse {
    fn default() -> Self {
        Self { origin: Instant::now(), began: Arc::default() }
    }
}

impl Pulse {
    /// To be held for a step.
    pub fn beat(&self) -> Beat {
        self.began.store(self.elapsed_ms() + 1, Ordering::Relaxed);
        Beat(Arc::clone(&self.began))
    }

    /// Of the current step; 0 between steps.
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
pub struct Beat(Arc<AtomicU64>);

impl Drop for Beat {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

/// What went wrong in a batch.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EngineFault {
    /// The batch did not fit; the engine keeps serving.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// The CUDA context may be poisoned: the service must go not-ready and exit.
    #[error("device failed: {0}")]
    Device(String),
    /// Any other panic: a defect, but only this batch's.
    #[error("batch failed: {0}")]
    Panic(String),
}

/// Runs one batch; a panic in it becomes a fault.
pub fn guarded<T>(batch: impl FnOnce() -> T) -> Result<T, EngineFault> {
    // A model is not changed by a forward, and what a batch was building is dropped with it.
    panic::catch_unwind(AssertUnwindSafe(batch)).map_err(|payload| {
        let text = payload.downcast_ref::<String>().cloned();
        let text = text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        classify(text.unwrap_or_else(|| "panic without a message".to_owned()))
    })
}

fn classify(text: String) -> EngineFault {
    // libtorch's C++ messages carry a back trace; the first line says it. In a failed unwrap's text line ends are
    // written out.
    let line = text.lines().next().unwrap_or_default();
    let line = line.split("\\n").next().unwrap_or_default().to_owned();
    if text.contains("out of memory") || text.contains("can't allocate memory") {
        EngineFault::OutOfMemory(line)
    } else if ["CUDA error", "cuBLAS", "CUBLAS", "cuDNN", "CUDNN"].iter().any(|sign| text.contains(sign)) {
        EngineFault::Device(line)
    } else {
        EngineFault::Panic(line)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tch::{Device, Kind, Tensor};

    use super::*;

    #[tokio::test]
    async fn the_model_is_loaded_and_served_on_one_thread_without_gradients() {
        let (queue, commands) = mpsc::channel::<i64>();
        let (answers, answered) = mpsc::channel();
        let loaded = spawn(
            "engine",
            1,
            || {
                let weight = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
                Ok::<_, String>((weight, thread::current().name().map(str::to_owned)))
            },
            move |weight| {
                for factor in commands {
                    let product = &weight * factor;
                    answers.send((product.requires_grad(), product.double_value(&[0]))).unwrap();
                }
            },
        );
        assert_eq!(loaded.await.unwrap().unwrap().as_deref(), Some("engine"));
        queue.send(3).unwrap();
        assert_eq!(answered.recv().unwrap(), (false, 3.0));
    }

    #[tokio::test]
    async fn a_load_error_reaches_the_caller() {
        let loaded = spawn("engine", 0, || Err::<((), ()), _>("no weights"), |()| unreachable!());
        assert_eq!(loaded.await.unwrap(), Err("no weights"));
    }

    #[tokio::test]
    async fn the_end_of_a_thread_that_served_is_told_even_when_it_panics() {
        let (ending, ended) = Ending::channel();
        let load = || Ok::<_, String>(((), ()));
        let serve = move |()| {
            let _serving = ending.begin();
            panic!("outside any guard");
        };
        spawn("engine", 1, load, serve).await.unwrap().unwrap();
        assert_eq!(ended.await, Ok(()));

        let (ending, ended) = Ending::channel();
        let never = spawn("engine", 1, || Err::<((), ()), _>("no weights"), move |()| drop(ending.begin()));
        assert!(never.await.unwrap().is_err() && ended.await.is_err());
    }

    #[test]
    fn a_step_is_timed_while_it_runs() {
        let pulse = Pulse::default();
        assert_eq!(pulse.step_ms(), 0);
        let beat = pulse.beat();
        thread::sleep(std::time::Duration::from_millis(20));
        assert!(pulse.clone().step_ms() >= 20);
        drop(beat);
        assert_eq!(pulse.step_ms(), 0);
    }

    #[test]
    fn faults_are_told_apart() {
        let mismatch = guarded(|| {
            Tensor::ones([2], (Kind::Float, Device::Cpu)) + Tensor::ones([3], (Kind::Float, Device::Cpu))
        });
        assert!(
            matches!(&mismatch, Err(EngineFault::Panic(text)) if !text.contains("frame #0")),
            "{mismatch:?}"
        );
        let fault = |text: &str| guarded(|| panic!("{text}")).unwrap_err();
        assert!(matches!(fault("CUDA out of memory. Tried to allocate"), EngineFault::OutOfMemory(_)));
        assert!(
            matches!(fault("CUDA error: an illegal memory access\nat x"), EngineFault::Device(line) if !line.contains("at x"))
        );
        assert_eq!(guarded(|| 7), Ok(7));
    }
}
