//! A prompt → ids, each drawn from the hash of all before it, or rows likewise: what a resumed answer goes on with
//! shows whether it was resumed with just what had been sent.

use std::{collections::BTreeMap, sync::Arc};

use blake3::Hash;
use emu2_proto::{
    capable,
    stage::{
        LlmAccepted, LlmEvent, LlmFinished, LlmInfo, LlmInfoRequest, LlmPrompt, LlmRequest, LlmResume,
        LlmStart, LlmText, LlmWatchLoadRequest, Load, RegressedEmbeddings,
        language_model_server::LanguageModel, llm_event, llm_part, llm_request, llm_start,
    },
    v1::{Tensor, TextOutput},
};
use emu2_serve::{
    deadline::Deadline,
    message,
    stream::{Events, Sender},
};
use prost::Message;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::{
    options::Options,
    replica::{Replica, Steps, refused, send},
    values,
};

const TOKENIZER_DIGEST: &str = "t1";
const TEMPLATE_VERSION: u32 = 1;
/// The positions that texts take, whatever they are; an image takes its queries and two marks.
const TEXT_POSITIONS: u32 = 30;
/// One id in so many adds its text with the next one, as an incomplete character does.
const HELD_BACK_EVERY: u32 = 8;
const VOCABULARY: u32 = 32_000;

pub(super) struct MockLlm(pub(super) Arc<Replica>);

#[async_trait]
impl LanguageModel for MockLlm {
    type GenerateStream = Events<LlmEvent>;

    type WatchLoadStream = Events<Load>;

    async fn watch_load(
        &self,
        request: Request<LlmWatchLoadRequest>,
    ) -> Result<Response<Events<Load>>, Status> {
        Ok(self.0.watch_load(Deadline::of(&request)))
    }

    async fn info(&self, _: Request<LlmInfoRequest>) -> Result<Response<LlmInfo>, Status> {
        let options = &self.0.options;
        Ok(Response::new(LlmInfo {
            weights_digest: options.digest.clone(),
            tokenizer_digest: TOKENIZER_DIGEST.into(),
            template_version: TEMPLATE_VERSION,
            dtype: options.dtype().into(),
            embedding_width: options.width,
            n_query: options.queries,
            v_query: options.queries,
            load: Some(self.0.load()),
            ..capable::llm()
        }))
    }

    async fn generate(
        &self,
        request: Request<Streaming<LlmRequest>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let deadline = Deadline::of(&request);
        let mut requests = request.into_inner();
        Ok(self.0.respond(deadline, |replica, events| async move {
            let options = &replica.options;
            let Some(LlmRequest { message: Some(llm_request::Message::Start(mut start)) }) =
                message::next(&mut requests).await?
            else {
                return Err(refused("the first message must be the start"));
            };
            // An answer that goes on is the answer that began.
            let resume = start.resume.take().unwrap_or_default();
            let slots = slots_of(&start);
            let accepted = LlmAccepted {
                prompt_positions: TEXT_POSITIONS + slots * (options.queries + 2),
                weights_digest: options.digest.clone(),
                tokenizer_digest: TOKENIZER_DIGEST.into(),
                template_version: TEMPLATE_VERSION,
            };
            send(&events, event(llm_event::Event::Accepted(accepted))).await;
            let images = read_slots(&mut requests, slots).await?;
            let prompt = prompt_hash(options, &start, &images);
            let count = match &start.output {
                Some(llm_start::Output::Text(parameters)) => parameters.max_new_tokens(),
                _ => options.queries,
            };
            let mut steps = replica.steps(count).await;
            replica.work(options.prompt_ms + f64::from(slots) * options.slot_ms).await;
            let answer = Answer { prompt, options, resume, events: &events };
            let finished = match start.output {
                Some(llm_start::Output::Text(parameters)) => answer.write(&parameters, &mut steps).await,
                Some(llm_start::Output::Regression(_)) => answer.regress(&mut steps).await,
                None => return Err(refused("output is missing")),
            };
            send(&events, event(llm_event::Event::Finished(finished))).await;
            Ok(())
        }))
    }
}

fn event(event: llm_event::Event) -> LlmEvent {
    LlmEvent { event: Some(event) }
}

fn slots_of(start: &LlmStart) -> u32 {
    let regresses = matches!(start.output, Some(llm_start::Output::Regression(_)));
    let prompts: Vec<&LlmPrompt> = match &start.input {
        Some(llm_start::Input::Prompt(prompt)) => vec![prompt],
        Some(llm_start::Input::Chat(chat)) => chat.turns.iter().collect(),
        None => vec![],
    };
    let parts = prompts.into_iter().flat_map(|prompt| &prompt.parts);
    let slots = parts.map(|part| match &part.kind {
        Some(llm_part::Kind::Image(_)) => 1,
        Some(llm_part::Kind::Video(video)) => video.frames,
        Some(llm_part::Kind::Box(_)) => u32::from(regresses),
        Some(llm_part::Kind::Text(_)) | None => 0,
    });
    slots.sum()
}

/// Every slot's embeddings, once each.
async fn read_slots(
    requests: &mut Streaming<LlmRequest>,
    slots: u32,
) -> Result<BTreeMap<u32, Tensor>, Status> {
    let mut images = BTreeMap::new();
    while images.len() < slots as usize {
        let message = message::next(requests).await?.and_then(|request| request.message);
        let Some(llm_request::Message::Embeddings(filled)) = message else {
            return Err(refused(format!("{} of {slots} slots were filled", images.len())));
        };
        let tensor = filled.embeddings.ok_or_else(|| refused("embeddings are missing"))?;
        if filled.slot >= slots || images.insert(filled.slot, tensor).is_some() {
            return Err(refused(format!("slot {} of {slots} is none or filled twice", filled.slot)));
        }
    }
    Ok(images)
}

/// Everything that an answer depends on.
fn prompt_hash(options: &Options, start: &LlmStart, images: &BTreeMap<u32, Tensor>) -> Hash {
    // What is regressed does not depend on the seed.
    let drawn = matches!(start.output, Some(llm_start::Output::Text(_)));
    let start = LlmStart { seed: if drawn { start.seed } else { 0 }, ..start.clone() }.encode_to_vec();
    let mut parts: Vec<&[u8]> = vec![options.digest.as_bytes(), &start];
    parts.extend(images.values().map(|tensor| tensor.data.as_ref()));
    values::hash(&parts)
}

struct Answer<'a> {
    prompt: Hash,
    options: &'a Options,
    /// What another replica has answered.
    resume: LlmResume,
    events: &'a Sender<LlmEvent>,
}

impl Answer<'_> {
    /// As many ids as may be. A beam search's come together at its end.
    async fn write(&self, parameters: &TextOutput, steps: &mut Steps<'_>) -> LlmFinished {
        let mut text = Text { state: self.prompt, held_back: String::new() };
        let total = parameters.max_new_tokens();
        let mut number = 0;
        for &id in &self.resume.token_ids {
            number += 1;
            text.take(id, number == total);
        }
        let mut whole = LlmText::default();
        while number < total {
            number += 1;
            steps.step().await;
            let id = text.next();
            let added = text.take(id, number == total);
            if parameters.num_beams() > 1 {
                whole.token_ids.push(id);
                whole.text.push_str(&added);
            } else {
                let token = LlmText { token_ids: vec![id], text: added };
                send(self.events, event(llm_event::Event::Text(token))).await;
            }
        }
        if !whole.token_ids.is_empty() {
            send(self.events, event(llm_event::Event::Text(whole))).await;
        }
        LlmFinished { complete: false, generated_tokens: total, ..Default::default() }
    }

    async fn regress(&self, steps: &mut Steps<'_>) -> LlmFinished {
        let Options { queries, width, .. } = *self.options;
        let rows = self.resume.rows.clone().unwrap_or_default();
        let first = rows.shape.first().copied().unwrap_or(0);
        // Each row follows from the one before.
        let row_bytes = rows.data.len() / first.max(1) as usize;
        let mut last = rows.data.slice(rows.data.len() - row_bytes..);
        for start in first..queries {
            steps.step().await;
            let seed = values::hash(&[self.prompt.as_bytes(), &last]);
            let row = values::tensor(&seed, 1, width, self.options.dtype());
            last = row.data.clone();
            let row = RegressedEmbeddings { start, embeddings: Some(row) };
            send(self.events, event(llm_event::Event::Embeddings(row))).await;
        }
        LlmFinished { complete: true, generated_tokens: queries, ..Default::default() }
    }
}

/// A text as it grows.
struct Text {
    /// The hash of the prompt and every id so far.
    state: Hash,
    held_back: String,
}

impl Text {
    fn next(&self) -> u32 {
        let [a, b, c, d, ..] = *self.state.as_bytes();
        u32::from_le_bytes([a, b, c, d]) % VOCABULARY
    }

    /// Returns what can be shown with this id.
    fn take(&mut self, id: u32, last: bool) -> String {
        self.state = values::hash(&[self.state.as_bytes(), &id.to_le_bytes()]);
        self.held_back.push_str(&format!(" {id}"));
        let holds_back = id.is_multiple_of(HELD_BACK_EVERY) && !last;
        if holds_back { String::new() } else { std::mem::take(&mut self.held_back) }
    }
}
