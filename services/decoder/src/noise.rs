//! Where an image starts: standard normal noise that depends on the seed alone.
//!
//! ChaCha is a counter-based generator on the CPU, so a seed gives the same latents on every replica and device, and
//! an image can be generated again elsewhere. The test below pins the values: a change of them is a change of every
//! image that a client keeps only the seed of.

use rand::SeedableRng;
use rand_chacha::ChaCha12Rng;
use rand_distr::{Distribution, StandardNormal};

/// Draws the first `count` values of the seed's noise, of mean 0 and variance 1. Equal seeds have equal values on every
/// machine.
pub fn standard_normal(seed: u64, count: usize) -> Vec<f32> {
    let generator = ChaCha12Rng::seed_from_u64(seed);
    StandardNormal.sample_iter(generator).take(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_noise_for_ever() {
        let pinned = [
            (0, [0.712813, 0.858_331_44, -2.436_243_8, 0.163_344_26]),
            (7, [-1.043_576_6, -0.576_747_8, -0.711_254_3, 0.116_297_14]),
            (u64::MAX, [-1.013_373_7, -1.227_777_5, -1.557_054_4, -0.566_462_93]),
        ];
        for (seed, values) in pinned {
            assert_eq!(standard_normal(seed, 4), values, "seed {seed}");
        }
        // Sizes share their beginnings.
        assert_eq!(standard_normal(7, 100)[..4], pinned[1].1);
    }

    #[test]
    fn noise_is_standard_normal_and_seeds_differ() {
        let count = 100_000;
        let (noise, other) = (standard_normal(1, count), standard_normal(2, count));
        let mean_product =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>() / count as f64;
        let mean = noise.iter().copied().map(f64::from).sum::<f64>() / count as f64;
        // Four standard errors.
        assert!(mean.abs() < 4.0 / (count as f64).sqrt(), "{mean}");
        assert!((mean_product(&noise, &noise) - 1.0).abs() < 0.018);
        assert!(mean_product(&noise, &other).abs() < 0.0127);
        let beyond = noise.iter().filter(|value| value.abs() > 1.959_964).count() as f64 / count as f64;
        assert!((beyond - 0.05).abs() < 0.003, "{beyond}");
    }
}
