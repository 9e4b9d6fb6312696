//! A disk that is too small, and one that fills up.

use std::process::Command;

use super::*;

/// A file system of 1 MiB, unmounted at the end.
struct Mounted(TempDir);

impl Mounted {
    fn new() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=1m", "emu2-test"]).arg(folder.path());
        mount.output().is_ok_and(|mount| mount.status.success()).then(|| Self(folder))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

/// Four tensors of 128 KiB in bfloat16.
fn half_a_megabyte() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let tensor = |number: usize| Saved::f32s(&format!("t{number}"), &[1 << 16], vec![0.5; 1 << 16]);
    fs::write(folder.path().join("a.bin"), save(&[0, 1, 2, 3].map(tensor))).unwrap();
    folder
}

#[test]
fn a_disk_that_fills_up_stops_the_conversion_and_loses_nothing() {
    let Some(disk) = Mounted::new() else {
        println!("skipped: file systems cannot be mounted here");
        return;
    };
    let input = half_a_megabyte();
    let out = disk.0.path().join("out");
    let conversion = Conversion { shard_bytes: 1 << 17, ..conversion(input.path(), &out) };
    let ballast = disk.0.path().join("ballast");
    let mut begun = 0;
    let outcome = conversion.run(&mut |event| {
        begun += usize::from(matches!(event, Event::Converting(_)));
        if begun == 3 && !ballast.exists() {
            // As much as fits beside 64 KiB.
            let free = rustix::fs::statvfs(&out).unwrap();
            fs::write(&ballast, vec![0; (free.f_bavail * free.f_frsize) as usize - (1 << 16)]).unwrap();
        }
    });
    let error = format!("{:#}", outcome.unwrap_err());
    assert!(
        error.contains("no space left in") && error.contains("2 of 4 shards are finished and stay"),
        "{error}"
    );
    assert!(error.contains("model-00003-of-00004.safetensors"), "{error}");
    // Room for what is left is checked before going on.
    let error = self::error(&conversion);
    assert!(error.contains("needs ") && error.contains(" are free there"), "{error}");
    fs::remove_file(ballast).unwrap();
    assert_eq!(run(&conversion).unwrap(), Summary { shards: 4, kept: 2, bytes: 4 << 17 });
    assert_eq!(converted(&out).len(), 4);
}

#[test]
fn what_cannot_fit_is_refused_before_it_is_begun() {
    // A tensor of 9 terabytes, in a file that has them without a byte being stored.
    const VALUES: u64 = 1 << 41;
    let input = tempfile::tempdir().unwrap();
    let header =
        json!({ "visual.a": { "dtype": "F32", "shape": [VALUES], "data_offsets": [0, 4 * VALUES] } })
            .to_string();
    let path = input.path().join("model.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    if let Err(error) = file.set_len(8 + header.len() as u64 + 4 * VALUES) {
        println!("skipped: this file system has no files of that size: {error}");
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let error = error(&conversion(input.path(), out.path()));
    assert!(error.contains("needs 4.40 TB, and "), "{error}");
    assert!(error.contains(" are free there"), "{error}");
}
