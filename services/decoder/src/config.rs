//! The decoder's configuration: every limit by name.

use std::path::PathBuf;

use emu2_serve::{config::Validate, server::ServerConfig, telemetry::TelemetryConfig};
use serde::{Deserialize, Serialize};

/// The port when none is configured; the admin port is 1000 above.
const PORT: u16 = 50_054;

/// The configuration of the decoder.
///
/// How long an image may take is the caller's `grpc-timeout`: steps × step plus the VAE, times the batches that take
/// turns. A guided step at 1024² is about 24 Tflop, so 50 of them are hours on two CPU cores (0.13 Tflop/s).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The folder of a model with a UNet and a VAE, in any layout.
    pub model_dir: PathBuf,
    /// The one device that computes, `cpu` or `cuda:N`: the whole decoder fits on one (5 GB in bfloat16).
    pub devices: Vec<String>,
    /// How many threads one torch operation takes on the CPU; 0 is as many as the process may use.
    pub cores: usize,
    /// The largest height and width of an image, in pixels. The VAE's memory grows with the area: at 2048² its widest
    /// feature map has 2 GB in bfloat16, and a few live at once.
    pub max_image_side: usize,
    /// The most denoising steps of an image: five times upstream's 50, a bound on what one request costs.
    pub max_steps: usize,
    /// The largest guidance scale: far above useful values (3 by default), far below where float32 would overflow.
    pub max_guidance_scale: f32,
    /// The most embeddings of one image: 64 in published models, 1024 before pooling.
    pub max_queries: usize,
    /// The most pixels of the images that share a denoising step, twice for those under guidance: a bound on memory,
    /// and on how long the others wait for their turn. The default is eight guided images at 1024². An image that alone
    /// exceeds it goes alone.
    pub max_batch_pixels: u64,
    /// The longest wait for the next embeddings of a request, in milliseconds: they are sent as the language model
    /// makes them.
    pub input_wait_ms_max: u64,
    /// How the service listens, sheds load and stops.
    pub server: ServerConfig,
    /// Where logs and traces go.
    pub telemetry: TelemetryConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            model_dir: PathBuf::new(),
            devices: vec!["cpu".to_owned()],
            cores: 0,
            max_image_side: 2048,
            max_steps: 250,
            max_guidance_scale: 100.0,
            max_queries: 1024,
            max_batch_pixels: 16 * 1024 * 1024,
            input_wait_ms_max: 600_000,
            server: ServerConfig::on_port(PORT),
            telemetry: TelemetryConfig::default(),
        }
    }
}

impl Validate for Config {
    fn problems(&self) -> Vec<String> {
        let mut problems = self.server.problems();
        problems.extend(self.telemetry.problems());
        if self.model_dir.as_os_str().is_empty() {
            problems.push("model_dir must name a model folder".to_owned());
        }
        if self.devices.len() != 1 {
            problems.push(format!("devices must name one device, got {:?}", self.devices));
        }
        let mut range = |key, min: u64, max: u64, value: u64| {
            if !(min..=max).contains(&value) {
                problems.push(format!("{key} must be {min} to {max}, got {value}"));
            }
        };
        range("cores", 0, 1024, self.cores as u64);
        range("max_image_side", 8, 8192, self.max_image_side as u64);
        range("max_steps", 1, 1000, self.max_steps as u64);
        range("max_queries", 1, 4096, self.max_queries as u64);
        range("max_batch_pixels", 1, 1 << 32, self.max_batch_pixels);
        range("input_wait_ms_max", 1, 86_400_000, self.input_wait_ms_max);
        if !(1.0..=1000.0).contains(&self.max_guidance_scale) {
            problems.push(format!("max_guidance_scale must be 1 to 1000, got {}", self.max_guidance_scale));
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_mistakes_are_told_at_once() {
        let config = Config {
            devices: Vec::new(),
            max_steps: 0,
            max_guidance_scale: f32::NAN,
            max_image_side: 1 << 20,
            ..Config::default()
        };
        let problems = config.problems().join("\n");
        for key in ["model_dir", "devices", "max_steps", "max_guidance_scale", "max_image_side"] {
            assert!(problems.contains(key), "{key} not in {problems}");
        }
        assert!(Config { model_dir: "model".into(), ..Config::default() }.problems().is_empty());
    }
}
