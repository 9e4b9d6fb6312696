//! Pictures that become rows of one value.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use emu2_proto::{
    capable,
    stage::{
        EncodeRequest, EncodeResponse, EncoderInfo, EncoderInfoRequest, EncoderWatchLoadRequest,
        encode_request::Source, visual_encoder_server::VisualEncoder,
    },
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::{LoadStream, SLOW, Script, WIDTH, tensor};

pub(super) struct MockEncoder(pub(super) Script);

#[async_trait]
impl VisualEncoder for MockEncoder {
    type EncodeStream = ReceiverStream<Result<EncodeResponse, Status>>;

    type WatchLoadStream = LoadStream;

    async fn watch_load(&self, _: Request<EncoderWatchLoadRequest>) -> Result<Response<LoadStream>, Status> {
        Ok(self.0.watch_load())
    }

    async fn info(&self, _: Request<EncoderInfoRequest>) -> Result<Response<EncoderInfo>, Status> {
        self.0.asked.fetch_add(1, Ordering::SeqCst);
        self.0.hang().await;
        Ok(Response::new(EncoderInfo {
            weights_digest: self.0.digest(),
            dtype: self.0.dtype(),
            width: WIDTH,
            grid_side: 4,
            preprocessing_version: self.0.version(),
            max_image_pixels: 1 << 20,
            load: self.0.load(),
            ..capable::encoder()
        }))
    }

    async fn encode(
        &self,
        request: Request<Streaming<EncodeRequest>>,
    ) -> Result<Response<Self::EncodeStream>, Status> {
        let script = self.0.clone();
        let metadata = request.metadata().clone();
        let mut requests = request.into_inner();
        self.0.respond(&metadata, |answers| async move {
            while let Ok(Some(request)) = requests.message().await {
                let source = request.source.expect("a source");
                script.encoded.lock().unwrap().push(source.clone());
                let content = match source {
                    Source::Image(data) => data,
                    Source::MeanColour(_) => Bytes::new(),
                    Source::Box(region) => region.phrase.into(),
                };
                if content.starts_with(SLOW) {
                    script.gate().await;
                }
                let weights_digest = script.digest();
                let embeddings = Some(tensor(&weights_digest, &content, request.n_query));
                let answer = EncodeResponse {
                    embeddings,
                    weights_digest,
                    preprocessing_version: script.version(),
                    ..Default::default()
                };
                let _ = answers.send(Ok(answer)).await;
            }
            true
        })
    }
}
