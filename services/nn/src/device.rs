//! Devices by name, and the CUDA libraries found at run time.
//!
//! One binary serves CPU and GPU: it links only the CPU part of libtorch and gains every CUDA kernel when
//! `libtorch_cuda.so` is loaded before torch is first asked about CUDA (a "no" asked too early is cached for the
//! process). The library comes from a GPU image, or from an installed PyTorch 2.11 through `LD_LIBRARY_PATH`.

use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::{Cuda, Device, Kind};

mod memory;

pub use memory::free_memory;

/// Why a device that a configuration names cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The name is not one of a device; it holds the name.
    #[error("device must be `cpu` or `cuda:N`, got `{0}`")]
    Name(String),
    /// The configuration names no device at all.
    #[error("no device is named")]
    Empty,
    /// A CUDA device is named where torch's CUDA library cannot be loaded; it holds the device's name and the loader's
    /// reason.
    #[error("device `{0}` needs libtorch_cuda.so, which cannot be loaded: {1}")]
    NoLibrary(String, String),
    /// The host has no CUDA device of this number.
    #[error("device `{name}` does not exist: {count} CUDA devices are visible")]
    Absent {
        /// The device's name.
        name: String,
        /// How many CUDA devices the process sees.
        count: i64,
    },
}

/// Opens the devices of a model service, named `cpu` or `cuda:N`, in the order of its configuration. The first CUDA
/// device that is named loads torch's CUDA library.
///
/// # Errors
///
/// No device is named, a name is not one of a device, the library cannot be loaded, or the device does not exist.
pub fn open(names: &[String]) -> Result<Vec<Device>, DeviceError> {
    if names.is_empty() {
        return Err(DeviceError::Empty);
    }
    names.iter().map(|name| open_one(name)).collect()
}

/// Returns the kind that models compute in on a device: bfloat16 on CUDA as the published models, float32 on CPUs, most
/// of which have no fast bfloat16 products.
pub fn compute_kind(device: Device) -> Kind {
    match device {
        Device::Cuda(_) => Kind::BFloat16,
        _ => Kind::Float,
    }
}

/// The refusal of weights that a device has no room for.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("{} are needed on {place}, where {} are free", gigabytes(*.needed), gigabytes(*.free))]
pub struct NoRoom {
    /// The device, as a configuration names it.
    pub place: String,
    /// Bytes that the weights take on this device.
    pub needed: u64,
    /// Bytes that this process can still allocate on it.
    pub free: u64,
}

/// Checks whether each device has as many bytes free as it is to hold; a device that stands several times must hold the
/// sum. A device of which nobody tells how much is free passes: the load itself will fail.
///
/// # Errors
///
/// The first device that has less memory free than it is to hold.
pub fn check_room(needed: &[(Device, u64)]) -> Result<(), NoRoom> {
    let mut sums: Vec<(Device, u64)> = Vec::new();
    for &(device, bytes) in needed {
        match sums.iter_mut().find(|(known, _)| *known == device) {
            Some((_, sum)) => *sum += bytes,
            None => sums.push((device, bytes)),
        }
    }
    for (device, needed) in sums {
        if let Some(free) = free_memory(device).filter(|free| *free < needed) {
            return Err(NoRoom { place: name(device), needed, free });
        }
    }
    Ok(())
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

/// Names a device as a configuration does.
fn name(device: Device) -> String {
    match device {
        Device::Cpu => "cpu".to_owned(),
        Device::Cuda(index) => format!("cuda:{index}"),
        other => format!("{other:?}"),
    }
}

fn open_one(name: &str) -> Result<Device, DeviceError> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let index = name.strip_prefix("cuda:").and_then(|index| index.parse::<usize>().ok());
    let index = index.ok_or_else(|| DeviceError::Name(name.to_owned()))?;
    load_cuda().as_ref().map_err(|error| DeviceError::NoLibrary(name.to_owned(), error.clone()))?;
    let count = if Cuda::is_available() { Cuda::device_count() } else { 0 };
    if index as i64 >= count {
        return Err(DeviceError::Absent { name: name.to_owned(), count });
    }
    Ok(Device::Cuda(index))
}

fn load_cuda() -> &'static Result<Library, String> {
    static CUDA: OnceLock<Result<Library, String>> = OnceLock::new();
    CUDA.get_or_init(|| {
        // SAFETY: libtorch's own initialisers run; they expect exactly this, torch's CPU part already loaded.
        unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) }.map_err(|e| e.to_string())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(names: &[&str]) -> Result<Vec<Device>, DeviceError> {
        open(&names.iter().map(|name| name.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn what_one_device_is_to_hold_is_added_up() {
        // Nobody tells of a device that does not exist.
        assert_eq!(check_room(&[(Device::Cpu, 1), (Device::Cuda(4096), u64::MAX)]), Ok(()));
        let error = check_room(&[(Device::Cpu, 1), (Device::Cpu, 1 << 60)]).unwrap_err();
        assert_eq!((error.place.as_str(), error.needed), ("cpu", (1 << 60) + 1));
        assert!(error.to_string().contains(" GB are needed on cpu, where "), "{error}");
    }

    #[test]
    fn names_are_checked() {
        assert_eq!(opened(&["cpu"]).unwrap(), [Device::Cpu]);
        assert!(matches!(opened(&[]), Err(DeviceError::Empty)));
        for name in ["gpu", "cuda", "cuda:", "cuda:-1", "cuda:x"] {
            assert!(matches!(opened(&[name]), Err(DeviceError::Name(_))), "{name}");
        }
        // Beyond any host's devices, whether or not it has CUDA.
        let absent = opened(&["cuda:4096"]);
        assert!(matches!(absent, Err(DeviceError::NoLibrary(..) | DeviceError::Absent { .. })), "{absent:?}");
    }
}
