//! Embeddings → an image's bytes out of their hash, after as many steps as were asked for.

use std::sync::Arc;

use emu2_proto::{
    capable,
    stage::{
        DecodeEvent, DecodeFinished, DecodeRequest, DecodeStart, DecodedImage, DecoderInfo,
        DecoderInfoRequest, DecoderWatchLoadRequest, DenoiseStep, Load, RegressedEmbeddings, decode_event,
        decode_request, visual_decoder_server::VisualDecoder,
    },
};
use emu2_serve::{deadline::Deadline, message, stream::Events};
use prost::Message;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::{
    replica::{Replica, refused, send},
    values,
};

pub(super) struct MockDecoder(pub(super) Arc<Replica>);

#[async_trait]
impl VisualDecoder for MockDecoder {
    type DecodeStream = Events<DecodeEvent>;

    type WatchLoadStream = Events<Load>;

    async fn watch_load(
        &self,
        request: Request<DecoderWatchLoadRequest>,
    ) -> Result<Response<Events<Load>>, Status> {
        Ok(self.0.watch_load(Deadline::of(&request)))
    }

    async fn info(&self, _: Request<DecoderInfoRequest>) -> Result<Response<DecoderInfo>, Status> {
        let options = &self.0.options;
        Ok(Response::new(DecoderInfo {
            weights_digest: options.digest.clone(),
            dtype: options.dtype().into(),
            width: options.width,
            load: Some(self.0.load()),
            ..capable::decoder()
        }))
    }

    async fn decode(
        &self,
        request: Request<Streaming<DecodeRequest>>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        let deadline = Deadline::of(&request);
        let mut requests = request.into_inner();
        Ok(self.0.respond(deadline, |replica, events| async move {
            let options = &replica.options;
            let Some(DecodeRequest { message: Some(decode_request::Message::Start(start)) }) =
                message::next(&mut requests).await?
            else {
                return Err(refused("the first message must be the start"));
            };
            let asked = start.image.ok_or_else(|| refused("parameters are missing"))?;
            let [positive, negative] = read_conditions(&mut requests, &start).await?;
            let mut running = replica.steps(asked.steps()).await;
            for step in 1..=asked.steps() {
                running.step().await;
                let step = DenoiseStep { step, steps: asked.steps() };
                send(&events, event(decode_event::Event::Step(step))).await;
            }
            drop(running);
            replica.work(options.vae_ms).await;
            let (height, width) = (asked.height(), asked.width());
            let seed = values::hash(&[
                options.digest.as_bytes(),
                &start.encode_to_vec(),
                &positive.data,
                &negative.data,
            ]);
            let png = seed.as_bytes().repeat(options.png_bytes.div_ceil(seed.as_bytes().len()));
            let image = DecodedImage { png: png.into(), height, width };
            send(&events, event(decode_event::Event::Image(image))).await;
            let finished = DecodeFinished { weights_digest: options.digest.clone(), ..Default::default() };
            send(&events, event(decode_event::Event::Finished(finished))).await;
            Ok(())
        }))
    }
}

fn event(event: decode_event::Event) -> DecodeEvent {
    DecodeEvent { event: Some(event) }
}

/// Rows as they come, in order and without a gap.
#[derive(Default)]
struct Condition {
    rows: u32,
    data: Vec<u8>,
}

impl Condition {
    fn push(&mut self, rows: RegressedEmbeddings) -> Result<(), Status> {
        let tensor = rows.embeddings.ok_or_else(|| refused("embeddings are missing"))?;
        if rows.start != self.rows {
            return Err(refused(format!("row {} came where {} was next", rows.start, self.rows)));
        }
        self.rows += tensor.shape.first().copied().unwrap_or(0);
        self.data.extend_from_slice(&tensor.data);
        Ok(())
    }
}

/// Positive and negative, each whole.
async fn read_conditions(
    requests: &mut Streaming<DecodeRequest>,
    start: &DecodeStart,
) -> Result<[Condition; 2], Status> {
    let wanted = [
        start.queries,
        if start.image.unwrap_or_default().guidance_scale() > 1.0 { start.queries } else { 0 },
    ];
    let mut conditions = [Condition::default(), Condition::default()];
    while conditions.each_ref().map(|condition| condition.rows) != wanted {
        let request = message::next(requests).await?;
        let (index, rows) = match request.and_then(|request| request.message) {
            Some(decode_request::Message::Positive(rows)) => (0, rows),
            Some(decode_request::Message::Negative(rows)) => (1, rows),
            Some(decode_request::Message::Start(_)) | None => {
                return Err(refused("conditions ended before they were whole"));
            }
        };
        conditions[index].push(rows)?;
        if conditions[index].rows > wanted[index] {
            return Err(refused(format!("more than {} rows", wanted[index])));
        }
    }
    Ok(conditions)
}
