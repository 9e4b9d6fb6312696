//! What a thread that computes with torch has to set up.

use std::thread;

use tch::NoGradGuard;

/// Makes the calling thread fit to serve a model: no gradients are kept while the guard lives, and one torch operation
/// takes at most `cores` threads; 0 means as many as the process may use.
pub fn set_up(cores: usize) -> NoGradGuard {
    // The count is kept per calling thread, so that engines in one process can share its cores.
    tch::set_num_threads(cores_or_all(cores));
    tch::no_grad_guard()
}

fn cores_or_all(cores: usize) -> i32 {
    let all = || thread::available_parallelism().map_or(1, |all| all.get());
    i32::try_from(if cores == 0 { all() } else { cores }).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use emu2_engine::error::{EngineFault, guarded};
    use tch::{Device, Kind, Tensor};

    use super::*;

    #[test]
    fn a_thread_that_was_set_up_keeps_no_gradients() {
        let served = thread::spawn(|| {
            let weight = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            let _kept = set_up(1);
            (&weight * 3.0).requires_grad()
        });
        assert!(!served.join().unwrap());
    }

    #[test]
    fn of_libtorchs_errors_the_first_line_is_kept() {
        let mismatch = guarded(|| {
            Tensor::ones([2], (Kind::Float, Device::Cpu)) + Tensor::ones([3], (Kind::Float, Device::Cpu))
        });
        assert!(
            matches!(&mismatch, Err(EngineFault::Panic(text)) if !text.contains("frame #0")),
            "{mismatch:?}"
        );
    }
}
