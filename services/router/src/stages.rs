//! The three stages as the router calls them: one streaming call each, its replica's load held until it ends.

use std::{fmt, time::Instant};

use emu2_proto::stage::{
    DecodeEvent, DecodeRequest, DecodeStart, DecoderInfo, DecoderInfoRequest, EncodeRequest, EncodeResponse,
    EncoderInfo, EncoderInfoRequest, LlmEvent, LlmInfo, LlmInfoRequest, LlmRequest, LlmStart, decode_request,
    language_model_client::LanguageModelClient, llm_request, visual_decoder_client::VisualDecoderClient,
    visual_encoder_client::VisualEncoderClient,
};
use emu2_serve::{deadline::Deadline, status, trace};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming, transport::Channel};

use crate::{
    error,
    metrics::Metrics,
    pool::{Lease, Pool, Stage},
};

/// Messages that wait for a stage to take them: one on its way and one ready; more would only be held here.
const WAITING_MESSAGES: usize = 2;

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
}

/// An open call: what goes in, and what comes out.
pub(crate) struct Call<S: Stage, In, Out> {
    pub(crate) requests: Requests<In>,
    pub(crate) answers: Answers<S, Out>,
}

pub(crate) type LlmCall = Call<Llm, LlmRequest, LlmEvent>;
pub(crate) type DecoderCall = Call<Decoder, DecodeRequest, DecodeEvent>;

/// The sending half; dropping it tells the stage that no more comes.
pub(crate) struct Requests<In>(mpsc::Sender<In>);

/// The receiving half; dropping it stops the stage.
pub(crate) struct Answers<S: Stage, Out> {
    stream: Streaming<Out>,
    lease: Lease<S>,
    _timer: Timer,
}

impl<In> Requests<In> {
    /// False once the stage has hung up: why is among its answers.
    pub(crate) async fn send(&self, request: In) -> bool {
        self.0.send(request).await.is_ok()
    }
}

impl<S: Stage, Out> Answers<S, Out> {
    /// The next answer. A stage may end its stream only after its last answer, which the caller knows: an end before
    /// that is a fault.
    pub(crate) async fn next(&mut self) -> Result<Out, Status> {
        match self.stream.message().await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(ended_early::<S>()),
            Err(status) => {
                if error::is_replica_lost(&status) {
                    self.lease.doubt();
                }
                Err(status)
            }
        }
    }

    pub(crate) fn lease(&self) -> &Lease<S> {
        &self.lease
    }
}

/// Encodes one picture. Several of a request go side by side, each where there is room; one whose replica is lost
/// is encoded by another.
pub(crate) async fn encode(
    pool: &Pool<Encoder>,
    digest: &str,
    request: EncodeRequest,
    deadline: Deadline,
    metrics: &Metrics,
) -> Result<(EncodeResponse, Lease<Encoder>), Status> {
    let _timer = Timer::start::<Encoder>(metrics);
    let encode = |mut client: VisualEncoderClient<Channel>| {
        let request = outgoing(tokio_stream::once(request.clone()), deadline);
        async move {
            let answer = client.encode(request).await?.into_inner().message().await?;
            answer.ok_or_else(ended_early::<Encoder>)
        }
    };
    pool.open(digest, encode).await
}

/// Opens the llm's stream with its prompt.
pub(crate) async fn generate(
    pool: &Pool<Llm>,
    digest: &str,
    start: LlmStart,
    deadline: Deadline,
    metrics: &Metrics,
) -> Result<LlmCall, Status> {
    let timer = Timer::start::<Llm>(metrics);
    let open = |mut client: LanguageModelClient<Channel>| {
        let first = LlmRequest { message: Some(llm_request::Message::Start(start.clone())) };
        let (requests, stream) = requests(first);
        let request = outgoing(stream, deadline);
        async move { Ok((client.generate(request).await?, requests)) }
    };
    let ((response, requests), lease) = pool.open(digest, open).await?;
    Ok(Call { requests, answers: Answers { stream: response.into_inner(), lease, _timer: timer } })
}

/// Opens the decoder's stream with the size and steps of its picture.
pub(crate) async fn decode(
    pool: &Pool<Decoder>,
    digest: &str,
    start: DecodeStart,
    deadline: Deadline,
    metrics: &Metrics,
) -> Result<DecoderCall, Status> {
    let timer = Timer::start::<Decoder>(metrics);
    let open = |mut client: VisualDecoderClient<Channel>| {
        let first = DecodeRequest { message: Some(decode_request::Message::Start(start.clone())) };
        let (requests, stream) = requests(first);
        let request = outgoing(stream, deadline);
        async move { Ok((client.decode(request).await?, requests)) }
    };
    let ((response, requests), lease) = pool.open(digest, open).await?;
    Ok(Call { requests, answers: Answers { stream: response.into_inner(), lease, _timer: timer } })
}

fn requests<In: fmt::Debug + Send + 'static>(first: In) -> (Requests<In>, ReceiverStream<In>) {
    let (sender, receiver) = mpsc::channel(WAITING_MESSAGES);
    sender.try_send(first).expect("an empty queue takes one message");
    (Requests(sender), ReceiverStream::new(receiver))
}

fn ended_early<S: Stage>() -> Status {
    status::internal(format!("the {} stage ended before its result", S::NAME))
}

/// The message with the request's id, its trace and what is left of its time.
fn outgoing<T>(message: T, deadline: Deadline) -> Request<T> {
    let mut request = Request::new(message);
    trace::inject(request.metadata_mut());
    deadline.apply(request.metadata_mut());
    request
}

/// Observes a call's length when it ends, however it ends.
struct Timer {
    stage: &'static str,
    began: Instant,
    metrics: Metrics,
}

impl Timer {
    fn start<S: Stage>(metrics: &Metrics) -> Self {
        Self { stage: S::NAME, began: Instant::now(), metrics: metrics.clone() }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.metrics.stage(self.stage, self.began.elapsed());
    }
}
