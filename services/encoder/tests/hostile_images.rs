//! Bytes from anybody: no decoder panics on them, and none allocates more than the limits allow.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    path::{Path, PathBuf},
};

use emu2_encoder::preprocess::decode::{Decoded, ImageLimits, decode};
use proptest::{prelude::*, test_runner::RngSeed};

/// Counts what the current thread holds; a decode runs on one thread. What libjpeg takes from C's allocator is not
/// seen: it allocates for an image only after the limits have been checked, at most 8 bytes a pixel.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    HELD.set(HELD.get() + bytes);
    PEAK.set(PEAK.get().max(HELD.get()));
}

// SAFETY: the system's allocator, and counters that do not allocate. The default `realloc` goes through `alloc` and
// `dealloc`, so that both blocks count while both exist.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MAX_PIXELS: u64 = 1 << 16;
/// What `decode` says that an image needs at most.
const BYTES_PER_PIXEL: isize = 16;
/// Tables and buffers of the decoders, whatever the image. A lossy WebP states the length of a partition in 24 bits,
/// and its decoder allocates that before it finds the file shorter.
const FIXED_BYTES: isize = (4 << 20) + (16 << 20);
/// Copies of the file's own bytes.
const COPIES: isize = 4;

/// Decodes under tight limits and returns whether it was accepted.
///
/// # Panics
/// When a decoder does, or when it allocates beyond the bound.
fn decode_within_bounds(name: &str, bytes: &[u8]) -> bool {
    let limits = ImageLimits { max_pixels: MAX_PIXELS, max_side: 8192, refuse_damaged: false };
    let before = HELD.get();
    PEAK.set(before);
    let decoded = decode(bytes, &limits);
    let peak = PEAK.get() - before;
    let bound = MAX_PIXELS as isize * BYTES_PER_PIXEL + FIXED_BYTES + bytes.len() as isize * COPIES;
    assert!(peak <= bound, "{name}: held {peak} bytes, bound {bound}");
    if let Ok(Decoded { image, .. }) = &decoded {
        assert_eq!(image.data.len(), image.width * image.height * 3, "{name}");
    }
    decoded.is_ok()
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/images")
}

/// Every encoded image of the fixtures, by name.
fn images() -> Vec<(String, Vec<u8>)> {
    let formats = ["png", "jpg", "webp", "bmp", "gif"];
    let mut images: Vec<_> = std::fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|format| formats.iter().any(|&known| format == known)))
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap()))
        .collect();
    images.sort();
    assert!(images.len() > 80, "only {} images", images.len());
    images
}

#[test]
fn the_allocator_counts() {
    let before = HELD.get();
    PEAK.set(before);
    drop(vec![0_u8; 12_345]);
    assert_eq!(PEAK.get() - before, 12_345);
    assert_eq!(HELD.get(), before);
}

#[test]
fn every_beginning_of_every_image_is_safe() {
    for (name, bytes) in images() {
        for length in (0..bytes.len()).step_by(3) {
            decode_within_bounds(&format!("{name} cut at {length}"), &bytes[..length]);
        }
    }
}

#[test]
fn a_header_that_claims_much_costs_little() {
    for name in
        ["huge_header.png", "huge_header.bmp", "huge_header.gif", "huge_header.jpg", "huge_header.webp"]
    {
        let bytes = std::fs::read(folder().join(name)).unwrap();
        let before = HELD.get();
        PEAK.set(before);
        assert!(decode(&bytes, &ImageLimits::default()).is_err(), "{name}");
        let peak = PEAK.get() - before;
        assert!(peak < 1 << 20, "{name}: held {peak} bytes");
    }
}

/// The first bytes that choose a decoder.
const BEGINNINGS: [&[u8]; 7] = [
    b"",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"\xff\xd8\xff",
    b"RIFF\x40\0\0\0WEBPVP8",
    b"GIF89a",
    b"BM",
    b"RIFF\x40\0\0\0WEBPVP8X",
];

proptest! {
    // The same cases each time; a million of each found nothing either.
    #![proptest_config(ProptestConfig {
        cases: 5000,
        rng_seed: RngSeed::Fixed(7),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn noise_behind_a_familiar_beginning_is_safe(
        beginning in proptest::sample::select(&BEGINNINGS[..]),
        noise in proptest::collection::vec(any::<u8>(), 0..400),
    ) {
        decode_within_bounds("noise", &[beginning, &noise].concat());
    }

    #[test]
    fn damaged_images_are_safe(
        (name, mut bytes) in proptest::sample::select(images()),
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..12),
        in_header in any::<bool>(),
    ) {
        // Half of the damage goes to the first bytes, where sides and modes are.
        let reach = if in_header { bytes.len().min(64) } else { bytes.len() };
        prop_assume!(reach > 0);
        for (place, byte) in damage {
            bytes[place.index(reach)] = byte;
        }
        // A damaged PNG chunk would be refused by its checksum before anything else: mend it.
        mend(&mut bytes);
        decode_within_bounds(&name, &bytes);
    }
}

/// Rewrites the checksums of a PNG's chunks.
fn mend(bytes: &mut [u8]) {
    let mut at = 8;
    while bytes.starts_with(b"\x89PNG") && at + 12 <= bytes.len() {
        let length = u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]) as usize;
        let Some(end) = at.checked_add(8 + length).filter(|end| end + 4 <= bytes.len()) else { return };
        let sum = crc32(&bytes[at + 4..end]);
        bytes[end..end + 4].copy_from_slice(&sum.to_be_bytes());
        at = end + 4;
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |sum: u32, &byte: &u8| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| (sum >> 1) ^ (0xEDB8_8320 & (sum & 1).wrapping_neg()))
    };
    !bytes.iter().fold(!0, step)
}
