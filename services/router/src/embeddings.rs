//! Embeddings that a request needs and that another may have needed before: of pictures, of the mean colour, and of
//! the empty prompt. From the cache, else from a stage, whose work is shared by all requests that wait for it.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use emu2_proto::{
    stage::{
        EncodeRequest, LlmAccepted, LlmPrompt, LlmStart, MeanColour, RegressionParameters,
        encode_request::Source,
        llm_event::Event,
        llm_start::{self, Input},
    },
    v1,
};
use emu2_serve::{
    admission::MemoryReservation, deadline::Deadline, priority::Priority, status, tenant::Tenant,
};
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use tonic::Status;
use tracing::{Instrument, Span};

use crate::{
    admission::Backlogs,
    cache::{Cache, Computed, Found, Key, Kind, Recipe, is_whole},
    drawing,
    error::{self, Stop},
    metrics::{Metrics, Outcome},
    model::{Model, Profile},
    pool::{Pool, Stage},
    regressed::SentPrompt,
    request::{Picture, Subject},
    stage_call::{Route, Session},
    stages::{self, LlmCall},
};

/// One model's embeddings, under one profile.
#[derive(Clone)]
pub(crate) struct Embeddings {
    pub(crate) model: Arc<Model>,
    pub(crate) profile: Profile,
    pub(crate) cache: Cache,
    /// Whose request it is: tenants share no values.
    pub(crate) tenant: Tenant,
    /// Of the request; work that is shared has that of the request which began it.
    pub(crate) priority: Priority,
    pub(crate) metrics: Metrics,
    pub(crate) backlogs: Backlogs,
    /// Of the request: a prompt's embeddings are up to 14 MB in float32, the 2,048 positions of its context.
    pub(crate) holding: MemoryReservation,
    /// What shared work may take: it has no caller whose deadline it could go by.
    pub(crate) shared_work: Duration,
}

/// A picture as the cache is asked for it: drawn and hashed once, however often it is asked for.
#[derive(Clone)]
pub(crate) struct Sought {
    key: Key,
    content: Bytes,
    pub(crate) found: Option<Found>,
}

impl Embeddings {
    pub(crate) fn seek(&self, picture: &Picture) -> Sought {
        let content = encoded_image(picture);
        let key = self.recipe(Kind::Image, &content, picture.n_query).key();
        Sought { key, content, found: None }
    }

    /// What the cache holds of these pictures; nothing is computed for it.
    pub(crate) async fn look_for(&self, pictures: &[Picture], at_once: usize) -> Result<Vec<Sought>, Stop> {
        let look = |index: usize| async move {
            let mut sought = self.seek(&pictures[index]);
            // One that is not there is counted when it is asked for again.
            if let Ok(found) = self.cache.peek(sought.key).await {
                self.cache.count(Kind::Image, found.outcome);
                sought.found = Some(self.held(found)?);
            }
            Ok(sought)
        };
        stream::iter(0..pictures.len()).map(look).buffered(at_once).try_collect().await
    }

    pub(crate) async fn picture(&self, picture: &Picture, sought: Sought) -> Result<Found, Stop> {
        let Sought { key, content, found } = sought;
        if let Some(found) = found {
            return Ok(found);
        }
        let source = Source::Image(content.clone());
        let found = self.encoded(Kind::Image, key, source, content, picture.n_query).await;
        let found = found.map_err(|stop| {
            // "image", "image.width" and so on are the picture; the rest we filled in.
            let public =
                |field: &str| field.strip_prefix("image").map(|rest| format!("{}{rest}", picture.field));
            error::in_public_terms("encoder", stop, public)
        })?;
        self.held(found)
    }

    /// Counted with what the request holds. The cache's memory has a budget of its own, and all who have a value from
    /// there share it.
    fn held(&self, found: Found) -> Result<Found, Stop> {
        if found.outcome != Outcome::L1Hit {
            self.holding.take(found.tensor.data.len())?;
        }
        Ok(found)
    }

    /// The negative of autoencoding: a picture that is zero after normalisation, as upstream.
    pub(crate) async fn mean_colour(&self) -> Result<Found, Stop> {
        let (source, n_query) = (Source::MeanColour(MeanColour {}), self.profile.llm.n_query);
        let key = self.recipe(Kind::MeanColour, &[], n_query).key();
        let found = self.encoded(Kind::MeanColour, key, source, Bytes::new(), n_query).await;
        found.map_err(|stop| error::in_public_terms("encoder", stop, |_| None))
    }

    /// The negative of image generation: what the llm regresses for the empty prompt, as upstream.
    pub(crate) async fn empty_prompt(&self) -> Result<Found, Stop> {
        let llm = &self.profile.llm;
        let empty = Input::Prompt(LlmPrompt::default());
        let key = self.prompt_key(llm, llm.dtype(), SentPrompt { input: &empty, embeddings: &[] });
        let work = self.shared();
        let compute = || work.regress(empty).instrument(Span::current()).boxed();
        let found = self.cache.fetch(Kind::Regressed, key, compute).await;
        found.map_err(|stop| error::in_public_terms("llm", stop, |_| None))
    }

    /// For work that others may wait for: it outlives the request, and what that holds is given back without it.
    fn shared(&self) -> Self {
        Self { holding: MemoryReservation::default(), ..self.clone() }
    }

    async fn encoded(
        &self,
        kind: Kind,
        key: Key,
        source: Source,
        content: Bytes,
        n_query: u32,
    ) -> Result<Found, Stop> {
        let work = self.shared();
        let request = EncodeRequest { id: 0, source: Some(source), n_query };
        let compute = || work.encode(kind, request, content, key).instrument(Span::current()).boxed();
        self.cache.fetch(kind, key, compute).await
    }

    /// As the profile's encoder would make it.
    fn recipe<'a>(&'a self, kind: Kind, content: &'a [u8], n_query: u32) -> Recipe<'a> {
        let encoder = &self.profile.encoder;
        Recipe {
            kind,
            weights_digest: &encoder.weights_digest,
            preprocessing_version: encoder.preprocessing_version,
            n_query,
            dtype: encoder.dtype(),
            tenant: self.tenant.name(),
            content,
        }
    }

    /// `asked`: the key of what is asked for.
    async fn encode(self, kind: Kind, request: EncodeRequest, content: Bytes, asked: Key) -> Computed {
        let encoder = &self.profile.encoder;
        let n_query = request.n_query;
        let work = self.backlogs.encode()?;
        let deadline = Deadline::after(self.shared_work);
        let route = self.route(&self.model.encoder, &encoder.weights_digest, deadline, None);
        let encoding = stages::encode(request, route);
        let (answer, lease) = deadline.run(encoding).await.map_err(|_| too_slow())??;
        work.finish();
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
            tenant: self.tenant.name(),
            content: &content,
        };
        // Most often what was asked for: a picture is hashed once.
        let key = if made == self.recipe(kind, &content, n_query) { asked } else { made.key() };
        Ok((key, tensor))
    }

    async fn regress(self, input: Input) -> Computed {
        let deadline = Deadline::after(self.shared_work);
        let regressing = self.regress_text(input.clone(), deadline);
        let (accepted, regressed) = deadline.run(regressing).await.map_err(|_| too_slow())??;
        let prompt = SentPrompt { input: &input, embeddings: &[] };
        Ok((self.key_of_regressed(&accepted, prompt, regressed.dtype()), regressed))
    }

    /// Of a prompt without slots.
    async fn regress_text(
        &self,
        input: Input,
        deadline: Deadline,
    ) -> Result<(LlmAccepted, v1::Tensor), Stop> {
        let llm = &self.profile.llm;
        let start = LlmStart {
            input: Some(input),
            output: Some(llm_start::Output::Regression(RegressionParameters {})),
            resume: None,
        };
        let call = LlmCall::new(start, &llm.weights_digest);
        let route = self.route(&self.model.llm, &llm.weights_digest, deadline, None);
        let (_, mut session) = Session::new(call, route);
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

    /// A call's way for this request; `hint`: of calls that share a beginning.
    pub(crate) fn route<S: Stage>(
        &self,
        pool: &Arc<Pool<S>>,
        digest: &str,
        deadline: Deadline,
        hint: Option<u64>,
    ) -> Route<S> {
        let (pool, digest) = (Arc::clone(pool), digest.to_owned());
        Route { pool, digest, hint, deadline, priority: self.priority, metrics: self.metrics.clone() }
    }
}

fn encoded_image(picture: &Picture) -> Bytes {
    match &picture.subject {
        Subject::Sent(data) => data.clone(),
        Subject::Outline(region) => drawing::outline_png(region),
    }
}

fn too_slow() -> Status {
    status::unavailable("it took longer than limits.shared_work_ms")
}
