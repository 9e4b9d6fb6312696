//! The gRPC edge: emu2.stage.v1.LanguageModel. Requests are checked here; the engine gets only what it can serve.

mod parameters;
mod placement;
mod resume;
#[cfg(test)]
mod tests;

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use emu2_engine::error::EngineError;
use emu2_proto::{
    stage::{
        self as stage, LlmEvent, LlmInfo, LlmInfoRequest, LlmRequest, LlmStart, LlmWatchLoadRequest, Load,
        language_model_server::LanguageModel, llm_event::Event as Reply, llm_request::Message, llm_start,
    },
    v1,
};
use emu2_serve::{
    deadline::Deadline,
    message,
    priority::Priority,
    status,
    status::Violation,
    stream::{self, Events, Sender},
};
use tokio::{
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument, Span};

use crate::{
    config::Config,
    engine::{Engine, Generation},
    error::{input_late, prompt_status},
    load::Loaded,
    prompt::{self, Prompt, PromptConfig, TEMPLATE_VERSION},
    request::{self, Event, SlotEmbeddings},
    tokenizer::Detokenizer,
};
use parameters::{Limits, input};
use placement::Placement;
use resume::Resumed;

/// Replies that wait for a slow reader; beyond, its own task waits, never the engine.
const REPLIES: usize = 64;

#[derive(Clone, Debug)]
pub(crate) struct Service {
    engine: Engine,
    /// What callers have to know of the model; set before the service is ready.
    loaded: Arc<OnceLock<Loaded>>,
    limits: Limits,
    /// See [`Config::input_wait_ms`].
    input_wait: Duration,
}

impl Service {
    pub(crate) fn new(config: &Config, engine: Engine, loaded: Arc<OnceLock<Loaded>>) -> Self {
        let limits = Limits::new(config.max_new_tokens, config.max_beams);
        let input_wait = Duration::from_millis(config.input_wait_ms);
        Self { engine, loaded, limits, input_wait }
    }

    fn loaded(&self) -> Result<&Loaded, Status> {
        self.loaded.get().ok_or_else(|| status::unavailable("the model is still loading"))
    }

    /// The start as a prompt, what is wanted of it, what there is of that already, and how its text is to be written.
    fn read(&self, start: LlmStart) -> Result<(Prompt, request::Output, Resumed, Text), Status> {
        let loaded = self.loaded()?;
        let config = PromptConfig {
            n_query: loaded.n_query,
            v_query: loaded.v_query,
            max_positions: loaded.max_positions,
        };
        let (output, keep_special, layout) = match start.output {
            Some(llm_start::Output::Text(text)) => {
                let (text, parameters) = self.limits.check(&text, start.seed)?;
                let (grounding, keep) = (text.grounding, text.keep_special_tokens());
                let layout = prompt::Output::Text { grounding, max_new_tokens: parameters.max_new_tokens };
                (request::Output::Text(parameters), keep, layout)
            }
            Some(llm_start::Output::Regression(_)) => {
                (request::Output::Image { queries: loaded.n_query }, false, prompt::Output::Regression)
            }
            None => return Err(Violation::new("output", "must be text or regression, got nothing").into()),
        };
        let input = input(start.input)?;
        let prompt = prompt::build(&loaded.tokenizer, &config, &input, &layout).map_err(prompt_status)?;
        let resumed = Resumed::read(start.resume, &output, loaded)?;
        let detokenizer = Detokenizer::new(Arc::clone(&loaded.tokenizer), !keep_special);
        let mut text = Text { detokenizer: Some(detokenizer), end: loaded.text_ids.end };
        // Said already.
        let _ = text.push(resumed.ids.clone());
        Ok((prompt, output, resumed, text))
    }
}

#[tonic::async_trait]
impl LanguageModel for Service {
    type WatchLoadStream = Events<Load>;

    async fn watch_load(
        &self,
        request: Request<LlmWatchLoadRequest>,
    ) -> Result<Response<Self::WatchLoadStream>, Status> {
        Ok(Response::new(self.engine.watch_load(Deadline::of(&request))))
    }

    async fn info(&self, _: Request<LlmInfoRequest>) -> Result<Response<LlmInfo>, Status> {
        let loaded = self.loaded()?;
        Ok(Response::new(LlmInfo {
            weights_digest: loaded.weights_digest.clone(),
            tokenizer_digest: loaded.tokenizer.digest().to_owned(),
            template_version: TEMPLATE_VERSION,
            dtype: v1::Dtype::from(loaded.dtype).into(),
            embedding_width: loaded.embedding_width as u32,
            n_query: loaded.n_query as u32,
            v_query: loaded.v_query as u32,
            max_positions: loaded.max_positions as u32,
            instruct: loaded.tokenizer.instruct(),
            max_text_bytes: loaded.tokenizer.max_text_bytes(loaded.max_positions) as u64,
            load: Some(self.engine.wire_load()),
            parameter_limits: self.limits.stated().to_vec(),
        }))
    }

    type GenerateStream = Events<LlmEvent>;

    async fn generate(
        &self,
        request: Request<Streaming<LlmRequest>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        self.loaded()?;
        let (sender, events) = stream::channel(REPLIES, Deadline::of(&request));
        // The stream is answered at once: a caller may wait for that before it says anything.
        let priority = Priority::of_call(&request);
        let conversation = Conversation { service: self.clone(), priority, sender };
        tokio::spawn(conversation.hold(request.into_inner()).instrument(Span::current()));
        Ok(Response::new(events))
    }
}

/// The state of one Generate call.
struct Conversation {
    service: Service,
    priority: Priority,
    sender: Sender<LlmEvent>,
}

impl Conversation {
    /// Serves the call until its end, or until nobody listens: then everything is dropped, and the engine with it lets
    /// go.
    async fn hold(self, messages: Streaming<LlmRequest>) {
        self.sender.run(self.converse(messages)).await;
    }

    async fn converse(&self, mut messages: Streaming<LlmRequest>) -> Result<(), Status> {
        let loaded = self.service.loaded()?;
        let wait = self.service.input_wait;
        let start = timeout(wait, first(&mut messages)).await.map_err(|_| input_late("start", wait))??;
        // Tokenizing a long text takes tens of milliseconds, which other requests' streams must not wait for.
        let service = self.service.clone();
        let read = spawn_blocking(move || service.read(start)).await;
        let (mut prompt, output, resumed, mut text) =
            read.map_err(|_| status::internal("the prompt could not be read"))??;
        let accepted = Reply::Accepted(stage::LlmAccepted {
            prompt_positions: prompt.ids.len() as u32,
            weights_digest: loaded.weights_digest.clone(),
            tokenizer_digest: loaded.tokenizer.digest().to_owned(),
            template_version: TEMPLATE_VERSION,
        });
        if let Some(finished) = resumed.finished(&output, loaded.text_ids.end) {
            self.reply(accepted).await?;
            self.tell(finished, &mut text).await?;
            return Ok(());
        }
        let mut placement = Placement::new(prompt.slots.clone(), loaded.dtype, loaded.embedding_width);
        resumed.extend(&mut prompt);
        let request = request::Request { prompt, output, resumed: resumed.count() };
        let mut generation = self.service.engine.submit(request, self.priority)?;
        if let Some(rows) = resumed.rows {
            generation.input(SlotEmbeddings { slot: placement.slots(), embeddings: rows }).await?;
        }
        self.reply(accepted).await?;
        let mut listening = true;
        loop {
            // Begins anew with whatever happens, so that only a stretch in which nothing does counts.
            let missing = placement.missing();
            tokio::select! {
                message = message::next(&mut messages), if listening => {
                    listening = self.hear(message?, &mut placement, &generation).await?;
                }
                () = sleep(wait), if missing.is_some() => {
                    let slot = missing.unwrap_or_default();
                    return Err(input_late(&format!("embeddings[slot {slot}]"), wait));
                }
                event = generation.next() => {
                    let event = event.unwrap_or(Err(EngineError::Stopped))?;
                    if self.tell(event, &mut text).await? {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// A message after the first; whether more may come.
    async fn hear(
        &self,
        message: Option<LlmRequest>,
        placement: &mut Placement,
        generation: &Generation,
    ) -> Result<bool, Status> {
        let Some(message) = message else {
            placement.finish()?;
            return Ok(false);
        };
        match message.message {
            Some(Message::Embeddings(slot)) => {
                let (slot, embeddings) = placement.take(slot)?;
                generation.input(SlotEmbeddings { slot, embeddings }).await?;
                Ok(true)
            }
            Some(Message::Start(_)) => {
                Err(Violation::new("message", "must be embeddings after the first, got start").into())
            }
            None => Err(Violation::new("message", "must be embeddings after the first, got nothing").into()),
        }
    }

    /// Whether that was the end.
    async fn tell(&self, event: Event, text: &mut Text) -> Result<bool, Status> {
        match event {
            Event::Tokens(ids) => {
                self.reply(Reply::Text(text.push(ids))).await?;
                Ok(false)
            }
            Event::Embeddings { start, rows } => {
                let embeddings = Some(rows.into());
                self.reply(Reply::Embeddings(stage::RegressedEmbeddings { start: start as u32, embeddings }))
                    .await?;
                Ok(false)
            }
            Event::Finished { complete, generated_tokens, timings } => {
                let rest = text.finish();
                if !rest.is_empty() {
                    self.reply(Reply::Text(stage::LlmText { token_ids: Vec::new(), text: rest })).await?;
                }
                let request::Timings { queue_ms, prefill_ms, generate_ms } = timings;
                let generated_tokens = generated_tokens as u32;
                let finished =
                    stage::LlmFinished { complete, generated_tokens, queue_ms, prefill_ms, generate_ms };
                self.reply(Reply::Finished(finished)).await?;
                Ok(true)
            }
        }
    }

    async fn reply(&self, event: Reply) -> Result<(), Status> {
        let sent = self.sender.send(Ok(LlmEvent { event: Some(event) })).await;
        sent.map_err(|_| self.sender.closed_status())
    }
}

async fn first(messages: &mut Streaming<LlmRequest>) -> Result<LlmStart, Status> {
    let message = message::next(messages).await?.and_then(|request| request.message);
    match message {
        Some(Message::Start(start)) => Ok(start),
        Some(Message::Embeddings(_)) => {
            Err(Violation::new("message", "must be start first, got embeddings").into())
        }
        None => Err(Violation::new("message", "must be start first, got nothing").into()),
    }
}

/// Ids to text as they come. The end of text is an id like any other, but no text.
struct Text {
    /// The decoder of the text; none after `finish`.
    detokenizer: Option<Detokenizer>,
    end: u32,
}

impl Text {
    fn push(&mut self, token_ids: Vec<u32>) -> stage::LlmText {
        let mut text = String::new();
        if let Some(detokenizer) = &mut self.detokenizer {
            let written = token_ids.iter().filter(|&&id| id != self.end);
            written.for_each(|&id| text.push_str(&detokenizer.push(id)));
        }
        stage::LlmText { token_ids, text }
    }

    fn finish(&mut self) -> String {
        self.detokenizer.take().map(Detokenizer::finish).unwrap_or_default()
    }
}
