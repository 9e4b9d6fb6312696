//! The edge: `VisualEncoder` as gRPC sees it.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use emu2_engine::error::EngineError;
use emu2_proto::{
    pooling,
    stage::{
        EncodeRequest, EncodeResponse, EncoderInfo, EncoderInfoRequest, EncoderWatchLoadRequest, Load,
        encode_request::Source,
        visual_encoder_server::{VisualEncoder, VisualEncoderServer},
    },
    v1,
};
use emu2_serve::{
    deadline::Deadline,
    message, parameters,
    priority::Priority,
    stream::{self, Events, Sender},
};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument, Span};

use crate::{
    config::Config,
    engine::{Encoded, Engine, ModelInfo, Pixels, PreparedImage},
    error::EncodeError,
    metrics::Metrics,
    preprocess::{
        PREPROCESSING_VERSION, Subject,
        pool::{Preprocessed, Preprocessor},
    },
};

#[cfg(test)]
mod tests;

/// Answers on their way to one caller; beyond, its own task waits, never the engine.
const ANSWERS: usize = 4;

/// The gRPC service. Clones share everything.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    engine: Engine,
    /// What callers have to know of the model; set before the service is ready.
    model: Arc<OnceLock<ModelInfo>>,
    preprocessor: Preprocessor,
    /// A permit for each image from its arrival to its answer, before it is decoded.
    images: Arc<Semaphore>,
    config: Arc<Config>,
    metrics: Metrics,
}

impl Service {
    pub(crate) fn new(config: &Config, engine: Engine, metrics: Metrics) -> Self {
        Self {
            engine,
            model: Arc::default(),
            preprocessor: Preprocessor::new(config.preprocess_threads, config.image.clone()),
            images: Arc::new(Semaphore::new(config.max_images)),
            config: Arc::new(config.clone()),
            metrics,
        }
    }

    pub(crate) fn loaded(&self, model: ModelInfo) {
        self.model.set(model).expect("a model is loaded once");
    }

    pub(crate) fn into_grpc(self) -> VisualEncoderServer<Self> {
        let max_bytes = self.config.server.max_message_bytes;
        VisualEncoderServer::new(self)
            .max_decoding_message_size(max_bytes)
            .max_encoding_message_size(max_bytes)
    }

    fn model(&self) -> Result<&ModelInfo, EncodeError> {
        self.model.get().ok_or(EncodeError::Loading)
    }

    /// Serves one call. When the caller leaves or its deadline passes, everything here is dropped: what waits is taken
    /// out of its queue, and what is being computed is the last.
    async fn call(
        self,
        requests: Streaming<EncodeRequest>,
        priority: Priority,
        sender: Sender<EncodeResponse>,
    ) {
        sender.run(self.answer(requests, priority, &sender)).await;
    }

    async fn answer(
        &self,
        mut requests: Streaming<EncodeRequest>,
        priority: Priority,
        sender: &Sender<EncodeResponse>,
    ) -> Result<(), Status> {
        let request = message::next(&mut requests).await?.ok_or(EncodeError::NoSource)?;
        let answer = self.encode_one(request, priority).await?;
        sender.send(Ok(answer)).await.map_err(|_| sender.closed_status())
    }

    async fn encode_one(
        &self,
        request: EncodeRequest,
        priority: Priority,
    ) -> Result<EncodeResponse, EncodeError> {
        let model = self.model()?;
        let full = EncodeError::Full { max: self.config.max_images };
        let _permit = self.images.try_acquire().map_err(|_| full)?;
        let n_query = checked_queries(request.n_query, model)?;
        let prepared = self.prepare(request.source, model).await?;
        let Preprocessed { pixels, damage, waited, took } = prepared;
        let pixels = if pixels.is_empty() { Pixels::Mean } else { Pixels::Values(pixels) };
        // Dropping the handle takes the image out of the queue.
        let mut submitted = self.engine.submit(PreparedImage { pixels, n_query }, priority)?;
        let encoded = submitted.next().await.ok_or(EngineError::Stopped)??;
        let Encoded { embeddings, queued, took: encode } = encoded;
        Ok(EncodeResponse {
            embeddings: Some(embeddings.into()),
            weights_digest: model.weights_digest.clone(),
            queue_ms: milliseconds(waited + queued),
            preprocess_ms: milliseconds(took),
            encode_ms: milliseconds(encode),
            preprocessing_version: PREPROCESSING_VERSION,
            warnings: damage.into_iter().map(str::to_owned).collect(),
        })
    }

    /// Prepares the pixels of a source; no pixels stand for the mean colour.
    async fn prepare(&self, source: Option<Source>, model: &ModelInfo) -> Result<Preprocessed, EncodeError> {
        let subject = match source.ok_or(EncodeError::NoSource)? {
            Source::MeanColour(_) => {
                return Ok(Preprocessed {
                    pixels: Vec::new(),
                    damage: Vec::new(),
                    waited: Duration::ZERO,
                    took: Duration::ZERO,
                });
            }
            Source::Image(encoded) => Subject::Encoded(encoded),
            Source::Box(region) => match parameters::region("box", &region) {
                wrong if wrong.is_empty() => Subject::Box(region),
                wrong => return Err(EncodeError::Box(wrong)),
            },
        };
        let prepared = self.preprocessor.run(subject, model.image_size).await;
        match &prepared {
            Ok(prepared) => self.metrics.preprocess_duration.observe(prepared.took.as_secs_f64()),
            Err(_) => drop(self.metrics.refused.inc()),
        }
        Ok(prepared?)
    }
}

#[tonic::async_trait]
impl VisualEncoder for Service {
    type EncodeStream = Events<EncodeResponse>;

    type WatchLoadStream = Events<Load>;

    async fn watch_load(
        &self,
        request: Request<EncoderWatchLoadRequest>,
    ) -> Result<Response<Self::WatchLoadStream>, Status> {
        Ok(Response::new(self.engine.watch_load(Deadline::of(&request))))
    }

    async fn info(&self, _: Request<EncoderInfoRequest>) -> Result<Response<EncoderInfo>, Status> {
        let model = self.model()?;
        Ok(Response::new(EncoderInfo {
            weights_digest: model.weights_digest.clone(),
            dtype: v1::Dtype::from(model.dtype).into(),
            // Dimensions of the model are far below 2^32.
            width: model.width as u32,
            image_size: model.image_size as u32,
            grid_side: model.grid_side as u32,
            preprocessing_version: PREPROCESSING_VERSION,
            max_image_pixels: self.preprocessor.limits().max_pixels,
            load: Some(self.engine.wire_load()),
        }))
    }

    async fn encode(
        &self,
        request: Request<Streaming<EncodeRequest>>,
    ) -> Result<Response<Self::EncodeStream>, Status> {
        let (sender, events) = stream::channel(ANSWERS, Deadline::of(&request));
        let priority = Priority::of_call(&request);
        let call = self.clone().call(request.into_inner(), priority, sender);
        tokio::spawn(call.instrument(Span::current()));
        Ok(Response::new(events))
    }
}

fn checked_queries(n_query: u32, model: &ModelInfo) -> Result<u32, EncodeError> {
    // A grid's side is at most 4096.
    match pooling::problem(model.grid_side as u32, n_query) {
        None => Ok(n_query),
        Some(problem) => Err(EncodeError::Queries(problem)),
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
