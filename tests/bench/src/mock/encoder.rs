//! Images of any bytes → embeddings out of their hash.

use std::sync::Arc;

use emu2_proto::{
    capable,
    stage::{
        EncodeRequest, EncodeResponse, EncoderInfo, EncoderInfoRequest, EncoderWatchLoadRequest, Load,
        encode_request::Source, visual_encoder_server::VisualEncoder,
    },
};
use emu2_serve::{deadline::Deadline, message, stream::Events};
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::{
    replica::{Replica, refused, send},
    values,
};

const PREPROCESSING_VERSION: u32 = 1;

pub(super) struct MockEncoder(pub(super) Arc<Replica>);

#[async_trait]
impl VisualEncoder for MockEncoder {
    type EncodeStream = Events<EncodeResponse>;

    type WatchLoadStream = Events<Load>;

    async fn watch_load(
        &self,
        request: Request<EncoderWatchLoadRequest>,
    ) -> Result<Response<Events<Load>>, Status> {
        Ok(self.0.watch_load(Deadline::of(&request)))
    }

    async fn info(&self, _: Request<EncoderInfoRequest>) -> Result<Response<EncoderInfo>, Status> {
        let options = &self.0.options;
        Ok(Response::new(EncoderInfo {
            weights_digest: options.digest.clone(),
            dtype: options.dtype().into(),
            width: options.width,
            preprocessing_version: PREPROCESSING_VERSION,
            load: Some(self.0.load()),
            ..capable::encoder()
        }))
    }

    async fn encode(
        &self,
        request: Request<Streaming<EncodeRequest>>,
    ) -> Result<Response<Self::EncodeStream>, Status> {
        let deadline = Deadline::of(&request);
        let mut requests = request.into_inner();
        Ok(self.0.respond(deadline, |replica, answers| async move {
            while let Some(request) = message::next(&mut requests).await? {
                let options = &replica.options;
                replica.work(options.image_ms).await;
                let source = request.source.ok_or_else(|| refused("source is missing"))?;
                let content = match &source {
                    Source::Image(data) => values::hash(&[options.digest.as_bytes(), b"image", data]),
                    Source::Box(_) => return Err(refused("boxes are not encoded here")),
                    Source::MeanColour(_) => values::hash(&[options.digest.as_bytes(), b"mean colour"]),
                };
                let tensor = values::tensor(&content, request.n_query, options.width, options.dtype());
                let answer = EncodeResponse {
                    embeddings: Some(tensor),
                    weights_digest: options.digest.clone(),
                    preprocessing_version: PREPROCESSING_VERSION,
                    encode_ms: options.image_ms,
                    ..Default::default()
                };
                send(&answers, answer).await;
            }
            Ok(())
        }))
    }
}
