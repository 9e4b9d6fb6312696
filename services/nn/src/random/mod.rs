//! Weights out of a seed, in place of a folder: full sizes without the files, for sizing and for measuring time.
//!
//! `random:NAME[,seed=N][,tokenizer=PATH]`, where a model folder is named. Each tensor is made on its device when it
//! is asked for, out of the seed, its part and its name, and is never written anywhere. The same seed gives the same
//! values on the same type of device; its digest says so.

use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use crate::checkpoint::Part;

mod sizes;
mod tokenizer;

/// What the name of a model with random weights begins with.
pub(crate) const PREFIX: &str = "random:";
/// Standard deviation of all weights but the scales of norms: what LLaMA is initialised with.
const DEVIATION: f64 = 0.02;

/// What the text after the prefix asks for.
#[derive(Debug)]
pub(crate) struct Spec {
    pub(crate) config: Map<String, Value>,
    pub(crate) random: Random,
    pub(crate) tokenizer: Option<PathBuf>,
}

impl Spec {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut settings = text.split(',');
        let size = sizes::find(settings.next().unwrap_or_default())?;
        let mut spec = Self {
            config: size.config,
            random: Random { seed: 0, values: Some(size.values), pieces: Some(size.pieces) },
            tokenizer: None,
        };
        for setting in settings {
            match setting.split_once('=') {
                Some(("seed", seed)) => {
                    let wrong = |_| format!("seed must be a number below 2^64, is `{seed}`");
                    spec.random.seed = seed.parse().map_err(wrong)?;
                }
                Some(("tokenizer", path)) => spec.tokenizer = Some(PathBuf::from(path)),
                _ => return Err(format!("settings are seed=N and tokenizer=PATH, got `{setting}`")),
            }
        }
        Ok(spec)
    }
}

/// The source of random weights.
#[derive(Debug)]
pub(crate) struct Random {
    seed: u64,
    /// How many values each part has that serving loads, where the size is a named one.
    values: Option<[u64; Part::ALL.len()]>,
    /// How many pieces the tokenizer has without special tokens, where the size is a named one.
    pieces: Option<usize>,
}

impl Random {
    /// Makes a source for a size that nobody has counted.
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, values: None, pieces: None }
    }

    /// Returns how many values a part has; 0 where the size is not a named one.
    pub(crate) fn values(&self, part: Part) -> u64 {
        self.values.map_or(0, |values| values[part as usize])
    }

    pub(crate) fn has_seed_of(&self, other: &Self) -> bool {
        self.seed == other.seed
    }

    pub(crate) fn tokenizer(&self) -> Option<Vec<u8>> {
        self.pieces.map(tokenizer::made_up)
    }

    /// Makes a tensor: the scales of norms are 1, all else is normal around 0.
    pub(crate) fn tensor(&self, part: Part, name: &str, shape: &[i64], kind: Kind, device: Device) -> Tensor {
        if shape.len() == 1 && name.ends_with("weight") {
            return Tensor::ones(shape, (kind, device));
        }
        let mut tensor = Tensor::empty(shape, (kind, device));
        // torch's generators belong to the process, and engines load side by side.
        static GENERATOR: Mutex<()> = Mutex::new(());
        let _turn = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
        tch::manual_seed(self.seed_of(part, name));
        tensor.normal_(0.0, DEVIATION)
    }

    /// Returns what stands for the values in the digest.
    pub(crate) fn identity(&self, device: Device) -> String {
        let place = if device.is_cuda() { "cuda" } else { "cpu" };
        format!("random seed {} on {place}", self.seed)
    }

    fn seed_of(&self, part: Part, name: &str) -> i64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.seed.to_le_bytes()).update(part.native_name(name).as_bytes());
        let seed = hasher.finalize();
        i64::from_le_bytes(*seed.as_bytes().first_chunk().expect("a hash has 32 bytes"))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::checkpoint::{CheckpointError, Layout, ModelDir};

    /// Two tensors' sum and deviation, and the digest.
    fn loaded(model: &str, kind: Kind) -> (f64, f64, String) {
        let dir = ModelDir::open(Path::new(model)).unwrap();
        let w = dir.weights(Part::Visual, Device::Cpu, kind).at("blocks").at(0);
        let (gain, weight) = (w.get("norm1.weight", &[64]), w.get("mlp.fc1.weight", &[512, 256]));
        assert_eq!((gain.kind(), gain.double_value(&[63])), (kind, 1.0));
        let wide = weight.to_kind(Kind::Double);
        (wide.sum(Kind::Double).double_value(&[]), wide.std(false).double_value(&[]), w.finish().unwrap())
    }

    #[test]
    fn a_seed_gives_the_same_weights_every_time() {
        let first = loaded("random:emu2-37b", Kind::Float);
        assert!((0.0199..0.0201).contains(&first.1), "{}", first.1);
        assert_eq!(loaded("random:emu2-37b,seed=0", Kind::Float), first);
        let other = loaded("random:emu2-37b,seed=1", Kind::Float);
        assert!(other.0 != first.0 && other.2 != first.2);
        let narrow = loaded("random:emu2-37b", Kind::BFloat16);
        assert!((0.0195..0.0205).contains(&narrow.1), "{}", narrow.1);
        assert_ne!(narrow.2, first.2);
    }

    #[test]
    fn parts_and_names_differ() {
        let random = Random::new(7);
        let tensor = |part, name| random.tensor(part, name, &[8, 8], Kind::Float, Device::Cpu);
        let same = |one: &Tensor, other: &Tensor| one.allclose(other, 0.0, 0.0, false);
        let first = tensor(Part::Unet, "conv_in.weight");
        assert!(same(&first, &tensor(Part::Unet, "conv_in.weight")));
        assert!(!same(&first, &tensor(Part::Unet, "conv_out.weight")));
        assert!(!same(&first, &tensor(Part::Vae, "conv_in.weight")));
    }

    #[test]
    fn a_named_size_has_every_part() {
        let dir = ModelDir::open(Path::new("random:emu2-37b,tokenizer=/a/tokenizer.model")).unwrap();
        assert_eq!((dir.layout(), dir.name(), dir.instruct()), (Layout::Random, "emu2-37b", false));
        assert!(Part::ALL.iter().all(|&part| dir.has(part)));
        let bytes: u64 = [Part::Visual, Part::Llm].map(|part| dir.bytes(part, Kind::BFloat16)).iter().sum();
        assert_eq!(bytes, 2 * 36_906_513_152, "the published total");
        assert_eq!(dir.tokenizer_path(), Some(Path::new("/a/tokenizer.model")));
        let third = ModelDir::open(Path::new("random:emu2-third")).unwrap();
        assert_eq!(third.tokenizer_path(), None);
        assert!(third.bytes(Part::Llm, Kind::Float) > 14_000_000_000);
        let sizes = serde_json::json!({ "vision": {} }).as_object().unwrap().clone();
        let sized = ModelDir::random(sizes, 3);
        assert!(sized.has(Part::Visual) && !sized.has(Part::Unet));
        assert!(matches!(sized.tokenizer_bytes(), Err(CheckpointError::Tokenizer { .. })));
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for (model, problem) in [
            ("random:emu9", "sizes are emu2-37b, emu2-third, emu2-tiny, got `emu9`"),
            ("random:", "got ``"),
            ("random:emu2-tiny,seed=-1", "seed must be a number below 2^64, is `-1`"),
            ("random:emu2-tiny,sed=1", "settings are seed=N and tokenizer=PATH, got `sed=1`"),
        ] {
            let error = ModelDir::open(Path::new(model)).unwrap_err();
            assert!(matches!(error, CheckpointError::Random { .. }), "{error}");
            assert!(error.to_string().contains(problem), "{error}");
        }
    }
}
