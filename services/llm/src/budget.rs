//! How many entries of keys and values may be promised: what is configured, or what fits where that is less.
//!
//! A budget beyond the memory is no reason not to serve: with the default budget a small machine serves a small model
//! well, only with fewer requests side by side. So it is cut down, and the log says so. Not even one whole context,
//! though, would be a service that refuses valid requests: that is an error at start.

use emu2_nn::device;
use tch::Device;
use tracing::warn;

use crate::{error::LoadError, llama::Llama};

/// Percent of a device's free memory that keys and values may take. A step needs the rest: a chunk of 512 positions of
/// the full model computes under 1 GiB at a time, most of it attention scores and the feed-forward's inner rows.
const PERCENT_OF_FREE: u64 = 90;

/// What an entry takes of one device, and what that device has left.
#[derive(Clone, Copy, Debug)]
struct Room {
    device: Device,
    entry_bytes: u64,
    /// The bytes that the device has left; none where nobody tells, and then the configured budget is believed.
    free_bytes: Option<u64>,
}

/// Returns how many entries fit `budget_bytes` and the memory that the model's devices have left now.
pub(crate) fn entries(model: &Llama, budget_bytes: u64) -> Result<usize, LoadError> {
    let config = model.config();
    let entry_bytes = config.kv_bytes(model.kind()) as u64;
    let rooms = model.layers_by_device().into_iter().map(|(device, layers)| Room {
        device,
        entry_bytes: entry_bytes / config.num_hidden_layers as u64 * layers as u64,
        free_bytes: device::free_memory(device),
    });
    fit(&rooms.collect::<Vec<_>>(), entry_bytes, config.max_position_embeddings as usize, budget_bytes)
}

/// Returns how many entries fit; `positions` are those of one whole context.
fn fit(rooms: &[Room], entry_bytes: u64, positions: usize, budget_bytes: u64) -> Result<usize, LoadError> {
    let configured = budget_bytes / entry_bytes;
    let needed = positions as u64 * entry_bytes;
    if configured < positions as u64 {
        return Err(LoadError::KvBudget { positions, needed, budget: budget_bytes });
    }
    let fits = |room: &Room| Some((room.free_bytes? / 100 * PERCENT_OF_FREE / room.entry_bytes, *room));
    let tightest = rooms.iter().filter_map(fits).min_by_key(|(entries, _)| *entries);
    let Some((fitting, room)) = tightest.filter(|(fitting, _)| *fitting < configured) else {
        return Ok(configured as usize);
    };
    if fitting < positions as u64 {
        return Err(LoadError::KvMemory { positions, needed, room: fitting * entry_bytes });
    }
    warn!(
        kv_budget_bytes = budget_bytes,
        fitting_bytes = fitting * entry_bytes,
        device = ?room.device,
        device_free_bytes = room.free_bytes,
        "kv_budget_bytes is more than the devices have left: keys and values get what fits"
    );
    Ok(fitting as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POSITIONS: usize = 2048;

    fn room(entry_bytes: u64, free_bytes: Option<u64>) -> Room {
        Room { device: Device::Cpu, entry_bytes, free_bytes }
    }

    #[test]
    fn a_budget_that_fits_is_kept() {
        let free = Some(100_000_000);
        assert_eq!(fit(&[room(1000, free)], 1000, POSITIONS, 90_000_000).unwrap(), 90_000);
        assert_eq!(fit(&[room(1000, None)], 1000, POSITIONS, u64::MAX).unwrap() as u64, u64::MAX / 1000);
    }

    #[test]
    fn one_that_does_not_is_cut_down_to_the_tightest_device() {
        // Two thirds of the layers are on the device with less.
        let rooms = [room(400, Some(100_000_000)), room(800, Some(10_000_000))];
        assert_eq!(fit(&rooms, 1200, POSITIONS, 90_000_000).unwrap(), 9_000_000 / 800);
    }

    #[test]
    fn less_than_one_context_is_refused_with_all_numbers() {
        let error = |free, budget| fit(&[room(1000, free)], 1000, POSITIONS, budget).unwrap_err().to_string();
        let text = error(Some(100_000_000), 2_047_999);
        assert!(text.contains("kv_budget_bytes") && text.contains("2048000 bytes, is 2047999"), "{text}");
        let text = error(Some(2_000_000), 90_000_000);
        assert!(text.contains("2048 positions, 2048000 bytes") && text.ends_with("holds 1800000"), "{text}");
    }
}
