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

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    rc::Rc,
};

use safetensors::Dtype;
use tch::{Device, Kind, Tensor};

use crate::checkpoint::{CheckpointError, Entry, ModelDir, Part};

/// A place in a part's tree of names, e.g. `blocks.3.attn`.
#[derive(Clone, Debug)]
pub struct Weights {
    ledger: Rc<Ledger>,
    prefix: String,
    device: Device,
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
}

impl Weights {
    pub(crate) fn new(dir: Rc<ModelDir>, part: Part, device: Device, kind: Kind) -> Self {
        let ledger = Ledger {
            dir,
            part,
            kind,
            used: RefCell::default(),
            skipped: RefCell::default(),
            problems: RefCell::default(),
        };
        Self { ledger: Rc::new(ledger), prefix: String::new(), device }
    }

    /// One level down: a name or an index.
    pub fn at(&self, name: impl Display) -> Self {
        Self { prefix: self.path(name) + ".", ..self.clone() }
    }

    /// The same place, loaded to another device.
    pub fn on(&self, device: Device) -> Self {
        Self { device, ..self.clone() }
    }

    pub fn device(&self) -> Device {
        self.device
    }

    pub fn kind(&self) -> Kind {
        self.ledger.kind
    }

    /// The tensor of this name on this place's device, in the kind that the part computes in. Never fails: see the
    /// module.
    pub fn get(&self, name: &str, shape: &[i64]) -> Tensor {
        let name = self.path(name);
        self.ledger.fetch(&name, shape, self.device).unwrap_or_else(|problem| {
            self.ledger.problems.borrow_mut().push(problem);
            // An expanded scalar: a misnamed layer must not allocate gigabytes of zeros.
            Tensor::zeros([1], (self.ledger.kind, self.device)).expand(shape, false)
        })
    }

    /// Names under here are known and not loaded, such as the VAE's encoder in serving.
    pub fn skip(&self, name: &str) {
        self.ledger.skipped.borrow_mut().insert(self.path(name) + ".");
    }

    /// Every mistake at once: missing names, wrong shapes, unused names. Else the weights digest, in hex.
    pub fn finish(self) -> Result<String, CheckpointError> {
        let ledger = &self.ledger;
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
        Ok(digest.finalize().to_hex().to_string())
    }

    fn path(&self, name: impl Display) -> String {
        format!("{}{name}", self.prefix)
    }
}

/// The digest of a stage that is built from several parts, in this order.
pub fn combined_digest(parts: &[&str]) -> String {
    let mut digest = blake3::Hasher::new();
    for part in parts {
        digest.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    digest.finalize().to_hex().to_string()
}

impl Ledger {
    fn fetch(&self, name: &str, shape: &[i64], device: Device) -> Result<Tensor, String> {
        let entry = self.dir.entry(self.part, name).ok_or_else(|| format!("`{name}` is missing"))?;
        if entry.shape != shape {
            return Err(format!("`{name}` must be {shape:?}, is {:?}", entry.shape));
        }
        let stored = kind_of(entry.dtype)
            .ok_or_else(|| format!("`{name}` must be F32, BF16 or F16, is {:?}", entry.dtype))?;
        let tensor = with_mapped(self.dir.bytes(entry), entry, stored, |mapped| {
            // Converted on the CPU, so that the device receives the narrow form and the hash sees what it computes with.
            mapped.to_kind(self.kind)
        });
        let hash = self.hash(name, shape, &tensor);
        if self.used.borrow_mut().insert(name.to_owned(), hash).is_some() {
            return Err(format!("`{name}` is used twice"));
        }
        Ok(tensor.to_device(device))
    }

    fn hash(&self, name: &str, shape: &[i64], tensor: &Tensor) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for field in [name.as_bytes(), format!("{:?}", self.kind).as_bytes()] {
            hasher.update(&(field.len() as u64).to_le_bytes()).update(field);
        }
        hasher.update(&(shape.len() as u64).to_le_bytes());
        for side in shape {
            hasher.update(&side.to_le_bytes());
        }
        // SAFETY: a contiguous CPU tensor just made, alive for the call; its storage is at least this long.
        let bytes = unsafe {
            let length = tensor.numel() * tensor.kind().elt_size_in_bytes();
            std::slice::from_raw_parts(tensor.data_ptr() as *const u8, length)
        };
        hasher.update(bytes).finalize()
    }
}

/// Hands `convert` a tensor over the mapped bytes and returns a tensor that owns its storage.
fn with_mapped(bytes: &[u8], entry: &Entry, stored: Kind, convert: impl Fn(&Tensor) -> Tensor) -> Tensor {
    let aligned = (bytes.as_ptr() as usize).is_multiple_of(stored.elt_size_in_bytes());
    if bytes.is_empty() || !aligned {
        return convert(&Tensor::from_data_size(bytes, &entry.shape, stored));
    }
    let strides: Vec<i64> = (0..entry.shape.len()).map(|i| entry.shape[i + 1..].iter().product()).collect();
    // SAFETY: the bytes outlive `mapped`, which is only read here and copied before this returns.
    let mapped = unsafe { Tensor::from_blob(bytes.as_ptr(), &entry.shape, &strides, stored, Device::Cpu) };
    let converted = convert(&mapped);
    // A conversion to the stored kind is a view of the mapping.
    if converted.data_ptr() == mapped.data_ptr() { converted.copy() } else { converted }
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
