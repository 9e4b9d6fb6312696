//! Numbers that the official model gives on tiny random weights: what "the same model" means, for parity tests.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use tch::{Kind, Tensor};

mod bench;
mod layouts;
pub mod torch_save;

pub use bench::{Bench, Tolerance};
pub use layouts::{diffusers, hugging_face, pickled, with_visual_of};

/// Tensors of one golden file by name.
#[derive(Debug)]
pub struct Golden {
    file: String,
    tensors: HashMap<String, Tensor>,
}

impl Golden {
    /// # Panics
    /// When the file has no such tensor.
    pub fn tensor(&self, name: &str) -> Tensor {
        let tensor = self.tensors.get(name).unwrap_or_else(|| panic!("{} has no tensor {name}", self.file));
        tensor.shallow_clone()
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }
}

/// A golden file of tensors, e.g. `vision.safetensors`.
pub fn file(name: &str) -> Golden {
    read(&root().join(name))
}

/// A golden file of tensors at any path.
pub fn read(path: &Path) -> Golden {
    let tensors =
        Tensor::read_safetensors(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Golden { file: path.display().to_string(), tensors: tensors.into_iter().collect() }
}

/// A golden JSON file, e.g. `generate.json`.
pub fn json(name: &str) -> serde_json::Value {
    let path = root().join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A tiny model folder: `emu2-base`, `emu2-chat` or `emu2-gen`.
pub fn model_dir(name: &str) -> PathBuf {
    root().join("models").join(name)
}

/// The tokenizer.model of a tiny model.
pub fn tokenizer(model: &str) -> Vec<u8> {
    let path = model_dir(model).join("tokenizer.model");
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A file of the full golden set, which is beside the project on some machines and is not committed.
/// A test that needs it says that it was skipped when this is `None`.
pub fn shared(name: &str) -> Option<PathBuf> {
    let path = manifest().join("../../../shared/golden-a").join(name);
    path.exists().then_some(path)
}

/// # Panics
/// When shapes differ, or any element by more than `tolerance`.
pub fn assert_close(name: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.size(), want.size(), "{name}: shape");
    let difference = (got.to_kind(Kind::Double) - want.to_kind(Kind::Double)).abs();
    let worst = difference.max().double_value(&[]);
    // NaN fails too.
    assert!(worst <= tolerance, "{name}: differs by {worst:e}, tolerance {tolerance:e}");
}

/// The manifest's tolerance of one forward in float32: 2e-5 × max(1, max |value|).
pub fn forward_tolerance(want: &Tensor) -> f64 {
    2e-5 * want.to_kind(Kind::Double).abs().max().double_value(&[]).max(1.0)
}

fn root() -> PathBuf {
    manifest().join("../../tests/fixtures/golden-a")
}

fn manifest() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
