//! The metrics of this service alone; those of its RPCs are `emu2-serve`'s, those of its load `emu2-engine`'s.

use emu2_serve::metrics::duration_histogram;
use prometheus_client::{
    metrics::{
        counter::Counter,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

/// Batches of 1 to 128 images.
const BATCH_BUCKETS: u16 = 8;

/// The encoder's metrics. Clones share the values.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// `emu2_encoder_encoded_images_total`: images encoded.
    pub encoded: Counter,
    /// `emu2_encoder_refused_images_total`: images that could not be decoded or were too large.
    pub refused: Counter,
    /// `emu2_encoder_batch_images`: images of one forward.
    pub batch_images: Histogram,
    /// `emu2_encoder_preprocess_duration_seconds`: decoding, resizing and normalising one image.
    pub preprocess_duration: Histogram,
}

impl Metrics {
    /// Registers all of them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            encoded: Counter::default(),
            refused: Counter::default(),
            batch_images: Histogram::new(exponential_buckets(1.0, 2.0, BATCH_BUCKETS)),
            preprocess_duration: duration_histogram(),
        };
        let all = &metrics;
        let mut count = |name, help, counter: &Counter| registry.register(name, help, counter.clone());
        count("emu2_encoder_encoded_images", "Images encoded", &all.encoded);
        count(
            "emu2_encoder_refused_images",
            "Images that could not be decoded or were too large",
            &all.refused,
        );
        registry.register("emu2_encoder_batch_images", "Images of one forward", all.batch_images.clone());
        let preprocess = "Decoding, resizing and normalising one image";
        registry.register_with_unit(
            "emu2_encoder_preprocess_duration",
            preprocess,
            Unit::Seconds,
            all.preprocess_duration.clone(),
        );
        metrics
    }
}
