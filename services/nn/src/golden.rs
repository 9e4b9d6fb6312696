//! Numbers that the official model gives on tiny random weights: what "the same model" means, for parity tests.
//!
//! The files are those of `tests/fixtures/golden-a`. All of this is for tests, so what is missing or broken panics.

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

/// The tensors of one golden file by name.
#[derive(Debug)]
pub struct Golden {
    file: String,
    tensors: HashMap<String, Tensor>,
}

impl Golden {
    /// Returns the tensor of this name, in the shape and kind that the file has it in.
    ///
    /// # Panics
    ///
    /// The file has no such tensor.
    pub fn tensor(&self, name: &str) -> Tensor {
        let tensor = self.tensors.get(name).unwrap_or_else(|| panic!("{} has no tensor {name}", self.file));
        tensor.shallow_clone()
    }

    /// Whether the file has a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Returns the names of all tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }
}

/// Reads a golden file of tensors by its name in the golden set, such as `vision.safetensors`.
///
/// # Panics
///
/// The file cannot be read.
pub fn file(name: &str) -> Golden {
    read(&root().join(name))
}

/// Reads a safetensors file of golden tensors at any path.
///
/// # Panics
///
/// The file cannot be read.
pub fn read(path: &Path) -> Golden {
    let tensors =
        Tensor::read_safetensors(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Golden { file: path.display().to_string(), tensors: tensors.into_iter().collect() }
}

/// Reads a golden JSON file by its name in the golden set, such as `generate.json`.
///
/// # Panics
///
/// The file cannot be read or is not JSON.
pub fn json(name: &str) -> serde_json::Value {
    let path = root().join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Returns the folder of a tiny golden model: `emu2-base`, `emu2-chat` or `emu2-gen`.
pub fn model_dir(name: &str) -> PathBuf {
    root().join("models").join(name)
}

/// Reads the tokenizer.model of a tiny golden model.
///
/// # Panics
///
/// The file cannot be read.
pub fn tokenizer(model: &str) -> Vec<u8> {
    let path = model_dir(model).join("tokenizer.model");
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Returns the path of a file of the full golden set, which is beside the project on some machines and is not
/// committed. A test that needs it says that it was skipped when this is `None`.
pub fn shared(name: &str) -> Option<PathBuf> {
    let path = manifest().join("../../../shared/golden-a").join(name);
    path.exists().then_some(path)
}

/// Asserts that `got` has the shape of `want` and differs from it by at most `tolerance` in every element; `name` is
/// for the message.
///
/// # Panics
///
/// The shapes differ, or an element differs by more than `tolerance` or is NaN.
pub fn assert_close(name: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.size(), want.size(), "{name}: shape");
    let difference = (got.to_kind(Kind::Double) - want.to_kind(Kind::Double)).abs();
    let worst = difference.max().double_value(&[]);
    // NaN fails too.
    assert!(worst <= tolerance, "{name}: differs by {worst:e}, tolerance {tolerance:e}");
}

/// Returns the tolerance that the golden set states for one forward in float32: 2e-5 × max(1, max |want|).
pub fn forward_tolerance(want: &Tensor) -> f64 {
    2e-5 * want.to_kind(Kind::Double).abs().max().double_value(&[]).max(1.0)
}

fn root() -> PathBuf {
    manifest().join("../../tests/fixtures/golden-a")
}

fn manifest() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
