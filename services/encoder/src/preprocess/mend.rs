//! Files that Pillow shows although they break their format, rewritten so that a strict decoder reads them as Pillow
//! does. A function returns nothing where there is nothing to mend.

/// A rewritten file, and what was wrong with the one that came.
pub(super) struct Mended {
    pub(super) file: Vec<u8>,
    pub(super) damage: Vec<&'static str>,
}

/// Pillow passes over critical chunks that it does not know, over the checksums of pixels, and over whatever should
/// have followed the last row.
pub(super) fn png(encoded: &[u8]) -> Option<Mended> {
    let mut file = encoded.get(..8)?.to_vec();
    let mut damage = Vec::new();
    let mut at = 8;
    loop {
        let Some(header) = encoded.get(at..at + 8) else {
            damage.push("the PNG has no end chunk");
            break;
        };
        let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = &header[4..];
        let end = (at + 8 + length).min(encoded.len());
        let sum = crc32fast::hash(&encoded[at + 4..end]);
        let sound = encoded.get(end..end + 4) == Some(&sum.to_be_bytes()[..]);
        match kind {
            b"IEND" => break,
            b"IDAT" => {
                if !sound {
                    note(&mut damage, "the checksum of the PNG's pixels is wrong");
                }
                file.extend(((end - at - 8) as u32).to_be_bytes());
                file.extend(&encoded[at + 4..end]);
                file.extend(sum.to_be_bytes());
            }
            _ if !sound => return None,
            // In capitals: a decoder must know it.
            [b'A'..=b'Z', ..] if kind != b"IHDR" && kind != b"PLTE" => {
                note(&mut damage, "the PNG has a critical chunk that is not known");
            }
            _ => file.extend(&encoded[at..end + 4]),
        }
        at = end + 4;
    }
    file.extend(b"\0\0\0\0IEND\xAE\x42\x60\x82");
    (!damage.is_empty()).then_some(Mended { file, damage })
}

/// Pillow passes over bytes between the blocks of a GIF, and takes an index without any palette as a grey.
pub(super) fn gif(encoded: &[u8]) -> Option<Mended> {
    let table = |flags: u8| if flags & 0x80 == 0 { 0 } else { 3 << ((flags & 7) + 1) };
    let flags = *encoded.get(10)?;
    let mut file = encoded.get(..13 + table(flags))?.to_vec();
    let mut damage = Vec::new();
    let mut at = file.len();
    while let Some(&introducer) = encoded.get(at) {
        let blocks = match introducer {
            b'!' => at + 2,
            b',' => {
                let local = table(*encoded.get(at + 9)?);
                if local == 0 && table(flags) == 0 && file[10] & 0x80 == 0 {
                    file[10] |= 0x87;
                    file.splice(13..13, (0..=255).flat_map(|grey| [grey; 3]));
                }
                at + 10 + local + 1
            }
            b';' => {
                file.push(b';');
                break;
            }
            _ => {
                note(&mut damage, "the GIF has bytes between its blocks");
                at += 1;
                continue;
            }
        };
        let mut end = blocks;
        // What is cut off is for the decoder to tell.
        while let Some(&length) = encoded.get(end) {
            end += 1 + usize::from(length);
            if length == 0 {
                break;
            }
        }
        file.extend(encoded.get(at..end).unwrap_or(&encoded[at..]));
        at = end;
    }
    (file != encoded).then_some(Mended { file, damage })
}

/// Once, though it may be met at every byte.
fn note(damage: &mut Vec<&'static str>, what: &'static str) {
    if !damage.contains(&what) {
        damage.push(what);
    }
}

/// libwebp takes an image as opaque whose header promises alpha that is not there.
pub(super) fn webp(encoded: &[u8]) -> Option<Mended> {
    const ALPHA: u8 = 0x10;
    let extended = encoded.get(12..16) == Some(b"VP8X") && encoded.get(20)? & ALPHA != 0;
    if !extended || chunks(encoded, 12).any(|(kind, _)| kind == b"ALPH") {
        return None;
    }
    let mut file = encoded.to_vec();
    file[20] &= !ALPHA;
    Some(Mended { file, damage: vec!["the WebP has no alpha although its header promises it"] })
}

/// The chunks of a WebP from a place on, each with its whole content.
pub(super) fn chunks(encoded: &[u8], mut at: usize) -> impl Iterator<Item = (&[u8], &[u8])> {
    std::iter::from_fn(move || {
        let header = encoded.get(at..at.checked_add(8)?)?;
        let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
        let content = encoded.get(at + 8..at + 8 + length)?;
        at += 8 + length + length % 2;
        Some((&header[..4], content))
    })
}
