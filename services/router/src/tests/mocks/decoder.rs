//! Steps, each behind the gate, and a picture.

use std::sync::atomic::Ordering;

use emu2_proto::{
    capable,
    stage::{
        DecodeEvent, DecodeFinished, DecodeRequest, DecodedImage, DecoderInfo, DecoderInfoRequest,
        DecoderWatchLoadRequest, DenoiseStep, decode_event, decode_request,
        visual_decoder_server::VisualDecoder,
    },
    v1::ParameterLimit,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::{LoadStream, Script, WIDTH};

pub(super) struct MockDecoder(pub(super) Script);

#[async_trait]
impl VisualDecoder for MockDecoder {
    type DecodeStream = ReceiverStream<Result<DecodeEvent, Status>>;

    type WatchLoadStream = LoadStream;

    async fn watch_load(&self, _: Request<DecoderWatchLoadRequest>) -> Result<Response<LoadStream>, Status> {
        Ok(self.0.watch_load())
    }

    async fn info(&self, _: Request<DecoderInfoRequest>) -> Result<Response<DecoderInfo>, Status> {
        self.0.asked.fetch_add(1, Ordering::SeqCst);
        self.0.hang().await;
        Ok(Response::new(DecoderInfo {
            weights_digest: self.0.digest(),
            dtype: self.0.dtype(),
            width: WIDTH,
            max_queries: 16,
            parameter_limits: capable::with_limits(
                capable::decoder().parameter_limits,
                &[
                    ParameterLimit::new("image.height", 8..=128, Some(64)).multiple_of(8),
                    ParameterLimit::new("image.width", 8..=128, Some(64)).multiple_of(8),
                    ParameterLimit::new("image.steps", 1..=100, Some(50)),
                ],
            ),
            load: self.0.load(),
            ..capable::decoder()
        }))
    }

    async fn decode(
        &self,
        request: Request<Streaming<DecodeRequest>>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        let script = self.0.clone();
        let metadata = request.metadata().clone();
        let mut requests = request.into_inner();
        self.0.respond(&metadata, |answers| async move {
            let send = async |event| {
                let _ = answers.send(Ok(DecodeEvent { event: Some(event) })).await;
            };
            let Ok(Some(DecodeRequest { message: Some(decode_request::Message::Start(start)) })) =
                requests.message().await
            else {
                panic!("the first message is the start");
            };
            script.decodes.lock().unwrap().push(start.clone());
            let asked = start.image.expect("parameters");
            let mut missing = [start.queries, if asked.guidance_scale() > 1.0 { start.queries } else { 0 }];
            while missing != [0, 0] {
                let Ok(Some(DecodeRequest { message: Some(message) })) = requests.message().await else {
                    return false;
                };
                let (index, rows, kept) = match message {
                    decode_request::Message::Positive(rows) => (0, rows, &script.positive),
                    decode_request::Message::Negative(rows) => (1, rows, &script.negative),
                    decode_request::Message::Start(_) => panic!("one start"),
                };
                missing[index] -= rows.embeddings.as_ref().unwrap().shape[0];
                kept.lock().unwrap().push(rows);
            }
            for step in 1..=asked.steps() {
                script.gate().await;
                send(decode_event::Event::Step(DenoiseStep { step, steps: asked.steps() })).await;
            }
            let image = DecodedImage {
                png: script.png.lock().unwrap().clone(),
                height: asked.height(),
                width: asked.width(),
            };
            send(decode_event::Event::Image(image)).await;
            let finished =
                DecodeFinished { weights_digest: script.digest(), vae_ms: 2.5, ..Default::default() };
            send(decode_event::Event::Finished(finished)).await;
            true
        })
    }
}
