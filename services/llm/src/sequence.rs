//! One request while it is being served: its prompt, its cache, what it feeds to the next step, and what it makes of
//! the answer.

use std::time::Instant;

use emu2_nn::array;
use emu2_serve::priority::Priority;
use tch::Tensor;
use tokio::sync::mpsc;
use tracing::{Span, info_span};

use crate::{
    engine::{Event, Output, Request, Timings},
    error::EngineError,
    kv::{Append, KvCache},
    prompt::Prompt,
    scheduler::{Demand, Work},
    search::{Next, Row, Search, TextIds},
    step::{Answer, Feed, Placed, Wants},
};

#[derive(Debug)]
pub(crate) struct Sequence {
    prompt: Prompt,
    /// Embeddings by slot, each [len, embedding_width], until the prompt is in the cache.
    slots: Vec<Option<Tensor>>,
    task: Task,
    kv_entries: usize,
    /// From admission on.
    kv: Option<KvCache>,
    events: mpsc::Sender<Event>,
    stages: Stages,
}

#[derive(Debug)]
enum Task {
    Text { search: Search, branches: bool, tokens: Vec<u32>, parents: Vec<i64>, generated: usize },
    Image { next: Option<Tensor>, done: usize, total: usize },
}

/// Whether a sequence goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    Continues,
    Ended,
}

impl Sequence {
    pub(crate) fn new(request: Request, text_ids: TextIds, events: mpsc::Sender<Event>) -> Self {
        let Request { prompt, resumed, .. } = request;
        let (task, generated_entries) = match request.output {
            // The last token of a row is never fed back.
            Output::Text(parameters) => {
                let rows = parameters.rows();
                let mut search = Search::new(&parameters, text_ids);
                search.resume(&prompt.ids[prompt.ids.len() - resumed..]);
                let task = Task::Text {
                    search,
                    branches: rows > 1,
                    tokens: Vec::new(),
                    parents: Vec::new(),
                    generated: resumed,
                };
                (task, rows * (parameters.max_new_tokens - resumed - 1))
            }
            Output::Image { queries } => {
                (Task::Image { next: None, done: resumed, total: queries }, queries - resumed - 1)
            }
        };
        Self {
            slots: prompt.slots.iter().map(|_| None).collect(),
            kv_entries: prompt.ids.len() + generated_entries,
            stages: Stages::begin(request.span, prompt.ids.len()),
            prompt,
            task,
            kv: None,
            events,
        }
    }

    pub(crate) fn demand(&self, priority: Priority) -> Demand {
        let (prompt, ready) = (self.prompt.ids.len(), self.ready());
        Demand { prompt, ready, kv_entries: self.kv_entries, priority }
    }

    pub(crate) fn kv_entries(&self) -> usize {
        self.kv_entries
    }

    pub(crate) fn admit(&mut self, kv: KvCache) {
        self.kv = Some(kv);
        self.stages.prefill();
    }

    /// Embeddings of a slot have come; how many leading positions are known now.
    pub(crate) fn place(&mut self, slot: usize, embeddings: Tensor) -> usize {
        self.slots[slot] = Some(embeddings);
        self.ready()
    }

    fn ready(&self) -> usize {
        let missing = self.slots.iter().position(Option::is_none);
        missing.map_or(self.prompt.ids.len(), |slot| self.prompt.slots[slot].start)
    }

    pub(crate) fn caller_left(&self) -> bool {
        self.events.is_closed()
    }

    pub(crate) fn feed(&mut self, work: &Work) -> Feed<'_> {
        let kv = self.kv.as_mut().expect("a sequence has a cache from its admission on");
        let wants = match self.task {
            Task::Text { .. } => Wants::Logits,
            Task::Image { .. } => Wants::Embedding,
        };
        match (work, &self.task) {
            (Work::Prefill(positions), _) => {
                let last = positions.end == self.prompt.ids.len();
                Feed {
                    kv,
                    append: Append::Line(positions.len() as i64),
                    ids: self.prompt.ids[positions.clone()].to_vec(),
                    embeddings: placed(&self.prompt, &self.slots, positions),
                    wants: if last { wants } else { Wants::Nothing },
                }
            }
            (Work::Decode, Task::Text { branches, tokens, parents, .. }) => {
                let append = if *branches { Append::Branch(parents) } else { Append::Line(1) };
                Feed { kv, append, ids: tokens.clone(), embeddings: Vec::new(), wants }
            }
            (Work::Decode, Task::Image { next, .. }) => {
                let next = next.as_ref().expect("the prompt's last position gave the first embedding");
                let embeddings = vec![Placed { first: 0, embeddings: next.shallow_clone() }];
                Feed { kv, append: Append::Line(1), ids: vec![0], embeddings, wants }
            }
        }
    }

    /// Takes what a step answered and tells the caller.
    pub(crate) fn advance(&mut self, answer: Answer) -> Result<Progress, EngineError> {
        let progress = match (answer, &mut self.task) {
            (Answer::Logits(mut logits), Task::Text { search, tokens, parents, generated, .. }) => {
                if !logits.iter().all(|logit| logit.is_finite()) {
                    return Err(EngineError::NotFinite);
                }
                let step = search.step(&mut logits);
                *generated += step.ids.len();
                let end = match step.next {
                    Next::Rows(rows) => {
                        *tokens = rows.iter().map(|row: &Row| row.token).collect();
                        *parents = rows.iter().map(|row| row.parent as i64).collect();
                        None
                    }
                    Next::End { complete, .. } => Some((complete, *generated)),
                };
                if !step.ids.is_empty() {
                    self.emit(Event::Tokens(step.ids));
                }
                end
            }
            (Answer::Embedding(embedding), Task::Image { next, done, total }) => {
                let event = Event::Embeddings { start: *done, rows: array::from_tensor(&embedding)? };
                *done += 1;
                *next = Some(embedding);
                let end = (done == total).then_some((true, 0));
                self.emit(event);
                end
            }
            (_, _) => return Ok(Progress::Continues),
        };
        self.stages.generate();
        self.slots.clear();
        let Some((complete, generated_tokens)) = progress else { return Ok(Progress::Continues) };
        let timings = self.stages.end();
        self.emit(Event::Finished { complete, generated_tokens, timings });
        Ok(Progress::Ended)
    }

    pub(crate) fn fail(&self, error: EngineError) {
        self.emit(Event::Failed(error));
    }

    /// Never waits. The channel holds all that one request can produce, so this fails only when the caller has
    /// left, which the next step notices.
    fn emit(&self, event: Event) {
        let _ = self.events.try_send(event);
    }
}

/// The embeddings of all slots within `positions`, as far as they reach in.
fn placed(prompt: &Prompt, slots: &[Option<Tensor>], positions: &std::ops::Range<usize>) -> Vec<Placed> {
    let mut placed = Vec::new();
    for (slot, embeddings) in prompt.slots.iter().zip(slots) {
        let (start, end) = (slot.start.max(positions.start), (slot.start + slot.len).min(positions.end));
        if start < end {
            let embeddings =
                embeddings.as_ref().expect("a prompt is prefilled as far as its embeddings have come");
            let rows = embeddings.narrow(0, (start - slot.start) as i64, (end - start) as i64);
            placed.push(Placed { first: start - positions.start, embeddings: rows });
        }
    }
    placed
}

/// Where a request is, as spans under its caller's and as milliseconds.
#[derive(Debug)]
struct Stages {
    caller: Span,
    prompt_positions: usize,
    /// Closes the stage's span when replaced.
    current: Span,
    since: Instant,
    timings: Timings,
    generating: bool,
}

impl Stages {
    fn begin(caller: Span, prompt_positions: usize) -> Self {
        let current = info_span!(parent: &caller, "queue");
        let timings = Timings::default();
        Self { caller, prompt_positions, current, since: Instant::now(), timings, generating: false }
    }

    fn prefill(&mut self) {
        self.timings.queue_ms = self.lap();
        self.current = info_span!(parent: &self.caller, "prefill", prompt_positions = self.prompt_positions);
    }

    /// Once the prompt has given its first answer; later calls change nothing.
    fn generate(&mut self) {
        if !self.generating {
            self.generating = true;
            self.timings.prefill_ms = self.lap();
            self.current = info_span!(parent: &self.caller, "decode_steps");
        }
    }

    fn end(&mut self) -> Timings {
        self.timings.generate_ms = self.lap();
        self.current = Span::none();
        self.timings
    }

    fn lap(&mut self) -> f64 {
        let since = std::mem::replace(&mut self.since, Instant::now());
        self.since.duration_since(since).as_secs_f64() * 1e3
    }
}
