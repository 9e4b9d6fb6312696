//! Formats of images that are not accepted, told apart so that a refusal can name them.

/// How the formats that hold pixels become one that is accepted.
const CONVERT: &str = "convert it to PNG, as with `magick FILE image.png`";

/// Returns the name of the format and how to convert it.
pub(super) fn named(encoded: &[u8]) -> Option<(&'static str, &'static str)> {
    Some(match encoded {
        [b'I', b'I', b'*' | b'+', 0, ..] | [b'M', b'M', 0, b'*' | b'+', ..] => ("TIFF", CONVERT),
        [0, 0, 1 | 2, 0, 1..=255, ..] => ("ICO", CONVERT),
        [0, 0, 0, 12, b'j', b'P', b' ', b' ', ..] | [0xFF, 0x4F, 0xFF, 0x51, ..] => ("JPEG 2000", CONVERT),
        [0, 0, 0, 12, b'J', b'X', b'L', b' ', ..] | [0xFF, 0x0A, ..] => ("JPEG XL", CONVERT),
        [_, _, _, length, b'f', b't', b'y', b'p', ..] => match brands(encoded, *length) {
            (true, _) => ("AVIF", CONVERT),
            (_, true) => ("HEIC", CONVERT),
            _ => return None,
        },
        [b'%', b'P', b'D', b'F', b'-', ..] => ("PDF", "render a page, as with `pdftoppm -png FILE page`"),
        _ if is_svg(encoded) => ("SVG", "render it, as with `rsvg-convert --output image.png FILE`"),
        _ => return None,
    })
}

/// Whether a file-type box names AVIF, and whether it names HEIC; a box is far shorter than 256 bytes.
fn brands(encoded: &[u8], length: u8) -> (bool, bool) {
    let brands = &encoded[8..encoded.len().min(usize::from(length).max(8))];
    let names = |known: &[&[u8]]| brands.chunks_exact(4).any(|brand| known.contains(&brand));
    let avif = names(&[b"avif", b"avis"]);
    (avif, names(&[b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"]))
}

/// Whether a text begins as XML and has an `svg` element near its beginning.
fn is_svg(encoded: &[u8]) -> bool {
    let text = encoded.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(encoded).trim_ascii_start();
    text.starts_with(b"<") && text[..text.len().min(4096)].windows(4).any(|window| window == b"<svg")
}
