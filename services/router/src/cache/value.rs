//! A tensor as it lies in Redis: a versioned header, the payload, and a checksum that is verified on every read.
//!
//! | bytes | holds |
//! |---|---|
//! | 4 | `EMU2` |
//! | 1 | version |
//! | 1 | dtype, as the wire's enum |
//! | 1 | rank |
//! | rank × 4 | shape, little-endian |
//! | … | payload |
//! | 32 | blake3 of all before it, keyed with the value's key: a value under another's key is bad too |

use bytes::{Buf, BufMut, Bytes, BytesMut};
use emu2_proto::v1;

use super::key::Key;

const MAGIC: &[u8; 4] = b"EMU2";
const VERSION: u8 = 1;
const FIXED_BYTES: usize = MAGIC.len() + 3;
const CHECKSUM_BYTES: usize = blake3::OUT_LEN;

/// Bytes that are not the value that was stored under their key.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(crate) enum BadValue {
    #[error("{0} bytes cannot hold a value")]
    Short(usize),
    #[error("checksum does not match")]
    Checksum,
    #[error("version is {0}, not {VERSION}")]
    Version(u8),
    #[error("header does not describe the payload")]
    Header,
}

pub(crate) fn encode(key: &Key, tensor: &v1::Tensor) -> Vec<u8> {
    let header_bytes = FIXED_BYTES + tensor.shape.len() * size_of::<u32>();
    let mut value = BytesMut::with_capacity(header_bytes + tensor.data.len() + CHECKSUM_BYTES);
    value.put_slice(MAGIC);
    value.put_u8(VERSION);
    value.put_u8(tensor.dtype as u8);
    value.put_u8(tensor.shape.len() as u8);
    tensor.shape.iter().for_each(|&side| value.put_u32_le(side));
    value.put_slice(&tensor.data);
    let checksum = blake3::keyed_hash(key.bytes(), &value);
    value.put_slice(checksum.as_bytes());
    value.into()
}

/// The tensor; its payload shares the value's bytes.
pub(crate) fn decode(key: &Key, mut value: Bytes) -> Result<v1::Tensor, BadValue> {
    if value.len() < FIXED_BYTES + CHECKSUM_BYTES {
        return Err(BadValue::Short(value.len()));
    }
    let checksum = value.split_off(value.len() - CHECKSUM_BYTES);
    if blake3::keyed_hash(key.bytes(), &value) != *checksum {
        return Err(BadValue::Checksum);
    }
    let mut magic = [0; MAGIC.len()];
    value.copy_to_slice(&mut magic);
    let version = value.get_u8();
    if magic != *MAGIC || version != VERSION {
        return Err(BadValue::Version(version));
    }
    let (dtype, rank) = (value.get_u8(), value.get_u8());
    if value.len() < usize::from(rank) * size_of::<u32>() {
        return Err(BadValue::Header);
    }
    let shape: Vec<u32> = (0..rank).map(|_| value.get_u32_le()).collect();
    let tensor = v1::Tensor { dtype: dtype.into(), shape, data: value };
    if is_whole(&tensor) { Ok(tensor) } else { Err(BadValue::Header) }
}

/// Whether a tensor has the bytes that its dtype and shape need. Its values are the readers' to check.
pub(crate) fn is_whole(tensor: &v1::Tensor) -> bool {
    let size = match tensor.dtype() {
        v1::Dtype::F32 => 4_usize,
        v1::Dtype::Bf16 => 2,
        v1::Dtype::Unspecified => return false,
    };
    let bytes = tensor.shape.iter().try_fold(size, |bytes, &side| bytes.checked_mul(side as usize));
    bytes == Some(tensor.data.len()) && !tensor.data.is_empty()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cache::key::{Kind, Recipe};

    fn key(content: &[u8]) -> Key {
        let recipe = Recipe {
            kind: Kind::Image,
            weights_digest: "d",
            preprocessing_version: 1,
            n_query: 4,
            dtype: v1::Dtype::F32,
            content,
        };
        recipe.key()
    }

    fn tensor() -> v1::Tensor {
        v1::Tensor {
            dtype: v1::Dtype::F32.into(),
            shape: vec![2, 3],
            data: (0..24).collect::<Vec<u8>>().into(),
        }
    }

    #[test]
    fn a_value_survives_under_its_key_and_only_there() {
        let value = Bytes::from(encode(&key(b"a"), &tensor()));
        assert_eq!(decode(&key(b"a"), value.clone()), Ok(tensor()));
        assert_eq!(decode(&key(b"b"), value), Err(BadValue::Checksum));
    }

    /// Bytes whose checksum is right but whose header is not, as a faulty build would write them.
    fn sealed(body: &[u8]) -> Bytes {
        let mut value = body.to_vec();
        value.extend_from_slice(blake3::keyed_hash(key(b"a").bytes(), body).as_bytes());
        value.into()
    }

    #[test]
    fn each_kind_of_damage_is_told_apart() {
        let decode = |value| decode(&key(b"a"), value);
        assert_eq!(decode(Bytes::new()), Err(BadValue::Short(0)));
        assert_eq!(decode(sealed(b"EMU2\x02\x01\x01\0\0\0\0")), Err(BadValue::Version(2)));
        assert_eq!(decode(sealed(b"EMU2\x01\x01\x09\0\0\0\0")), Err(BadValue::Header));
        assert_eq!(decode(sealed(b"EMU2\x01\x01\x01\x02\0\0\0\0\0\0\0")), Err(BadValue::Header));
        assert_eq!(decode(sealed(b"EMU2\x01\x07\x01\x01\0\0\0\0\0\0\0")), Err(BadValue::Header));
    }

    proptest! {
        #[test]
        fn any_flipped_byte_is_detected(position in 0_usize..71, flip in 1_u8..=255) {
            let mut value = encode(&key(b"a"), &tensor());
            prop_assert_eq!(value.len(), 71);
            value[position] ^= flip;
            prop_assert!(decode(&key(b"a"), value.into()).is_err());
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(decode(&key(b"a"), bytes.clone().into()).is_err());
            let _ = decode(&key(b"a"), sealed(&bytes));
        }
    }
}
