//! Memory-mapped weights files.
//!
//! Pages are asked for just before a tensor is read and given back right after, so that loading holds one tensor of
//! the files at a time beside what it makes of it.

use std::{fs::File, ops::Range, os::unix::fs::MetadataExt, path::Path};

use memmap2::{Advice, Mmap, UncheckedAdvice};
use safetensors::{Dtype, SafeTensors};

use super::error::CheckpointError;

/// Largest header of a weights file; the published single-file checkpoint's has a few hundred kilobytes.
const MAX_HEADER_BYTES: usize = 64 << 20;

/// The place of a tensor in one of the files.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(super) file: usize,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<i64>,
    pub(super) range: Range<usize>,
}

impl Entry {
    pub(super) fn values(&self) -> u64 {
        self.shape.iter().map(|&side| side as u64).product()
    }
}

/// All weights files of a model, mapped.
#[derive(Debug)]
pub(crate) struct Files(pub(super) Vec<Mapped>);

impl Files {
    /// Whether both entries are the same bytes of the same file, such as a link to it.
    pub(super) fn is_place_of(&self, entry: &Entry, others: &Self, other: &Entry) -> bool {
        entry.range == other.range && self.0[entry.file].identity == others.0[other.file].identity
    }

    /// Hands `convert` the bytes of a tensor, once, and returns what it makes of them.
    pub(crate) fn read<T>(&self, entry: &Entry, convert: impl FnOnce(&[u8]) -> T) -> T {
        self.0[entry.file].read(&entry.range, convert)
    }
}

/// An open file; its entries are found, nothing else is read.
#[derive(Debug)]
pub(super) struct Mapped {
    map: Mmap,
    /// Device and number of the file.
    identity: (u64, u64),
}

impl Mapped {
    /// The file and its tensors by name, sorted; `file`: the number that they carry.
    pub(super) fn open(path: &Path, file: usize) -> Result<(Self, Vec<(String, Entry)>), CheckpointError> {
        let bad = |reason: String| CheckpointError::Weights { path: path.to_owned(), reason };
        let io = |source| CheckpointError::Io { path: path.to_owned(), source };
        let opened = File::open(path).map_err(io)?;
        let metadata = opened.metadata().map_err(io)?;
        let identity = (metadata.dev(), metadata.ino());
        // SAFETY: the mapping is read-only; a file cut short under a running service ends it with SIGBUS, as any
        // program that maps its weights.
        let map = unsafe { Mmap::map(&opened) }.map_err(|error| bad(error.to_string()))?;
        check_header_length(&map).map_err(bad)?;
        // Also checks that offsets are in order, without gaps, and end with the file.
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|error| bad(error.to_string()))?;
        let data = header + 8;
        if map.len() != data + metadata.data_len() {
            let expected = data + metadata.data_len();
            return Err(bad(format!("{} bytes, but its header speaks of {expected}", map.len())));
        }
        let entry = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
            let shape = info.shape.iter().map(|&side| side as i64).collect();
            let range = data + info.data_offsets.0..data + info.data_offsets.1;
            (name, Entry { file, dtype: info.dtype, shape, range })
        };
        let mut entries: Vec<_> = metadata.tensors().into_iter().map(entry).collect();
        entries.sort_by(|(one, _), (other, _)| one.cmp(other));
        let mapped = Self { map, identity };
        mapped.drop_pages(&(0..data));
        Ok((mapped, entries))
    }

    fn read<T>(&self, range: &Range<usize>, convert: impl FnOnce(&[u8]) -> T) -> T {
        // Advice only: where the system refuses it, reading is slower and the pages stay until they are needed.
        for advice in [Advice::Sequential, Advice::WillNeed] {
            let _ = self.map.advise_range(advice, range.start, range.len());
        }
        let converted = convert(&self.map[range.clone()]);
        self.drop_pages(range);
        converted
    }

    fn drop_pages(&self, range: &Range<usize>) {
        // SAFETY: the mapping is of a file and read-only: dropped pages, and those of neighbours at both ends, are
        // read from the file again when they are touched.
        let _ =
            unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
    }
}

fn check_header_length(bytes: &[u8]) -> Result<(), String> {
    let length = bytes.first_chunk::<8>().ok_or("shorter than its header's length")?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES as u64 {
        return Err(format!("header must be at most {MAX_HEADER_BYTES} bytes, got {length}"));
    }
    Ok(())
}
