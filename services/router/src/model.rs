//! A model: its stages' pools, and what it can do as its stages say.

use std::sync::Arc;

use emu2_proto::{
    stage::{DecoderInfo, EncoderInfo, LlmInfo},
    v1::{self, Capability},
};
use emu2_serve::status;
use tonic::Status;

use crate::{
    config::{Config, ModelConfig},
    pool::Pool,
    stages::{Decoder, Encoder, Llm},
};

pub(crate) struct Model {
    pub(crate) name: String,
    pub(crate) encoder: Pool<Encoder>,
    pub(crate) llm: Pool<Llm>,
    /// Absent in a model that only writes.
    pub(crate) decoder: Option<Pool<Decoder>>,
}

/// What a model's stages say of themselves. A request goes by one profile from its check to its end, so that it sees
/// one set of weights per stage.
#[derive(Clone, Debug)]
pub(crate) struct Profile {
    pub(crate) encoder: Arc<EncoderInfo>,
    pub(crate) llm: Arc<LlmInfo>,
    /// Absent in a model that only writes, and while its decoder has not answered yet.
    pub(crate) decoder: Option<Arc<DecoderInfo>>,
}

impl Model {
    /// Begins to watch the model's replicas.
    pub(crate) fn start(model: &ModelConfig, config: &Config) -> anyhow::Result<Self> {
        let bytes = config.server.max_message_bytes;
        let decoder = match model.decoder.as_slice() {
            [] => None,
            endpoints => Some(Pool::start(endpoints, &config.pool, bytes)?),
        };
        Ok(Self {
            name: model.name.clone(),
            encoder: Pool::start(&model.encoder, &config.pool, bytes)?,
            llm: Pool::start(&model.llm, &config.pool, bytes)?,
            decoder,
        })
    }

    /// Returns once every stage has answered.
    pub(crate) async fn answered(&self) {
        self.encoder.answered().await;
        self.llm.answered().await;
        if let Some(decoder) = &self.decoder {
            decoder.answered().await;
        }
    }

    /// Whether every stage has a replica that answers now.
    pub(crate) fn is_ready(&self) -> bool {
        self.encoder.is_ready() && self.llm.is_ready() && self.decoder.as_ref().is_none_or(Pool::is_ready)
    }

    /// What a new request goes by; UNAVAILABLE while a stage that it needs has not answered.
    pub(crate) fn profile(&self, paints: bool) -> Result<Profile, Status> {
        let missing =
            |stage| status::unavailable(format!("no {stage} replica of model {:?} has answered", self.name));
        let profile = Profile {
            encoder: self.encoder.info().ok_or_else(|| missing("encoder"))?,
            llm: self.llm.info().ok_or_else(|| missing("llm"))?,
            decoder: self.decoder.as_ref().and_then(Pool::info),
        };
        if paints && self.decoder.is_some() && profile.decoder.is_none() {
            return Err(missing("decoder"));
        }
        profile.check_widths().map_err(|problem| {
            tracing::error!(model = self.name, problem, "stages do not fit together");
            status::unavailable(format!("the stages of model {:?} do not fit together: {problem}", self.name))
        })?;
        Ok(profile)
    }

    /// As `ListModels` tells it.
    pub(crate) fn describe(&self, config: &Config) -> v1::Model {
        let (encoder, llm) = (self.encoder.info().unwrap_or_default(), self.llm.info().unwrap_or_default());
        let decoder = self.decoder.as_ref().and_then(Pool::info).unwrap_or_default();
        let has = [
            (Capability::Embed, true),
            (Capability::Text, true),
            (Capability::Chat, llm.instruct),
            (Capability::Image, self.decoder.is_some()),
        ];
        v1::Model {
            name: self.name.clone(),
            capabilities: has.into_iter().filter(|(_, has)| *has).map(|(it, _)| it.into()).collect(),
            n_query: llm.n_query,
            v_query: llm.v_query,
            embedding_width: llm.embedding_width,
            max_positions: llm.max_positions,
            default_height: decoder.default_height,
            default_width: decoder.default_width,
            limits: Some(v1::Limits {
                max_message_bytes: config.server.max_message_bytes as u64,
                max_parts: config.limits.max_parts,
                max_images: config.limits.max_images,
                max_image_pixels: encoder.max_image_pixels,
                max_new_tokens: llm.max_new_tokens,
                max_beams: llm.max_beams,
                max_steps: decoder.max_steps,
                max_image_side: decoder.max_image_side,
                max_guidance_scale: decoder.max_guidance_scale,
                max_text_bytes: llm.max_text_bytes,
                min_length_penalty: llm.min_length_penalty,
                max_length_penalty: llm.max_length_penalty,
                min_temperature: llm.min_temperature,
                max_temperature: llm.max_temperature,
                min_repetition_penalty: llm.min_repetition_penalty,
                max_repetition_penalty: llm.max_repetition_penalty,
            }),
            encoder_digest: encoder.weights_digest.clone(),
            llm_digest: llm.weights_digest.clone(),
            decoder_digest: decoder.weights_digest.clone(),
            ready: self.is_ready(),
        }
    }
}

impl Profile {
    /// Embeddings of one width cross all cuts.
    fn check_widths(&self) -> Result<(), String> {
        let (encoder, llm) = (self.encoder.width, self.llm.embedding_width);
        let decoder = self.decoder.as_ref().map_or(llm, |decoder| decoder.width);
        if encoder == llm && llm == decoder {
            return Ok(());
        }
        Err(format!(
            "embeddings are {encoder} wide in the encoder, {llm} in the llm, {decoder} in the decoder"
        ))
    }
}
