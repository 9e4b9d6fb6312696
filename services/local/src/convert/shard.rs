//! Writes one shard, and checks one that was written.

use std::{
    fs::{self, File},
    io::{Read, Write},
    path::Path,
};

use anyhow::{Context, Result};
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Map, json};

use super::{
    plan::{Shard, written_bytes, written_dtype},
    record::{self, Finished},
    source::Source,
};

/// Bytes of a finished shard that are read at once.
const PIECE_BYTES: usize = 1 << 20;

/// Converts a shard's tensors one piece at a time; `advance` hears of the bytes written.
pub(super) fn write(
    path: &Path,
    shard: &Shard,
    source: &Source,
    mut advance: impl FnMut(u64),
) -> Result<Finished> {
    record::write_with(path, |file| {
        let mut out = Hashed { file, hasher: blake3::Hasher::new(), bytes: 0 };
        out.write(&header(shard, source))?;
        let mut narrow = Vec::new();
        for name in &shard.names {
            let tensor = &source.tensors[name];
            let read = source.read(tensor, |piece| {
                let piece = match tensor.dtype {
                    Dtype::F64 | Dtype::F32 | Dtype::F16 => {
                        narrow_to_bf16(tensor.dtype, piece, &mut narrow);
                        &narrow
                    }
                    _ => piece,
                };
                out.write(piece)?;
                advance(piece.len() as u64);
                Ok(())
            });
            read.with_context(|| format!("`{name}` of {}", source.path.display()))?;
        }
        Ok(Finished { bytes: out.bytes, blake3: out.hasher.finalize().to_hex().to_string() })
    })
}

/// Returns whether a shard's bytes still have their checksum; `advance` hears of the bytes read.
pub(super) fn is_sound(path: &Path, finished: &Finished, mut advance: impl FnMut(u64)) -> Result<bool> {
    if !fs::metadata(path).is_ok_and(|metadata| metadata.len() == finished.bytes) {
        return Ok(false);
    }
    let mut check = || {
        let mut file = File::open(path)?;
        let (mut hasher, mut piece) = (blake3::Hasher::new(), vec![0; PIECE_BYTES]);
        loop {
            match file.read(&mut piece)? {
                0 => return Ok(hasher.finalize().to_hex().as_str() == finished.blake3),
                length => {
                    hasher.update(&piece[..length]);
                    advance(length as u64);
                }
            }
        }
    };
    let sound: std::io::Result<bool> = check();
    sound.with_context(|| path.display().to_string())
}

/// A file that is written, with the checksum and the number of the bytes so far.
struct Hashed<'a> {
    file: &'a mut File,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Hashed<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes)
    }
}

/// Returns the length of the safetensors header and the header, padded so that values start aligned.
fn header(shard: &Shard, source: &Source) -> Vec<u8> {
    let mut header = Map::new();
    // What transformers expects in a file of its own.
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut at = 0;
    for name in &shard.names {
        let tensor = &source.tensors[name];
        let end = at + written_bytes(tensor);
        let dtype = format!("{:?}", written_dtype(tensor));
        let info = json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": [at, end] });
        header.insert(name.clone(), info);
        at = end;
    }
    let mut header = serde_json::Value::Object(header).to_string();
    let padding = header.len().next_multiple_of(8) - header.len();
    header.extend(std::iter::repeat_n(' ', padding));
    [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()
}

/// Rounds values to bfloat16: to the nearest, ties to even, as PyTorch does.
fn narrow_to_bf16(dtype: Dtype, wide: &[u8], narrow: &mut Vec<u8>) {
    fn each<const N: usize>(wide: &[u8], narrow: &mut Vec<u8>, round: impl Fn([u8; N]) -> bf16) {
        narrow.clear();
        narrow.resize(wide.len() / N * 2, 0);
        let (values, _) = wide.as_chunks::<N>();
        for (to, from) in narrow.as_chunks_mut::<2>().0.iter_mut().zip(values) {
            *to = round(*from).to_le_bytes();
        }
    }
    match dtype {
        Dtype::F64 => each(wide, narrow, |value| bf16::from_f32(f64::from_le_bytes(value) as f32)),
        Dtype::F32 => each(wide, narrow, |value| bf16::from_f32(f32::from_le_bytes(value))),
        Dtype::F16 => each(wide, narrow, |value| bf16::from_f32(f16::from_le_bytes(value).to_f32())),
        _ => unreachable!("only wider floats are narrowed"),
    }
}
