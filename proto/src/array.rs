//! A dense array as it crosses the wire: dtype, shape and little-endian bytes, checked once on arrival.
//!
//! An [`Array`] that exists is well formed: its byte length equals the product of its shape times the element size,
//! no dimension is zero or above [`MAX_DIMENSION`], and every value is finite. Engines take and give arrays, edges
//! turn them into messages; neither needs to look again.

use bytes::Bytes;

use crate::v1;

/// The most dimensions that an array may have: latents are [channels, height, width], embeddings [queries, width].
pub const MAX_RANK: usize = 4;
/// The largest dimension of an array; the widest layer of Emu2 has 17,920 units.
pub const MAX_DIMENSION: usize = 65_536;

/// The element types of the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 binary32.
    F32,
    /// bfloat16, the upper half of a binary32.
    Bf16,
}

impl Dtype {
    /// Returns the bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// Returns the name of the type as errors spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        }
    }
}

/// A checked array. Clones share its bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Bytes,
}

/// Why bytes are not an array, or not the one that is needed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ArrayError {
    /// A message has no tensor.
    #[error("tensor is missing")]
    Missing,
    /// The message's number is that of no element type.
    #[error("dtype must be DTYPE_F32 or DTYPE_BF16, got {0}")]
    Dtype(i32),
    /// The shape, which it holds, has no dimensions or too many, or one that is zero or too large.
    #[error("shape must have 1 to {MAX_RANK} dimensions of 1 to {MAX_DIMENSION}, got {0:?}")]
    Shape(Vec<usize>),
    /// The bytes are more or fewer than the shape needs.
    #[error("data must be {expected} bytes for shape {shape:?} of {dtype}, got {got}")]
    Length {
        /// The bytes that the shape needs.
        expected: usize,
        /// The shape.
        shape: Vec<usize>,
        /// The element type by name.
        dtype: &'static str,
        /// The bytes that there are.
        got: usize,
    },
    /// A value is infinite or not a number.
    #[error("values must be finite, got {value} at element {index}")]
    NotFinite {
        /// The value.
        value: f32,
        /// Its index among all elements.
        index: usize,
    },
    /// The array has another shape than the one that is needed.
    #[error("shape must be {expected:?}, got {got:?}")]
    WrongShape {
        /// The needed shape.
        expected: Vec<usize>,
        /// The array's shape.
        got: Vec<usize>,
    },
    /// The array has another element type than the one that is needed.
    #[error("dtype must be {expected}, got {got}")]
    WrongDtype {
        /// The needed element type by name.
        expected: &'static str,
        /// The array's element type by name.
        got: &'static str,
    },
}

impl Array {
    /// Makes an array of row-major, little-endian elements, and checks everything that makes bytes one.
    ///
    /// # Errors
    ///
    /// The shape is out of bounds, the bytes do not fit it, or a value is not finite.
    pub fn new(dtype: Dtype, shape: Vec<usize>, data: Bytes) -> Result<Self, ArrayError> {
        let in_bounds = |&side: &usize| (1..=MAX_DIMENSION).contains(&side);
        if !(1..=MAX_RANK).contains(&shape.len()) || !shape.iter().all(in_bounds) {
            return Err(ArrayError::Shape(shape));
        }
        // Four dimensions of 2^16 overflow 64 bits.
        let expected = shape.iter().try_fold(dtype.size(), |bytes, &side| bytes.checked_mul(side));
        let expected = expected.ok_or_else(|| ArrayError::Shape(shape.clone()))?;
        if data.len() != expected {
            return Err(ArrayError::Length { expected, shape, dtype: dtype.name(), got: data.len() });
        }
        let array = Self { dtype, shape, data };
        let stray = array.values().enumerate().find(|(_, value)| !value.is_finite());
        stray.map_or(Ok(array), |(index, value)| Err(ArrayError::NotFinite { value, index }))
    }

    /// Returns the element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Returns the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Returns the row-major, little-endian elements.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// Returns the elements, widened to float32.
    pub fn values(&self) -> impl Iterator<Item = f32> + '_ {
        let dtype = self.dtype;
        self.data.chunks_exact(dtype.size()).map(move |element| match dtype {
            Dtype::F32 => f32::from_le_bytes([element[0], element[1], element[2], element[3]]),
            Dtype::Bf16 => half::bf16::from_le_bytes([element[0], element[1]]).to_f32(),
        })
    }

    /// Returns this array if it has the element type and the shape that its reader needs.
    ///
    /// # Errors
    ///
    /// It has another one.
    pub fn expect(self, dtype: Dtype, shape: &[usize]) -> Result<Self, ArrayError> {
        if self.dtype != dtype {
            return Err(ArrayError::WrongDtype { expected: dtype.name(), got: self.dtype.name() });
        }
        if self.shape != shape {
            return Err(ArrayError::WrongShape { expected: shape.to_vec(), got: self.shape });
        }
        Ok(self)
    }
}

impl TryFrom<v1::Tensor> for Array {
    type Error = ArrayError;

    fn try_from(tensor: v1::Tensor) -> Result<Self, ArrayError> {
        let dtype = match v1::Dtype::try_from(tensor.dtype) {
            Ok(v1::Dtype::F32) => Dtype::F32,
            Ok(v1::Dtype::Bf16) => Dtype::Bf16,
            _ => return Err(ArrayError::Dtype(tensor.dtype)),
        };
        Self::new(dtype, tensor.shape.iter().map(|&side| side as usize).collect(), tensor.data)
    }
}

impl TryFrom<Option<v1::Tensor>> for Array {
    type Error = ArrayError;

    fn try_from(tensor: Option<v1::Tensor>) -> Result<Self, ArrayError> {
        tensor.ok_or(ArrayError::Missing)?.try_into()
    }
}

impl From<Array> for v1::Tensor {
    fn from(array: Array) -> Self {
        let dtype = v1::Dtype::from(array.dtype).into();
        // Dimensions are at most MAX_DIMENSION.
        Self { dtype, shape: array.shape.iter().map(|&side| side as u32).collect(), data: array.data }
    }
}

impl From<Dtype> for v1::Dtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(dtype: i32, shape: &[u32], values: &[f32]) -> v1::Tensor {
        let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        v1::Tensor { dtype, shape: shape.to_vec(), data: data.into() }
    }

    #[test]
    fn a_well_formed_tensor_survives_both_ways() {
        let sent = tensor(v1::Dtype::F32.into(), &[2, 3], &[0.0, -1.5, 2.0, 3.0, 4.0, 1e30]);
        let array = Array::try_from(sent.clone()).unwrap();
        assert_eq!(array.shape(), [2, 3]);
        assert_eq!(array.values().collect::<Vec<_>>(), [0.0, -1.5, 2.0, 3.0, 4.0, 1e30]);
        assert_eq!(v1::Tensor::from(array), sent);
    }

    #[test]
    fn each_malformation_is_named() {
        let f32 = v1::Dtype::F32.into();
        let error = |tensor| Array::try_from(tensor).unwrap_err();
        assert_eq!(error(tensor(9, &[1], &[1.0])), ArrayError::Dtype(9));
        assert_eq!(error(tensor(f32, &[], &[])), ArrayError::Shape(vec![]));
        assert_eq!(error(tensor(f32, &[2, 0], &[])), ArrayError::Shape(vec![2, 0]));
        assert_eq!(error(tensor(f32, &[1; 5], &[1.0])), ArrayError::Shape(vec![1; 5]));
        assert!(matches!(error(tensor(f32, &[u32::MAX], &[])), ArrayError::Shape(_)));
        assert!(matches!(error(tensor(f32, &[65_536; 4], &[])), ArrayError::Shape(_)));
        assert!(matches!(error(tensor(f32, &[3], &[1.0])), ArrayError::Length { expected: 12, got: 4, .. }));
        assert!(matches!(error(tensor(f32, &[2], &[1.0, f32::NAN])), ArrayError::NotFinite { index: 1, .. }));
        assert!(matches!(error(tensor(f32, &[1], &[f32::INFINITY])), ArrayError::NotFinite { .. }));
        assert_eq!(Array::try_from(None).unwrap_err(), ArrayError::Missing);
    }

    #[test]
    fn bfloat16_values_widen_exactly() {
        let data: Vec<u8> =
            [1.5_f32, -2.0].iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
        let array = Array::new(Dtype::Bf16, vec![2], data.into()).unwrap();
        assert_eq!(array.values().collect::<Vec<_>>(), [1.5, -2.0]);
        assert!(matches!(array.expect(Dtype::F32, &[2]), Err(ArrayError::WrongDtype { .. })));
    }
}
