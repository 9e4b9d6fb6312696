//! The seeds, and what fuzzing once found, through every target.

use std::{fs, path::Path};

use emu2_fuzz::{cache_value, picture, request, tensor};

fn replay(folder: &str, target: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let files = fs::read_dir(&folder).unwrap().map(|entry| fs::read(entry.unwrap().path()).unwrap());
    let count = files.map(|bytes| target(&bytes)).count();
    assert!(count > 0, "{} is empty", folder.display());
}

#[test]
fn seeds_and_findings_are_read_without_harm() {
    replay("../fixtures/images", picture);
    replay("seeds/picture", picture);
    replay("seeds/request", request);
    replay("seeds/tensor", tensor);
    replay("seeds/cache_value", cache_value);
}
