use std::{
    sync::{Arc, Mutex, mpsc as std_mpsc},
    time::Duration,
};

use emu2_engine::error::EngineError;
use emu2_nn::golden::{self, assert_close, forward_tolerance};
use emu2_serve::priority::Priority;
use prometheus_client::registry::Registry;
use tokio::{sync::oneshot, task::JoinHandle};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// What an image in the queue comes to.
type Answer = JoinHandle<Result<f32, EngineError<UnsoundEmbeddings>>>;

/// Answers each image with its n_query, once per permission; writes down its batches.
struct Probe {
    permissions: std_mpsc::Receiver<Result<(), &'static str>>,
    batches: Arc<Mutex<Vec<Vec<u32>>>>,
}

impl BatchEncoder for Probe {
    fn encode(&self, batch: &[PreparedImage]) -> Vec<Result<Array, ArrayError>> {
        let numbers: Vec<u32> = batch.iter().map(|image| image.n_query).collect();
        self.batches.lock().unwrap().push(numbers.clone());
        if let Err(panic) = self.permissions.recv().unwrap() {
            panic!("{panic}");
        }
        let answer =
            |number: u32| Array::new(Dtype::F32, vec![1], (number as f32).to_le_bytes().to_vec().into());
        numbers.into_iter().map(answer).collect()
    }
}

struct Bench {
    engine: engine::Engine<Encoder<Probe>>,
    metrics: Metrics,
    ended: oneshot::Receiver<()>,
    permit: std_mpsc::SyncSender<Result<(), &'static str>>,
    batches: Arc<Mutex<Vec<Vec<u32>>>>,
}

impl Bench {
    async fn new(batch: usize) -> Self {
        let (permit, permissions) = std_mpsc::sync_channel(64);
        let batches = Arc::new(Mutex::new(Vec::new()));
        let probe = Probe { permissions, batches: Arc::clone(&batches) };
        let registry = &mut Registry::default();
        let metrics = Metrics::register(registry);
        let load_metrics = LoadMetrics::register(registry, "encoder");
        let options = Options { name: "encoder", max_waiting: 8, limit_name: "max_images" };
        let stage = Encoder::new(probe, batch, metrics.clone());
        let load = || Ok::<_, LoadError>((stage, ()));
        let started = engine::Engine::start(options, load_metrics, || thread::set_up(1), load);
        started.loaded.await.unwrap().unwrap();
        Self { engine: started.engine, metrics, ended: started.ended, permit, batches }
    }

    /// An image in the queue, known by its number.
    fn submit(&self, number: u32) -> Answer {
        self.submit_as(Priority::Normal, number)
    }

    fn submit_as(&self, priority: Priority, number: u32) -> Answer {
        let submitted = self.engine.submit(PreparedImage { pixels: Pixels::Mean, n_query: number }, priority);
        tokio::spawn(async move {
            let encoded = submitted?.next().await.ok_or(EngineError::Stopped)??;
            Ok(encoded.embeddings.values().next().unwrap())
        })
    }

    fn waiting(&self) -> usize {
        self.engine.load().current().waiting
    }

    async fn until(&self, holds: impl Fn(&Self) -> bool) {
        let waiting = async {
            while !holds(self) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.expect("it comes to hold");
    }

    /// One image in the model, and these behind it in the queue.
    async fn busy(&self, numbers: std::ops::RangeInclusive<u32>) -> Vec<Answer> {
        let mut handles = vec![self.submit(0)];
        self.until(|bench| bench.batches.lock().unwrap().len() == 1).await;
        for (waiting, number) in numbers.enumerate() {
            handles.push(self.submit(number));
            self.until(|bench| bench.waiting() == waiting + 1).await;
        }
        handles
    }
}

#[tokio::test]
async fn what_queued_while_the_engine_was_busy_is_one_batch() {
    let bench = Bench::new(8).await;
    let handles = bench.busy(1..=5).await;
    bench.permit.send(Ok(())).unwrap();
    bench.permit.send(Ok(())).unwrap();
    for (number, handle) in handles.into_iter().enumerate() {
        assert_eq!(handle.await.unwrap(), Ok(number as f32));
    }
    assert_eq!(*bench.batches.lock().unwrap(), [vec![0], vec![1, 2, 3, 4, 5]]);
    assert_eq!(bench.waiting(), 0);
    assert_eq!(bench.metrics.encoded.get(), 6);
}

#[tokio::test]
async fn higher_classes_are_encoded_first() {
    let bench = Bench::new(2).await;
    let mut handles = bench.busy(1..=2).await;
    for (waiting, (priority, number)) in
        [(Priority::Low, 3), (Priority::High, 4), (Priority::Normal, 5)].into_iter().enumerate()
    {
        handles.push(bench.submit_as(priority, number));
        bench.until(|bench| bench.waiting() == waiting + 3).await;
    }
    (0..4).for_each(|_| bench.permit.send(Ok(())).unwrap());
    for handle in handles {
        handle.await.unwrap().unwrap();
    }
    assert_eq!(*bench.batches.lock().unwrap(), [vec![0], vec![4, 1], vec![2, 5], vec![3]]);
}

#[tokio::test]
async fn a_batch_is_bounded() {
    let bench = Bench::new(2).await;
    let handles = bench.busy(1..=5).await;
    (0..4).for_each(|_| bench.permit.send(Ok(())).unwrap());
    for handle in handles {
        handle.await.unwrap().unwrap();
    }
    assert_eq!(*bench.batches.lock().unwrap(), [vec![0], vec![1, 2], vec![3, 4], vec![5]]);
}

#[tokio::test]
async fn callers_that_left_are_not_worked_for() {
    let bench = Bench::new(8).await;
    let mut handles = bench.busy(1..=4).await;
    for left in [3, 1] {
        let handle = handles.remove(left);
        handle.abort();
        assert!(handle.await.unwrap_err().is_cancelled());
    }
    bench.permit.send(Ok(())).unwrap();
    bench.permit.send(Ok(())).unwrap();
    for handle in handles {
        handle.await.unwrap().unwrap();
    }
    assert_eq!(*bench.batches.lock().unwrap(), [vec![0], vec![2, 4]]);
    assert_eq!(bench.engine.load().callers_left(), 2);
}

#[tokio::test]
async fn a_full_queue_refuses_and_a_closed_one_says_so() {
    let bench = Bench::new(8).await;
    let handles = bench.busy(1..=8).await;
    let refused = bench.submit(9).await.unwrap();
    assert_eq!(refused, Err(EngineError::Full { max: 8, limit_name: "max_images" }));
    assert_eq!(bench.waiting(), 8);
    drop(bench.permit);
    // Without permissions the probe panics: a fault of each batch, not of the engine.
    for handle in handles {
        assert_eq!(handle.await.unwrap(), Err(EngineError::StepFailed));
    }
    drop(bench.engine);
    tokio::time::timeout(PATIENCE, bench.ended).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_panic_ends_its_batch_and_a_broken_device_the_engine() {
    let bench = Bench::new(8).await;
    bench.permit.send(Err("a defect")).unwrap();
    let failed = bench.submit(1).await.unwrap().unwrap_err();
    assert_eq!(failed, EngineError::StepFailed);
    let status = tonic::Status::from(failed);
    assert_eq!((status.code(), status.message()), (tonic::Code::Internal, "the step failed"));
    bench.permit.send(Ok(())).unwrap();
    assert_eq!(bench.submit(2).await.unwrap(), Ok(2.0));
    bench.permit.send(Err("CUDA error: an illegal memory access was encountered")).unwrap();
    assert_eq!(bench.submit(3).await.unwrap(), Err(EngineError::Stopped));
    tokio::time::timeout(PATIENCE, bench.ended).await.unwrap().unwrap();
    let late = PreparedImage { pixels: Pixels::Mean, n_query: 4 };
    assert_eq!(bench.engine.submit(late, Priority::Normal).unwrap_err(), EngineError::Stopped);
}

#[test]
fn one_batch_mixes_queries_and_the_mean_colour() {
    let _no_grad = tch::no_grad_guard();
    let (model, info) =
        load(golden::model_dir("emu2-base"), &["cpu".to_owned()], Progress::default()).unwrap();
    assert_eq!((info.width, info.image_size, info.grid_side, info.dtype), (64, 56, 4, Dtype::F32));
    let golden = golden::file("vision.safetensors");
    let pixels = golden.tensor("pixels");
    let values = |index: i64| Pixels::Values(pixels.get(index).contiguous().view(-1).try_into().unwrap());
    let batch = [
        PreparedImage { pixels: values(0), n_query: 16 },
        PreparedImage { pixels: Pixels::Mean, n_query: 4 },
        PreparedImage { pixels: values(1), n_query: 1 },
    ];
    let encoded: Vec<Tensor> = model
        .encode(&batch)
        .into_iter()
        .map(|array| array::to_tensor(&array.unwrap(), Device::Cpu, Kind::Float))
        .collect();
    let close =
        |name: &str, got: &Tensor, want: &Tensor| assert_close(name, got, want, forward_tolerance(want));
    close("first", &encoded[0], &golden.tensor("encode_image.nq16").get(0));
    close("last", &encoded[2], &golden.tensor("encode_image.nq1").get(1));
    let zeros = Tensor::zeros([1, 3, 56, 56], (Kind::Float, Device::Cpu));
    close("mean colour", &encoded[1], &model.encode_image(&zeros, 4).squeeze_dim(0));
}
