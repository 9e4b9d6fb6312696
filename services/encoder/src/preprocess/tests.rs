//! Against Pillow's results (tests/fixtures/images, written by its make.py) and the official transform's (golden-a).

use emu2_nn::golden;
use serde::Deserialize;
use tch::{Kind, Tensor};

use super::{
    decode::{ImageError, ImageLimits, Rgb, decode},
    normalise, preprocess,
    resize::resize,
};
use crate::tests::fixtures;

#[derive(Deserialize)]
struct Manifest {
    decode: Vec<DecodeCase>,
    resize: Vec<ResizeCase>,
    refuse: Vec<RefuseCase>,
}

#[derive(Deserialize)]
struct DecodeCase {
    file: String,
    expected: String,
    width: usize,
    height: usize,
    damage: Option<String>,
}

#[derive(Deserialize)]
struct ResizeCase {
    source: String,
    width: usize,
    height: usize,
    side: usize,
    expected: String,
}

#[derive(Deserialize)]
struct RefuseCase {
    file: String,
    reason: String,
}

fn manifest() -> Manifest {
    serde_json::from_slice(&fixtures::file("manifest.json")).unwrap()
}

/// Largest and mean absolute difference.
fn difference(got: &[u8], want: &[u8]) -> (u8, f64) {
    let differences: Vec<u8> = got.iter().zip(want).map(|(got, want)| got.abs_diff(*want)).collect();
    let total: f64 = differences.iter().map(|&difference| f64::from(difference)).sum();
    (differences.iter().copied().max().unwrap_or(0), total / got.len() as f64)
}

#[test]
fn every_image_decodes_as_pillow_does() {
    let cases = manifest().decode;
    assert!(cases.len() > 130, "only {} cases", cases.len());
    let mut wrong = Vec::new();
    for case in cases {
        let got = match decode(&fixtures::file(&case.file), &ImageLimits::default()) {
            Ok(decoded) => {
                let told = decoded.damage.join(", ");
                match &case.damage {
                    Some(damage) if !told.contains(damage) => {
                        wrong.push(format!("{}: told {told:?}", case.file))
                    }
                    None if !told.is_empty() => wrong.push(format!("{}: told {told:?}", case.file)),
                    _ => {}
                }
                decoded.image
            }
            Err(error) => {
                wrong.push(format!("{}: {error}", case.file));
                continue;
            }
        };
        if (got.width, got.height) != (case.width, case.height) {
            wrong.push(format!("{}: {} x {}", case.file, got.width, got.height));
            continue;
        }
        let (worst, mean) = difference(&got.data, &fixtures::file(&case.expected));
        if worst > 0 {
            wrong.push(format!("{}: off by at most {worst}, {mean:.3} on average", case.file));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_bad_image_is_refused_for_its_reason() {
    let cases = manifest().refuse;
    assert!(cases.len() > 15, "only {} cases", cases.len());
    for case in cases {
        let error = decode(&fixtures::file(&case.file), &ImageLimits::default()).unwrap_err();
        let reason = match &error {
            ImageError::Empty => "empty",
            ImageError::UnknownFormat(_) => "unknown",
            ImageError::NotAccepted { format, .. } => format,
            ImageError::TooManyPixels { .. } | ImageError::TooLong { .. } => "pixels",
            ImageError::Animated(_) => "animated",
            ImageError::Truncated(_) => "truncated",
            ImageError::Damaged(_) => "damaged",
            ImageError::Undecodable { .. } => "undecodable",
        };
        assert_eq!(reason, case.reason, "{}: {error}", case.file);
    }
}

#[test]
fn refusals_say_limit_and_value() {
    let error = |file, limits: ImageLimits| decode(&fixtures::file(file), &limits).unwrap_err().to_string();
    let huge = error("huge_header.png", ImageLimits::default());
    assert!(huge.contains("67108864") && huge.contains("60000 x 60000"), "{huge}");
    let long = error("one_row.png", ImageLimits { max_side: 39, ..ImageLimits::default() });
    assert!(long.contains("39") && long.contains("40 x 1"), "{long}");
    assert!(error("text.txt", ImageLimits::default()).contains("PNG, JPEG, WebP, BMP or single-frame GIF"));
    let tiff = error("little.tiff", ImageLimits::default());
    assert!(tiff.ends_with("got TIFF: convert it to PNG, as with `magick FILE image.png`"), "{tiff}");
    assert!(error("animated.gif", ImageLimits::default()).contains("send frames as video"));
}

#[test]
fn a_damaged_image_is_refused_where_that_is_configured() {
    let limits = ImageLimits { refuse_damaged: true, ..ImageLimits::default() };
    for case in manifest().decode {
        let decoded = decode(&fixtures::file(&case.file), &limits);
        assert_eq!(matches!(decoded, Err(ImageError::Damaged(_))), case.damage.is_some(), "{}", case.file);
    }
    let error = decode(&fixtures::file("ends_early.jpg"), &limits).unwrap_err().to_string();
    assert!(error.contains("the JPEG ends early; the rest is grey"), "{error}");
}

#[test]
fn a_jpeg_of_very_many_scans_is_refused() {
    // A whole scan that may come again and again, each time over all of the image.
    let jpeg = fixtures::file("scans1.jpg");
    let scan = jpeg.windows(2).position(|pair| pair == [0xFF, 0xDA]).unwrap();
    let end = jpeg.len() - 2;
    let with_scans = |count| [&jpeg[..scan], &jpeg[scan..end].repeat(count), &jpeg[end..]].concat();
    let limits = ImageLimits::default();
    let image = |jpeg: &[u8]| decode(jpeg, &limits).unwrap().image;
    assert_eq!(image(&with_scans(200)), image(&jpeg));
    let error = decode(&with_scans(10_000), &limits).unwrap_err().to_string();
    assert!(error.contains("more than 256 scans"), "{error}");
}

#[test]
fn the_resize_is_pillows_to_the_byte() {
    for case in manifest().resize {
        let source = Rgb { width: case.width, height: case.height, data: fixtures::file(&case.source) };
        let got = resize(source, case.side);
        let (worst, _) = difference(&got.data, &fixtures::file(&case.expected));
        assert_eq!(got.data.len(), case.side * case.side * 3, "{}", case.expected);
        assert_eq!(worst, 0, "{}", case.expected);
    }
}

fn golden_image(golden: &golden::Golden, name: &str) -> Rgb {
    let tensor = golden.tensor(name);
    let (height, width, _) = tensor.size3().unwrap();
    Rgb { width: width as usize, height: height as usize, data: bytes(&tensor) }
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    tensor.contiguous().view(-1).try_into().unwrap()
}

#[test]
fn the_official_transform_is_met() {
    let golden = golden::file("preprocess.safetensors");
    for (name, side) in [("img0", 56), ("img0", 448), ("img1", 56)] {
        let resized = resize(golden_image(&golden, &format!("{name}.rgb_u8")), side);
        assert_eq!(
            resized.data,
            bytes(&golden.tensor(&format!("{name}.resized{side}_u8"))),
            "{name} at {side}"
        );
        let side = side as i64;
        let pixels = Tensor::from_slice(&normalise(&resized)).view([3, side, side]);
        let (want, pixels) = match side {
            448 => (golden.tensor("img0.pixels448_rows0_32"), pixels.narrow(1, 0, 32)),
            _ => (golden.tensor(&format!("{name}.pixels56")), pixels),
        };
        golden::assert_close(&format!("{name} pixels at {side}"), &pixels, &want, 1e-6);
    }
}

#[test]
fn a_whole_file_becomes_pixels() {
    let golden = golden::file("preprocess.safetensors");
    let png = fixtures::png(&golden_image(&golden, "img1.rgb_u8"));
    let pixels =
        preprocess(&super::Subject::Encoded(png.into()), 56, &ImageLimits::default()).unwrap().pixels;
    let pixels = Tensor::from_slice(&pixels).view([3, 56, 56]).to_kind(Kind::Float);
    golden::assert_close("img1", &pixels, &golden.tensor("img1.pixels56"), 1e-6);
}
