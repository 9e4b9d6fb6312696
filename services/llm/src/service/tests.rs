//! The service over loopback gRPC, on the tiny models.

use std::time::Duration;

use emu2_nn::golden;
use emu2_proto::{
    stage::{
        LlmChat, LlmFinished, LlmPart, LlmPrompt, RegressionParameters, SlotEmbeddings,
        language_model_client::LanguageModelClient, llm_part::Kind,
    },
    v1::TextOutput,
};
use emu2_serve::{
    server::{Listeners, ServerConfig},
    shutdown::Shutdown,
};
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, transport::Channel};

use super::*;

const PATIENCE: Duration = Duration::from_secs(60);

struct Running {
    client: LanguageModelClient<Channel>,
    shutdown: Shutdown,
    served: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    async fn start(model: &str) -> Self {
        Self::with(Config { model_dir: golden::model_dir(model), ..config() }).await
    }

    async fn with(config: Config) -> Self {
        let listeners = Listeners::bind(&config.server).await.unwrap();
        let address = format!("http://{}", listeners.grpc_addr());
        let shutdown = Shutdown::new();
        let served = tokio::spawn(crate::run(config, listeners, shutdown.clone()));
        let channel = Channel::from_shared(address).unwrap().connect().await.unwrap();
        let mut client = LanguageModelClient::new(channel);
        let ready = async {
            while client.info(LlmInfoRequest {}).await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, ready).await.expect("the service becomes ready");
        Self { client, shutdown, served }
    }

    /// Opens a stream and sends these messages; the sender keeps it open.
    async fn open(&self, messages: Vec<LlmRequest>) -> (mpsc::Sender<LlmRequest>, Streaming<LlmEvent>) {
        let (sender, receiver) = mpsc::channel(64);
        for message in messages {
            sender.send(message).await.unwrap();
        }
        let response = self.client.clone().generate(ReceiverStream::new(receiver)).await.unwrap();
        (sender, response.into_inner())
    }

    async fn answer(&self, messages: Vec<LlmRequest>) -> Result<StepOutput, Status> {
        let (_, events) = self.open(messages).await;
        timeout(PATIENCE, collect(events)).await.expect("the service hangs")
    }

    async fn end(self) {
        self.shutdown.begin();
        timeout(PATIENCE, self.served).await.expect("it drains").unwrap().unwrap();
    }
}

fn config() -> Config {
    let server = ServerConfig { admin: None, ..ServerConfig::on_port(0) };
    Config { cores: 1, kv_budget_bytes: 32 << 20, prefill_chunk: 16, server, ..Config::default() }
}

#[derive(Debug, Default)]
struct StepOutput {
    accepted: stage::LlmAccepted,
    ids: Vec<u32>,
    texts: Vec<String>,
    embeddings: Vec<v1::Tensor>,
    /// Of each of the embeddings.
    starts: Vec<u32>,
    finished: LlmFinished,
}

async fn collect(mut events: Streaming<LlmEvent>) -> Result<StepOutput, Status> {
    let mut answer = StepOutput::default();
    while let Some(event) = events.message().await? {
        match event.event.unwrap() {
            Reply::Accepted(accepted) => answer.accepted = accepted,
            Reply::Text(text) => {
                answer.ids.extend(text.token_ids);
                answer.texts.push(text.text);
            }
            Reply::Embeddings(embeddings) => {
                answer.starts.push(embeddings.start);
                answer.embeddings.push(embeddings.embeddings.unwrap());
            }
            Reply::Finished(finished) => answer.finished = finished,
        }
    }
    Ok(answer)
}

fn part(kind: Kind) -> LlmPart {
    LlmPart { kind: Some(kind) }
}

fn written(text: &str) -> LlmPart {
    part(Kind::Text(text.to_owned()))
}

fn image() -> LlmPart {
    part(Kind::Image(stage::ImageSlot {}))
}

fn greedy(max_new_tokens: u32) -> TextOutput {
    TextOutput { max_new_tokens: Some(max_new_tokens), num_beams: Some(1), ..TextOutput::default() }
}

fn start(input: llm_start::Input, output: llm_start::Output) -> LlmRequest {
    let start = LlmStart { input: Some(input), output: Some(output), resume: None, seed: 7 };
    LlmRequest { message: Some(Message::Start(start)) }
}

fn ask(parts: &[LlmPart], text: TextOutput) -> LlmRequest {
    start(llm_start::Input::Prompt(LlmPrompt { parts: parts.to_vec() }), llm_start::Output::Text(text))
}

fn paint(parts: &[LlmPart]) -> LlmRequest {
    let output = llm_start::Output::Regression(RegressionParameters {});
    start(llm_start::Input::Prompt(LlmPrompt { parts: parts.to_vec() }), output)
}

fn chat(turns: &[&[LlmPart]]) -> LlmRequest {
    let turns = turns.iter().map(|parts| LlmPrompt { parts: parts.to_vec() }).collect();
    let chat = LlmChat { turns, system_message: None };
    start(llm_start::Input::Chat(chat), llm_start::Output::Text(greedy(4)))
}

fn place(slot: u32, shape: &[u32], value: f32) -> LlmRequest {
    let count = shape.iter().product::<u32>() as usize;
    let data: Vec<u8> = std::iter::repeat_n(value.to_le_bytes(), count).flatten().collect();
    let tensor = v1::Tensor { dtype: v1::Dtype::F32.into(), shape: shape.to_vec(), data: data.into() };
    LlmRequest { message: Some(Message::Embeddings(SlotEmbeddings { slot, embeddings: Some(tensor) })) }
}

#[tokio::test]
async fn info_says_what_is_served() {
    let running = Running::start("emu2-chat").await;
    let info = running.client.clone().info(LlmInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.n_query, info.v_query, info.embedding_width, info.max_positions), (16, 4, 64, 2048));
    assert!(info.instruct && info.weights_digest.len() == 64 && info.tokenizer_digest.len() == 64);
    assert_eq!(info.dtype(), v1::Dtype::F32);
    let limit = |field| emu2_serve::parameters::limit(&info.parameter_limits, field).unwrap();
    let range = |field| (limit(field).min as f32, limit(field).max as f32);
    assert_eq!((range("text.num_beams"), range("text.max_new_tokens")), ((1.0, 8.0), (1.0, 1024.0)));
    assert_eq!(range("text.length_penalty"), (-10.0, 10.0));
    assert_eq!(range("text.temperature"), (0.001, 100.0));
    assert_eq!(range("text.repetition_penalty"), (0.1, 10.0));
    assert_eq!(info.max_text_bytes, 98_304);
    let accepted = running.answer(vec![ask(&[written("hi")], greedy(1))]).await.unwrap().accepted;
    assert_eq!(accepted.weights_digest, info.weights_digest);
    assert_eq!(accepted.tokenizer_digest, info.tokenizer_digest);
    assert_eq!(accepted.template_version, info.template_version);
    running.end().await;
}

#[tokio::test]
async fn greedy_text_streams_and_beam_text_comes_at_once() {
    let running = Running::start("emu2-base").await;
    let prompt = [image(), written("Describe the image in details:")];
    let slot = place(0, &[4, 64], 0.25);
    let greedy = running.answer(vec![ask(&prompt, greedy(12)), slot.clone()]).await.unwrap();
    assert_eq!(greedy.accepted.prompt_positions, 21);
    assert_eq!(greedy.ids.len(), greedy.finished.generated_tokens as usize);
    assert!(greedy.texts.len() >= greedy.ids.len(), "one event a token: {greedy:?}");
    let tokenizer = crate::tokenizer::Tokenizer::parse(&golden::tokenizer("emu2-base"), false).unwrap();
    assert_eq!(greedy.texts.concat(), tokenizer.decode(&greedy.ids, true));

    let beams = TextOutput { num_beams: Some(5), length_penalty: Some(2.0), ..self::greedy(12) };
    let beams = running.answer(vec![ask(&prompt, beams), slot]).await.unwrap();
    let with_text = beams.texts.iter().filter(|text| !text.is_empty()).count();
    assert!(with_text <= 2 && beams.ids.len() > 2, "whole, and what was held back: {beams:?}");
    assert_eq!(beams.texts.concat(), tokenizer.decode(&beams.ids, true));
    running.end().await;
}

#[tokio::test]
async fn an_image_comes_embedding_by_embedding() {
    let running = Running::start("emu2-gen").await;
    let text =
        running.answer(vec![paint(&[written("An image of a dog wearing sunglasses.")])]).await.unwrap();
    assert_eq!(text.starts, (0..16).collect::<Vec<_>>());
    assert!(text.embeddings.iter().all(|rows| rows.shape == [1, 64] && rows.dtype() == v1::Dtype::F32));
    assert!(text.finished.complete && text.finished.generated_tokens == 0);
    let empty = running.answer(vec![paint(&[])]).await.unwrap();
    assert_eq!((empty.accepted.prompt_positions, empty.embeddings.len()), (2, 16));
    running.end().await;
}

/// The request as a next replica gets it.
fn resumed(request: &LlmRequest, token_ids: &[u32], rows: &[v1::Tensor]) -> LlmRequest {
    let Some(Message::Start(start)) = &request.message else { panic!("a start") };
    let rows = (!rows.is_empty()).then(|| v1::Tensor {
        dtype: rows[0].dtype,
        shape: vec![rows.len() as u32, 64],
        data: rows.iter().flat_map(|row| row.data.iter().copied()).collect(),
    });
    let resume = Some(stage::LlmResume { token_ids: token_ids.to_vec(), rows });
    LlmRequest { message: Some(Message::Start(LlmStart { resume, ..start.clone() })) }
}

#[tokio::test]
async fn a_text_goes_on_where_another_replica_left_it() {
    let running = Running::start("emu2-base").await;
    let prompt = [image(), written("Describe the image in details:")];
    let slot = place(0, &[4, 64], 0.25);
    let sampled = TextOutput { do_sample: true, temperature: Some(1.5), ..greedy(12) };
    let penalised = TextOutput { repetition_penalty: Some(1.5), min_length: Some(9), ..greedy(12) };
    let beams = TextOutput { num_beams: Some(3), ..greedy(12) };
    for text in [greedy(12), sampled, penalised, beams] {
        let request = ask(&prompt, text);
        let whole = running.answer(vec![request.clone(), slot.clone()]).await.unwrap();
        let cuts = if text.num_beams() > 1 { whole.ids.len()..=whole.ids.len() } else { 0..=whole.ids.len() };
        for cut in cuts {
            let rest =
                running.answer(vec![resumed(&request, &whole.ids[..cut], &[]), slot.clone()]).await.unwrap();
            assert_eq!(rest.ids, whole.ids[cut..], "{text:?} cut at {cut}");
            // One event an id, or one for all of a beam search's; then what was held back.
            let said = if text.num_beams() > 1 { 1 } else { cut };
            assert_eq!(rest.texts.concat(), whole.texts[said..].concat(), "{text:?} cut at {cut}");
            let counted = |answer: &StepOutput| (answer.finished.complete, answer.finished.generated_tokens);
            assert_eq!(counted(&rest), counted(&whole));
            assert_eq!(rest.accepted, whole.accepted);
        }
    }
    running.end().await;
}

/// Within the golden set's 1e-4 for regressed embeddings; of the empty prompt, which does not amplify rounding as the
/// set's `text` does.
#[tokio::test]
async fn an_image_goes_on_with_the_rows_that_there_are() {
    let running = Running::start("emu2-gen").await;
    let request = paint(&[]);
    let whole = running.answer(vec![request.clone()]).await.unwrap();
    let values = |rows: &[v1::Tensor]| -> Vec<f32> {
        let bytes = rows.iter().flat_map(|row| row.data.chunks_exact(4));
        bytes.map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    };
    for cut in [1, 7, 15, 16] {
        let rest = running.answer(vec![resumed(&request, &[], &whole.embeddings[..cut])]).await.unwrap();
        assert_eq!(rest.starts, (cut as u32..16).collect::<Vec<_>>());
        for (value, expected) in values(&rest.embeddings).iter().zip(values(&whole.embeddings[cut..])) {
            assert!((value - expected).abs() <= 1e-4, "{value} is not {expected}, cut at {cut}");
        }
        assert_eq!(rest.accepted, whole.accepted);
        assert!(rest.finished.complete);
    }
    running.end().await;
}

#[tokio::test]
async fn what_cannot_be_gone_on_with_is_named() {
    let running = Running::start("emu2-base").await;
    let text = ask(&[written("a")], greedy(4));
    let row = |width: u32, value: f32| v1::Tensor {
        dtype: v1::Dtype::F32.into(),
        shape: vec![1, width],
        data: value.to_le_bytes().repeat(width as usize).into(),
    };
    let mut wide = resumed(&paint(&[]), &[], &[row(64, 0.0)]);
    if let Some(Message::Start(start)) = &mut wide.message {
        start.resume.as_mut().unwrap().rows = Some(row(63, 0.0));
    }
    let many = vec![row(64, 0.0); 17];
    for (request, expected) in [
        (resumed(&text, &[5; 5], &[]), "resume.token_ids must be at most 4 ids (text.max_new_tokens), got 5"),
        (resumed(&text, &[5, 999_999], &[]), "resume.token_ids[1] must be below"),
        (resumed(&text, &[2, 5], &[]), "resume.token_ids must have the end of text, 2, only as the last"),
        (resumed(&text, &[], &[row(64, 0.0)]), "resume.rows must be absent under text"),
        (resumed(&paint(&[]), &[5], &[]), "resume.token_ids must be absent under regression, got 1"),
        (resumed(&paint(&[]), &[], &[row(64, f32::NAN)]), "resume.rows values must be finite, got NaN"),
        (resumed(&paint(&[]), &[], &many), "resume.rows must be 1 to"),
        (wide, "resume.rows shape must be [1, 64], got [1, 63]"),
    ] {
        let status = running.answer(vec![request]).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{expected}: {status:?}");
        assert!(status.message().starts_with(expected), "{:?} is not {expected:?}", status.message());
    }
    running.end().await;
}

#[tokio::test]
async fn bad_requests_are_named_and_the_service_goes_on() {
    let running = Running::start("emu2-base").await;
    let asked = || ask(&[image(), written("What?")], greedy(4));
    let long = ask(&[written(&"word ".repeat(3000))], greedy(4));
    let huge = ask(&[written(&"word ".repeat(100_000))], greedy(4));
    let nothing = LlmRequest { message: None };
    let cases = [
        (vec![place(0, &[4, 64], 0.0)], "message must be start first, got embeddings"),
        (vec![nothing], "message must be start first, got nothing"),
        (vec![asked(), asked()], "message must be embeddings after the first, got start"),
        (vec![ask(&[written("a")], greedy(0))], "text.max_new_tokens must be 1 to 1024, got 0"),
        (vec![ask(&[written("a <image>")], greedy(1))], "prompt.parts[0].text contains <image>"),
        (vec![ask(&[], greedy(1))], "prompt.parts has no parts"),
        (vec![long], "positions of prompt and 4 requested"),
        (vec![huge], "prompt must hold at most 98304 bytes of text (max_text_bytes), got 500000"),
        (vec![chat(&[&[written("hi")]])], "chat this model has no chat template"),
        (vec![asked(), place(1, &[4, 64], 0.0)], "embeddings.slot must be below 1"),
        (vec![asked(), place(0, &[4, 63], 0.0)], "embeddings[slot 0] shape must be [4, 64], got [4, 63]"),
        (vec![asked(), place(0, &[3, 64], 0.0)], "embeddings[slot 0] shape must be [4, 64], got [3, 64]"),
        (vec![asked(), place(0, &[4, 64], f32::NAN)], "embeddings[slot 0] values must be finite, got NaN"),
        (
            vec![ask(&[image(), image()], greedy(400)), place(0, &[4, 64], 0.0), place(0, &[4, 64], 0.0)],
            "embeddings.slot must come once, got 0 twice",
        ),
        (vec![asked()], "embeddings must come for all 1 slots, the stream ended after 0"),
        (vec![], "message must be start first, got nothing"),
    ];
    for (messages, expected) in cases {
        let (sender, events) = running.open(messages).await;
        drop(sender);
        let status = timeout(PATIENCE, collect(events)).await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{expected}: {status:?}");
        assert!(status.message().contains(expected), "{:?} is not {expected:?}", status.message());
    }
    let dtype = v1::Tensor { dtype: v1::Dtype::Bf16.into(), shape: vec![4, 64], data: vec![0; 512].into() };
    let wrong = SlotEmbeddings { slot: 0, embeddings: Some(dtype) };
    let wrong = LlmRequest { message: Some(Message::Embeddings(wrong)) };
    let status = running.answer(vec![asked(), wrong]).await.unwrap_err();
    assert_eq!(status.message(), "embeddings[slot 0] dtype must be float32, got bfloat16");
    assert!(running.answer(vec![ask(&[written("hi")], greedy(4))]).await.is_ok());
    running.end().await;
}

#[tokio::test]
async fn chats_are_answered_by_a_chat_model() {
    let running = Running::start("emu2-chat").await;
    let answer =
        running.answer(vec![chat(&[&[written("hi")], &[written("ho")], &[written("hu")]])]).await.unwrap();
    assert!(answer.accepted.prompt_positions > 10 && !answer.ids.is_empty());
    let status = running.answer(vec![chat(&[&[written("hi")], &[written("ho")]])]).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    running.end().await;
}

#[tokio::test]
async fn a_deadline_ends_a_stream_and_frees_its_permit() {
    let server = ServerConfig { max_requests: 1, ..config().server };
    let running =
        Running::with(Config { server, model_dir: golden::model_dir("emu2-base"), ..config() }).await;
    // Waits for embeddings that never come, and keeps its half of the stream open.
    let (sender, receiver) = mpsc::channel(4);
    sender.send(ask(&[image()], greedy(4))).await.unwrap();
    let mut request = Request::new(ReceiverStream::new(receiver));
    request.set_timeout(Duration::from_millis(300));
    let events = running.client.clone().generate(request).await.unwrap().into_inner();
    let full = running.client.clone().generate(tokio_stream::empty()).await.map(drop).unwrap_err();
    assert_eq!(full.code(), Code::ResourceExhausted);
    let status = timeout(PATIENCE, collect(events)).await.unwrap().unwrap_err();
    // The client keeps the same deadline, and may be the first to notice.
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");
    let answered = async {
        while running.answer(vec![ask(&[written("hi")], greedy(4))]).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, answered).await.expect("the permit comes back");
    running.end().await;
}

#[tokio::test]
async fn a_caller_who_leaves_its_request_waiting_is_refused() {
    let server = ServerConfig { max_requests: 1, ..config().server };
    let model_dir = golden::model_dir("emu2-base");
    let running = Running::with(Config { server, model_dir, input_wait_ms: 100, ..config() }).await;
    let two = ask(&[image(), image()], greedy(4));
    for (messages, expected) in [
        (vec![], "start must come within 100 ms (input_wait_ms)"),
        (vec![two.clone()], "embeddings[slot 0] must come within 100 ms (input_wait_ms)"),
        (vec![two.clone(), place(0, &[4, 64], 0.5)], "embeddings[slot 1] must come within"),
    ] {
        // Nothing more comes, but the stream stays open.
        let (_sender, events) = running.open(messages).await;
        let status =
            timeout(PATIENCE, collect(events)).await.expect("the service waits for ever").unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
        assert!(status.message().starts_with(expected), "{status:?}");
    }
    let filled = vec![two, place(1, &[4, 64], 0.5), place(0, &[4, 64], 0.5)];
    assert!(running.answer(filled).await.is_ok(), "its permit is back");
    running.end().await;
}

#[tokio::test]
async fn a_model_that_cannot_be_loaded_ends_the_service() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config { model_dir: folder.path().to_owned(), ..config() };
    let listeners = Listeners::bind(&config.server).await.unwrap();
    let ended = timeout(PATIENCE, crate::run(config, listeners, Shutdown::new())).await.expect("it ends");
    let error = format!("{:#}", ended.unwrap_err());
    assert!(error.contains("config.json"), "{error}");
}
