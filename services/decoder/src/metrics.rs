//! The metrics of the decoder alone, unit last; those of its RPCs are `emu2-serve`'s, those of its load
//! `emu2-engine`'s.

use emu2_serve::metrics::duration_histogram;
use prometheus_client::{
    metrics::{
        counter::Counter,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

/// The decoder's metrics. Clones share the values.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// `emu2_decoder_denoise_step_seconds`: the time of one step of one batch.
    pub(crate) denoise_step: Histogram,
    /// `emu2_decoder_batch_rows`: rows of the UNet's batch in one step; a request under guidance takes two.
    pub(crate) batch_rows: Histogram,
    /// `emu2_decoder_vae_seconds`: the time of decoding one image from its latents.
    pub(crate) vae: Histogram,
    /// `emu2_decoder_steps_total`: denoising steps of requests; a batch counts each of its requests.
    pub(crate) steps: Counter,
    /// `emu2_decoder_images_total`: images generated.
    pub(crate) images: Counter,
}

impl Metrics {
    /// Registers the metrics under the prefix `emu2_decoder`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            denoise_step: duration_histogram(),
            batch_rows: Histogram::new(exponential_buckets(1.0, 2.0, 8)),
            vae: duration_histogram(),
            steps: Counter::default(),
            images: Counter::default(),
        };
        let registry = registry.sub_registry_with_prefix("emu2_decoder");
        let help = "Time of one denoising step of one batch";
        registry.register_with_unit("denoise_step", help, Unit::Seconds, metrics.denoise_step.clone());
        registry.register("batch_rows", "Rows of one denoising step", metrics.batch_rows.clone());
        registry.register_with_unit(
            "vae",
            "Time of one image's decoding",
            Unit::Seconds,
            metrics.vae.clone(),
        );
        registry.register("steps", "Denoising steps of requests", metrics.steps.clone());
        registry.register("images", "Images generated", metrics.images.clone());
        metrics
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_documented_ones() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        metrics.vae.observe(0.5);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for name in [
            "emu2_decoder_denoise_step_seconds_count 0",
            "emu2_decoder_batch_rows_count 0",
            "emu2_decoder_vae_seconds_count 1",
            "emu2_decoder_steps_total 0",
            "emu2_decoder_images_total 0",
        ] {
            assert!(text.contains(name), "{name} not in\n{text}");
        }
    }
}
