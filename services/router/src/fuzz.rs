//! Doors for the fuzz targets of `tests/fuzz` to what reads strangers' bytes here. No interface: nothing else may use
//! them. Each panics if what it reads is accepted and not what it should be.

use bytes::Bytes;
use emu2_proto::{
    capable,
    v1::{Dtype, EmbedRequest, GenerateRequest},
};
use emu2_serve::status::Violation;
use prost::Message;
use tonic::Code;

use crate::{
    cache::{self, Kind, Recipe, Value},
    config::LimitsConfig,
    model::Profile,
    request,
};

/// A model that can do everything.
fn profile() -> Profile {
    let (encoder, llm, decoder) = (capable::encoder(), capable::llm(), capable::decoder());
    Profile { encoder: encoder.into(), llm: llm.into(), decoder: Some(decoder.into()) }
}

pub fn generate_request(bytes: &[u8]) {
    let Ok(sent) = GenerateRequest::decode(bytes) else { return };
    let limits = LimitsConfig { max_parts: 16, max_images: 8, ..Default::default() };
    match request::check(sent.clone(), &limits, &profile()) {
        Ok(checked) => {
            assert!(checked.images.len() <= limits.max_images as usize);
            assert!(checked.images.iter().all(|image| !image.field.is_empty()));
            assert!(sent.seed.is_none_or(|seed| seed == checked.seed));
        }
        Err(violations) => assert_said(&violations),
    }
}

pub fn embed_request(bytes: &[u8]) {
    let Ok(sent) = EmbedRequest::decode(bytes) else { return };
    if let Err(violations) = request::check_embed(sent, &profile()) {
        assert_said(&violations);
    }
}

fn assert_said(violations: &[Violation]) {
    assert!(!violations.is_empty(), "refused without a reason");
}

/// The bytes as Redis might answer them, and again with the checksum that belongs to them, so that what is behind
/// the checksum is read too.
pub fn cache_value(bytes: &[u8]) {
    let recipe = Recipe {
        kind: Kind::Image,
        weights_digest: "d",
        preprocessing_version: 1,
        n_query: 64,
        dtype: Dtype::F32,
        tenant: "default",
        content: b"fuzz",
    };
    let key = recipe.key();
    let mut sealed = bytes.to_vec();
    sealed.extend_from_slice(blake3::keyed_hash(key.bytes(), bytes).as_bytes());
    for value in [Bytes::copy_from_slice(bytes), sealed.into()] {
        let Ok(read) = cache::decode(&key, value.clone()) else { continue };
        match &read {
            Value::Tensor(tensor) => assert!(cache::is_whole(tensor)),
            Value::Refusal(status) => assert_eq!(status.code(), Code::InvalidArgument),
        }
        assert!(cache::encode(&key, &read).is_none_or(|written| written == value));
    }
}
