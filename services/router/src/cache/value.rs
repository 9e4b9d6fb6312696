//! What Redis holds under a key: a versioned header, a body, and a checksum that is verified on every read. Bytes from
//! there are never believed: whatever is not exactly a value of this key is bad.
//!
//! | bytes | holds |
//! |---|---|
//! | 4 | `EMU2` |
//! | 1 | version |
//! | 1 | kind: 1 a tensor, 2 a refusal |
//! | … | body |
//! | 32 | blake3 of all before it, keyed with the value's key: a value under another's key is bad too |
//!
//! A tensor's body is its dtype (1, as the wire's enum), its rank (1), its shape (rank × 4) and its payload; a
//! refusal's the bytes of its message (4), the message, and its details as gRPC carries them. Numbers are
//! little-endian.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use emu2_proto::v1;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::key::Key;

const MAGIC: &[u8; 4] = b"EMU2";
const VERSION: u8 = 2;
const TENSOR: u8 = 1;
const REFUSAL: u8 = 2;
const HEADER_BYTES: usize = MAGIC.len() + 2;
const CHECKSUM_BYTES: usize = blake3::OUT_LEN;
/// A refusal names a few fields; more is not worth keeping.
const MAX_REFUSAL_BYTES: usize = 16 << 10;

/// What a stage made of a key's content.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    Tensor(v1::Tensor),
    /// INVALID_ARGUMENT, as the stage said it, its fields still named by the stage.
    Refusal(Status),
}

/// Bytes that are not the value that was stored under their key.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(crate) enum BadValue {
    #[error("{0} bytes cannot hold a value")]
    Short(usize),
    #[error("checksum does not match")]
    Checksum,
    #[error("version is {0}, not {VERSION}")]
    Version(u8),
    #[error("header does not describe the body")]
    Header,
}

/// None for what is not worth storing: a refusal that is too long, or that names no field.
pub(crate) fn encode(key: &Key, value: &Value) -> Option<Vec<u8>> {
    let mut bytes = BytesMut::new();
    match value {
        Value::Tensor(tensor) => {
            let shape_bytes = tensor.shape.len() * size_of::<u32>();
            bytes.reserve(HEADER_BYTES + 2 + shape_bytes + tensor.data.len() + CHECKSUM_BYTES);
            put_header(&mut bytes, TENSOR);
            bytes.put_u8(tensor.dtype as u8);
            bytes.put_u8(tensor.shape.len() as u8);
            tensor.shape.iter().for_each(|&side| bytes.put_u32_le(side));
            bytes.put_slice(&tensor.data);
        }
        Value::Refusal(status) => {
            put_header(&mut bytes, REFUSAL);
            bytes.put_u32_le(status.message().len() as u32);
            bytes.put_slice(status.message().as_bytes());
            bytes.put_slice(status.details());
            if !is_refusal(status) || bytes.len() > MAX_REFUSAL_BYTES {
                return None;
            }
        }
    }
    let checksum = blake3::keyed_hash(key.bytes(), &bytes);
    bytes.put_slice(checksum.as_bytes());
    Some(bytes.into())
}

/// The value; a tensor's payload shares the bytes.
pub(crate) fn decode(key: &Key, mut bytes: Bytes) -> Result<Value, BadValue> {
    if bytes.len() < HEADER_BYTES + CHECKSUM_BYTES {
        return Err(BadValue::Short(bytes.len()));
    }
    let checksum = bytes.split_off(bytes.len() - CHECKSUM_BYTES);
    if blake3::keyed_hash(key.bytes(), &bytes) != *checksum {
        return Err(BadValue::Checksum);
    }
    let mut magic = [0; MAGIC.len()];
    bytes.copy_to_slice(&mut magic);
    let version = bytes.get_u8();
    if magic != *MAGIC || version != VERSION {
        return Err(BadValue::Version(version));
    }
    let value = match bytes.get_u8() {
        TENSOR => tensor(bytes).map(Value::Tensor),
        REFUSAL => refusal(bytes).map(Value::Refusal),
        _ => None,
    };
    value.ok_or(BadValue::Header)
}

fn put_header(bytes: &mut BytesMut, kind: u8) {
    bytes.put_slice(MAGIC);
    bytes.put_u8(VERSION);
    bytes.put_u8(kind);
}

fn tensor(mut body: Bytes) -> Option<v1::Tensor> {
    let (dtype, rank) = (body.try_get_u8().ok()?, body.try_get_u8().ok()?);
    let shape = (0..rank).map(|_| body.try_get_u32_le().ok()).collect::<Option<_>>()?;
    Some(v1::Tensor { dtype: dtype.into(), shape, data: body }).filter(is_whole)
}

fn refusal(mut body: Bytes) -> Option<Status> {
    let message_bytes = body.try_get_u32_le().ok()? as usize;
    if body.len() > MAX_REFUSAL_BYTES || message_bytes > body.len() {
        return None;
    }
    let message = String::from_utf8(body.split_to(message_bytes).into()).ok()?;
    Some(Status::with_details(Code::InvalidArgument, message, body)).filter(is_refusal)
}

/// Whether a status says which fields are wrong; without that no client can be told.
fn is_refusal(status: &Status) -> bool {
    let fields = status.check_error_details().ok().and_then(|details| details.bad_request().cloned());
    status.code() == Code::InvalidArgument && fields.is_some_and(|it| !it.field_violations.is_empty())
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
    use emu2_serve::status::{self, Violation};
    use proptest::prelude::*;

    use super::*;
    use crate::cache::key::tests::key;

    fn tensor() -> v1::Tensor {
        v1::Tensor {
            dtype: v1::Dtype::F32.into(),
            shape: vec![2, 3],
            data: (0..24).collect::<Vec<u8>>().into(),
        }
    }

    fn refusal() -> Status {
        status::invalid(vec![Violation::new("image", "must be a picture, got 3 bytes of text")])
    }

    fn encoded(value: Value) -> Bytes {
        encode(&key(b"a"), &value).unwrap().into()
    }

    #[test]
    fn a_tensor_survives_under_its_key_and_only_there() {
        let bytes = encoded(Value::Tensor(tensor()));
        let Ok(Value::Tensor(read)) = decode(&key(b"a"), bytes.clone()) else { panic!("not a tensor") };
        assert_eq!(read, tensor());
        assert_eq!(decode(&key(b"b"), bytes).unwrap_err(), BadValue::Checksum);
    }

    #[test]
    fn a_refusal_survives_with_the_fields_it_names() {
        let bytes = encoded(Value::Refusal(refusal()));
        let Ok(Value::Refusal(read)) = decode(&key(b"a"), bytes) else { panic!("not a refusal") };
        assert_eq!((read.code(), read.message()), (Code::InvalidArgument, refusal().message()));
        assert_eq!(read.details(), refusal().details());
    }

    #[test]
    fn only_a_short_refusal_that_names_fields_is_stored() {
        let long = "x".repeat(MAX_REFUSAL_BYTES);
        let long = Status::with_details(Code::InvalidArgument, long, refusal().details().to_vec().into());
        for status in [Status::invalid_argument("no fields"), status::internal("broken"), long] {
            assert!(encode(&key(b"a"), &Value::Refusal(status)).is_none());
        }
    }

    /// Bytes whose checksum is right but whose header is not, as a faulty build would write them.
    fn sealed(body: &[u8]) -> Bytes {
        let mut value = body.to_vec();
        value.extend_from_slice(blake3::keyed_hash(key(b"a").bytes(), body).as_bytes());
        value.into()
    }

    #[test]
    fn each_kind_of_damage_is_told_apart() {
        let bad = |value| decode(&key(b"a"), value).unwrap_err();
        assert_eq!(bad(Bytes::new()), BadValue::Short(0));
        assert_eq!(bad(sealed(b"EMU2\x01\x01\x01\x01\0\0\0\0")), BadValue::Version(1));
        for body in [
            b"EMU2\x02\x03" as &[u8],
            b"EMU2\x02\x01",
            b"EMU2\x02\x01\x01\x09\0\0\0\0",
            b"EMU2\x02\x01\x01\x02\0\0\0\0\0\0\0",
            b"EMU2\x02\x01\x07\x01\x01\0\0\0\0\0\0\0",
            b"EMU2\x02\x02\x09\0\0\0bad",
            b"EMU2\x02\x02\x03\0\0\0bad",
            b"EMU2\x02\x02\x01\0\0\0\xff",
        ] {
            assert_eq!(bad(sealed(body)), BadValue::Header, "{body:?}");
        }
    }

    proptest! {
        #[test]
        fn any_flipped_byte_is_detected(position in 0_usize..72, flip in 1_u8..=255) {
            let mut value = encoded(Value::Tensor(tensor())).to_vec();
            prop_assert_eq!(value.len(), 72);
            value[position] ^= flip;
            prop_assert!(decode(&key(b"a"), value.into()).is_err());
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0_u8..4) {
            prop_assert!(decode(&key(b"a"), bytes.clone().into()).is_err());
            let _ = decode(&key(b"a"), sealed(&bytes));
            let _ = decode(&key(b"a"), sealed(&[b"EMU2\x02", &[kind][..], &bytes].concat()));
        }
    }
}
