//! The edge: `VisualDecoder` as gRPC sees it.

use std::{
    io::Cursor,
    sync::{Arc, OnceLock},
    time::Duration,
};

use emu2_engine::error::EngineError;
use emu2_proto::{
    stage::{
        DecodeEvent, DecodeFinished, DecodeRequest, DecodedImage, DecoderInfo, DecoderInfoRequest,
        DecoderWatchLoadRequest, DenoiseStep, Load, decode_event,
        visual_decoder_server::{VisualDecoder, VisualDecoderServer},
    },
    v1,
};
use emu2_serve::{
    deadline::Deadline,
    message,
    priority::Priority,
    status::{ErrorCode, invalid, unavailable},
    stream::{self, Events, Sender},
};
use image::{
    ExtendedColorType, ImageEncoder,
    codecs::png::{CompressionType, FilterType, PngEncoder},
};
use tokio::time::timeout;
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument, Span};

use crate::{
    config::Config,
    denoise::{DenoiseRequest, ModelInfo, RgbImage},
    engine::{Engine, Event, FinishedImage},
    error::{DecodeError, LatentsNotFinite},
    intake::{Intake, Limits},
};

#[cfg(test)]
mod tests;

/// Events on their way to one caller; the engine's own channel holds the rest.
const EVENTS: usize = 4;

/// The gRPC service. Clones share everything.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    engine: Engine,
    config: Arc<Config>,
    /// What requests are checked against; empty until the model is loaded.
    limits: Arc<OnceLock<Limits>>,
}

impl Service {
    pub(crate) fn new(config: &Config, engine: Engine) -> Self {
        Self { engine, config: Arc::new(config.clone()), limits: Arc::default() }
    }

    pub(crate) fn loaded(&self, model: ModelInfo) {
        let limits = Limits::new(&self.config, model);
        self.limits.set(limits).expect("a model is loaded once");
    }

    pub(crate) fn into_grpc(self) -> VisualDecoderServer<Self> {
        let max_bytes = self.config.server.max_message_bytes;
        VisualDecoderServer::new(self)
            .max_decoding_message_size(max_bytes)
            .max_encoding_message_size(max_bytes)
    }

    fn limits(&self) -> Result<&Limits, Status> {
        self.limits.get().ok_or_else(|| unavailable("the model is still loading"))
    }

    /// One call from its first message to its last event. When the caller leaves, everything here is dropped, and
    /// with it the engine's channel, which takes the request out of the batch.
    async fn call(self, messages: Streaming<DecodeRequest>, priority: Priority, sender: Sender<DecodeEvent>) {
        sender.run(self.paint(messages, priority, &sender)).await;
    }

    async fn paint(
        &self,
        messages: Streaming<DecodeRequest>,
        priority: Priority,
        sender: &Sender<DecodeEvent>,
    ) -> Result<(), Status> {
        let limits = self.limits()?;
        let request = self.gather(messages, limits).await?;
        let steps = request.steps;
        let tell = async |event| {
            let event = DecodeEvent { event: Some(event) };
            sender.send(Ok(event)).await.map_err(|_| sender.closed_status())
        };
        let mut events = self.engine.submit(request, priority)?;
        while let Some(event) = events.next().await {
            match event? {
                Event::Step(step) => tell(progress(step, steps)).await?,
                Event::Finished(image) => {
                    let finished = finished(&image, &limits.model);
                    tell(compressed(image.image).await?).await?;
                    return tell(finished).await;
                }
            }
        }
        Err(EngineError::<LatentsNotFinite>::Stopped.into())
    }

    /// Reads messages until the request is complete; what comes after is not read.
    async fn gather(
        &self,
        mut messages: Streaming<DecodeRequest>,
        limits: &Limits,
    ) -> Result<DenoiseRequest, Status> {
        let first = self.next(&mut messages).await?;
        let mut intake = Intake::open(first, limits).map_err(invalid)?;
        while !intake.is_complete() {
            let Some(message) = self.next(&mut messages).await? else { break };
            intake.push(message)?;
        }
        intake.finish().map_err(invalid)
    }

    async fn next(&self, messages: &mut Streaming<DecodeRequest>) -> Result<Option<DecodeRequest>, Status> {
        let limit = self.config.input_wait_ms_max;
        let waited = timeout(Duration::from_millis(limit), message::next(messages)).await;
        waited.unwrap_or_else(|_| {
            let text = format!("the next message must come within {limit} ms (input_wait_ms_max)");
            Err(ErrorCode::DeadlineExceeded.status(text))
        })
    }
}

#[tonic::async_trait]
impl VisualDecoder for Service {
    type DecodeStream = Events<DecodeEvent>;

    type WatchLoadStream = Events<Load>;

    async fn watch_load(
        &self,
        request: Request<DecoderWatchLoadRequest>,
    ) -> Result<Response<Self::WatchLoadStream>, Status> {
        Ok(Response::new(self.engine.watch_load(Deadline::of(&request))))
    }

    async fn info(&self, _: Request<DecoderInfoRequest>) -> Result<Response<DecoderInfo>, Status> {
        let limits = self.limits()?;
        let model = &limits.model;
        Ok(Response::new(DecoderInfo {
            weights_digest: model.weights_digest.clone(),
            dtype: v1::Dtype::from(model.dtype).into(),
            // Model dimensions and configured limits are far below 2^32.
            width: model.width as u32,
            scale_factor: model.scale_factor as u32,
            max_queries: limits.max_queries as u32,
            parameter_limits: limits.parameters.clone(),
            load: Some(self.engine.wire_load()),
        }))
    }

    async fn decode(
        &self,
        request: Request<Streaming<DecodeRequest>>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        let (sender, events) = stream::channel(EVENTS, Deadline::of(&request));
        let priority = Priority::of_call(&request);
        let call = self.clone().call(request.into_inner(), priority, sender);
        tokio::spawn(call.instrument(Span::current()));
        Ok(Response::new(events))
    }
}

fn progress(step: usize, steps: usize) -> decode_event::Event {
    // Both are at most max_steps.
    decode_event::Event::Step(DenoiseStep { step: step as u32, steps: steps as u32 })
}

fn finished(image: &FinishedImage, model: &ModelInfo) -> decode_event::Event {
    let milliseconds = |duration: Duration| duration.as_secs_f64() * 1e3;
    decode_event::Event::Finished(DecodeFinished {
        weights_digest: model.weights_digest.clone(),
        queue_ms: milliseconds(image.queue),
        denoise_ms: milliseconds(image.denoise),
        vae_ms: milliseconds(image.vae),
    })
}

/// Compressing takes as long as some steps, so not on the threads that serve connections.
async fn compressed(image: RgbImage) -> Result<decode_event::Event, DecodeError> {
    let encoded = tokio::task::spawn_blocking(move || png(&image).map(|png| (png, image))).await;
    let (png, image) = encoded.map_err(|error| DecodeError::Png(error.to_string()))??;
    let (height, width) = (image.height as u32, image.width as u32);
    Ok(decode_event::Event::Image(DecodedImage { png: png.into(), height, width }))
}

/// Compressed fast rather than well: the image goes to a caller, not to an archive.
fn png(image: &RgbImage) -> Result<Vec<u8>, DecodeError> {
    let mut file = Cursor::new(Vec::new());
    let encoder = PngEncoder::new_with_quality(&mut file, CompressionType::Fast, FilterType::Adaptive);
    encoder
        .write_image(&image.rgb, image.width as u32, image.height as u32, ExtendedColorType::Rgb8)
        .map_err(|error| DecodeError::Png(error.to_string()))?;
    Ok(file.into_inner())
}
