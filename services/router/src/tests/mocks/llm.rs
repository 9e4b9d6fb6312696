//! "Hello" in three tokens, or rows by their number; the gate stands before the third token and the second row.

use std::sync::atomic::Ordering;

use emu2_proto::{
    capable,
    stage::{
        LlmAccepted, LlmEvent, LlmFinished, LlmInfo, LlmInfoRequest, LlmPrompt, LlmRequest, LlmStart,
        LlmText, LlmWatchLoadRequest, RegressedEmbeddings, language_model_server::LanguageModel, llm_event,
        llm_part, llm_request, llm_start,
    },
    v1::ParameterLimit,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::{LoadStream, N_QUERY, Script, WIDTH, tensor};

pub(super) struct MockLlm(pub(super) Script, pub(super) bool);

#[async_trait]
impl LanguageModel for MockLlm {
    type GenerateStream = ReceiverStream<Result<LlmEvent, Status>>;

    type WatchLoadStream = LoadStream;

    async fn watch_load(&self, _: Request<LlmWatchLoadRequest>) -> Result<Response<LoadStream>, Status> {
        Ok(self.0.watch_load())
    }

    async fn info(&self, _: Request<LlmInfoRequest>) -> Result<Response<LlmInfo>, Status> {
        self.0.asked.fetch_add(1, Ordering::SeqCst);
        self.0.hang().await;
        Ok(Response::new(LlmInfo {
            weights_digest: self.0.digest(),
            template_version: self.0.version(),
            dtype: self.0.dtype(),
            embedding_width: WIDTH,
            n_query: N_QUERY,
            v_query: 1,
            instruct: self.1,
            max_text_bytes: 10_000,
            parameter_limits: capable::with_limits(
                capable::llm().parameter_limits,
                &[
                    ParameterLimit::new("text.max_new_tokens", 1..=100, Some(64)),
                    ParameterLimit::new("text.min_length", 0..=101, Some(1)),
                    ParameterLimit::new("text.num_beams", 1..=5, Some(5)),
                ],
            ),
            load: self.0.load(),
            ..capable::llm()
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
                tokenizer_digest: capable::llm().tokenizer_digest,
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
