//! The public service: admit, check, hand to the pipeline.

use std::{collections::HashMap, pin::Pin, sync::Arc, time::Duration};

use emu2_proto::v1::{
    EmbedRequest, EmbedResponse, GenerateEvent, GenerateRequest, ListModelsRequest, ListModelsResponse,
    emu2_server::Emu2, generate_request::Output,
};
use emu2_serve::{
    admission::MemoryReservation, deadline::Deadline, priority::Priority, status, stream, tenant::Tenant,
    trace::RequestId,
};
use futures::{Stream, StreamExt};
use tonic::{Request, Response, Status};
use tracing::Instrument;

use crate::{
    admission::{Admission, Admitted},
    cache::Cache,
    config::Config,
    context::{Caller, MAX_BEGINNINGS, RequestContext},
    embeddings::EmbeddingStore,
    error::Stop,
    metrics::Metrics,
    model::{Model, Profile, StagePools},
    pipeline::Job,
    request,
};

/// Cloning shares everything.
#[derive(Clone)]
pub(crate) struct Router {
    config: Arc<Config>,
    models: Arc<Vec<Arc<Model>>>,
    by_name: Arc<HashMap<String, Arc<Model>>>,
    admission: Arc<Admission>,
    cache: Cache,
    metrics: Metrics,
}

impl Router {
    /// Begins to watch every model's replicas.
    pub(crate) fn start(config: Config, metrics: Metrics) -> anyhow::Result<Self> {
        let mut pools = StagePools::new(&config);
        let models = config.models.iter().map(|model| Ok(Arc::new(Model::start(model, &mut pools)?)));
        let models = models.collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Self {
            admission: Arc::new(Admission::new(&config)),
            cache: Cache::open(&config.cache, config.server.max_message_bytes, metrics.clone())?,
            by_name: Arc::new(models.iter().map(|model| (model.name.clone(), Arc::clone(model))).collect()),
            models: Arc::new(models),
            config: Arc::new(config),
            metrics,
        })
    }

    /// Returns once every stage of every model has answered, and all replicas were asked; `waits` is told what for.
    pub(crate) async fn answered(&self, waits: impl Fn(String)) {
        for model in self.models.iter() {
            model.answered(&waits).await;
        }
    }

    fn model(&self, name: &str) -> Result<&Arc<Model>, Status> {
        self.by_name.get(name).ok_or_else(|| status::not_found("model", name))
    }

    fn store(&self, model: &Arc<Model>, profile: Profile, caller: &Caller) -> EmbeddingStore {
        let context = RequestContext {
            caller: caller.clone(),
            model: Arc::clone(model),
            profile,
            metrics: self.metrics.clone(),
            shared_work: Duration::from_millis(self.config.limits.shared_work_ms),
        };
        EmbeddingStore::new(context, self.cache.for_request(), self.config.admission.max_backlog())
    }

    fn job(
        &self,
        request: GenerateRequest,
        request_id: RequestId,
        caller: &Caller,
    ) -> Result<(Job, Admitted), Status> {
        let model = self.model(&request.model)?;
        let profile = model.profile(matches!(request.output, Some(Output::Image(_))))?;
        let generation = request::check(request, &self.config.limits, &profile).map_err(status::invalid)?;
        self.metrics.request(&model.name, generation.task.name());
        let admitted = self.admission.enter(model, &generation, caller)?;
        let job = Job {
            generation,
            store: self.store(model, profile, caller),
            request_id: request_id.to_string(),
            images_in_flight: self.config.limits.images_in_flight,
        };
        Ok((job, admitted))
    }

    async fn embedding(&self, request: EmbedRequest, caller: &Caller) -> Result<EmbedResponse, Status> {
        let _permit = self.admission.permit(caller)?;
        let model = self.model(&request.model)?;
        let profile = model.profile(false)?;
        let image = request::check_embed(request, &profile).map_err(status::invalid)?;
        self.metrics.request(&model.name, "embed");
        let mut store = self.store(model, profile, caller);
        for _ in 0..MAX_BEGINNINGS {
            match store.image(&image, store.lookup(&image)).await {
                Ok(found) => {
                    return Ok(EmbedResponse {
                        embeddings: Some(found.tensor),
                        weights_digest: store.context.profile.encoder.weights_digest.clone(),
                        cached: found.outcome.is_hit(),
                    });
                }
                Err(Stop::WeightsChanged) => store.context.renew_profile(false)?,
                Err(stop) => return Err(stop.into()),
            }
        }
        Err(Stop::WeightsChanged.into())
    }
}

#[tonic::async_trait]
impl Emu2 for Router {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateEvent, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let (caller, request_id) = (caller(&request, request.get_ref().priority)?, RequestId::of(&request));
        let (job, mut admitted) = self.job(request.into_inner(), request_id, &caller)?;
        let (sender, events) = stream::channel(self.config.limits.waiting_events, caller.deadline);
        // Ends by itself once nobody listens to `events`.
        tokio::spawn(Box::pin(job.run(sender)).in_current_span());
        let watched = events.inspect(move |event| {
            if let Ok(event) = event {
                admitted.observe(event);
            }
        });
        Ok(Response::new(Box::pin(watched)))
    }

    async fn embed(&self, request: Request<EmbedRequest>) -> Result<Response<EmbedResponse>, Status> {
        let caller = caller(&request, request.get_ref().priority)?;
        let embedding = Box::pin(self.embedding(request.into_inner(), &caller));
        Ok(Response::new(caller.deadline.run(embedding).await??))
    }

    async fn list_models(
        &self,
        _: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        let models = self.models.iter().map(|model| model.describe(&self.config)).collect();
        Ok(Response::new(ListModelsResponse { models }))
    }
}

/// Who asks, with the class that it asks for.
fn caller<T>(request: &Request<T>, priority: i32) -> Result<Caller, Status> {
    let (tenant, deadline) = (Tenant::of(request), Deadline::of(request));
    Ok(Caller {
        tenant,
        priority: Priority::of(priority)?,
        deadline,
        reservation: MemoryReservation::of(request),
    })
}
