//! Bytes out of hashes: equal inputs, equal bytes, and any difference shows.

use blake3::{Hash, Hasher};
use emu2_proto::v1::{Dtype, Tensor};

/// Clears the exponent's second bit in every odd byte, which holds a bfloat16's (and, in every fourth byte, a
/// float32's) exponent: no value is infinite or not a number.
const FINITE: u8 = 0xBF;
/// Bytes that a tensor repeats: enough to tell two tensors apart, cheap enough that the router is what is measured.
const BLOCK_BYTES: usize = 256;

/// The hash of length-prefixed parts.
pub(super) fn hash(parts: &[&[u8]]) -> Hash {
    let mut hasher = Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize()
}

/// [rows, width] finite values drawn from `seed`.
pub(super) fn tensor(seed: &Hash, rows: u32, width: u32, dtype: Dtype) -> Tensor {
    let size = if dtype == Dtype::F32 { 4 } else { 2 };
    let mut block = [0; BLOCK_BYTES];
    Hasher::new().update(seed.as_bytes()).finalize_xof().fill(&mut block);
    block.iter_mut().skip(1).step_by(2).for_each(|byte| *byte &= FINITE);
    let bytes = rows as usize * width as usize * size;
    let mut data = block.repeat(bytes.div_ceil(BLOCK_BYTES));
    data.truncate(bytes);
    Tensor { dtype: dtype.into(), shape: vec![rows, width], data: data.into() }
}

#[cfg(test)]
mod tests {
    use emu2_proto::array::Array;

    use super::*;

    #[test]
    fn tensors_are_well_formed_and_told_apart() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let made = |content: &[u8]| tensor(&hash(&[content]), 64, 1792, dtype);
            assert_eq!(made(b"a"), made(b"a"));
            assert_ne!(made(b"a"), made(b"b"));
            for content in 0..50_u8 {
                assert_eq!(Array::try_from(made(&[content])).unwrap().shape(), [64, 1792]);
            }
        }
    }
}
