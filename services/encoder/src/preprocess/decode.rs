//! Encoded bytes -> RGB, as Pillow's `Image.open(…).convert("RGB")`: alpha is dropped, not blended; transparency of a
//! palette or colour key is ignored; inks are inverted; 16-bit colour keeps its high byte, but 16-bit grey is clipped.
//!
//! The format is told by its first bytes, and the header is read and judged before anything the size of the image
//! is allocated. What a refused image costs is then bounded by its bytes; an accepted one needs at most about 16
//! bytes a pixel at once (a progressive CMYK's coefficients, planes and inks).

use std::io::Cursor;

pub use super::pixels::{Decoded, ImageError, ImageLimits, Rgb};
use super::{
    bmp, foreign, jpeg,
    mend::{self, Mended},
    pixels::{colour_of, samples, undecodable},
};

/// Decodes an image of any of the formats that are told apart here, to [height, width, 3] bytes.
///
/// # Errors
///
/// The bytes are none of the formats, or a broken, truncated or animated file of one, or the image is beyond a limit,
/// or the file is damaged and the limits say that it is to be refused.
pub fn decode(encoded: &[u8], limits: &ImageLimits) -> Result<Decoded, ImageError> {
    let decoded = decode_any(encoded, limits)?;
    if limits.refuse_damaged && !decoded.damage.is_empty() {
        return Err(ImageError::Damaged(decoded.damage.join(", ")));
    }
    Ok(decoded)
}

fn decode_any(encoded: &[u8], limits: &ImageLimits) -> Result<Decoded, ImageError> {
    Ok(match encoded {
        [] => return Err(ImageError::Empty),
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1A, b'\n', ..] => {
            mended(encoded, limits, decode_png, mend::png)?
        }
        [0xFF, 0xD8, 0xFF, ..] => jpeg::decode(encoded, limits)?,
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => {
            mended(encoded, limits, decode_webp, mend::webp)?
        }
        [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => match mend::gif(encoded) {
            // Before the decoder, which takes a break behind the first frame for the end.
            Some(Mended { file, damage }) => Decoded { image: decode_gif(&file, limits)?, damage },
            None => decode_gif(encoded, limits)?.into(),
        },
        [b'B', b'M', ..] => bmp::decode(encoded, limits)?.into(),
        _ => {
            return Err(match foreign::named(encoded) {
                Some((format, advice)) => ImageError::NotAccepted { format, advice },
                None => ImageError::UnknownFormat(encoded.len()),
            });
        }
    })
}

/// Decodes a file or, where that fails, what can be made of it.
fn mended(
    encoded: &[u8],
    limits: &ImageLimits,
    decode: fn(&[u8], &ImageLimits) -> Result<Rgb, ImageError>,
    mend: fn(&[u8]) -> Option<Mended>,
) -> Result<Decoded, ImageError> {
    match decode(encoded, limits) {
        Err(error @ (ImageError::Truncated(_) | ImageError::Undecodable { .. })) => {
            let Some(Mended { file, damage }) = mend(encoded) else { return Err(error) };
            let image = decode(&file, limits).map_err(|_| error)?;
            Ok(Decoded { image, damage })
        }
        decoded => Ok(decoded?.into()),
    }
}

fn decode_png(encoded: &[u8], limits: &ImageLimits) -> Result<Rgb, ImageError> {
    let error = |error| match error {
        png::DecodingError::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            ImageError::Truncated("PNG")
        }
        error => undecodable("PNG", error),
    };
    let mut decoder = png::Decoder::new(Cursor::new(encoded));
    // Neither changes a pixel, and both may unpack to much more than they take.
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    // As zlib, which Pillow uses: the sum over the pixels counts, whatever becomes of the chunks' sums.
    decoder.ignore_checksums(false);
    let header = decoder.read_header_info().map_err(error)?;
    let (width, height) = limits.check("PNG", header.width.into(), header.height.into())?;
    let mut reader = decoder.read_info().map_err(error)?;
    if let Some(animation) = reader.info().animation_control {
        // Without a frame control before it, the first image is one more than the animation's frames.
        let frames = u64::from(animation.num_frames) + u64::from(reader.info().frame_control.is_none());
        if frames > 1 {
            return Err(ImageError::Animated("PNG"));
        }
    }
    let to_rgb = PngRow::of(reader.info())?;
    let mut data = Vec::with_capacity(width * height * 3);
    if reader.info().interlaced {
        let line =
            reader.output_line_size(width as u32).ok_or(png::DecodingError::LimitsExceeded).map_err(error)?;
        let mut samples = vec![0; line * height];
        reader.next_frame(&mut samples).map_err(error)?;
        samples.chunks_exact(line).for_each(|row| to_rgb.convert(row, width, &mut data));
    } else {
        while let Some(row) = reader.next_row().map_err(error)? {
            to_rgb.convert(row.data(), width, &mut data);
        }
    }
    Ok(Rgb { width, height, data })
}

/// How a row of a PNG's samples becomes RGB.
struct PngRow {
    bits: usize,
    colour: png::ColorType,
    /// RGB of each index; what lies past its end is black.
    palette: Vec<u8>,
}

impl PngRow {
    fn of(info: &png::Info) -> Result<Self, ImageError> {
        let palette = info.palette.as_deref().unwrap_or_default().to_vec();
        if info.color_type == png::ColorType::Indexed && palette.is_empty() {
            return Err(undecodable("PNG", "its palette is missing"));
        }
        Ok(Self { bits: info.bit_depth as usize, colour: info.color_type, palette })
    }

    fn convert(&self, row: &[u8], width: usize, rgb: &mut Vec<u8>) {
        use png::ColorType::{Grayscale, GrayscaleAlpha, Indexed, Rgb, Rgba};
        match (self.colour, self.bits) {
            (Rgb, 8) => rgb.extend_from_slice(row),
            (Rgb, _) => rgb.extend(row.chunks_exact(2).map(|sample| sample[0])),
            (Rgba, 8) => row.chunks_exact(4).for_each(|pixel| rgb.extend_from_slice(&pixel[..3])),
            (Rgba, _) => row.chunks_exact(8).for_each(|pixel| rgb.extend([pixel[0], pixel[2], pixel[4]])),
            (GrayscaleAlpha, bits) => row.chunks_exact(bits / 4).for_each(|pixel| rgb.extend([pixel[0]; 3])),
            // Pillow keeps 16-bit grey as integers and clips them to a byte, so that 256 and above are white.
            (Grayscale, 16) => row.chunks_exact(2).for_each(|sample| {
                rgb.extend([if sample[0] == 0 { sample[1] } else { 255 }; 3]);
            }),
            (Grayscale, bits) => {
                let white = 255 / ((1 << bits) - 1);
                samples(row, bits, width).for_each(|grey| rgb.extend([grey * white as u8; 3]));
            }
            (Indexed, bits) => {
                samples(row, bits, width).for_each(|index| rgb.extend(colour_of(&self.palette, index)));
            }
        }
    }
}

/// A known hole: the tables of a lossless WebP's codes are built from its bytes without regard to its sides, up to
/// about 300 times the bytes; the crate offers no bound for them but the message limit.
fn decode_webp(encoded: &[u8], limits: &ImageLimits) -> Result<Rgb, ImageError> {
    // The container states its length, less the eight bytes that state it.
    let stated = u32::from_le_bytes([encoded[4], encoded[5], encoded[6], encoded[7]]) as usize;
    let whole = encoded.len() - 8 >= stated;
    let error = |error| if whole { undecodable("WebP", error) } else { ImageError::Truncated("WebP") };
    let mut decoder = image_webp::WebPDecoder::new(Cursor::new(encoded)).map_err(error)?;
    let (width, height) = decoder.dimensions();
    let (width, height) = limits.check("WebP", width.into(), height.into())?;
    if decoder.is_animated() {
        return decode_webp_frame(encoded, (width, height), limits);
    }
    check_webp_frame(encoded, (width, height))?;
    let channels = if decoder.has_alpha() { 4 } else { 3 };
    let mut data = vec![0; width * height * channels];
    decoder.read_image(&mut data).map_err(error)?;
    if channels == 4 {
        drop_alpha(&mut data);
    }
    Ok(Rgb { width, height, data })
}

/// An animation of one frame is one image: the frame, and black around it.
fn decode_webp_frame(
    encoded: &[u8],
    (width, height): (usize, usize),
    limits: &ImageLimits,
) -> Result<Rgb, ImageError> {
    let mut frames = mend::chunks(encoded, 12).filter(|(kind, _)| kind == b"ANMF").map(|(_, frame)| frame);
    let frame = frames.next().ok_or(ImageError::Truncated("WebP"))?;
    if frames.next().is_some() {
        return Err(ImageError::Animated("WebP"));
    }
    let (header, image) = frame.split_at_checked(16).ok_or(ImageError::Truncated("WebP"))?;
    if ![b"VP8 ", b"VP8L", b"ALPH"].iter().any(|&kind| image.starts_with(kind)) {
        return Err(undecodable("WebP", "its frame holds no image"));
    }
    let three_bytes =
        |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], 0]) as usize;
    let (left, top) = (three_bytes(0) * 2, three_bytes(3) * 2);
    let sides = (three_bytes(6) + 1, three_bytes(9) + 1);
    // The frame as a file of its own, with the header that alpha needs.
    let mut still = b"RIFF\0\0\0\0WEBP".to_vec();
    if image.starts_with(b"ALPH") {
        still.extend(b"VP8X\x0a\0\0\0\x10\0\0\0");
        still.extend(&header[6..12]);
    }
    still.extend(image);
    let length = still.len() as u32 - 8;
    still[4..8].copy_from_slice(&length.to_le_bytes());
    let frame = decode_webp(&still, limits)?;
    if (frame.width, frame.height) != sides {
        return Err(undecodable("WebP", "its frame has other sides than it states"));
    }
    if left + frame.width > width || top + frame.height > height {
        return Err(undecodable("WebP", "its frame passes the edge of its canvas"));
    }
    let mut data = vec![0; width * height * 3];
    for (y, row) in frame.data.chunks_exact(frame.width * 3).enumerate() {
        let start = ((top + y) * width + left) * 3;
        data[start..start + row.len()].copy_from_slice(row);
    }
    Ok(Rgb { width, height, data })
}

/// The extended header states the sides of the canvas; the crate allocates a lossy frame by the frame's own header
/// and compares them later.
fn check_webp_frame(encoded: &[u8], canvas: (usize, usize)) -> Result<(), ImageError> {
    let mut at = 12;
    while let Some(header) = encoded.get(at..at + 18) {
        if &header[..4] == b"VP8 " {
            let side = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]) & 0x3FFF);
            if (side(14), side(16)) != canvas {
                return Err(undecodable("WebP", "its frame does not fill its canvas"));
            }
        }
        let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
        at += 8 + length + length % 2;
    }
    Ok(())
}

/// Drops every fourth byte, in place: RGBA -> RGB.
fn drop_alpha(data: &mut Vec<u8>) {
    let pixels = data.len() / 4;
    for pixel in 1..pixels {
        data.copy_within(pixel * 4..pixel * 4 + 3, pixel * 3);
    }
    data.truncate(pixels * 3);
}

fn decode_gif(encoded: &[u8], limits: &ImageLimits) -> Result<Rgb, ImageError> {
    let error = |error| match error {
        gif::DecodingError::UnexpectedEof => ImageError::Truncated("GIF"),
        gif::DecodingError::Io(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            ImageError::Truncated("GIF")
        }
        error => undecodable("GIF", error),
    };
    let mut decoder = gif::DecodeOptions::new().read_info(encoded).map_err(error)?;
    let (screen_width, screen_height) = (usize::from(decoder.width()), usize::from(decoder.height()));
    limits.check("GIF", screen_width.max(1) as u64, screen_height.max(1) as u64)?;
    let frame =
        decoder.next_frame_info().map_err(error)?.ok_or_else(|| undecodable("GIF", "it has no frame"))?;
    let frame = GifFrame::of(frame);
    // As Pillow does, the screen grows to hold a frame that passes its edge.
    let width = screen_width.max(frame.left + frame.width);
    let height = screen_height.max(frame.top + frame.height);
    limits.check("GIF", width as u64, height as u64)?;
    limits.check("GIF", frame.width as u64, frame.height as u64)?;
    let palette = decoder.palette().map_err(error)?.to_vec();
    let mut indices = vec![0; frame.width * frame.height];
    decoder.read_into_buffer(&mut indices).map_err(error)?;
    // A file that ends or breaks after its first frame still is one image.
    if let Ok(Some(_)) = decoder.next_frame_info() {
        return Err(ImageError::Animated("GIF"));
    }
    let mut data = colour_of(&palette, frame.background).repeat(width * height);
    for (y, row) in indices.chunks_exact(frame.width).enumerate() {
        let start = ((frame.top + y) * width + frame.left) * 3;
        for (pixel, &index) in data[start..].chunks_exact_mut(3).zip(row) {
            pixel.copy_from_slice(&colour_of(&palette, index));
        }
    }
    Ok(Rgb { width, height, data })
}

struct GifFrame {
    left: usize,
    top: usize,
    width: usize,
    height: usize,
    /// Index of what the frame does not cover: Pillow takes the transparent one, else the first; never the file's
    /// background.
    background: u8,
}

impl GifFrame {
    fn of(frame: &gif::Frame) -> Self {
        Self {
            left: frame.left.into(),
            top: frame.top.into(),
            width: frame.width.into(),
            height: frame.height.into(),
            background: frame.transparent.unwrap_or(0),
        }
    }
}
