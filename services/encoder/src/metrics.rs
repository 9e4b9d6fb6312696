//! Every metric of this service; those of its RPCs are `emu2-serve`'s.

use emu2_serve::metrics::duration_histogram;
use prometheus_client::{
    metrics::{
        counter::Counter,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

/// Batches of 1 to 128 images.
const BATCH_BUCKETS: u16 = 8;

#[derive(Clone, Debug)]
pub struct Metrics {
    pub waiting: Gauge,
    pub encoded: Counter,
    pub refused: Counter,
    pub left: Counter,
    pub batch_images: Histogram,
    pub preprocess_duration: Histogram,
    pub queue_duration: Histogram,
    pub batch_duration: Histogram,
}

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            waiting: Gauge::default(),
            encoded: Counter::default(),
            refused: Counter::default(),
            left: Counter::default(),
            batch_images: Histogram::new(exponential_buckets(1.0, 2.0, BATCH_BUCKETS)),
            preprocess_duration: duration_histogram(),
            queue_duration: duration_histogram(),
            batch_duration: duration_histogram(),
        };
        let all = &metrics;
        let waiting = "Images preprocessed and waiting for the engine";
        registry.register("emu2_encoder_waiting_images", waiting, all.waiting.clone());
        let mut count = |name, help, counter: &Counter| registry.register(name, help, counter.clone());
        count("emu2_encoder_encoded_images", "Images encoded", &all.encoded);
        count(
            "emu2_encoder_refused_images",
            "Images that could not be decoded or were too large",
            &all.refused,
        );
        count("emu2_encoder_left_images", "Images whose caller left before their batch", &all.left);
        registry.register("emu2_encoder_batch_images", "Images of one forward", all.batch_images.clone());
        let mut seconds = |name, help, histogram: &Histogram| {
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        };
        let preprocess = "Decoding, resizing and normalising one image";
        seconds("emu2_encoder_preprocess_duration", preprocess, &all.preprocess_duration);
        seconds("emu2_encoder_queue_duration", "Waiting of one image for the engine", &all.queue_duration);
        seconds("emu2_encoder_batch_duration", "One forward", &all.batch_duration);
        metrics
    }
}
