//! Any schedule gives every request what it gets alone: random arrivals, embeddings that come late and in any order,
//! callers who leave, chunks and budgets of any size. The worker is driven by hand, so that a seed is a schedule.

use futures::FutureExt;

use super::*;

const REQUESTS: usize = 12;
const SCHEDULES: u64 = 8;
/// Far more turns than any schedule takes: who is never served fails instead.
const TURNS_MAX: usize = 20_000;

/// A request, with the embeddings that its caller sends.
struct Asked {
    prompt: Prompt,
    output: Output,
    slots: Vec<Array>,
}

impl Asked {
    fn new(random: &mut ChaCha12Rng, loaded: &Loaded) -> Self {
        let (mut prompt, output) = random_request(random);
        let mut start = random.random_range(1..8);
        while start + 4 < prompt.ids.len() && random.random_ratio(3, 4) {
            prompt.slots.push(Slot { start, len: 4 });
            start += 4 + random.random_range(0..12);
        }
        let slots = prompt.slots.iter().map(|_| rows(loaded, random.random_range(-1.0..1.0))).collect();
        Self { prompt, output, slots }
    }

    /// Entries that it takes, at least as many as it really does.
    fn kv_entries(&self) -> usize {
        let rows = match &self.output {
            Output::Text(parameters) => parameters.rows() * parameters.max_new_tokens,
            Output::Image { queries } => *queries,
        };
        self.prompt.ids.len() + rows
    }
}

/// A worker without its thread, and the handle to it.
struct ByHand {
    worker: Worker<LanguageModel>,
    engine: Engine,
}

impl ByHand {
    fn new(model: Llama, loaded: &Loaded, prefill_chunk: usize, kv_entries: usize) -> Self {
        let loaded = Loaded { kv_entries, ..loaded.clone() };
        let config = ModelConfig { prefill_chunk, ..config("emu2-base") };
        let (load_metrics, metrics) = registered();
        let stage = LanguageModel::new(model, &loaded, &config, metrics, DEVICE);
        let options = Options { name: "llm", max_waiting: REQUESTS, limit_name: "max_waiting" };
        let (engine, worker) = Engine::by_hand(options, load_metrics, stage);
        Self { worker, engine }
    }

    fn submit<'a>(&self, asked: &'a Asked) -> Caller<'a> {
        let (prompt, output) = (asked.prompt.clone(), asked.output.clone());
        let request = Request { prompt, output, resumed: 0 };
        let generation = self.engine.submit(request, Priority::Normal).unwrap();
        let missing = (0..asked.slots.len()).collect();
        Caller { asked, generation: Some(generation), missing, answer: Answer::default(), ended: false }
    }

    fn turn(&mut self) {
        self.worker.turn().unwrap();
    }

    /// The model, and that nothing was forgotten.
    fn finish(mut self) -> Llama {
        self.turn();
        let LanguageModel { model, scheduler, sequences, .. } = self.worker.into_stage();
        assert_eq!((scheduler.running(), scheduler.waiting(), scheduler.reserved()), (0, 0, 0));
        assert!(sequences.is_empty());
        model
    }
}

struct Caller<'a> {
    asked: &'a Asked,
    /// Until it leaves.
    generation: Option<Generation>,
    missing: Vec<usize>,
    answer: Answer,
    ended: bool,
}

impl Caller<'_> {
    /// Sends the embeddings of one of the missing slots.
    fn place(&mut self, index: usize) {
        let Some(generation) = &self.generation else { return };
        let slot = self.missing.swap_remove(index);
        let input = generation.input(rows_of(slot, self.asked.slots[slot].clone()));
        input.now_or_never().expect("the queue has room").unwrap();
    }

    fn listen(&mut self) {
        let Some(generation) = &mut self.generation else { return };
        while let Some(event) = generation.try_next() {
            match event.unwrap() {
                Event::Tokens(ids) => self.answer.ids.extend(ids),
                Event::Embeddings { rows, .. } => self.answer.embeddings.extend(rows.values()),
                Event::Finished { complete, .. } => (self.answer.complete, self.ended) = (complete, true),
            }
        }
    }

    fn is_through(&self) -> bool {
        self.ended || self.generation.is_none()
    }
}

/// What the request gets when nobody else is there, its prompt in one piece.
fn alone(model: Llama, loaded: &Loaded, asked: &Asked) -> (Llama, Answer) {
    let mut by_hand = ByHand::new(model, loaded, 512, 8192);
    let mut caller = by_hand.submit(asked);
    while !caller.missing.is_empty() {
        caller.place(0);
    }
    for _ in 0..TURNS_MAX {
        by_hand.turn();
        caller.listen();
        if caller.ended {
            break;
        }
    }
    assert!(caller.ended);
    (by_hand.finish(), caller.answer)
}

/// Whoever stayed, with what they got.
fn together<'a>(by_hand: &mut ByHand, asked: &'a [Asked], random: &mut ChaCha12Rng) -> Vec<Caller<'a>> {
    let mut to_come = asked.iter();
    let mut callers: Vec<Caller<'a>> = Vec::new();
    for _ in 0..TURNS_MAX {
        if random.random_ratio(1, 3) {
            callers.extend(to_come.next().map(|asked| by_hand.submit(asked)));
        }
        for caller in callers.iter_mut().filter(|caller| !caller.is_through()) {
            if !caller.missing.is_empty() && random.random_ratio(1, 4) {
                caller.place(random.random_range(0..caller.missing.len()));
            }
            if random.random_ratio(1, 150) {
                caller.generation = None;
            }
        }
        by_hand.turn();
        callers.iter_mut().for_each(Caller::listen);
        if callers.len() == asked.len() && callers.iter().all(Caller::is_through) {
            return callers;
        }
    }
    panic!("somebody is never served");
}

#[test]
fn any_schedule_gives_every_request_what_it_gets_alone() {
    tch::set_num_threads(1);
    let _no_grad = tch::no_grad_guard();
    let (mut model, loaded) = load(&config("emu2-base")).unwrap();
    let mut random = ChaCha12Rng::seed_from_u64(3);
    let asked: Vec<Asked> = (0..REQUESTS).map(|_| Asked::new(&mut random, &loaded)).collect();
    let largest = asked.iter().map(Asked::kv_entries).max().unwrap();
    let mut wanted = Vec::new();
    for asked in &asked {
        let (back, answer) = alone(model, &loaded, asked);
        model = back;
        wanted.push(answer);
    }
    let mut compared = 0;
    for seed in 0..SCHEDULES {
        let mut random = ChaCha12Rng::seed_from_u64(seed);
        let (chunk, budget) = (random.random_range(1..40), random.random_range(largest..4 * largest));
        let mut by_hand = ByHand::new(model, &loaded, chunk, budget);
        let callers = together(&mut by_hand, &asked, &mut random);
        for (index, (caller, want)) in callers.iter().zip(&wanted).enumerate() {
            if caller.ended {
                let got = &caller.answer;
                assert_eq!(
                    (&got.ids, got.complete),
                    (&want.ids, want.complete),
                    "seed {seed}, request {index}"
                );
                assert_eq!(got.embeddings.len(), want.embeddings.len());
                for (got, want) in got.embeddings.iter().zip(&want.embeddings) {
                    assert!((got - want).abs() < 1e-3, "seed {seed}, request {index}: {got} {want}");
                }
                compared += 1;
            }
        }
        drop(callers);
        model = by_hand.finish();
    }
    assert!(compared > 60 && compared < REQUESTS * SCHEDULES as usize, "some left, most did not: {compared}");
}
