//! The three stages as the router calls them: what each is asked, and what of its answers a next attempt builds on.

use emu2_proto::{
    stage::{
        DecodeEvent, DecodeRequest, DecodeStart, DecoderInfo, DecoderInfoRequest, DecoderWatchLoadRequest,
        EncodeRequest, EncodeResponse, EncoderInfo, EncoderInfoRequest, EncoderWatchLoadRequest, LlmAccepted,
        LlmEvent, LlmInfo, LlmInfoRequest, LlmRequest, LlmResume, LlmStart, LlmWatchLoadRequest, Load,
        decode_event, decode_request, language_model_client::LanguageModelClient, llm_event, llm_request,
        visual_decoder_client::VisualDecoderClient, visual_encoder_client::VisualEncoderClient,
    },
    v1,
};
use emu2_serve::status;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, transport::Channel};

use crate::{
    error::Stop,
    pool::{Lease, Stage},
    rows::Rows,
    stage_call::{Call, Progress, Route, Session},
};

pub(crate) struct Encoder;
pub(crate) struct Llm;
pub(crate) struct Decoder;

impl Stage for Encoder {
    const NAME: &'static str = "encoder";
    type Client = VisualEncoderClient<Channel>;
    type Info = EncoderInfo;

    fn client(channel: Channel, max_message_bytes: usize) -> Self::Client {
        VisualEncoderClient::new(channel).max_decoding_message_size(max_message_bytes)
    }

    async fn info(mut client: Self::Client) -> Result<EncoderInfo, Status> {
        Ok(client.info(EncoderInfoRequest {}).await?.into_inner())
    }

    fn digest(info: &EncoderInfo) -> &str {
        &info.weights_digest
    }

    fn load(info: &EncoderInfo) -> Load {
        info.load.unwrap_or_default()
    }

    async fn watch_load(mut client: Self::Client) -> Result<Response<Streaming<Load>>, Status> {
        client.watch_load(EncoderWatchLoadRequest {}).await
    }
}

impl Stage for Llm {
    const NAME: &'static str = "llm";
    type Client = LanguageModelClient<Channel>;
    type Info = LlmInfo;

    fn client(channel: Channel, max_message_bytes: usize) -> Self::Client {
        LanguageModelClient::new(channel).max_decoding_message_size(max_message_bytes)
    }

    async fn info(mut client: Self::Client) -> Result<LlmInfo, Status> {
        Ok(client.info(LlmInfoRequest {}).await?.into_inner())
    }

    fn digest(info: &LlmInfo) -> &str {
        &info.weights_digest
    }

    fn load(info: &LlmInfo) -> Load {
        info.load.unwrap_or_default()
    }

    async fn watch_load(mut client: Self::Client) -> Result<Response<Streaming<Load>>, Status> {
        client.watch_load(LlmWatchLoadRequest {}).await
    }
}

impl Stage for Decoder {
    const NAME: &'static str = "decoder";
    type Client = VisualDecoderClient<Channel>;
    type Info = DecoderInfo;

    fn client(channel: Channel, max_message_bytes: usize) -> Self::Client {
        VisualDecoderClient::new(channel).max_decoding_message_size(max_message_bytes)
    }

    async fn info(mut client: Self::Client) -> Result<DecoderInfo, Status> {
        Ok(client.info(DecoderInfoRequest {}).await?.into_inner())
    }

    fn digest(info: &DecoderInfo) -> &str {
        &info.weights_digest
    }

    fn load(info: &DecoderInfo) -> Load {
        info.load.unwrap_or_default()
    }

    async fn watch_load(mut client: Self::Client) -> Result<Response<Streaming<Load>>, Status> {
        client.watch_load(DecoderWatchLoadRequest {}).await
    }
}

/// Encodes one image. Several of a request go side by side, each where there is room. The lease is of the replica
/// that did it.
pub(crate) async fn encode(
    request: EncodeRequest,
    route: Route<Encoder>,
) -> Result<(EncodeResponse, Option<Lease<Encoder>>), Stop> {
    let (_, mut session) = Session::new(EncodeCall(request), route);
    let answer = session.next().await?;
    Ok((answer, session.into_parts().1))
}

struct EncodeCall(EncodeRequest);

impl Call for EncodeCall {
    type Stage = Encoder;
    type In = EncodeRequest;
    type Out = EncodeResponse;

    fn first(&self) -> EncodeRequest {
        self.0.clone()
    }

    async fn open(
        mut client: VisualEncoderClient<Channel>,
        request: Request<ReceiverStream<EncodeRequest>>,
    ) -> Result<Response<Streaming<EncodeResponse>>, Status> {
        client.encode(request).await
    }

    /// Whatever weights it names: the value is good under their name.
    fn take(&mut self, _: &EncodeResponse) -> Result<Progress, Status> {
        Ok(Progress::Last)
    }
}

/// A prompt to the llm. What came of it so far is the next attempt's beginning.
pub(crate) struct LlmCall {
    start: LlmStart,
    digest: String,
    /// What the first attempt's replica called itself: another that reads prompts otherwise cannot go on with them.
    accepted: Option<LlmAccepted>,
    token_ids: Vec<u32>,
    rows: Rows,
}

impl LlmCall {
    pub(crate) fn new(start: LlmStart, digest: &str) -> Self {
        Self {
            start,
            digest: digest.to_owned(),
            accepted: None,
            token_ids: Vec::new(),
            rows: Rows::default(),
        }
    }

    fn accept(&mut self, accepted: &LlmAccepted) -> Progress {
        match &self.accepted {
            _ if accepted.weights_digest != self.digest => Progress::OtherWeights,
            Some(first) if first == accepted => Progress::Known,
            Some(_) => Progress::OtherWeights,
            None => {
                self.accepted = Some(accepted.clone());
                Progress::New
            }
        }
    }

    /// The embeddings that were regressed, and what the llm called itself; INTERNAL unless there are as many as
    /// expected.
    pub(crate) fn regressed(self, expected: u32) -> Result<(LlmAccepted, v1::Tensor), Status> {
        Ok((self.accepted.unwrap_or_default(), self.rows.whole(expected)?))
    }
}

impl Call for LlmCall {
    type Stage = Llm;
    type In = LlmRequest;
    type Out = LlmEvent;

    fn first(&self) -> LlmRequest {
        let begun = !self.token_ids.is_empty() || !self.rows.is_empty();
        let resume = begun.then(|| LlmResume { token_ids: self.token_ids.clone(), rows: self.rows.so_far() });
        let start = LlmStart { resume, ..self.start.clone() };
        LlmRequest { message: Some(llm_request::Message::Start(start)) }
    }

    async fn open(
        mut client: LanguageModelClient<Channel>,
        request: Request<ReceiverStream<LlmRequest>>,
    ) -> Result<Response<Streaming<LlmEvent>>, Status> {
        client.generate(request).await
    }

    fn take(&mut self, answer: &LlmEvent) -> Result<Progress, Status> {
        let event = answer.event.as_ref();
        match event.ok_or_else(|| status::internal("the llm sent an event of no kind"))? {
            llm_event::Event::Accepted(accepted) => Ok(self.accept(accepted)),
            llm_event::Event::Text(text) => {
                self.token_ids.extend(&text.token_ids);
                Ok(Progress::New)
            }
            llm_event::Event::Embeddings(rows) => {
                self.rows.push(rows)?;
                Ok(Progress::New)
            }
            llm_event::Event::Finished(_) => Ok(Progress::Last),
        }
    }
}

/// An image of the decoder. Each attempt denoises from the seed; of its steps the reader sees those that are further
/// than any before.
pub(crate) struct DecodeCall {
    start: DecodeStart,
    digest: String,
    steps_seen: u32,
}

impl DecodeCall {
    pub(crate) fn new(start: DecodeStart, digest: &str) -> Self {
        Self { start, digest: digest.to_owned(), steps_seen: 0 }
    }
}

impl Call for DecodeCall {
    type Stage = Decoder;
    type In = DecodeRequest;
    type Out = DecodeEvent;

    fn first(&self) -> DecodeRequest {
        DecodeRequest { message: Some(decode_request::Message::Start(self.start.clone())) }
    }

    async fn open(
        mut client: VisualDecoderClient<Channel>,
        request: Request<ReceiverStream<DecodeRequest>>,
    ) -> Result<Response<Streaming<DecodeEvent>>, Status> {
        client.decode(request).await
    }

    fn take(&mut self, answer: &DecodeEvent) -> Result<Progress, Status> {
        match &answer.event {
            Some(decode_event::Event::Step(step)) if step.step <= self.steps_seen => Ok(Progress::Known),
            Some(decode_event::Event::Step(step)) => {
                self.steps_seen = step.step;
                Ok(Progress::New)
            }
            Some(decode_event::Event::Finished(finished)) if finished.weights_digest != self.digest => {
                Ok(Progress::OtherWeights)
            }
            Some(decode_event::Event::Finished(_)) => Ok(Progress::Last),
            _ => Ok(Progress::New),
        }
    }
}
