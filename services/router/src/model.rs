//! A model: its stages' pools, and what it can do as its stages say.

use std::sync::Arc;

use emu2_proto::{
    pooling,
    stage::{DecoderInfo, EncoderInfo, LlmInfo},
    v1::{self, Capability},
};
use emu2_serve::{parameters, status};
use tonic::Status;

use crate::{
    config::{Config, ModelConfig},
    pool::{Pool, Pools},
    stages::{Decoder, Encoder, Llm},
};

pub(crate) struct Model {
    pub(crate) name: String,
    pub(crate) encoder: Arc<Pool<Encoder>>,
    pub(crate) llm: Arc<Pool<Llm>>,
    /// Absent in a model that only writes.
    pub(crate) decoder: Option<Arc<Pool<Decoder>>>,
}

/// The pools of all models.
pub(crate) struct StagePools {
    encoders: Pools<Encoder>,
    llms: Pools<Llm>,
    decoders: Pools<Decoder>,
}

impl StagePools {
    pub(crate) fn new(config: &Config) -> Self {
        let (pool, bytes) = (&config.pool, config.server.max_message_bytes);
        Self {
            encoders: Pools::new(pool, bytes),
            llms: Pools::new(pool, bytes),
            decoders: Pools::new(pool, bytes),
        }
    }
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
    pub(crate) fn start(model: &ModelConfig, pools: &mut StagePools) -> anyhow::Result<Self> {
        let decoder = match model.decoder.as_slice() {
            [] => None,
            endpoints => Some(pools.decoders.get(endpoints)?),
        };
        Ok(Self {
            name: model.name.clone(),
            encoder: pools.encoders.get(&model.encoder)?,
            llm: pools.llms.get(&model.llm)?,
            decoder,
        })
    }

    /// Returns once every stage has answered, and all its replicas were asked; `waits` is told what for.
    pub(crate) async fn answered(&self, waits: impl Fn(String)) {
        waits(self.missing("encoder"));
        self.encoder.answered().await;
        waits(self.missing("llm"));
        self.llm.answered().await;
        if let Some(decoder) = &self.decoder {
            waits(self.missing("decoder"));
            decoder.answered().await;
        }
    }

    fn missing(&self, stage: &str) -> String {
        format!("no {stage} replica of model {:?} has answered", self.name)
    }

    /// Whether every stage has a replica that answers now.
    pub(crate) fn is_ready(&self) -> bool {
        self.encoder.is_ready()
            && self.llm.is_ready()
            && self.decoder.as_ref().is_none_or(|pool| pool.is_ready())
    }

    /// What a new request goes by; UNAVAILABLE while a stage that it needs has not answered.
    pub(crate) fn profile(&self, paints: bool) -> Result<Profile, Status> {
        let missing = |stage| status::unavailable(self.missing(stage));
        let profile = Profile {
            encoder: self.encoder.info().ok_or_else(|| missing("encoder"))?,
            llm: self.llm.info().ok_or_else(|| missing("llm"))?,
            decoder: self.decoder.as_ref().and_then(|pool| pool.info()),
        };
        if paints && self.decoder.is_some() && profile.decoder.is_none() {
            return Err(missing("decoder"));
        }
        match profile.misfits(paints) {
            misfits if misfits.is_empty() => Ok(profile),
            misfits => {
                let problem = misfits.join("; ");
                tracing::error!(model = self.name, problem, "stages do not fit together");
                let name = &self.name;
                Err(status::unavailable(format!(
                    "the stages of model {name:?} do not fit together: {problem}"
                )))
            }
        }
    }

    /// Describes the model as `ListModels` tells it.
    pub(crate) fn describe(&self, config: &Config) -> v1::Model {
        let (encoder, llm) = (self.encoder.info().unwrap_or_default(), self.llm.info().unwrap_or_default());
        let decoder = self.decoder.as_ref().and_then(|pool| pool.info()).unwrap_or_default();
        let mut parameter_limits = llm.parameter_limits.clone();
        parameter_limits.extend(decoder.parameter_limits.iter().cloned());
        let limit = |field| parameters::limit(&parameter_limits, field).cloned().unwrap_or_default();
        let (beams, tokens) = (limit("text.num_beams"), limit("text.max_new_tokens"));
        let (penalty, repetition) = (limit("text.length_penalty"), limit("text.repetition_penalty"));
        let (temperature, guidance) = (limit("text.temperature"), limit("image.guidance_scale"));
        let (height, width) = (limit("image.height"), limit("image.width"));
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
            default_height: height.default() as u32,
            default_width: width.default() as u32,
            limits: Some(v1::Limits {
                max_message_bytes: config.server.max_message_bytes as u64,
                max_parts: config.limits.max_parts,
                max_images: config.limits.max_images,
                max_image_pixels: encoder.max_image_pixels,
                max_new_tokens: tokens.max as u32,
                max_beams: beams.max as u32,
                max_steps: limit("image.steps").max as u32,
                max_image_side: height.max as u32,
                max_guidance_scale: guidance.max as f32,
                max_text_bytes: llm.max_text_bytes,
                min_length_penalty: penalty.min as f32,
                max_length_penalty: penalty.max as f32,
                min_temperature: temperature.min as f32,
                max_temperature: temperature.max as f32,
                min_repetition_penalty: repetition.min as f32,
                max_repetition_penalty: repetition.max as f32,
            }),
            encoder_digest: encoder.weights_digest.clone(),
            llm_digest: llm.weights_digest.clone(),
            decoder_digest: decoder.weights_digest.clone(),
            ready: self.is_ready() && self.profile(true).is_ok(),
            parameter_limits,
        }
    }
}

impl Profile {
    /// Why what one stage makes is not what the next one takes; `paints`: whether the decoder takes part.
    fn misfits(&self, paints: bool) -> Vec<String> {
        let Self { encoder, llm, decoder } = self;
        let mut stages =
            vec![("encoder", encoder.width, encoder.dtype()), ("llm", llm.embedding_width, llm.dtype())];
        let decoder = decoder.as_ref().filter(|_| paints);
        stages.extend(decoder.map(|decoder| ("decoder", decoder.width, decoder.dtype())));
        let mut misfits = Vec::new();
        for pair in stages.windows(2) {
            let [(one, width, dtype), (other, other_width, other_dtype)] = [pair[0], pair[1]];
            if width != other_width {
                misfits
                    .push(format!("embeddings are {width} wide in the {one}, {other_width} in the {other}"));
            }
            // An embedding is never narrowed on its way, so that it is the same computation wherever it goes on.
            if dtype != other_dtype {
                let (dtype, other_dtype) = (dtype_name(dtype), dtype_name(other_dtype));
                misfits.push(format!("the {one} computes in {dtype}, the {other} in {other_dtype}"));
            }
        }
        for (name, queries) in [("n_query", llm.n_query), ("v_query", llm.v_query)] {
            misfits.extend(
                pooling::problem(encoder.grid_side, queries)
                    .map(|problem| format!("the llm's {name} {problem} (the encoder's grid)")),
            );
        }
        if let Some(most) = decoder.map(|decoder| decoder.max_queries).filter(|most| llm.n_query > *most) {
            misfits.push(format!(
                "the decoder takes {most} embeddings of an image, the llm gives {}",
                llm.n_query
            ));
        }
        misfits
    }
}

fn dtype_name(dtype: v1::Dtype) -> &'static str {
    match dtype {
        v1::Dtype::F32 => "float32",
        v1::Dtype::Bf16 => "bfloat16",
        v1::Dtype::Unspecified => "a dtype that it does not name",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(change: impl FnOnce(&mut EncoderInfo, &mut LlmInfo, &mut DecoderInfo)) -> Profile {
        let dtype = v1::Dtype::F32.into();
        let mut encoder = EncoderInfo { dtype, width: 1792, grid_side: 32, ..Default::default() };
        let mut llm =
            LlmInfo { dtype, embedding_width: 1792, n_query: 256, v_query: 64, ..Default::default() };
        let mut decoder = DecoderInfo { dtype, width: 1792, max_queries: 1024, ..Default::default() };
        change(&mut encoder, &mut llm, &mut decoder);
        Profile { encoder: encoder.into(), llm: llm.into(), decoder: Some(decoder.into()) }
    }

    #[test]
    fn stages_that_fit_have_nothing_to_say() {
        assert_eq!(profile(|_, _, _| {}).misfits(true), [""; 0]);
    }

    #[test]
    fn every_misfit_names_both_sides() {
        let bf16 = v1::Dtype::Bf16.into();
        for (profile, misfits) in [
            (
                profile(|encoder, _, _| encoder.dtype = bf16),
                &["the encoder computes in bfloat16, the llm in float32"][..],
            ),
            (
                profile(|_, llm, _| llm.dtype = bf16),
                &[
                    "the encoder computes in float32, the llm in bfloat16",
                    "the llm computes in bfloat16, the decoder in float32",
                ],
            ),
            (
                profile(|encoder, _, _| encoder.width = 64),
                &["embeddings are 64 wide in the encoder, 1792 in the llm"],
            ),
            (
                profile(|encoder, _, decoder| (encoder.grid_side, decoder.max_queries) = (16, 64)),
                &["the decoder takes 64 embeddings of an image, the llm gives 256"],
            ),
            (
                profile(|encoder, _, _| encoder.grid_side = 4),
                &[
                    "the llm's n_query must be what pooling 4 x 4 patches can leave (1, 4, 16), got 256 (the \
                     encoder's grid)",
                    "the llm's v_query must be what pooling 4 x 4 patches can leave (1, 4, 16), got 64 (the \
                     encoder's grid)",
                ],
            ),
        ] {
            assert_eq!(profile.misfits(true), misfits);
        }
    }

    #[test]
    fn a_text_does_not_ask_the_decoder() {
        let odd = profile(|_, _, decoder| decoder.width = 64);
        assert_eq!(odd.misfits(false), [""; 0]);
        assert_eq!(odd.misfits(true), ["embeddings are 1792 wide in the llm, 64 in the decoder"]);
    }
}
