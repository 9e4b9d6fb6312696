//! One request while it is being served: its prompt, its cache, what it feeds to the next step, and what it makes of
//! the answer.

use std::time::{Duration, Instant};

use emu2_nn::array;
use emu2_serve::priority::Priority;
use tch::Tensor;
use tracing::{Span, info_span};

use crate::{
    error::SequenceError,
    kv::{Append, KvCache},
    prompt::Prompt,
    request::{Event, Output, Request, Timings},
    scheduler::{Demand, Work},
    search::{Next, Row, Search, TextIds},
    step::{OutputKind, Placed, StepInput, StepOutput},
};

#[derive(Debug)]
pub(crate) struct Sequence {
    prompt: Prompt,
    /// Embeddings by slot, each [len, embedding_width], until the prompt is in the cache.
    slots: Vec<Option<Tensor>>,
    task: Task,
    kv_entries: usize,
    /// The cache, from admission on.
    kv: Option<KvCache>,
    stages: Stages,
}

#[derive(Debug)]
enum Task {
    Text {
        search: Search,
        beams: bool,
        tokens: Vec<u32>,
        parents: Vec<i64>,
        generated: usize,
        /// Steps done, which for beams run ahead of the ids that are certain.
        done: usize,
        max_new_tokens: usize,
    },
    Image {
        next: Option<Tensor>,
        done: usize,
        total: usize,
    },
}

/// What a step came to for one sequence.
#[derive(Debug, Default)]
pub(crate) struct Advance {
    /// What the request is told while it goes on.
    pub(crate) told: Option<Event>,
    /// What the request is told last: the sequence is at its end.
    pub(crate) finished: Option<Event>,
}

impl Sequence {
    pub(crate) fn new(request: Request, text_ids: TextIds, span: Span) -> Self {
        let Request { prompt, resumed, .. } = request;
        let (task, generated_entries) = match request.output {
            // The last token of a row is never fed back.
            Output::Text(parameters) => {
                let rows = parameters.rows();
                let mut search = Search::new(&parameters, text_ids);
                search.resume(&prompt.ids[prompt.ids.len() - resumed..]);
                let task = Task::Text {
                    search,
                    beams: rows > 1,
                    tokens: Vec::new(),
                    parents: Vec::new(),
                    generated: resumed,
                    done: resumed,
                    max_new_tokens: parameters.max_new_tokens,
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
            stages: Stages::begin(span, prompt.ids.len()),
            prompt,
            task,
            kv: None,
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

    /// How long it waited until it was admitted.
    pub(crate) fn waited(&mut self, waited: Duration) {
        self.stages.timings.queue_ms = waited.as_secs_f64() * 1e3;
    }

    /// Tokens or embeddings that may still be asked of it.
    pub(crate) fn output_left(&self) -> usize {
        match &self.task {
            Task::Text { max_new_tokens, done, .. } => max_new_tokens.saturating_sub(*done),
            Task::Image { done, total, .. } => total - done,
        }
    }

    pub(crate) fn feed(&mut self, work: &Work) -> StepInput<'_> {
        let kv = self.kv.as_mut().expect("a sequence has a cache from its admission on");
        let output = match self.task {
            Task::Text { .. } => OutputKind::Logits,
            Task::Image { .. } => OutputKind::Embedding,
        };
        match (work, &self.task) {
            (Work::Prefill(positions), _) => {
                let last = positions.end == self.prompt.ids.len();
                StepInput {
                    kv,
                    append: Append::Sequential(positions.len() as i64),
                    ids: self.prompt.ids[positions.clone()].to_vec(),
                    embeddings: placed(&self.prompt, &self.slots, positions),
                    output: if last { output } else { OutputKind::Nothing },
                }
            }
            (Work::Decode, Task::Text { beams, tokens, parents, .. }) => {
                let append = if *beams { Append::Beams(parents) } else { Append::Sequential(1) };
                StepInput { kv, append, ids: tokens.clone(), embeddings: Vec::new(), output }
            }
            (Work::Decode, Task::Image { next, .. }) => {
                let next = next.as_ref().expect("the prompt's last position gave the first embedding");
                let embeddings = vec![Placed { first: 0, embeddings: next.shallow_clone() }];
                StepInput { kv, append: Append::Sequential(1), ids: vec![0], embeddings, output }
            }
        }
    }

    /// Takes what a step answered.
    pub(crate) fn advance(&mut self, output: StepOutput) -> Result<Advance, SequenceError> {
        let (told, end) = match (output, &mut self.task) {
            (StepOutput::Logits(mut logits), Task::Text { search, tokens, parents, generated, done, .. }) => {
                if !logits.iter().all(|logit| logit.is_finite()) {
                    return Err(SequenceError::NotFinite);
                }
                let step = search.step(&mut logits);
                *generated += step.ids.len();
                *done += 1;
                let end = match step.next {
                    Next::Rows(rows) => {
                        *tokens = rows.iter().map(|row: &Row| row.token).collect();
                        *parents = rows.iter().map(|row| row.parent as i64).collect();
                        None
                    }
                    Next::End { complete, .. } => Some((complete, *generated)),
                };
                ((!step.ids.is_empty()).then_some(Event::Tokens(step.ids)), end)
            }
            (StepOutput::Embedding(embedding), Task::Image { next, done, total }) => {
                let event = Event::Embeddings { start: *done, rows: array::from_tensor(&embedding)? };
                *done += 1;
                *next = Some(embedding);
                (Some(event), (done == total).then_some((true, 0)))
            }
            (_, _) => return Ok(Advance::default()),
        };
        self.stages.generate();
        self.slots.clear();
        let finished = end.map(|(complete, generated_tokens)| Event::Finished {
            complete,
            generated_tokens,
            timings: self.stages.end(),
        });
        Ok(Advance { told, finished })
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
    /// The wait for admission has a span of the engine's.
    fn begin(caller: Span, prompt_positions: usize) -> Self {
        let (current, timings) = (Span::none(), Timings::default());
        Self { caller, prompt_positions, current, since: Instant::now(), timings, generating: false }
    }

    fn prefill(&mut self) {
        self.since = Instant::now();
        self.current = info_span!(parent: &self.caller, "prefill", prompt_positions = self.prompt_positions);
    }

    /// Begins the last stage, once the prompt has given its first answer; later calls change nothing.
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
