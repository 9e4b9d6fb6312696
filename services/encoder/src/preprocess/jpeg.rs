//! JPEG by Pillow's rules over the library that Pillow uses: components and colour models, inks, and where a file may
//! end.

use super::{
    libjpeg::{Decompressor, Failure, Samples, Warning},
    pixels::{Decoded, ImageError, ImageLimits, Rgb, undecodable},
};

pub(super) fn decode(encoded: &[u8], limits: &ImageLimits) -> Result<Decoded, ImageError> {
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
    let ended = decompressor.finish()?;
    let mut damage: Vec<_> = decompressor.warnings().into_iter().map(damage_of).collect();
    if !ended {
        damage.push("the JPEG has no end-of-image marker");
    }
    Ok(Decoded { image: Rgb { width, height, data }, damage })
}

fn damage_of(warning: Warning) -> &'static str {
    match warning {
        Warning::EndsEarly => "the JPEG ends early; the rest is grey",
        Warning::ScanEndsEarly => "a scan of the JPEG ends early; what it would refine stays coarse",
        Warning::BadCode => "the JPEG's data is corrupt; what follows may be wrong",
        Warning::Restart => "a restart marker of the JPEG is wrong or missing; parts may be lost or moved",
        Warning::Extraneous => "the JPEG has bytes that belong to no part of it",
        Warning::ScanOrder => "the scans of the JPEG are out of order",
        Warning::ScanHeader => "a scan header of the JPEG is wrong and was not heeded",
    }
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
