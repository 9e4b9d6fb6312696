//! A file of weights, pickled or safetensors, as tensors that are read piece by piece.

use std::{
    collections::BTreeMap,
    ops::Range,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use safetensors::{Dtype, tensor::Metadata};

use super::{
    archive::{Archive, Entry},
    file::Readable,
    pickle::{self, StoredTensor},
};

/// Bytes that are read at once; a multiple of every dtype's width.
const PIECE_BYTES: usize = 4 << 20;
/// Bytes that the header of a safetensors file may have.
const MAX_HEADER_BYTES: u64 = 64 << 20;
/// Bytes that a view which is not contiguous may have, because it is gathered in memory; Emu2's checkpoints have no such
/// view, and their largest tensor has 860 MB.
const MAX_GATHERED_BYTES: u64 = 4 << 30;

/// A file of weights whose tensors are known, but not read.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) path: PathBuf,
    file: Readable,
    /// The tensors of the file by name.
    pub(super) tensors: BTreeMap<String, Tensor>,
}

/// A tensor of a file, and where its values lie.
#[derive(Debug)]
pub(super) struct Tensor {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// The bytes of the file that hold its values; those of a view may hold others between them.
    range: Range<u64>,
    /// Strides in values; none for a contiguous tensor.
    strides: Option<Vec<usize>>,
    /// The CRC-32 of the range, where the file has one for exactly this range.
    crc: Option<u32>,
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let open = || -> Result<Self> {
            let file = Readable::open(path)?;
            let is_safetensors = path.extension().is_some_and(|extension| extension == "safetensors");
            let tensors = if is_safetensors { safetensors(&file)? } else { pickled(&file)? };
            Ok(Self { path: path.to_owned(), file, tensors })
        };
        open().with_context(|| path.display().to_string())
    }

    /// Reads the values of a tensor in row-major order; `take` receives them piece by piece, in the tensor's dtype.
    pub(super) fn read(&self, tensor: &Tensor, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let Some(strides) = &tensor.strides else { return self.read_contiguous(tensor, take) };
        let bytes = self.file.read(tensor.range.clone(), MAX_GATHERED_BYTES)?;
        let width = width(tensor.dtype).expect("it was checked when the file was opened");
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        let mut index = vec![0; tensor.shape.len()];
        let mut at = 0;
        for _ in 0..tensor.shape.iter().product() {
            piece.extend_from_slice(&bytes[at * width..][..width]);
            if piece.len() == PIECE_BYTES {
                take(&piece)?;
                piece.clear();
            }
            for dimension in (0..index.len()).rev() {
                index[dimension] += 1;
                at += strides[dimension];
                if index[dimension] < tensor.shape[dimension] {
                    break;
                }
                at -= strides[dimension] * index[dimension];
                index[dimension] = 0;
            }
        }
        take(&piece)
    }

    fn read_contiguous(&self, tensor: &Tensor, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let Range { mut start, end } = tensor.range;
        let mut piece = vec![0; PIECE_BYTES.min((end - start) as usize)];
        let mut crc = crc32fast::Hasher::new();
        while start < end {
            let length = PIECE_BYTES.min((end - start) as usize);
            let piece = &mut piece[..length];
            self.file.fill(start, piece)?;
            if tensor.crc.is_some() {
                crc.update(piece);
            }
            take(piece)?;
            start += length as u64;
        }
        let sound = tensor.crc.is_none_or(|expected| crc.finalize() == expected);
        ensure!(sound, "its bytes do not have the checksum that they were saved with: the file is damaged");
        Ok(())
    }
}

impl Tensor {
    pub(super) fn values(&self) -> u64 {
        self.shape.iter().map(|&side| side as u64).product()
    }
}

/// Returns the bytes of one value; none for a dtype that no published checkpoint holds.
pub(super) fn width(dtype: Dtype) -> Option<usize> {
    Some(match dtype {
        Dtype::F64 | Dtype::I64 => 8,
        Dtype::F32 | Dtype::I32 => 4,
        Dtype::F16 | Dtype::BF16 | Dtype::I16 => 2,
        Dtype::I8 | Dtype::U8 | Dtype::BOOL => 1,
        _ => return None,
    })
}

fn pickled(file: &Readable) -> Result<BTreeMap<String, Tensor>> {
    let archive = Archive::open(file)?;
    let mut located = BTreeMap::new();
    let mut tensors = BTreeMap::new();
    for (name, stored) in pickle::read(&archive.pickle)? {
        let key = stored.storage.key;
        let entry = match located.get(key) {
            Some(entry) => entry,
            None => located.entry(key).or_insert(archive.storage(file, key)?),
        };
        tensors.insert(name.to_owned(), in_storage(&stored, entry).with_context(|| format!("`{name}`"))?);
    }
    Ok(tensors)
}

/// Locates a tensor in its storage, after checking everything that the pickle claims of both.
fn in_storage(stored: &StoredTensor<'_>, entry: &Entry) -> Result<Tensor> {
    const OUTSIDE: &str = "does not lie in its storage";
    let StoredTensor { storage, offset, shape, strides } = stored;
    let width = width(storage.dtype).expect("every storage class has a known dtype") as u64;
    let held = entry.range.end - entry.range.start;
    ensure!(
        storage.values.checked_mul(width) == Some(held),
        "storage `{}` must have {} values, has {held} bytes",
        storage.key,
        storage.values
    );
    ensure!(shape.len() == strides.len(), "{} dimensions, {} strides", shape.len(), strides.len());
    let count = shape.iter().try_fold(1_u64, |count, &side| count.checked_mul(side)).context(OUTSIDE)?;
    // More values than are stored would be a file that grows without bound when it is written out.
    ensure!(count <= storage.values, "has {count} values in a storage of {}", storage.values);
    let span = match count {
        0 => Some(0),
        _ => (shape.iter().zip(strides))
            .try_fold(1_u64, |span, (&side, &stride)| span.checked_add((side - 1).checked_mul(stride)?)),
    };
    let end = span.and_then(|span| offset.checked_add(span)).filter(|&end| end <= storage.values);
    let end = end.context(OUTSIDE)?;
    // The sides of what is empty are bounded by nothing.
    let contiguous = count == 0 || is_contiguous(shape, strides);
    let range = entry.range.start + offset * width..entry.range.start + end * width;
    // PyTorch can be told to write no checksums.
    let crc = (contiguous && range == entry.range && entry.crc != 0).then_some(entry.crc);
    let strides = strides.iter().map(|&stride| stride as usize).collect();
    Ok(Tensor {
        dtype: storage.dtype,
        shape: shape.iter().map(|&side| side as usize).collect(),
        range,
        strides: (!contiguous).then_some(strides),
        crc,
    })
}

fn is_contiguous(shape: &[u64], strides: &[u64]) -> bool {
    let mut expected = 1;
    shape.iter().zip(strides).rev().all(|(&side, &stride)| {
        let fits = side == 1 || stride == expected;
        expected *= side;
        fits
    })
}

fn safetensors(file: &Readable) -> Result<BTreeMap<String, Tensor>> {
    let length = file.exact(0, 8, 8)?.try_into().map(u64::from_le_bytes).expect("eight bytes were read");
    let header = file.exact(8, length, MAX_HEADER_BYTES)?;
    // Checks that the ranges are in order, without gaps, and fit dtypes and shapes.
    let metadata: Metadata = serde_json::from_slice(&header)?;
    let data = 8 + length;
    let expected = data.saturating_add(metadata.data_len() as u64);
    ensure!(file.bytes() == expected, "{} bytes, but its header speaks of {expected}", file.bytes());
    let tensor = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
        ensure!(width(info.dtype).is_some(), "`{name}`: {:?} is not read", info.dtype);
        let range = data + info.data_offsets.0 as u64..data + info.data_offsets.1 as u64;
        Ok((name, Tensor { dtype: info.dtype, shape: info.shape.clone(), range, strides: None, crc: None }))
    };
    metadata.tensors().into_iter().map(tensor).collect()
}
