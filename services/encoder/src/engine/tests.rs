use std::{
    sync::{Arc, Mutex, mpsc as std_mpsc},
    time::Duration,
};

use emu2_nn::golden::{self, assert_close, forward_tolerance};
use prometheus_client::registry::Registry;

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// Answers each picture with its n_query, once per permission; writes down its batches.
struct Probe {
    permissions: std_mpsc::Receiver<Result<(), &'static str>>,
    batches: Arc<Mutex<Vec<Vec<u32>>>>,
}

impl BatchEncoder for Probe {
    fn encode(&self, batch: &[Picture]) -> Vec<Result<Array, ArrayError>> {
        let numbers: Vec<u32> = batch.iter().map(|picture| picture.n_query).collect();
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
    engine: Engine,
    ended: oneshot::Receiver<()>,
    permit: std_mpsc::Sender<Result<(), &'static str>>,
    batches: Arc<Mutex<Vec<Vec<u32>>>>,
}

impl Bench {
    async fn new(batch: usize) -> Self {
        let (permit, permissions) = std_mpsc::channel();
        let batches = Arc::new(Mutex::new(Vec::new()));
        let probe = Probe { permissions, batches: Arc::clone(&batches) };
        let info = ModelInfo {
            weights_digest: String::new(),
            dtype: Dtype::F32,
            width: 1,
            image_size: 1,
            grid_side: 1,
        };
        let metrics = Metrics::register(&mut Registry::default());
        let bounds = Bounds { waiting: 8, batch };
        let Started { engine, loaded, ended } =
            Engine::start_with(bounds, 1, metrics, move || Ok((probe, info)));
        loaded.await.unwrap().unwrap();
        Self { engine, ended, permit, batches }
    }

    /// A picture in the queue, known by its number.
    fn submit(&self, number: u32) -> tokio::task::JoinHandle<Result<f32, EncodeError>> {
        self.submit_as(Priority::Normal, number)
    }

    fn submit_as(
        &self,
        priority: Priority,
        number: u32,
    ) -> tokio::task::JoinHandle<Result<f32, EncodeError>> {
        let engine = self.engine.clone();
        tokio::spawn(async move {
            let encoded = engine.encode(Picture { pixels: Pixels::Mean, n_query: number }, priority).await?;
            Ok(encoded.embeddings.values().next().unwrap())
        })
    }

    async fn until(&self, holds: impl Fn(&Self) -> bool) {
        let waiting = async {
            while !holds(self) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.expect("it comes to hold");
    }

    /// One picture in the model, and these behind it in the queue.
    async fn busy(
        &self,
        numbers: std::ops::RangeInclusive<u32>,
    ) -> Vec<tokio::task::JoinHandle<Result<f32, EncodeError>>> {
        let mut handles = vec![self.submit(0)];
        self.until(|bench| bench.batches.lock().unwrap().len() == 1).await;
        for (waiting, number) in numbers.enumerate() {
            handles.push(self.submit(number));
            self.until(|bench| bench.engine.metrics.waiting.get() == waiting as i64 + 1).await;
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
    assert_eq!(bench.engine.metrics.waiting.get(), 0);
    assert_eq!(bench.engine.metrics.encoded.get(), 6);
}

#[tokio::test]
async fn higher_classes_are_encoded_first() {
    let bench = Bench::new(2).await;
    let mut handles = bench.busy(1..=2).await;
    for (waiting, (priority, number)) in
        [(Priority::Low, 3), (Priority::High, 4), (Priority::Normal, 5)].into_iter().enumerate()
    {
        handles.push(bench.submit_as(priority, number));
        bench.until(|bench| bench.engine.metrics.waiting.get() == waiting as i64 + 3).await;
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
    assert_eq!(bench.engine.metrics.left.get(), 2);
}

#[tokio::test]
async fn a_full_queue_refuses_and_a_closed_one_says_so() {
    let bench = Bench::new(8).await;
    let handles = bench.busy(1..=8).await;
    let refused = bench.submit(9).await.unwrap();
    assert_eq!(refused, Err(EncodeError::Full { max: 8 }));
    assert_eq!(bench.engine.metrics.waiting.get(), 8);
    drop(bench.permit);
    // Without permissions the probe panics: a fault of each batch, not of the engine.
    for handle in handles {
        assert!(matches!(handle.await.unwrap(), Err(EncodeError::Fault(EngineFault::Panic(_)))));
    }
    drop(bench.engine);
    tokio::time::timeout(PATIENCE, bench.ended).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_panic_ends_its_batch_and_a_broken_device_the_engine() {
    let bench = Bench::new(8).await;
    bench.permit.send(Err("a defect")).unwrap();
    let failed = bench.submit(1).await.unwrap();
    assert!(matches!(failed, Err(EncodeError::Fault(EngineFault::Panic(_)))), "{failed:?}");
    bench.permit.send(Ok(())).unwrap();
    assert_eq!(bench.submit(2).await.unwrap(), Ok(2.0));
    bench.permit.send(Err("CUDA error: an illegal memory access was encountered")).unwrap();
    let failed = bench.submit(3).await.unwrap();
    assert!(matches!(failed, Err(EncodeError::Fault(EngineFault::Device(_)))), "{failed:?}");
    tokio::time::timeout(PATIENCE, bench.ended).await.unwrap().unwrap();
    assert_eq!(
        bench
            .engine
            .encode(Picture { pixels: Pixels::Mean, n_query: 4 }, Priority::Normal)
            .await
            .unwrap_err(),
        EncodeError::Stopped
    );
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
        Picture { pixels: values(0), n_query: 16 },
        Picture { pixels: Pixels::Mean, n_query: 4 },
        Picture { pixels: values(1), n_query: 1 },
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
