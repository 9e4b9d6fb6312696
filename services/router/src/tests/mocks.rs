//! The three stages as servers that answer by a script, remember what they were asked, and can be held or killed.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use emu2_proto::{
    stage::{
        DecodeEvent, DecodeFinished, DecodeRequest, DecodeStart, DecodedImage, DecoderInfo,
        DecoderInfoRequest, DenoiseStep, EncodeRequest, EncodeResponse, EncoderInfo, EncoderInfoRequest,
        LlmAccepted, LlmEvent, LlmFinished, LlmInfo, LlmInfoRequest, LlmPrompt, LlmRequest, LlmStart,
        LlmText, RegressedEmbeddings, decode_event, decode_request,
        encode_request::Source,
        language_model_server::{LanguageModel, LanguageModelServer},
        llm_event, llm_part, llm_request, llm_start,
        visual_decoder_server::{VisualDecoder, VisualDecoderServer},
        visual_encoder_server::{VisualEncoder, VisualEncoderServer},
    },
    v1::{Dtype, Tensor},
};
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Status, Streaming, async_trait,
    metadata::MetadataMap,
    transport::{Server, server::TcpIncoming},
};

pub(super) const WIDTH: u32 = 4;
pub(super) const N_QUERY: u32 = 4;
/// A picture that begins so waits for the encoder's gate.
pub(super) const SLOW: &[u8] = b"slow";
pub(super) const PNG: &[u8] = b"a painted png";

/// What a test and its stage share.
#[derive(Clone)]
pub(super) struct Script(Arc<Shared>);

pub(super) struct Shared {
    pub(super) digest: Mutex<String>,
    /// Of the preprocessing, or of the templates.
    pub(super) version: AtomicU32,
    pub(super) dtype: Mutex<Dtype>,
    /// Closed, it holds the stage at its one waiting point.
    pub(super) gate: watch::Sender<bool>,
    /// Answered in place of work.
    pub(super) fails: Mutex<Option<Status>>,
    /// Set, the stage neither says what it is nor moves.
    pub(super) hung: watch::Sender<bool>,
    /// Said of the engine's current step.
    pub(super) step_ms: AtomicU64,
    /// Times that it was asked what it is.
    pub(super) asked: AtomicUsize,
    pub(super) calls: AtomicUsize,
    pub(super) running: AtomicUsize,
    /// Calls whose caller went away before their end.
    pub(super) cancelled: AtomicUsize,
    pub(super) metadata: Mutex<Vec<MetadataMap>>,
    pub(super) encoded: Mutex<Vec<Source>>,
    pub(super) starts: Mutex<Vec<LlmStart>>,
    pub(super) slots: Mutex<Vec<(u32, Tensor)>>,
    pub(super) decodes: Mutex<Vec<DecodeStart>>,
    pub(super) positive: Mutex<Vec<RegressedEmbeddings>>,
    pub(super) negative: Mutex<Vec<RegressedEmbeddings>>,
}

impl std::ops::Deref for Script {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Script {
    pub(super) fn new(digest: &str) -> Self {
        let shared = Shared {
            digest: Mutex::new(digest.into()),
            version: AtomicU32::new(1),
            dtype: Mutex::new(Dtype::F32),
            gate: watch::channel(true).0,
            fails: Mutex::default(),
            hung: watch::channel(false).0,
            step_ms: AtomicU64::new(0),
            asked: AtomicUsize::new(0),
            calls: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            cancelled: AtomicUsize::new(0),
            metadata: Mutex::default(),
            encoded: Mutex::default(),
            starts: Mutex::default(),
            slots: Mutex::default(),
            decodes: Mutex::default(),
            positive: Mutex::default(),
            negative: Mutex::default(),
        };
        Self(Arc::new(shared))
    }

    pub(super) fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    pub(super) fn running(&self) -> usize {
        self.running.load(Ordering::SeqCst)
    }

    pub(super) fn hold(&self) {
        self.gate.send_replace(false);
    }

    pub(super) fn let_go(&self) {
        self.gate.send_replace(true);
    }

    /// Serves other weights from now on.
    pub(super) fn roll(&self, digest: &str) {
        *self.digest.lock().unwrap() = digest.into();
    }

    /// Reads pictures or prompts in another way from now on.
    pub(super) fn rewrite(&self, version: u32) {
        self.version.store(version, Ordering::SeqCst);
    }

    fn step_ms(&self) -> u64 {
        self.step_ms.load(Ordering::SeqCst)
    }

    fn version(&self) -> u32 {
        self.version.load(Ordering::SeqCst)
    }

    /// Says so; what it makes stays as it is.
    pub(super) fn compute_in(&self, dtype: Dtype) {
        *self.dtype.lock().unwrap() = dtype;
    }

    fn dtype(&self) -> i32 {
        (*self.dtype.lock().unwrap()).into()
    }

    pub(super) fn fail(&self, status: Option<Status>) {
        *self.fails.lock().unwrap() = status;
    }

    fn digest(&self) -> String {
        self.digest.lock().unwrap().clone()
    }

    async fn gate(&self) {
        let _ = self.gate.subscribe().wait_for(|open| *open).await;
        self.hang().await;
    }

    async fn hang(&self) {
        let _ = self.hung.subscribe().wait_for(|hung| !hung).await;
    }

    /// Runs one call until it ends (`work` says whether with its result) or its caller leaves.
    fn respond<T, F, Work>(
        &self,
        metadata: &MetadataMap,
        work: F,
    ) -> Result<Response<ReceiverStream<T>>, Status>
    where
        T: Send + 'static,
        F: FnOnce(mpsc::Sender<T>) -> Work,
        Work: Future<Output = bool> + Send + 'static,
    {
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.metadata.lock().unwrap().push(metadata.clone());
        if let Some(status) = self.fails.lock().unwrap().clone() {
            return Err(status);
        }
        self.running.fetch_add(1, Ordering::SeqCst);
        let (sender, receiver) = mpsc::channel(1);
        let (work, script) = (work(sender.clone()), self.clone());
        tokio::spawn(async move {
            let whole = tokio::select! {
                whole = work => whole,
                () = sender.closed() => false,
            };
            script.cancelled.fetch_add(usize::from(!whole), Ordering::SeqCst);
            script.running.fetch_sub(1, Ordering::SeqCst);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// A stage on its own runtime, so that it can be killed with all its connections.
pub(super) struct Stage {
    pub(super) script: Script,
    pub(super) address: SocketAddr,
    runtime: Option<Runtime>,
}

#[derive(Clone, Copy)]
pub(super) enum Role {
    Encoder,
    Llm { instruct: bool },
    Decoder,
}

impl Stage {
    pub(super) fn start(role: Role, script: Script) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Self::start_on(listener, role, script)
    }

    pub(super) fn start_on(listener: std::net::TcpListener, role: Role, script: Script) -> Self {
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let served = script.clone();
        runtime.spawn(async move {
            let incoming = TcpIncoming::from(TcpListener::from_std(listener).unwrap());
            let mut server = Server::builder();
            let router = match role {
                Role::Encoder => server.add_service(VisualEncoderServer::new(MockEncoder(served))),
                Role::Llm { instruct } => {
                    server.add_service(LanguageModelServer::new(MockLlm(served, instruct)))
                }
                Role::Decoder => server.add_service(VisualDecoderServer::new(MockDecoder(served))),
            };
            router.serve_with_incoming(incoming).await.unwrap();
        });
        Self { script, address, runtime: Some(runtime) }
    }

    pub(super) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Ends the stage at once, its connections with it.
    pub(super) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.kill();
    }
}

impl std::ops::Deref for Stage {
    type Target = Script;

    fn deref(&self) -> &Script {
        &self.script
    }
}

/// Rows of one value each: the tensor of `content` under weights `digest`.
pub(super) fn tensor(digest: &str, content: &[u8], rows: u32) -> Tensor {
    let sum = digest
        .bytes()
        .chain(content.iter().copied())
        .fold(0_u32, |sum, byte| sum * 31 % 65_521 + u32::from(byte));
    let data: Vec<u8> = (0..rows * WIDTH).flat_map(|_| (sum as f32).to_le_bytes()).collect();
    Tensor { dtype: Dtype::F32.into(), shape: vec![rows, WIDTH], data: data.into() }
}

struct MockEncoder(Script);

#[async_trait]
impl VisualEncoder for MockEncoder {
    type EncodeStream = ReceiverStream<Result<EncodeResponse, Status>>;

    async fn info(&self, _: Request<EncoderInfoRequest>) -> Result<Response<EncoderInfo>, Status> {
        self.0.asked.fetch_add(1, Ordering::SeqCst);
        self.0.hang().await;
        Ok(Response::new(EncoderInfo {
            weights_digest: self.0.digest(),
            dtype: self.0.dtype(),
            width: WIDTH,
            image_size: 448,
            grid_side: 4,
            preprocessing_version: self.0.version(),
            max_image_pixels: 1 << 20,
            step_ms: self.0.step_ms(),
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
                };
                if content.starts_with(SLOW) {
                    script.gate().await;
                }
                let weights_digest = script.digest();
                let embeddings = Some(tensor(&weights_digest, &content, request.n_query));
                let answer = EncodeResponse {
                    id: request.id,
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

struct MockLlm(Script, bool);

#[async_trait]
impl LanguageModel for MockLlm {
    type GenerateStream = ReceiverStream<Result<LlmEvent, Status>>;

    async fn info(&self, _: Request<LlmInfoRequest>) -> Result<Response<LlmInfo>, Status> {
        self.0.asked.fetch_add(1, Ordering::SeqCst);
        self.0.hang().await;
        Ok(Response::new(LlmInfo {
            weights_digest: self.0.digest(),
            tokenizer_digest: "t1".into(),
            template_version: self.0.version(),
            dtype: self.0.dtype(),
            embedding_width: WIDTH,
            n_query: N_QUERY,
            v_query: 1,
            max_positions: 2048,
            instruct: self.1,
            max_new_tokens: 100,
            max_beams: 5,
            min_length_penalty: -10.0,
            max_length_penalty: 10.0,
            min_temperature: 0.001,
            max_temperature: 100.0,
            min_repetition_penalty: 0.1,
            max_repetition_penalty: 10.0,
            max_text_bytes: 10_000,
            step_ms: self.0.step_ms(),
        }))
    }

    async fn generate(
        &self,
        request: Request<Streaming<LlmRequest>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let script = self.0.clone();
        let metadata = request.metadata().clone();
        let mut requests = request.into_inner();
        self.0.respond(&metadata, |answers| async move {
            let send = async |event| {
                let _ = answers.send(Ok(LlmEvent { event: Some(event) })).await;
            };
            let Ok(Some(LlmRequest { message: Some(llm_request::Message::Start(start)) })) =
                requests.message().await
            else {
                panic!("the first message is the start");
            };
            script.starts.lock().unwrap().push(start.clone());
            let accepted = LlmAccepted {
                prompt_positions: 7,
                weights_digest: script.digest(),
                tokenizer_digest: "t1".into(),
                template_version: script.version(),
            };
            send(llm_event::Event::Accepted(accepted)).await;
            for _ in 0..slots_of(&start) {
                match requests.message().await {
                    Ok(Some(LlmRequest { message: Some(llm_request::Message::Embeddings(it)) })) => {
                        script.slots.lock().unwrap().push((it.slot, it.embeddings.unwrap()));
                    }
                    _ => return false,
                }
            }
            let resume = start.resume.unwrap_or_default();
            match start.output.expect("an output") {
                llm_start::Output::Text(_) => {
                    let pieces = ["Hel", "", "lo"].into_iter().enumerate();
                    for (index, text) in pieces.skip(resume.token_ids.len()) {
                        if index == 2 {
                            script.gate().await;
                        }
                        let token_ids = vec![10 + index as u32];
                        send(llm_event::Event::Text(LlmText { token_ids, text: text.into() })).await;
                    }
                }
                llm_start::Output::Regression(_) => {
                    for row in resume.rows.map_or(0, |rows| rows.shape[0])..N_QUERY {
                        if row == 1 {
                            script.gate().await;
                        }
                        let embeddings = Some(tensor(&script.digest(), &[row as u8], 1));
                        send(llm_event::Event::Embeddings(RegressedEmbeddings { start: row, embeddings }))
                            .await;
                    }
                }
            }
            let finished =
                LlmFinished { complete: true, generated_tokens: 3, prefill_ms: 1.5, ..Default::default() };
            send(llm_event::Event::Finished(finished)).await;
            true
        })
    }
}

fn slots_of(start: &LlmStart) -> u32 {
    let paints = matches!(start.output, Some(llm_start::Output::Regression(_)));
    let prompts: Vec<&LlmPrompt> = match start.input.as_ref().expect("an input") {
        llm_start::Input::Prompt(prompt) => vec![prompt],
        llm_start::Input::Chat(chat) => chat.turns.iter().collect(),
    };
    let slots =
        prompts.into_iter().flat_map(|prompt| &prompt.parts).map(|part| match part.kind.as_ref().unwrap() {
            llm_part::Kind::Text(_) => 0,
            llm_part::Kind::Image(_) => 1,
            llm_part::Kind::Video(video) => video.frames,
            llm_part::Kind::Box(_) => u32::from(paints),
        });
    slots.sum()
}

struct MockDecoder(Script);

#[async_trait]
impl VisualDecoder for MockDecoder {
    type DecodeStream = ReceiverStream<Result<DecodeEvent, Status>>;

    async fn info(&self, _: Request<DecoderInfoRequest>) -> Result<Response<DecoderInfo>, Status> {
        self.0.asked.fetch_add(1, Ordering::SeqCst);
        self.0.hang().await;
        Ok(Response::new(DecoderInfo {
            weights_digest: self.0.digest(),
            dtype: self.0.dtype(),
            width: WIDTH,
            default_height: 64,
            default_width: 64,
            scale_factor: 8,
            max_image_side: 128,
            max_steps: 100,
            max_guidance_scale: 100.0,
            max_queries: 16,
            step_ms: self.0.step_ms(),
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
            let mut missing = [start.queries, if start.guidance_scale > 1.0 { start.queries } else { 0 }];
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
            for step in 1..=start.steps {
                script.gate().await;
                send(decode_event::Event::Step(DenoiseStep { step, steps: start.steps })).await;
            }
            let image = DecodedImage { png: PNG.into(), height: start.height, width: start.width };
            send(decode_event::Event::Image(image)).await;
            let finished =
                DecodeFinished { weights_digest: script.digest(), vae_ms: 2.5, ..Default::default() };
            send(decode_event::Event::Finished(finished)).await;
            true
        })
    }
}
