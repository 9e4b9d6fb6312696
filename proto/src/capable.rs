//! What stages of the published sizes say of themselves when they refuse nothing: for whatever stands in for stages in
//! tests, benchmarks and fuzz targets, which name only what is different about theirs.

use crate::{
    stage::{DecoderInfo, EncoderInfo, LlmInfo, Load},
    v1::Dtype,
};

/// Describes an encoder of the published size, in float32.
pub fn encoder() -> EncoderInfo {
    EncoderInfo {
        weights_digest: "e1".into(),
        dtype: Dtype::F32.into(),
        width: 1792,
        image_size: 448,
        grid_side: 32,
        preprocessing_version: 1,
        max_image_pixels: 1 << 26,
        load: Some(Load::default()),
    }
}

/// Describes an llm of the published chat model's size, in float32.
pub fn llm() -> LlmInfo {
    LlmInfo {
        weights_digest: "l1".into(),
        tokenizer_digest: "t1".into(),
        template_version: 1,
        dtype: Dtype::F32.into(),
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
        load: Some(Load::default()),
    }
}

/// Describes a decoder of the published size, in float32.
pub fn decoder() -> DecoderInfo {
    DecoderInfo {
        weights_digest: "d1".into(),
        dtype: Dtype::F32.into(),
        width: 1792,
        default_height: 1024,
        default_width: 1024,
        scale_factor: 8,
        max_image_side: 2048,
        max_steps: 250,
        max_guidance_scale: 100.0,
        max_queries: 1024,
        load: Some(Load::default()),
    }
}
