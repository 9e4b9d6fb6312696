//! The noise schedule: at which timesteps the UNet is asked, and how much noise is left at each.
//!
//! Euler's method on the probability-flow equation (Karras et al., arXiv 2206.00364, algorithm 2 without churn) over
//! the training schedule of Stable Diffusion XL; upstream's is diffusers 0.24 `EulerDiscreteScheduler` with
//! "leading" spacing. Numbers only: what is done with them to latents is in [`crate::denoise`].

use serde::Deserialize;

use crate::{
    error::LoadError,
    switches::{Settings, Supported, unsupported},
};

/// Section `scheduler` of a model's configuration; the defaults are Emu2's.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    /// How many timesteps the training schedule has, at least 2.
    pub num_train_timesteps: usize,
    /// The variance of the noise that training adds at the first timestep, above 0.
    pub beta_start: f64,
    /// The variance of the noise that training adds at the last timestep, at least `beta_start` and below 1.
    pub beta_end: f64,
    /// What is added to every timestep, so that the last is not 0.
    pub steps_offset: usize,
    #[serde(flatten)]
    settings: Settings,
}

const SUPPORTED: &[(&str, Supported)] = &[
    ("beta_schedule", Supported::Text("scaled_linear")),
    ("interpolation_type", Supported::Text("linear")),
    ("prediction_type", Supported::Text("epsilon")),
    ("timestep_spacing", Supported::Text("leading")),
    ("trained_betas", Supported::Off),
    ("use_karras_sigmas", Supported::Off),
];

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_start: 0.00085,
            beta_end: 0.012,
            steps_offset: 1,
            settings: Settings::new(),
        }
    }
}

impl SchedulerConfig {
    fn problems(&self) -> Vec<String> {
        let mut problems = unsupported(&self.settings, SUPPORTED);
        if self.num_train_timesteps < 2 {
            problems
                .push(format!("`num_train_timesteps` must be at least 2, got {}", self.num_train_timesteps));
        }
        let (start, end) = (self.beta_start, self.beta_end);
        if !(0.0 < start && start <= end && end < 1.0) {
            problems
                .push(format!("`beta_start` and `beta_end` must rise within 0 and 1, got {start} and {end}"));
        }
        problems
    }
}

/// The training schedule, from which a schedule of any number of steps is taken.
#[derive(Clone, Debug)]
pub struct EulerDiscrete {
    alphas_cumprod: Vec<f32>,
    steps_offset: usize,
}

impl EulerDiscrete {
    /// Computes the training schedule of a configuration.
    ///
    /// # Errors
    ///
    /// [`LoadError::Config`]: the configuration contradicts itself or asks for what is not built.
    pub fn new(config: &SchedulerConfig) -> Result<Self, LoadError> {
        LoadError::check("scheduler", config.problems())?;
        Ok(Self { alphas_cumprod: alphas_cumprod(config), steps_offset: config.steps_offset })
    }

    /// Returns the share ᾱ of the image's variance that is left at each training timestep: x_t = √ᾱ x_0 + √(1 − ᾱ)
    /// noise.
    pub fn alphas_cumprod(&self) -> &[f32] {
        &self.alphas_cumprod
    }

    /// Returns the schedule of `steps` steps, from 1 to the number of training timesteps, which is the most that can be
    /// told apart.
    pub fn schedule(&self, steps: usize) -> Schedule {
        debug_assert!((1..=self.alphas_cumprod.len()).contains(&steps));
        // "Leading": multiples of a whole ratio, counted from 0 and then shifted.
        let ratio = self.alphas_cumprod.len() / steps;
        let timesteps: Vec<f32> = (0..steps).rev().map(|i| (i * ratio + self.steps_offset) as f32).collect();
        let sigmas = timesteps.iter().map(|&timestep| self.sigma(timestep)).chain([0.0]).collect();
        Schedule { timesteps, sigmas }
    }

    /// Returns the standard deviation of the noise at a timestep, linear between the training timesteps; beyond the
    /// last, that of the last.
    fn sigma(&self, timestep: f32) -> f32 {
        let last = self.alphas_cumprod.len() - 1;
        let at = |index: usize| {
            let alpha = self.alphas_cumprod[index.min(last)];
            f64::from(((1.0 - alpha) / alpha).sqrt())
        };
        let below = timestep.floor();
        let fraction = f64::from(timestep - below);
        let (low, high) = (at(below as usize), at(below as usize + 1));
        (low + fraction * (high - low)) as f32
    }
}

/// Computes the running products of 1 − β. The betas are the squares of equal steps between the roots of their ends
/// ("scaled linear").
///
/// The rounding is upstream's: float32 throughout, but for the running product, which torch keeps in float64. Early
/// sigmas are roots of 1 − ᾱ with ᾱ near 1, so another rounding would move them by more than 1e-6.
fn alphas_cumprod(config: &SchedulerConfig) -> Vec<f32> {
    let count = config.num_train_timesteps;
    let (start, end) = (config.beta_start.sqrt() as f32, config.beta_end.sqrt() as f32);
    let step = (end - start) / (count - 1) as f32;
    // As torch.linspace: the second half is counted from the end.
    let root =
        |i: usize| if i < count / 2 { start + step * i as f32 } else { end - step * (count - 1 - i) as f32 };
    let alphas = (0..count).map(|i| 1.0 - root(i) * root(i));
    let product = alphas.scan(1.0_f64, |product, alpha: f32| {
        *product *= f64::from(alpha);
        Some(*product as f32)
    });
    product.collect()
}

/// The denoising steps of one request.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// The timesteps, falling.
    timesteps: Vec<f32>,
    /// The standard deviation of the noise before each step; one more than timesteps, the last is 0.
    sigmas: Vec<f32>,
}

/// Where one denoising step starts and ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The training timestep that the UNet is told.
    pub timestep: f32,
    /// The standard deviation of the noise in the latents before the step.
    pub sigma: f32,
    /// The standard deviation of the noise in the latents after the step.
    pub sigma_next: f32,
}

impl Schedule {
    /// Returns how many steps the schedule has.
    pub fn steps(&self) -> usize {
        self.timesteps.len()
    }

    /// Returns the step of this index.
    ///
    /// # Panics
    ///
    /// The schedule has no such step.
    pub fn step(&self, index: usize) -> Step {
        Step {
            timestep: self.timesteps[index],
            sigma: self.sigmas[index],
            sigma_next: self.sigmas[index + 1],
        }
    }

    /// Returns what standard normal noise is multiplied by to become the first latents. It belongs to this schedule,
    /// whose first sigma is the largest; that of the training schedule is larger.
    pub fn init_noise_sigma(&self) -> f32 {
        input_scale(self.sigmas[0])
    }
}

impl Step {
    /// Returns what latents are divided by before the UNet sees them: their standard deviation.
    pub fn input_scale(&self) -> f32 {
        input_scale(self.sigma)
    }
}

fn input_scale(sigma: f32) -> f32 {
    (sigma * sigma + 1.0).sqrt()
}

#[cfg(test)]
mod tests {
    use emu2_nn::golden;
    use serde_json::json;
    use tch::Tensor;

    use super::*;

    fn scheduler() -> EulerDiscrete {
        EulerDiscrete::new(&SchedulerConfig::default()).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.flatten(0, -1)).unwrap()
    }

    fn assert_relative(name: &str, got: &[f32], want: &[f32]) {
        assert_eq!(got.len(), want.len(), "{name}");
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((got - want).abs() <= 1e-6 * want.abs(), "{name}[{i}]: {got} instead of {want}");
        }
    }

    #[test]
    fn schedules_are_the_official_ones() {
        let golden = golden::file("scheduler.safetensors");
        let scheduler = scheduler();
        assert_relative(
            "alphas_cumprod",
            scheduler.alphas_cumprod(),
            &values(&golden.tensor("alphas_cumprod")),
        );
        for steps in [4, 20, 50] {
            let schedule = scheduler.schedule(steps);
            let want = |name: &str| values(&golden.tensor(&format!("n{steps}.{name}")));
            assert_eq!(schedule.timesteps, want("timesteps"));
            assert_relative("sigmas", &schedule.sigmas, &want("sigmas"));
            assert_relative("init_noise_sigma", &[schedule.init_noise_sigma()], &want("init_noise_sigma"));
        }
    }

    #[test]
    fn every_number_of_steps_falls_to_zero() {
        let scheduler = scheduler();
        for steps in [1, 2, 3, 7, 499, 501, 999, 1000] {
            let schedule = scheduler.schedule(steps);
            assert_eq!(schedule.steps(), steps);
            assert!(schedule.timesteps.windows(2).all(|pair| pair[0] > pair[1]), "{steps}");
            // Beyond the last training timestep there is only its sigma: 1000 steps meet it twice.
            assert!(schedule.sigmas.windows(2).all(|pair| pair[0] >= pair[1]), "{steps}");
            assert_eq!(schedule.step(steps - 1).sigma_next, 0.0);
            assert!(schedule.step(steps - 1).sigma > 0.0);
        }
    }

    #[test]
    fn other_schedules_are_refused_by_name() {
        let config = json!({"timestep_spacing": "trailing", "use_karras_sigmas": true, "beta_start": 0.5});
        let config: SchedulerConfig = serde_json::from_value(config).unwrap();
        let error = EulerDiscrete::new(&config).unwrap_err().to_string();
        for name in ["timestep_spacing", "trailing", "use_karras_sigmas", "beta_start", "scheduler"] {
            assert!(error.contains(name), "{error}");
        }
    }
}
