//! Windows and OS/2 bitmaps by Pillow's rules: which bit fields are known, how 5- and 6-bit channels widen, what a run
//! that overflows its row does, and that a fourth byte is never alpha enough to matter.

use super::pixels::{ImageError, ImageLimits, Rgb, colour_of, samples, undecodable};

const FILE_HEADER: usize = 14;

/// What a bitmap's headers say.
struct Header {
    width: usize,
    height: usize,
    top_down: bool,
    bits: u16,
    compression: Compression,
    /// Red, green, blue and alpha of a 16- or 32-bit pixel.
    masks: Option<[u32; 4]>,
    /// Red, green and blue of each index.
    palette: Vec<u8>,
    /// The offset at which the rows begin.
    data: usize,
}

/// Appends one row's pixels to RGB.
type RowConverter<'a> = Box<dyn Fn(&[u8], &mut Vec<u8>) + 'a>;

#[derive(Clone, Copy, PartialEq)]
enum Compression {
    None,
    RunLength8,
    RunLength4,
}

pub(super) fn decode(encoded: &[u8], limits: &ImageLimits) -> Result<Rgb, ImageError> {
    let header = Header::read(encoded, limits)?;
    let data = encoded.get(header.data..).ok_or(TRUNCATED)?;
    let mut rows = match header.compression {
        Compression::None => header.plain_rows(data)?,
        Compression::RunLength8 | Compression::RunLength4 => header.run_length_rows(data)?,
    };
    if !header.top_down {
        flip(&mut rows, header.width * 3);
    }
    Ok(Rgb { width: header.width, height: header.height, data: rows })
}

const TRUNCATED: ImageError = ImageError::Truncated("BMP");

fn flip(rows: &mut [u8], stride: usize) {
    let (top, bottom) = rows.split_at_mut(rows.len() / stride / 2 * stride);
    let swaps = top.chunks_exact_mut(stride).zip(bottom.rchunks_exact_mut(stride));
    swaps.for_each(|(upper, lower)| upper.swap_with_slice(lower));
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, ImageError> {
    let bytes = bytes.get(at..at + 2).ok_or(TRUNCATED)?;
    Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, ImageError> {
    let bytes = bytes.get(at..at + 4).ok_or(TRUNCATED)?;
    Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

impl Header {
    fn read(encoded: &[u8], limits: &ImageLimits) -> Result<Self, ImageError> {
        let stated_data = u32_at(encoded, 10)? as usize;
        let info = &encoded[FILE_HEADER..];
        let size = u32_at(info, 0)? as usize;
        match size {
            // OS/2: sides of 16 bits, palette entries of three bytes, never compressed.
            12 => {
                let (width, height) = (u16_at(info, 4)?, u16_at(info, 6)?);
                let (width, height) = limits.check("BMP", width.into(), height.into())?;
                let bits = u16_at(info, 10)?;
                let mut header = Self {
                    width,
                    height,
                    top_down: false,
                    bits,
                    compression: Compression::None,
                    masks: None,
                    palette: Vec::new(),
                    data: stated_data,
                };
                header.read_palette(encoded, FILE_HEADER + size, 3, 0)?;
                Ok(header)
            }
            40 | 52 | 56 | 64 | 108 | 124 => Self::read_windows(encoded, size, stated_data, limits),
            _ => Err(undecodable("BMP", format!("its header is of the unknown size {size}"))),
        }
    }

    fn read_windows(
        encoded: &[u8],
        size: usize,
        stated_data: usize,
        limits: &ImageLimits,
    ) -> Result<Self, ImageError> {
        let info = &encoded[FILE_HEADER..];
        // A negative height means rows from the top.
        let height = u32_at(info, 8)? as i32;
        let width = u32_at(info, 4)?;
        let (width, height_px) = limits.check("BMP", width.into(), height.unsigned_abs().into())?;
        let bits = u16_at(info, 14)?;
        let mut tables = FILE_HEADER + size;
        let mut masks = None;
        let compression = match u32_at(info, 16)? {
            0 => Compression::None,
            1 if bits == 8 => Compression::RunLength8,
            2 if bits == 4 => Compression::RunLength4,
            3 => {
                // Masks are the end of a long header, or follow a short one.
                let alpha = if size >= 56 { u32_at(info, 52)? } else { 0 };
                masks = Some([u32_at(info, 40)?, u32_at(info, 44)?, u32_at(info, 48)?, alpha]);
                tables += if size < 52 { 12 } else { 0 };
                Compression::None
            }
            other => {
                return Err(undecodable("BMP", format!("compression {other} at {bits} bits is unknown")));
            }
        };
        let top_down = height < 0;
        let palette = Vec::new();
        let data = stated_data;
        let mut header = Self { width, height: height_px, top_down, bits, compression, masks, palette, data };
        header.read_palette(encoded, tables, 4, u32_at(info, 32)?)?;
        Ok(header)
    }

    /// `colours` 0 means as many as the bits can tell.
    fn read_palette(
        &mut self,
        encoded: &[u8],
        at: usize,
        entry: usize,
        colours: u32,
    ) -> Result<(), ImageError> {
        if self.bits > 8 {
            return Ok(());
        }
        // No more than an index can reach, whatever the header claims.
        let most = 1 << self.bits;
        let colours = if colours == 0 { most } else { (colours as usize).min(most) };
        let end = at + colours * entry;
        // Some writers state that the rows begin where the palette does.
        if self.data == at {
            self.data = end;
        }
        let entries = encoded.get(at..end).ok_or(TRUNCATED)?;
        self.palette = entries.chunks_exact(entry).flat_map(|bgr| [bgr[2], bgr[1], bgr[0]]).collect();
        Ok(())
    }

    fn plain_rows(&self, data: &[u8]) -> Result<Vec<u8>, ImageError> {
        // Rows are padded to four bytes; the padding of the last one may be missing.
        let used = (self.width * usize::from(self.bits)).div_ceil(8);
        let stride = used.next_multiple_of(4);
        if data.len() < stride * (self.height - 1) + used {
            return Err(TRUNCATED);
        }
        let convert = self.row_converter()?;
        let mut rgb = Vec::with_capacity(self.width * self.height * 3);
        for row in data.chunks(stride).take(self.height) {
            convert(&row[..used], &mut rgb);
        }
        Ok(rgb)
    }

    fn row_converter(&self) -> Result<RowConverter<'_>, ImageError> {
        let unknown =
            || undecodable("BMP", format!("bit fields {:x?} at {} bits are unknown", self.masks, self.bits));
        Ok(match self.bits {
            1 | 4 | 8 => {
                let (bits, width) = (usize::from(self.bits), self.width);
                Box::new(move |row, rgb| {
                    samples(row, bits, width).for_each(|index| rgb.extend(colour_of(&self.palette, index)));
                })
            }
            16 => {
                let green_bits = match self.masks {
                    None | Some([0x7C00, 0x3E0, 0x1F, _]) => 5,
                    Some([0xF800, 0x7E0, 0x1F, _]) => 6,
                    Some(_) => return Err(unknown()),
                };
                Box::new(move |row, rgb| {
                    let pixels = row.chunks_exact(2).map(|pixel| u16::from_le_bytes([pixel[0], pixel[1]]));
                    rgb.extend(pixels.flat_map(|pixel| {
                        [
                            widened(pixel >> (5 + green_bits), 5),
                            widened(pixel >> 5, green_bits),
                            widened(pixel, 5),
                        ]
                    }));
                })
            }
            24 => match self.masks {
                None | Some([0xFF_0000, 0xFF00, 0xFF, _]) => bytes_at::<3>([2, 1, 0]),
                Some(_) => return Err(unknown()),
            },
            32 => match self.masks.unwrap_or_default() {
                [0xFF_0000, 0xFF00, 0xFF, 0 | 0xFF00_0000] | [0, 0, 0, 0] => bytes_at::<4>([2, 1, 0]),
                [0xFF, 0xFF00, 0xFF_0000, 0xFF00_0000] => bytes_at::<4>([0, 1, 2]),
                [0xFF00_0000, 0xFF_0000, 0xFF00, 0 | 0xFF] => bytes_at::<4>([3, 2, 1]),
                [0xFF00_0000, 0xFF00, 0xFF, 0 | 0xFF_0000] => bytes_at::<4>([3, 1, 0]),
                _ => return Err(unknown()),
            },
            bits => return Err(undecodable("BMP", format!("{bits} bits a pixel are unknown"))),
        })
    }

    /// Run lengths as Pillow reads them: what lies past a row's end is dropped in a run but kept in a literal
    /// stretch, skipped pixels take index 0, and data that ends early is an error.
    fn run_length_rows(&self, data: &[u8]) -> Result<Vec<u8>, ImageError> {
        let pixels = self.width * self.height;
        let nibbles = self.compression == Compression::RunLength4;
        let mut indices: Vec<u8> = Vec::with_capacity(pixels);
        // Column of the next pixel as runs count it; a literal stretch may carry it past the row.
        let mut column = 0;
        let mut at = 0;
        while indices.len() < pixels {
            let Some(&[count, value]) = data.get(at..at + 2) else { break };
            at += 2;
            let room = pixels - indices.len();
            match (count, value) {
                (0, 0) => {
                    indices.resize(indices.len().next_multiple_of(self.width), 0);
                    column = 0;
                }
                (0, 1) => break,
                (0, 2) => {
                    let Some(&[right, up]) = data.get(at..at + 2) else { break };
                    at += 2;
                    let skipped = usize::from(right) + usize::from(up) * self.width;
                    indices.resize(indices.len() + skipped.min(room), 0);
                    column = indices.len() % self.width;
                }
                (0, literal) => {
                    let count = usize::from(literal).min(room);
                    let length = if nibbles { count.div_ceil(2) } else { count };
                    let Some(stretch) = data.get(at..at + length) else { break };
                    let bits = if nibbles { 4 } else { 8 };
                    indices.extend(samples(stretch, bits, count));
                    // Stretches start at even places of the file.
                    at = (self.data + at + length).next_multiple_of(2) - self.data;
                    column += usize::from(literal);
                }
                (count, value) => {
                    let count = usize::from(count).min(self.width.saturating_sub(column)).min(room);
                    let (even, odd) = if nibbles { (value >> 4, value & 0xF) } else { (value, value) };
                    indices.extend((0..count).map(|index| if index % 2 == 0 { even } else { odd }));
                    column += count;
                }
            }
        }
        if indices.len() < pixels {
            return Err(TRUNCATED);
        }
        Ok(indices.iter().flat_map(|&index| colour_of(&self.palette, index)).collect())
    }
}

/// The lowest bits of `value`, spread over a byte's range and rounded down.
fn widened(value: u16, bits: u32) -> u8 {
    let most = (1_u16 << bits) - 1;
    ((value & most) * 255 / most) as u8
}

/// Pixels of `SIZE` bytes with red, green and blue at these places.
fn bytes_at<const SIZE: usize>(places: [usize; 3]) -> RowConverter<'static> {
    Box::new(move |row, rgb| {
        row.chunks_exact(SIZE).for_each(|pixel| rgb.extend(places.map(|place| pixel[place])));
    })
}
