//! What strangers' bytes reach first, for a fuzzer (`make fuzz`) and, with the seeds, for `make test`. A target returns
//! if all is well and panics if not.
//!
//! | target | bytes are | who reads them |
//! |---|---|---|
//! | [`image`] | an encoded image | the encoder: format, header, pixels |
//! | [`request`] | a public request's protobuf | the router's checks |
//! | [`tensor`] | a tensor's protobuf | every stage |
//! | [`cache_value`] | what Redis answered | the router's cache |

use emu2_proto::{array::Array, v1};
use prost::Message;

/// The encoder's own source, compiled here: the crate that it belongs to links libtorch.
#[allow(
    dead_code,
    unreachable_pub,
    reason = "it is written for the encoder, and not all of it is reached from here"
)]
#[path = "../../../services/encoder/src/preprocess"]
mod preprocess {
    pub mod bmp;
    pub mod decode;
    pub mod foreign;
    pub mod jpeg;
    pub mod libjpeg;
    pub mod mend;
    pub mod pixels;
}

use preprocess::decode::{Decoded, ImageLimits, decode};

/// Small, so that a run spends its time on headers rather than on pixels; the fixtures just fit.
const LIMITS: ImageLimits = ImageLimits { max_pixels: 1 << 12, max_side: 1 << 10, refuse_damaged: false };

/// Whatever is accepted has the pixels that it says, and no more than the limits allow.
pub fn image(bytes: &[u8]) {
    if let Ok(Decoded { image, .. }) = decode(bytes, &LIMITS) {
        assert_eq!(image.data.len(), image.width * image.height * 3);
        assert!((image.width * image.height) as u64 <= LIMITS.max_pixels);
        assert!(image.width.max(image.height) <= LIMITS.max_side as usize);
    }
}

/// Whatever is accepted keeps to the limits; whatever is refused says why. The first byte chooses the request.
pub fn request(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    if kind.is_multiple_of(4) {
        emu2_router::fuzz::embed_request(bytes);
    } else {
        emu2_router::fuzz::generate_request(bytes);
    }
}

/// Whatever is accepted is whole, finite, and the same when it is sent on.
pub fn tensor(bytes: &[u8]) {
    let Ok(sent) = v1::Tensor::decode(bytes) else { return };
    if let Ok(array) = Array::try_from(sent.clone()) {
        assert_eq!(array.values().count(), array.shape().iter().product::<usize>());
        assert!(array.values().all(f32::is_finite));
        assert_eq!(v1::Tensor::from(array), sent);
    }
}

/// Whatever is accepted is whole, and is written as it was read.
pub fn cache_value(bytes: &[u8]) {
    emu2_router::fuzz::cache_value(bytes);
}
