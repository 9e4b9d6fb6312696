//! Where parity tests compute: on the CPU in float32, as the golden numbers were, unless told otherwise.

use tch::{Device, Kind, Tensor};

use super::assert_close;
use crate::device;

/// Names the device of the stages' parity tests: `EMU2_TEST_DEVICE=cuda:0 cargo test official`; `cpu` unless set.
const VARIABLE: &str = "EMU2_TEST_DEVICE";

/// Share of the largest value by which bfloat16 may differ from the golden float32 numbers. The golden set names
/// none; this is the design's for attention, five times the 2^-8 between neighbours of eight bits. Each block alone
/// stays within it on the CPU (at most 1.5e-2, a block of the UNet), and so do the tower and the llm as a whole
/// (1.4e-2 after three layers).
const BF16_SHARE: f64 = 2e-2;

/// The device and the kind that a parity test computes in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bench {
    /// The device that the model is loaded to.
    pub device: Device,
    /// The kind that the model computes in: float32 or bfloat16.
    pub kind: Kind,
}

/// The largest differences that a result may have from golden numbers, in each kind that a [`Bench`] may have.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// The largest absolute difference in float32.
    pub float32: f64,
    /// The largest absolute difference in bfloat16.
    pub bf16: f64,
}

impl Tolerance {
    /// Makes a tolerance of one forward: `float32` as given; in bfloat16, 2e-2 × max(1, max |want|).
    pub fn new(float32: f64, want: &Tensor) -> Self {
        Self { float32, bf16: BF16_SHARE * largest(want) }
    }

    /// Makes a tolerance of a result after `blocks` blocks in a row, of which independent roundings add up as the root
    /// of their number: in bfloat16, √blocks times that of [`Self::new`].
    pub fn after(blocks: u32, float32: f64, want: &Tensor) -> Self {
        Self { float32, bf16: BF16_SHARE * f64::from(blocks).sqrt() * largest(want) }
    }
}

impl Bench {
    /// The bench that the golden numbers were computed on: the CPU in float32.
    pub const GOLDEN: Self = Self { device: Device::Cpu, kind: Kind::Float };
    /// The CPU in bfloat16: the kind that a GPU computes in, on any machine.
    pub const BF16: Self = Self { device: Device::Cpu, kind: Kind::BFloat16 };

    /// Returns the device of `EMU2_TEST_DEVICE`, the CPU unless it is set, in the kind that serving takes there:
    /// bfloat16 on CUDA.
    ///
    /// # Panics
    ///
    /// There is no such device.
    pub fn of_environment() -> Self {
        let name = std::env::var(VARIABLE).unwrap_or_else(|_| "cpu".to_owned());
        let opened = device::open(std::slice::from_ref(&name));
        let device = opened.unwrap_or_else(|error| panic!("{VARIABLE}={name}: {error}"))[0];
        Self { device, kind: device::compute_kind(device) }
    }

    /// Copies a tensor to this bench's device and kind, as a model there takes it.
    pub fn put(&self, tensor: &Tensor) -> Tensor {
        tensor.to_device(self.device).to_kind(self.kind)
    }

    /// Asserts that `got` has the shape of `want` and differs from it by at most the tolerance of this bench's kind. It
    /// also prints by how much it differs, for whoever asks how close it comes.
    ///
    /// # Panics
    ///
    /// The shapes differ, or an element differs by more than the tolerance.
    pub fn assert_close(&self, name: &str, got: &Tensor, want: &Tensor, tolerance: Tolerance) {
        let got = got.to_device(Device::Cpu).to_kind(Kind::Double);
        let want = want.to_device(Device::Cpu).to_kind(Kind::Double);
        if got.size() == want.size() {
            let share = (&got - &want).abs().max().double_value(&[]) / largest(&want);
            println!("{name} on {:?} in {:?}: {share:.1e} of the largest", self.device, self.kind);
        }
        let tolerance = if self.kind == Kind::Float { tolerance.float32 } else { tolerance.bf16 };
        assert_close(name, &got, &want, tolerance);
    }
}

fn largest(want: &Tensor) -> f64 {
    want.abs().max().double_value(&[]).max(1.0)
}
