//! What loading costs in memory, measured alone in its process.
//!
//! `EMU2_MEMORY_TEST_MB` sets another size of the checkpoint, for a measurement by hand: its file is sparse, so that
//! it costs no disk.

use std::{fs, path::Path, time::Instant};

use emu2_nn::checkpoint::{ModelDir, Part, Progress};
use tch::{Device, Kind, Tensor};

const MIB: u64 = 1 << 20;
const TENSOR_BYTES: u64 = 64 * MIB;

/// Stored as float32, in a native layout.
fn write_checkpoint(folder: &Path, tensors: u64) {
    let entry = |index: u64| {
        let (begin, end) = (index * TENSOR_BYTES, (index + 1) * TENSOR_BYTES);
        let info = serde_json::json!({ "dtype": "F32", "shape": [TENSOR_BYTES / 4096, 1024], "data_offsets": [begin, end] });
        (format!("visual.blocks.{index}.weight"), info)
    };
    let header = serde_json::Value::Object((0..tensors).map(entry).collect()).to_string();
    let header = format!("{header:<0$}", header.len().next_multiple_of(8));
    let path = folder.join("model.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_len(8 + header.len() as u64 + tensors * TENSOR_BYTES).unwrap();
    fs::write(folder.join("config.json"), "{}").unwrap();
}

/// Bytes; `VmHWM` is the peak of `VmRSS`.
fn status(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

fn load(folder: &Path, tensors: u64, kind: Kind) -> (Vec<Tensor>, String) {
    let dir = ModelDir::open_with(folder, Progress::default()).unwrap();
    let w = dir.weights(Part::Visual, Device::Cpu, kind);
    let shape = [(TENSOR_BYTES / 4096) as i64, 1024];
    let loaded = (0..tensors).map(|index| w.at("blocks").at(index).get("weight", &shape)).collect();
    (loaded, w.finish().unwrap())
}

#[test]
fn loading_takes_the_weights_and_one_tensor_of_the_file() {
    let megabytes = std::env::var("EMU2_MEMORY_TEST_MB").map_or(1024, |text| text.parse().unwrap());
    let tensors = (megabytes * MIB).div_ceil(TENSOR_BYTES);
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), tensors);
    // What torch sets up once is not the checkpoint's.
    let _ = Tensor::ones([1 << 20], (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16).sum(Kind::Float);

    for (kind, size) in [(Kind::BFloat16, 2), (Kind::Float, 4)] {
        let target = tensors * TENSOR_BYTES / 4 * size;
        let largest = TENSOR_BYTES;
        // The peak starts from here.
        fs::write("/proc/self/clear_refs", "5").unwrap();
        let (resident, anonymous, start) = (status("VmRSS"), status("RssAnon"), Instant::now());
        let (loaded, _) = load(folder.path(), tensors, kind);
        let seconds = start.elapsed().as_secs_f64();
        let grown = status("RssAnon") - anonymous;
        let peak = status("VmHWM") - resident;
        println!(
            "{kind:?}: {} MB of weights from {} MB: anonymous +{} MB, peak +{} MB, {seconds:.2} s",
            target / 1_000_000,
            tensors * TENSOR_BYTES / 1_000_000,
            grown / 1_000_000,
            peak / 1_000_000,
        );
        assert!(loaded.len() as u64 == tensors && grown >= target * 9 / 10, "nothing was loaded");
        assert!(grown <= target * 11 / 10, "{grown} of {target}");
        assert!(peak <= target * 11 / 10 + largest, "{peak} of {target} + {largest}");
    }
}
