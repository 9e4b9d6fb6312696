//! The encoder's configuration: every limit by name.

use std::path::PathBuf;

use emu2_serve::{config::Validate, server::ServerConfig, telemetry::TelemetryConfig};
use serde::{Deserialize, Serialize};

use crate::preprocess::decode::ImageLimits;

/// The port when none is configured; the admin port is 1000 above.
const PORT: u16 = 50_052;

/// The configuration of the encoder.
///
/// An accepted image waits for at most `max_images / max_batch_images` batches before its own, and for
/// `max_images / preprocess_threads` decodes before its own: a caller's deadline is at least that.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The folder of a model in any layout; only the visual encoder's weights are read.
    pub model_dir: PathBuf,
    /// The one device that computes, `cpu` or `cuda:N`: 4.4 billion parameters fit one device (8.7 GB in bfloat16).
    pub devices: Vec<String>,
    /// How many threads one torch operation takes on the CPU; 0 is as many as the process may use.
    pub cores: usize,
    /// How many images one forward takes at most: at 448² a batch of 8 keeps a GPU busy, and more would only add
    /// latency.
    pub max_batch_images: usize,
    /// How many images may be accepted and not yet answered at a time, over all calls; one more is refused. Each
    /// waits as 2.4 MB of pixels.
    pub max_images: usize,
    /// How many images are decoded at a time, each with the memory that `image` allows.
    pub preprocess_threads: usize,
    /// How large an image may be.
    pub image: ImageLimits,
    /// How the service listens, sheds load and stops.
    pub server: ServerConfig,
    /// Where logs and traces go.
    pub telemetry: TelemetryConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            model_dir: PathBuf::from("model"),
            devices: vec!["cpu".to_owned()],
            cores: 0,
            max_batch_images: 8,
            max_images: 128,
            preprocess_threads: 2,
            image: ImageLimits::default(),
            server: ServerConfig::on_port(PORT),
            telemetry: TelemetryConfig::default(),
        }
    }
}

impl Validate for Config {
    fn problems(&self) -> Vec<String> {
        let mut problems = self.server.problems();
        problems.extend(self.telemetry.problems());
        let mut range = |key, min: u64, max: u64, value: u64| {
            if !(min..=max).contains(&value) {
                problems.push(format!("{key} must be {min} to {max}, got {value}"));
            }
        };
        range("cores", 0, 4_096, self.cores as u64);
        range("max_batch_images", 1, 1_024, self.max_batch_images as u64);
        range("max_images", 1, 65_536, self.max_images as u64);
        range("preprocess_threads", 1, 256, self.preprocess_threads as u64);
        // The longest side that JPEG and GIF can state; a gigapixel would need 16 GB to decode.
        range("image.max_side", 1, 65_535, self.image.max_side.into());
        range("image.max_pixels", 1, 1 << 30, self.image.max_pixels);
        if self.devices.len() != 1 {
            problems.push(format!("devices must name one device, got {:?}", self.devices));
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_mistakes_are_told_at_once() {
        assert_eq!(Config::default().problems(), Vec::<String>::new());
        let wrong = Config { max_batch_images: 0, max_images: 0, devices: Vec::new(), ..Config::default() };
        let problems = wrong.problems();
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(problems[1].contains("max_images must be 1 to "), "{problems:?}");
    }
}
