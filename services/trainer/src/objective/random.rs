//! The random numbers of a step: each use has a stream of its own, seeded from the stage's seed and the step's number.

use emu2_decoder::noise::standard_normal;
use rand::SeedableRng;
use rand_chacha::ChaCha12Rng;
use tch::{Device, Tensor};

/// What random numbers of a step are for. The discriminant goes into the seed, so a number that is changed or used
/// again breaks the repetition of runs that are resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum RandomStream {
    /// The task of a batch of documents.
    Task = 0,
    /// The sample of the latents' distribution that the autoencoder decodes.
    AutoencoderLatents = 1,
    /// The sample of the latents' distribution that the UNet denoises.
    DiffusionLatents = 2,
    /// The noise that is added to those latents.
    DiffusionNoise = 3,
    /// The timesteps of that noise, then which embeddings are dropped.
    TimestepsAndDropout = 4,
    /// The part of the noise that is one value for a whole channel.
    NoiseOffset = 5,
    /// What a step is conditioned on: the form of teacher forcing, or whose embeddings the UNet is given.
    Conditioning = 6,
}

impl RandomStream {
    /// Returns this stream's seed in a step of a stage.
    pub(crate) fn seed(self, stage_seed: u64, step: u64) -> u64 {
        let mut hasher = blake3::Hasher::new();
        [stage_seed, step, self as u64].iter().for_each(|value| {
            hasher.update(&value.to_le_bytes());
        });
        u64::from_le_bytes(*hasher.finalize().as_bytes().first_chunk().expect("a hash has 32 bytes"))
    }

    /// Returns this stream's generator in a step of a stage.
    pub(crate) fn generator(self, stage_seed: u64, step: u64) -> ChaCha12Rng {
        ChaCha12Rng::seed_from_u64(self.seed(stage_seed, step))
    }

    /// Returns standard normal values of this stream: `shape`, float32.
    pub(crate) fn normal(self, shape: &[i64], (stage_seed, step): (u64, u64), device: Device) -> Tensor {
        let count = shape.iter().product::<i64>() as usize;
        let values = standard_normal(self.seed(stage_seed, step), count);
        Tensor::from_slice(&values).view(shape).to_device(device)
    }
}

/// Returns the number of sample `index` of a step's batch: no two steps of a stage share a sample.
pub(crate) fn sample_number(step: u64, batch: usize, index: usize) -> u64 {
    step * batch as u64 + index as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seeds of runs that exist: with others, a run would not go on as it began. BLAKE3 of three numbers,
    /// computed outside of this crate.
    const SEEDS: [u64; 7] = [
        356_704_318_864_765_382,
        3_424_498_219_080_652_094,
        13_800_927_311_949_701_276,
        7_859_742_856_287_449_175,
        1_289_903_517_033_787_496,
        5_789_126_143_179_837_617,
        15_565_192_013_896_674_860,
    ];

    #[test]
    fn seeds_stay_what_they_are() {
        use RandomStream::*;
        let streams = [
            Task,
            AutoencoderLatents,
            DiffusionLatents,
            DiffusionNoise,
            TimestepsAndDropout,
            NoiseOffset,
            Conditioning,
        ];
        let seeds = streams.map(|stream| stream.seed(1400, 11_899));
        assert_eq!(seeds, SEEDS);
    }
}
