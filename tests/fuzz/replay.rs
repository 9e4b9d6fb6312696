//! The seeds, and what fuzzing once found, through every target.

use std::{fs, path::Path};

use emu2_fuzz::{cache_value, image, request, tensor};

fn replay(folder: &str, target: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let paths = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let files = paths.filter(|path| path.is_file()).map(|path| fs::read(path).unwrap());
    let count = files.map(|bytes| target(&bytes)).count();
    assert!(count > 0, "{} is empty", folder.display());
}

/// Those written by hand, and one input for each edge of the code that fuzzing has reached.
fn replay_seeds(name: &str, target: fn(&[u8])) {
    replay(&format!("seeds/{name}"), target);
    replay(&format!("seeds/{name}/learnt"), target);
}

#[test]
fn seeds_and_findings_are_read_without_harm() {
    replay("../fixtures/images", image);
    replay_seeds("image", image);
    replay_seeds("request", request);
    replay_seeds("tensor", tensor);
    replay_seeds("cache_value", cache_value);
}
