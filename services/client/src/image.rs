//! An image's PNG, whole or in chunks.

use anyhow::{Result, ensure};
use emu2_proto::v1;

/// The PNG of the image that a request generates, as its chunks come.
#[derive(Debug, Default)]
pub struct ChunkedPng(Vec<u8>);

impl ChunkedPng {
    /// Takes the next chunk.
    ///
    /// # Errors
    ///
    /// The chunk does not begin where the one before ended, or goes beyond the total that it states.
    pub fn push(&mut self, chunk: &v1::ImageChunk) -> Result<()> {
        let (has, more) = (self.0.len() as u64, chunk.data.len() as u64);
        ensure!(
            chunk.offset == has,
            "a chunk of an image begins at byte {}, after {has} bytes",
            chunk.offset
        );
        ensure!(has + more <= chunk.total, "an image of {} bytes has {} and more", chunk.total, has + more);
        self.0.extend_from_slice(&chunk.data);
        Ok(())
    }

    /// Returns the image with its whole PNG, once its event has come.
    pub fn finish(&mut self, image: v1::ImageResult) -> v1::ImageResult {
        let png = std::mem::take(&mut self.0);
        if png.is_empty() { image } else { v1::ImageResult { png: png.into(), ..image } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(offset: u64, data: &'static [u8]) -> v1::ImageChunk {
        v1::ImageChunk { data: data.into(), offset, total: 4 }
    }

    #[test]
    fn chunks_in_order_are_the_png_and_none_leave_it_whole() {
        let image = v1::ImageResult { png: b"whole".as_slice().into(), height: 1, width: 2 };
        assert_eq!(ChunkedPng::default().finish(image.clone()), image);
        let mut png = ChunkedPng::default();
        png.push(&chunk(0, b"abc")).unwrap();
        assert!(png.push(&chunk(0, b"abc")).is_err(), "twice the same");
        assert!(png.push(&chunk(3, b"de")).is_err(), "more than there are");
        png.push(&chunk(3, b"d")).unwrap();
        let empty = v1::ImageResult { png: Vec::new().into(), ..image };
        assert_eq!(png.finish(empty).png, b"abcd".as_slice());
    }
}
