//! Conversions between arrays of the wire and torch's tensors.

use emu2_proto::array::{Array, ArrayError, Dtype};
use tch::{Device, Kind, Tensor};

/// Copies an array to a tensor of the same shape on `device`, and converts it to `kind` there.
pub fn to_tensor(array: &Array, device: Device, kind: Kind) -> Tensor {
    let shape: Vec<i64> = array.shape().iter().map(|&side| side as i64).collect();
    Tensor::from_data_size(array.data(), &shape, kind_of(array.dtype())).to_device(device).to_kind(kind)
}

/// Copies a tensor of any shape, on any device, to an array of the same shape and dtype, as it goes on the wire.
///
/// # Errors
///
/// A value is not finite: it must not reach the wire.
///
/// # Panics
///
/// The tensor is neither float32 nor bfloat16; see [`dtype`].
pub fn from_tensor(tensor: &Tensor) -> Result<Array, ArrayError> {
    let tensor = tensor.to_device(Device::Cpu).contiguous();
    let dtype = dtype(tensor.kind());
    let mut data = vec![0_u8; tensor.numel() * dtype.size()];
    tensor.copy_data_u8(&mut data, tensor.numel());
    let shape = tensor.size().iter().map(|&side| side as usize).collect();
    Array::new(dtype, shape, data.into())
}

/// Returns the wire's name of the kind that a model computes in.
///
/// # Panics
///
/// The kind is neither float32 nor bfloat16, the two that models compute in.
pub fn dtype(kind: Kind) -> Dtype {
    match kind {
        Kind::Float => Dtype::F32,
        Kind::BFloat16 => Dtype::Bf16,
        other => panic!("{other:?} is not a compute kind"),
    }
}

fn kind_of(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::Bf16 => Kind::BFloat16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_both_kinds_and_a_view() {
        let values = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]).tr();
        for kind in [Kind::Float, Kind::BFloat16] {
            let array = from_tensor(&values.to_kind(kind)).unwrap();
            assert_eq!((array.shape(), array.dtype()), (&[3, 2][..], dtype(kind)));
            assert_eq!(array.values().collect::<Vec<_>>(), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
            assert!(to_tensor(&array, Device::Cpu, Kind::Float).allclose(&values, 0.0, 0.0, false));
        }
    }

    #[test]
    fn a_value_that_is_not_finite_never_leaves() {
        let poisoned = Tensor::from_slice(&[1.0_f32, f32::NAN]);
        assert!(matches!(from_tensor(&poisoned), Err(ArrayError::NotFinite { index: 1, .. })));
    }
}
