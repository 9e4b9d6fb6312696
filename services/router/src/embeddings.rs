//! The store of embeddings that a request needs and that another may have needed before. From the cache, else from a
//! stage, whose work is shared by all requests that wait for it.
//!
//! It keeps three kinds:
//! - of images and boxes, and of the mean colour, the negative of autoencoding: from the encoder;
//! - what the llm regressed for a whole prompt. It is deterministic there: the same prompt gives the same embeddings
//!   whatever the seed, so that another image of it needs the decoder alone;
//! - guidance's negative, what the llm regresses for the empty prompt.
//!
//! A prompt is looked up only if the cache holds all its images. One that has to be encoded makes the prompt new in any
//! case, and the llm had better begin on what comes before it.

mod prompt;

use std::time::Duration;

use bytes::Bytes;
use emu2_proto::{
    stage::{
        EncodeRequest, LlmAccepted, LlmInfo, LlmPrompt, LlmStart, MeanColour, RegressionParameters,
        encode_request::Source,
        llm_event::Event,
        llm_start::{self, Input},
    },
    v1,
};
use emu2_serve::status;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use tonic::Status;
use tracing::{Instrument, Span};

pub(crate) use self::prompt::SentPrompt;
use crate::{
    admission,
    cache::{Cache, Computed, Found, Key, Kind, Recipe, is_whole},
    context::RequestContext,
    error::{self, Stop},
    metrics::Outcome,
    request::{PromptImage, Subject},
    stage_call::Session,
    stages::{self, LlmCall},
};

/// The store as one request sees it. A clone shares everything.
#[derive(Clone)]
pub(crate) struct EmbeddingStore {
    pub(crate) context: RequestContext,
    cache: Cache,
    /// How far behind the encoder may be when it is asked.
    max_backlog: Duration,
}

/// An image as the cache is asked for it: hashed once, however often it is asked for.
#[derive(Clone)]
pub(crate) struct Lookup {
    kind: Kind,
    key: Key,
    /// What its embeddings depend on.
    content: Bytes,
    /// What the cache held; none where it held nothing or has not been asked.
    pub(crate) found: Option<Found>,
}

impl EmbeddingStore {
    pub(crate) fn new(context: RequestContext, cache: Cache, max_backlog: Duration) -> Self {
        Self { context, cache, max_backlog }
    }

    /// An image, before the cache is asked for it.
    pub(crate) fn lookup(&self, image: &PromptImage) -> Lookup {
        let (kind, content) = match &image.subject {
            Subject::Image(data) => (Kind::Image, data.clone()),
            Subject::Box(region) => (Kind::Box, edges(region)),
        };
        let key = self.recipe(kind, &content, image.n_query).key();
        Lookup { kind, key, content, found: None }
    }

    /// What the cache holds of these images; nothing is computed for it.
    pub(crate) async fn look_for(&self, images: &[PromptImage], at_once: usize) -> Result<Vec<Lookup>, Stop> {
        let look = |index: usize| async move {
            let mut lookup = self.lookup(&images[index]);
            // One that is not there is counted when it is asked for again.
            if let Ok(found) = self.cache.peek(lookup.key).await {
                self.cache.count(lookup.kind, found.outcome);
                lookup.found = Some(self.held(found)?);
            }
            Ok(lookup)
        };
        stream::iter(0..images.len()).map(look).buffered(at_once).try_collect().await
    }

    /// An image's embeddings, [n_query, width]; computed where the cache does not hold them.
    pub(crate) async fn image(&self, image: &PromptImage, lookup: Lookup) -> Result<Found, Stop> {
        let Lookup { kind, key, content, found } = lookup;
        if let Some(found) = found {
            return Ok(found);
        }
        let source = match &image.subject {
            Subject::Image(data) => Source::Image(data.clone()),
            Subject::Box(region) => Source::Box(region.clone()),
        };
        let found = self.encoded(kind, key, source, content, image.n_query).await;
        let found = found.map_err(|stop| {
            // "image", "box.left" and so on are the image; the rest we filled in.
            let public = |field: &str| {
                let rest = field.strip_prefix("image").or_else(|| field.strip_prefix("box"));
                rest.map(|rest| format!("{}{rest}", image.field))
            };
            error::in_public_terms("encoder", stop, public)
        })?;
        self.held(found)
    }

    /// Counted with what the request holds. The cache's memory has a budget of its own, and all who have a value from
    /// there share it.
    fn held(&self, found: Found) -> Result<Found, Stop> {
        if found.outcome != Outcome::L1Hit {
            self.context.caller.reservation.take(found.tensor.data.len())?;
        }
        Ok(found)
    }

    /// The negative of autoencoding: an image that is zero after normalisation, as upstream.
    pub(crate) async fn mean_colour(&self) -> Result<Found, Stop> {
        let (source, n_query) = (Source::MeanColour(MeanColour {}), self.context.profile.llm.n_query);
        let key = self.recipe(Kind::MeanColour, &[], n_query).key();
        let found = self.encoded(Kind::MeanColour, key, source, Bytes::new(), n_query).await;
        found.map_err(|stop| error::in_public_terms("encoder", stop, |_| None))
    }

    /// The negative of image generation: what the llm regresses for the empty prompt, as upstream.
    pub(crate) async fn empty_prompt(&self) -> Result<Found, Stop> {
        let llm = &self.context.profile.llm;
        let empty = Input::Prompt(LlmPrompt::default());
        let key = self.prompt_key(llm, llm.dtype(), SentPrompt { input: &empty, embeddings: &[] });
        let store = self.clone();
        let compute = || store.regress(empty).instrument(Span::current()).boxed();
        let found = self.cache.fetch(Kind::Regressed, key, compute).await;
        found.map_err(|stop| error::in_public_terms("llm", stop, |_| None))
    }

    /// What the llm regressed for this prompt before.
    pub(crate) async fn regressed(&self, prompt: SentPrompt<'_>) -> Option<Found> {
        let llm = &self.context.profile.llm;
        let found = self.cache.peek(self.prompt_key(llm, llm.dtype(), prompt)).await;
        self.cache
            .count(Kind::Regressed, found.as_ref().map_or_else(|outcome| *outcome, |found| found.outcome));
        found.ok()
    }

    /// Keeps what the llm has now regressed, all of it, under the names that came with it.
    pub(crate) fn keep_regressed(
        &self,
        accepted: &LlmAccepted,
        prompt: SentPrompt<'_>,
        regressed: v1::Tensor,
    ) {
        self.cache.put(self.key_of_regressed(accepted, prompt, regressed.dtype()), regressed);
    }

    async fn encoded(
        &self,
        kind: Kind,
        key: Key,
        source: Source,
        content: Bytes,
        n_query: u32,
    ) -> Result<Found, Stop> {
        let store = self.clone();
        let request = EncodeRequest { source: Some(source), n_query };
        let compute = || store.encode(kind, request, content, key).instrument(Span::current()).boxed();
        self.cache.fetch(kind, key, compute).await
    }

    /// Work that others may wait for. `asked`: the key of what is asked for.
    async fn encode(self, kind: Kind, request: EncodeRequest, content: Bytes, asked: Key) -> Computed {
        let context = self.context.of_shared_work();
        let encoder = &context.profile.encoder;
        let n_query = request.n_query;
        admission::check_encoder(&context.model, self.max_backlog)?;
        let encoding = stages::encode(request, context.encoder_route());
        let (answer, lease) = context.caller.deadline.run(encoding).await.map_err(|_| too_slow())??;
        let known = (&encoder.weights_digest, encoder.preprocessing_version);
        if (&answer.weights_digest, answer.preprocessing_version) != known
            && let Some(lease) = lease
        {
            lease.refresh().await;
        }
        let tensor = answer.embeddings.filter(is_whole);
        let tensor = tensor.ok_or_else(|| status::internal("the encoder sent a tensor that is not whole"))?;
        let made = Recipe {
            kind,
            weights_digest: &answer.weights_digest,
            preprocessing_version: answer.preprocessing_version,
            n_query,
            dtype: tensor.dtype(),
            tenant: context.caller.tenant.name(),
            content: &content,
        };
        // Most often what was asked for: an image is hashed once.
        let key = if made == self.recipe(kind, &content, n_query) { asked } else { made.key() };
        Ok((key, tensor))
    }

    /// Work that others may wait for: what the llm regresses for a prompt without slots.
    async fn regress(self, input: Input) -> Computed {
        let context = self.context.of_shared_work();
        let regressing = regress_text(&context, input.clone());
        let (accepted, regressed) =
            context.caller.deadline.run(regressing).await.map_err(|_| too_slow())??;
        let prompt = SentPrompt { input: &input, embeddings: &[] };
        Ok((self.key_of_regressed(&accepted, prompt, regressed.dtype()), regressed))
    }

    fn recipe<'a>(&'a self, kind: Kind, content: &'a [u8], n_query: u32) -> Recipe<'a> {
        let encoder = &self.context.profile.encoder;
        Recipe {
            kind,
            weights_digest: &encoder.weights_digest,
            preprocessing_version: encoder.preprocessing_version,
            n_query,
            dtype: encoder.dtype(),
            tenant: self.context.caller.tenant.name(),
            content,
        }
    }

    /// The key of what was regressed, by what the llm that regressed it called itself.
    fn key_of_regressed(&self, accepted: &LlmAccepted, prompt: SentPrompt<'_>, dtype: v1::Dtype) -> Key {
        let LlmAccepted { weights_digest, tokenizer_digest, template_version, .. } = accepted.clone();
        let known = (*self.context.profile.llm).clone();
        let llm = LlmInfo { weights_digest, tokenizer_digest, template_version, ..known };
        self.prompt_key(&llm, dtype, prompt)
    }

    fn prompt_key(&self, llm: &LlmInfo, dtype: v1::Dtype, prompt: SentPrompt<'_>) -> Key {
        let recipe = Recipe {
            kind: Kind::Regressed,
            weights_digest: &llm.weights_digest,
            preprocessing_version: llm.template_version,
            n_query: llm.n_query,
            dtype,
            tenant: self.context.caller.tenant.name(),
            content: &prompt::content(&llm.tokenizer_digest, prompt),
        };
        recipe.key()
    }
}

async fn regress_text(context: &RequestContext, input: Input) -> Result<(LlmAccepted, v1::Tensor), Stop> {
    let llm = &context.profile.llm;
    let start = LlmStart {
        input: Some(input),
        output: Some(llm_start::Output::Regression(RegressionParameters {})),
        resume: None,
        seed: 0,
    };
    let (_, mut session) = Session::new(LlmCall::new(start, &llm.weights_digest), context.llm_route(None));
    while !matches!(session.next().await?.event, Some(Event::Finished(_))) {}
    let (call, lease) = session.into_parts();
    let (accepted, regressed) = call.regressed(llm.n_query)?;
    let known = (&llm.tokenizer_digest, llm.template_version);
    if (&accepted.tokenizer_digest, accepted.template_version) != known
        && let Some(lease) = lease
    {
        lease.refresh().await;
    }
    Ok((accepted, regressed))
}

/// A region's edges: what the drawing of it depends on.
fn edges(region: &v1::Box) -> Bytes {
    let v1::Box { left, top, right, bottom, .. } = region;
    [left, top, right, bottom].map(|edge| edge.to_le_bytes()).concat().into()
}

fn too_slow() -> Status {
    status::unavailable("it took longer than limits.shared_work_ms")
}
