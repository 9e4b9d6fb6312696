//! What stages of the published sizes say of themselves when they refuse nothing: for whatever stands in for stages in
//! tests, benchmarks and fuzz targets, which name only what is different about theirs.

use crate::{
    stage::{DecoderInfo, EncoderInfo, LlmInfo, Load},
    v1::{Dtype, ParameterLimit},
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
        max_text_bytes: 1 << 16,
        load: Some(Load::default()),
        parameter_limits: vec![
            ParameterLimit::new("text.max_new_tokens", 1..=1024, Some(64)),
            ParameterLimit::new("text.min_length", 0..=1025, Some(1)),
            ParameterLimit::new("text.num_beams", 1..=16, Some(5)),
            ParameterLimit::new("text.length_penalty", -10.0..=10.0, Some(-1.0)),
            ParameterLimit::new("text.temperature", 0.001_f32..=100.0, Some(1.0)),
            ParameterLimit::new("text.top_k", 1..=u32::MAX, None),
            ParameterLimit::new("text.top_p", 0.0..=1.0, None).above_min(),
            ParameterLimit::new("text.repetition_penalty", 0.1_f32..=10.0, Some(1.0)),
        ],
    }
}

/// Describes a decoder of the published size, in float32.
pub fn decoder() -> DecoderInfo {
    DecoderInfo {
        weights_digest: "d1".into(),
        dtype: Dtype::F32.into(),
        width: 1792,
        scale_factor: 8,
        max_queries: 1024,
        load: Some(Load::default()),
        parameter_limits: vec![
            ParameterLimit::new("image.height", 8..=2048, Some(1024)).multiple_of(8),
            ParameterLimit::new("image.width", 8..=2048, Some(1024)).multiple_of(8),
            ParameterLimit::new("image.steps", 1..=250, Some(50)),
            ParameterLimit::new("image.guidance_scale", 0.0..=100.0, Some(3.0)),
            ParameterLimit::new("image.original_height", 0..=u32::MAX, Some(1024)),
            ParameterLimit::new("image.original_width", 0..=u32::MAX, Some(1024)),
            ParameterLimit::new("image.crop_top", 0..=u32::MAX, Some(0)),
            ParameterLimit::new("image.crop_left", 0..=u32::MAX, Some(0)),
        ],
    }
}

/// Puts limits in place of those that are stated for the same fields.
pub fn with_limits(mut stated: Vec<ParameterLimit>, others: &[ParameterLimit]) -> Vec<ParameterLimit> {
    for other in others {
        let limit = stated.iter_mut().find(|limit| limit.field == other.field);
        *limit.expect("the field has a limit") = other.clone();
    }
    stated
}
