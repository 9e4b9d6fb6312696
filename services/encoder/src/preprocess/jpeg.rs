//! JPEG by Pillow's rules over the library that Pillow uses: components and colour models, inks, and where a file may
//! end.

use super::{
    libjpeg::{Decompressor, Failure, Samples},
    pixels::{ImageError, ImageLimits, Rgb, undecodable},
};

pub(super) fn decode(encoded: &[u8], limits: &ImageLimits) -> Result<Rgb, ImageError> {
    let mut decompressor = Decompressor::new(encoded);
    let header = decompressor.read_header()?;
    let (width, height) = limits.check("JPEG", header.width.into(), header.height.into())?;
    let mut data = vec![0; width * height * 3];
    let rows = data.chunks_exact_mut(width * 3);
    match header.components {
        1 | 3 => {
            decompressor.start(Samples::Rgb)?;
            for row in rows {
                decompressor.read_row(row)?;
            }
        }
        4 => {
            decompressor.start(Samples::Inks)?;
            let mut inks = vec![0; width * 4];
            for row in rows {
                decompressor.read_row(&mut inks)?;
                for (rgb, inks) in row.chunks_exact_mut(3).zip(inks.chunks_exact(4)) {
                    rgb.copy_from_slice(&rgb_of_inks(inks));
                }
            }
        }
        components => return Err(undecodable("JPEG", format!("it has {components} components"))),
    }
    // Once every row is there, the end-of-image marker may be missing, but what comes instead is still judged.
    decompressor.finish()?;
    Ok(Rgb { width, height, data })
}

/// Each ink takes its share of what black leaves of the light, rounded as Pillow rounds it. Whether or not Adobe's
/// marker says so, Pillow takes inks as Adobe writes them, inverted: the samples are what is left of the light.
fn rgb_of_inks(samples: &[u8]) -> [u8; 3] {
    let light = u32::from(samples[3]);
    [samples[0], samples[1], samples[2]].map(|sample| {
        let product = u32::from(255 - sample) * light + 128;
        // product / 255, rounded, without dividing; never above `light`.
        (light - (((product >> 8) + product) >> 8)) as u8
    })
}

impl From<Failure> for ImageError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Ended => Self::Truncated("JPEG"),
            Failure::Broken(reason) => undecodable("JPEG", reason),
        }
    }
}
