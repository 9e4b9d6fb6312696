//! The ledger that models are built from.
//!
//! Loading *is* construction: a layer asks for its weights by name and shape while it is built. [`Weights::get`]
//! never fails: what is missing or misshapen is written down and stands in as zeros, so that one error at
//! [`Weights::finish`] lists every mistake of a checkpoint at once instead of the first. A model is used only after
//! `finish` said yes.
//!
//! The ledger also computes the weights digest while each tensor passes through: blake3 over canonical name, dtype,
//! shape and bytes, sorted by name. The dtype is the one computed in, so that layouts which store equal values
//! differently (Emu2 is published as float32 and as bfloat16) agree, and stages that compute differently do not.
//!
//! A model of two tensors is loaded, and a model that does not fit the same file is told everything that is wrong:
//!
//! ```
//! use emu2_nn::checkpoint::{CheckpointError, ModelDir, Part};
//! use safetensors::{Dtype, tensor::TensorView};
//! use tch::{Device, Kind, Tensor};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let folder = tempfile::tempdir()?;
//! std::fs::write(folder.path().join("config.json"), "{}")?;
//! let values = [1.0_f32, -2.0, 0.5].map(f32::to_le_bytes).concat();
//! let tensor = || TensorView::new(Dtype::F32, vec![3], &values);
//! let tensors = [("visual.norm.weight", tensor()?), ("visual.norm.bias", tensor()?)];
//! safetensors::serialize_to_file(tensors, None, &folder.path().join("model.safetensors"))?;
//! let dir = ModelDir::open(folder.path())?;
//!
//! let w = dir.weights(Part::Visual, Device::Cpu, Kind::Float);
//! let weight = w.at("norm").get("weight", &[3]);
//! let bias = w.at("norm").get("bias", &[3]);
//! let digest = w.finish()?;
//! assert_eq!(Vec::<f32>::try_from(&(weight + bias))?, [2.0, -4.0, 1.0]);
//! assert_eq!(digest.len(), 64);
//!
//! let w = dir.weights(Part::Visual, Device::Cpu, Kind::Float);
//! let zeros = w.at("norm").get("weight", &[4]);
//! assert_eq!(zeros, Tensor::zeros([4], (Kind::Float, Device::Cpu)));
//! let Err(CheckpointError::Mismatch { problems, .. }) = w.finish() else { panic!("it does not fit") };
//! assert!(problems.contains(&"`norm.weight` must be [4], is [3]".to_owned()));
//! assert!(problems.contains(&"`norm.bias` is not used".to_owned()));
//! # Ok(())
//! # }
//! ```

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    rc::Rc,
    time::Instant,
};

use safetensors::Dtype;
use tch::{Device, Kind, Tensor, nn::VarStore};

use crate::checkpoint::{CheckpointError, Entry, Files, ModelDir, Part, Reading, Source};

/// A place in a part's tree of names, such as `blocks.3.attn`, from which a layer loads its tensors. Clones and deeper
/// places share one ledger.
#[derive(Clone, Debug)]
pub struct Weights {
    ledger: Rc<Ledger>,
    prefix: String,
    device: Device,
    variables: Option<Rc<VarStore>>,
}

#[derive(Debug)]
struct Ledger {
    dir: Rc<ModelDir>,
    part: Part,
    kind: Kind,
    /// Hash of each tensor handed out, by canonical name.
    used: RefCell<BTreeMap<String, blake3::Hash>>,
    skipped: RefCell<BTreeSet<String>>,
    problems: RefCell<Vec<String>>,
    /// Why nothing is read at all, if so.
    refused: RefCell<Option<CheckpointError>>,
    /// How many bytes have been handed out.
    loaded: Cell<u64>,
    started: Instant,
}

impl ModelDir {
    /// Returns the ledger that a part is built from on a device, computing in `kind`; see [`Weights`].
    pub fn weights(self: &Rc<Self>, part: Part, device: Device, kind: Kind) -> Weights {
        Weights::new(self.clone(), part, device, kind)
    }

    /// Returns the ledger of [`Self::weights`], with which every tensor is registered in `variables` under its native
    /// name: what is built can be trained, and what is saved is a native checkpoint.
    pub fn trainable(self: &Rc<Self>, part: Part, variables: &Rc<VarStore>, kind: Kind) -> Weights {
        self.weights(part, variables.device(), kind).registered_in(variables.clone())
    }
}

impl Weights {
    fn new(dir: Rc<ModelDir>, part: Part, device: Device, kind: Kind) -> Self {
        // On CUDA a part may be spread over several devices: only `ModelDir::prepare` knows them.
        let kept = dir.reading() == Reading::Values;
        let unchecked = dir.expect(part, kind) && device == Device::Cpu && kept;
        let refused = unchecked.then(|| dir.check_room(&[(device, dir.bytes(part, kind))]).err()).flatten();
        let ledger = Ledger {
            dir,
            part,
            kind,
            used: RefCell::default(),
            skipped: RefCell::default(),
            problems: RefCell::default(),
            refused: RefCell::new(refused),
            loaded: Cell::new(0),
            started: Instant::now(),
        };
        Self { ledger: Rc::new(ledger), prefix: String::new(), device, variables: None }
    }

    /// Returns the same place with its tensors as trainable variables.
    fn registered_in(self, variables: Rc<VarStore>) -> Self {
        Self { variables: Some(variables), ..self }
    }

    /// Returns the place one level down, at a name or an index.
    pub fn at(&self, name: impl Display) -> Self {
        Self { prefix: self.path(name) + ".", ..self.clone() }
    }

    /// Returns the same place with its tensors loaded to another device.
    pub fn on(&self, device: Device) -> Self {
        Self { device, ..self.clone() }
    }

    /// Returns the device that tensors of this place are loaded to.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Returns the kind that the part computes in, which its tensors are converted to.
    pub fn kind(&self) -> Kind {
        self.ledger.kind
    }

    /// Loads the tensor of this name and shape to this place's device, in the kind that the part computes in.
    ///
    /// It never fails: a tensor that is missing, misshapen, of a dtype that is not served or asked for twice is written
    /// down for [`Self::finish`], and zeros of the shape stand in for it.
    pub fn get(&self, name: &str, shape: &[i64]) -> Tensor {
        let name = self.path(name);
        match self.ledger.fetch(&name, shape, self.device) {
            Ok(tensor) => self.register(&name, tensor),
            Err(problem) => {
                self.ledger.problems.borrow_mut().extend(problem);
                self.ledger.stand_in(shape, self.device)
            }
        }
    }

    /// Declares the names under `name` known and not loaded, such as the VAE's encoder in serving.
    pub fn skip(&self, name: &str) {
        self.ledger.skipped.borrow_mut().insert(self.path(name) + ".");
    }

    /// Ends the loading of the part: returns its weights digest, 64 hexadecimal digits.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Mismatch`] with every mistake at once: missing and unused names, wrong shapes and dtypes.
    /// [`CheckpointError::NoRoom`] if the part was not prepared and the CPU has less memory free than it takes; nothing
    /// was read then.
    pub fn finish(self) -> Result<String, CheckpointError> {
        let ledger = &self.ledger;
        if let Some(refused) = ledger.refused.take() {
            return Err(refused);
        }
        let (used, skipped) = (ledger.used.borrow(), ledger.skipped.borrow());
        let is_skipped = |name: &str| skipped.iter().any(|prefix| name.starts_with(prefix.as_str()));
        let mut problems = ledger.problems.borrow().clone();
        let unused =
            ledger.dir.names(ledger.part).filter(|name| !used.contains_key(*name) && !is_skipped(name));
        problems.extend(unused.map(|name| format!("`{name}` is not used")));
        problems.extend(ledger.dir.unknown().iter().map(|name| format!("`{name}` is not a name of Emu2")));
        if !problems.is_empty() {
            return Err(CheckpointError::Mismatch { path: ledger.dir.path().to_owned(), problems });
        }
        let mut digest = blake3::Hasher::new();
        for hash in used.values() {
            digest.update(hash.as_bytes());
        }
        ledger.tell(used.len());
        Ok(digest.finalize().to_hex().to_string())
    }

    /// Registers a tensor under its native name, so that a file of all variables is a native checkpoint.
    fn register(&self, name: &str, tensor: Tensor) -> Tensor {
        let Some(variables) = &self.variables else { return tensor };
        let name = self.ledger.part.native_name(name);
        let (place, last) = name.rsplit_once('.').unwrap_or(("", &name));
        let steps = place.split('.').filter(|step| !step.is_empty());
        steps.fold(variables.root(), |place, step| place / step).add(last, tensor, true)
    }

    fn path(&self, name: impl Display) -> String {
        format!("{}{name}", self.prefix)
    }
}

/// Combines the digests of parts that make up one stage, in this order, into one of 64 hexadecimal digits.
pub fn combined_digest(parts: &[&str]) -> String {
    let mut digest = blake3::Hasher::new();
    for part in parts {
        digest.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    digest.finalize().to_hex().to_string()
}

impl Ledger {
    /// Reads a tensor and records its hash; an error without a text is a problem that is known already.
    fn fetch(&self, name: &str, shape: &[i64], device: Device) -> Result<Tensor, Option<String>> {
        if self.refused.borrow().is_some() {
            return Err(None);
        }
        let (tensor, hash) = match self.dir.source() {
            Source::Files(files) => self.read(files, name, shape, device)?,
            Source::Random(random) => {
                let tensor = match self.dir.reading() {
                    Reading::Values => random.tensor(self.part, name, shape, self.kind, device),
                    Reading::Digest | Reading::Names => self.stand_in(shape, device),
                };
                (tensor, self.hash(name, shape, random.identity(device).as_bytes()))
            }
        };
        if self.used.borrow_mut().insert(name.to_owned(), hash).is_some() {
            return Err(Some(format!("`{name}` is used twice")));
        }
        let bytes = (tensor.numel() * self.kind.elt_size_in_bytes()) as u64;
        self.loaded.set(self.loaded.get() + bytes);
        self.dir.progress().advance(bytes);
        Ok(tensor)
    }

    fn read(
        &self,
        files: &Files,
        name: &str,
        shape: &[i64],
        device: Device,
    ) -> Result<(Tensor, blake3::Hash), String> {
        let entry = self.dir.entry(self.part, name).ok_or_else(|| format!("`{name}` is missing"))?;
        if entry.shape != shape {
            return Err(format!("`{name}` must be {shape:?}, is {:?}", entry.shape));
        }
        let stored = kind_of(entry.dtype)
            .ok_or_else(|| format!("`{name}` must be F32, BF16 or F16, is {:?}", entry.dtype))?;
        if self.dir.reading() == Reading::Names {
            return Ok((self.stand_in(shape, device), self.hash(name, shape, &[])));
        }
        Ok(files.read(entry, |bytes| {
            let mapped = over(bytes, entry, stored);
            // Converted on the CPU, so that the device receives the narrow form and the hash sees what it computes
            // with.
            let mut converted = mapped.to_kind(self.kind);
            if self.dir.reading() == Reading::Digest {
                let hash = self.hash(name, shape, values(&converted));
                return (self.stand_in(shape, device), hash);
            }
            // A conversion to the stored kind is a view of the mapping, which another device copies from and the CPU
            // must not keep.
            if device == Device::Cpu && converted.data_ptr() == mapped.data_ptr() {
                converted = converted.copy();
            }
            let hash = self.hash(name, shape, values(&converted));
            (converted.to_device(device), hash)
        }))
    }

    /// Makes zeros that take no memory, an expanded scalar: what is not there must not allocate gigabytes.
    fn stand_in(&self, shape: &[i64], device: Device) -> Tensor {
        Tensor::zeros([1], (self.kind, device)).expand(shape, false)
    }

    fn hash(&self, name: &str, shape: &[i64], values: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for field in [name.as_bytes(), format!("{:?}", self.kind).as_bytes()] {
            hasher.update(&(field.len() as u64).to_le_bytes()).update(field);
        }
        hasher.update(&(shape.len() as u64).to_le_bytes());
        for side in shape {
            hasher.update(&side.to_le_bytes());
        }
        hasher.update(values).finalize()
    }

    /// Logs that all of the part that serving needs is in; what it skips counts as done.
    fn tell(&self, tensors: usize) {
        let bytes = self.loaded.get();
        self.dir.progress().advance(self.dir.bytes(self.part, self.kind).saturating_sub(bytes));
        let seconds = self.started.elapsed().as_secs_f64();
        tracing::info!(part = %self.part, tensors, bytes, seconds, "weights loaded");
    }
}

/// Whether two tensors have the same values in `kind`, to the bit, as their hashes would say.
pub(crate) fn same_values(files: &Files, entry: &Entry, others: &Files, other: &Entry, kind: Kind) -> bool {
    let (Some(stored), Some(other_stored)) = (kind_of(entry.dtype), kind_of(other.dtype)) else {
        return false;
    };
    files.read(entry, |bytes| {
        others.read(other, |other_bytes| {
            (stored == other_stored && bytes == other_bytes) || {
                let converted = over(bytes, entry, stored).to_kind(kind);
                let other_converted = over(other_bytes, other, other_stored).to_kind(kind);
                values(&converted) == values(&other_converted)
            }
        })
    })
}

/// A tensor over the mapped bytes; valid as long as they are.
fn over(bytes: &[u8], entry: &Entry, stored: Kind) -> Tensor {
    let aligned = (bytes.as_ptr() as usize).is_multiple_of(stored.elt_size_in_bytes());
    if bytes.is_empty() || !aligned {
        return Tensor::from_data_size(bytes, &entry.shape, stored);
    }
    let strides: Vec<i64> = (0..entry.shape.len()).map(|i| entry.shape[i + 1..].iter().product()).collect();
    // SAFETY: the callers read it while the bytes are borrowed, and keep no view of it.
    unsafe { Tensor::from_blob(bytes.as_ptr(), &entry.shape, &strides, stored, Device::Cpu) }
}

/// Returns the bytes of a contiguous CPU tensor.
fn values(tensor: &Tensor) -> &[u8] {
    let length = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if length == 0 {
        return &[];
    }
    // SAFETY: its storage is at least this long, and is not written while the tensor is borrowed.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr() as *const u8, length) }
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::BF16 => Some(Kind::BFloat16),
        Dtype::F16 => Some(Kind::Half),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, path::Path};

    use safetensors::tensor::TensorView;

    use super::*;
    use crate::checkpoint::Progress;

    fn write(path: &Path, tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) {
        let views: HashMap<_, _> = tensors
            .iter()
            .map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap()))
            .collect();
        safetensors::serialize_to_file(&views, None, path).unwrap();
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn bf16s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect()
    }

    fn folder(tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        write(&folder.path().join("model.safetensors"), tensors);
        folder
    }

    fn open(folder: &tempfile::TempDir) -> Weights {
        ModelDir::open(folder.path()).unwrap().weights(Part::Visual, Device::Cpu, Kind::Float)
    }

    #[test]
    fn every_mistake_is_listed_at_once() {
        let folder = folder(&[
            ("visual.a.weight", Dtype::F32, &[2], f32s(&[1.0, 2.0])),
            ("visual.b.weight", Dtype::I64, &[1], vec![0; 8]),
            ("visual.left_over", Dtype::F32, &[1], f32s(&[0.0])),
            ("stranger", Dtype::F32, &[1], f32s(&[0.0])),
            ("decoder.lm.model.layers.0.self_attn.rotary_emb.inv_freq", Dtype::F32, &[1], f32s(&[0.0])),
            ("safety_checker.x", Dtype::F32, &[1], f32s(&[0.0])),
        ]);
        let w = open(&folder);
        assert_eq!(w.at("a").get("weight", &[3]).size(), [3]);
        let _ = w.at("b").get("weight", &[1]);
        let _ = w.at("missing").at(7).get("weight", &[1 << 20, 1 << 20]);
        let CheckpointError::Mismatch { problems, .. } = w.finish().unwrap_err() else {
            panic!("another error")
        };
        let text = problems.join("\n");
        for problem in [
            "`a.weight` must be [3], is [2]",
            "`b.weight` must be F32, BF16 or F16, is I64",
            "`missing.7.weight` is missing",
            "`left_over` is not used",
            "`stranger` is not a name of Emu2",
        ] {
            assert!(text.contains(problem), "{problem} not in:\n{text}");
        }
        assert!(!text.contains("inv_freq") && !text.contains("safety_checker"), "{text}");
    }

    #[test]
    fn equal_values_have_equal_digests_whatever_the_layout() {
        let digest = |folder: &tempfile::TempDir, names: [&str; 2]| {
            let w = open(folder);
            let values = names.map(|name| w.get(name, &[2]));
            (values[0].sum(Kind::Float).double_value(&[]), w.finish().unwrap())
        };
        let wide = folder(&[
            ("visual.x", Dtype::F32, &[2], f32s(&[1.5, -2.0])),
            ("visual.y", Dtype::F32, &[2], f32s(&[3.0, 0.25])),
        ]);
        let narrow = folder(&[
            ("multimodal_encoder.visual.y", Dtype::BF16, &[2], bf16s(&[3.0, 0.25])),
            ("multimodal_encoder.visual.x", Dtype::BF16, &[2], bf16s(&[1.5, -2.0])),
        ]);
        let other = folder(&[
            ("visual.x", Dtype::F32, &[2], f32s(&[1.5, -2.0])),
            ("visual.y", Dtype::F32, &[2], f32s(&[3.0, 0.5])),
        ]);
        let (sum, expected) = digest(&wide, ["x", "y"]);
        assert_eq!(sum, -0.5);
        assert_eq!(digest(&narrow, ["y", "x"]).1, expected);
        assert_ne!(digest(&other, ["x", "y"]).1, expected);
    }

    #[test]
    fn names_and_digests_take_no_values() {
        let folder = folder(&[("visual.x", Dtype::BF16, &[2], bf16s(&[1.5, -2.0]))]);
        let built = |reading, shape: &[i64]| {
            let dir = ModelDir::open_for(folder.path(), reading, Progress::default()).unwrap();
            let w = dir.weights(Part::Visual, Device::Cpu, Kind::Float);
            let sum = w.get("x", shape).sum(Kind::Float).double_value(&[]);
            (sum, w.finish().map_err(|error| error.to_string()))
        };
        let (sum, digest) = built(Reading::Values, &[2]);
        assert_eq!((sum, digest.is_ok()), (-0.5, true));
        assert_eq!(built(Reading::Digest, &[2]), (0.0, digest));
        assert!(built(Reading::Names, &[2]).1.is_ok());
        for reading in [Reading::Values, Reading::Digest, Reading::Names] {
            let error = built(reading, &[3]).1.unwrap_err();
            assert!(error.contains("`x` must be [3], is [2]"), "{error}");
        }
    }

    #[test]
    fn skipped_names_are_not_left_over() {
        let folder = folder(&[
            ("visual.kept", Dtype::F32, &[1], f32s(&[1.0])),
            ("visual.encoder.a", Dtype::F32, &[1], f32s(&[1.0])),
            ("visual.encoder_too", Dtype::F32, &[1], f32s(&[1.0])),
        ]);
        let w = open(&folder);
        let _ = w.get("kept", &[1]);
        w.skip("encoder");
        let error = w.finish().unwrap_err().to_string();
        assert!(error.contains("`encoder_too` is not used") && !error.contains("encoder.a"), "{error}");
    }

    #[test]
    fn bad_files_are_refused_before_anything_is_allocated() {
        let folder = folder(&[("visual.a", Dtype::F32, &[1], f32s(&[1.0]))]);
        let path = folder.path().join("model.safetensors");
        let whole = std::fs::read(&path).unwrap();
        let mut huge = whole.clone();
        huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        let mut long = whole.clone();
        long.push(0);
        for bytes in [&whole[..whole.len() - 1], &whole[..4], &huge, &long, b""] {
            std::fs::write(&path, bytes).unwrap();
            let error = ModelDir::open(folder.path()).unwrap_err();
            assert!(matches!(error, CheckpointError::Weights { .. }), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(ModelDir::open(folder.path()), Err(CheckpointError::NoWeights(_))));
        std::fs::write(folder.path().join("config.json"), "[]").unwrap();
        assert!(matches!(ModelDir::open(folder.path()), Err(CheckpointError::Config { .. })));
    }

    #[test]
    fn a_name_in_two_files_is_refused() {
        let folder = folder(&[("visual.a", Dtype::F32, &[1], f32s(&[1.0]))]);
        write(&folder.path().join("second.safetensors"), &[("visual.a", Dtype::F32, &[1], f32s(&[1.0]))]);
        assert!(matches!(ModelDir::open(folder.path()), Err(CheckpointError::Duplicate { .. })));
    }
}
