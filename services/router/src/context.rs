//! What all of a request's work shares: who asks, which model it goes to, and how its stages are called.

use std::{sync::Arc, time::Duration};

use emu2_serve::{
    admission::MemoryReservation, deadline::Deadline, priority::Priority, status, tenant::Tenant,
};
use tonic::Status;

use crate::{
    metrics::Metrics,
    model::{Model, Profile},
    pool::{Pool, Stage},
    stage_call::Route,
    stages::{Decoder, Encoder, Llm},
};

/// Times that a request begins because it finds its stages' weights replaced: each stage may be found so once.
pub(crate) const MAX_BEGINNINGS: usize = 4;

/// Who asks, and how long it can wait.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// Tenants share no values.
    pub(crate) tenant: Tenant,
    pub(crate) priority: Priority,
    pub(crate) deadline: Deadline,
    /// What the request holds in memory: a prompt's embeddings are up to 14 MB in float32, the 2,048 positions of its
    /// context.
    pub(crate) reservation: MemoryReservation,
}

/// A request's caller and model, under one profile of the model's stages.
#[derive(Clone)]
pub(crate) struct RequestContext {
    pub(crate) caller: Caller,
    pub(crate) model: Arc<Model>,
    pub(crate) profile: Profile,
    pub(crate) metrics: Metrics,
    /// What work that several requests wait for may take: it has no caller whose deadline it could go by.
    pub(crate) shared_work: Duration,
}

impl RequestContext {
    /// The context of work that others may wait for, which begins now: it outlives the request, whose reservation is
    /// given back without it, and has the class of the request that began it.
    pub(crate) fn of_shared_work(&self) -> Self {
        let (deadline, reservation) = (Deadline::after(self.shared_work), MemoryReservation::default());
        let caller = Caller { deadline, reservation, ..self.caller.clone() };
        Self { caller, ..self.clone() }
    }

    /// Goes by what the stages say of themselves now; `paints`: whether the decoder takes part.
    pub(crate) fn renew_profile(&mut self, paints: bool) -> Result<(), Status> {
        self.profile = self.model.profile(paints)?;
        Ok(())
    }

    pub(crate) fn encoder_route(&self) -> Route<Encoder> {
        self.route(&self.model.encoder, &self.profile.encoder.weights_digest, None)
    }

    /// `hint`: of calls that share a beginning.
    pub(crate) fn llm_route(&self, hint: Option<u64>) -> Route<Llm> {
        self.route(&self.model.llm, &self.profile.llm.weights_digest, hint)
    }

    /// INTERNAL in a model that only writes, which a checked request is never about.
    pub(crate) fn decoder_route(&self) -> Result<Route<Decoder>, Status> {
        let (Some(pool), Some(info)) = (&self.model.decoder, &self.profile.decoder) else {
            return Err(status::internal("an image was asked of a model without a decoder"));
        };
        Ok(self.route(pool, &info.weights_digest, None))
    }

    fn route<S: Stage>(&self, pool: &Arc<Pool<S>>, digest: &str, hint: Option<u64>) -> Route<S> {
        let Caller { deadline, priority, .. } = self.caller;
        let (pool, digest) = (Arc::clone(pool), digest.to_owned());
        Route { pool, digest, hint, deadline, priority, metrics: self.metrics.clone() }
    }
}
