//! Doors for the fuzz targets of `tests/fuzz` to what reads strangers' bytes here. No interface: nothing else may use
//! them. Each panics if what it reads is accepted and not what it should be.

use bytes::Bytes;
use emu2_proto::{
    stage::{DecoderInfo, EncoderInfo, LlmInfo},
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
    let dtype = Dtype::F32.into();
    let encoder = EncoderInfo { dtype, width: 1792, grid_side: 32, ..Default::default() };
    let llm = LlmInfo {
        dtype,
        embedding_width: 1792,
        n_query: 64,
        v_query: 64,
        max_positions: 2048,
        instruct: true,
        max_new_tokens: 1024,
        max_beams: 16,
        min_length_penalty: -10.0,
        max_length_penalty: 10.0,
        min_temperature: 0.001,
        max_temperature: 100.0,
        min_repetition_penalty: 0.1,
        max_repetition_penalty: 10.0,
        max_text_bytes: 1 << 16,
        ..Default::default()
    };
    let decoder = DecoderInfo {
        dtype,
        width: 1792,
        default_height: 1024,
        default_width: 1024,
        scale_factor: 8,
        max_image_side: 2048,
        max_steps: 250,
        max_guidance_scale: 100.0,
        max_queries: 1024,
        ..Default::default()
    };
    Profile { encoder: encoder.into(), llm: llm.into(), decoder: Some(decoder.into()) }
}

pub fn generate_request(bytes: &[u8]) {
    let Ok(sent) = GenerateRequest::decode(bytes) else { return };
    let limits = LimitsConfig { max_parts: 16, max_images: 8, ..Default::default() };
    match request::check(sent.clone(), &limits, &profile()) {
        Ok(checked) => {
            assert!(checked.pictures.len() <= limits.max_images as usize);
            assert!(checked.pictures.iter().all(|picture| !picture.field.is_empty()));
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
