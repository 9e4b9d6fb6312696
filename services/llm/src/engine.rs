//! The language model on the step engine: sequences join and leave between any two forwards.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use emu2_engine::{
    engine::{self, Options},
    error::{EngineFault, guarded},
    load::LoadMetrics,
    stage::{Arrival, Batch, Outbox, Stage, Ticket},
};
use emu2_nn::{array, thread};
use emu2_proto::array::Array;
use tch::Tensor;

use crate::{
    error::{LoadError, SequenceError},
    kv::KvCache,
    llama::Llama,
    load::{Loaded, ModelConfig, load},
    metrics::Metrics,
    request::{Event, Request, SlotEmbeddings},
    scheduler::{Plan, Scheduler, SchedulerLimits, Work},
    search::TextIds,
    sequence::{Advance, Sequence},
    step::{self, StepInput},
};

/// The step engine of the llm.
pub type Engine = engine::Engine<LanguageModel>;

/// The handle of a request in the llm's engine.
pub type Generation = engine::RequestHandle<LanguageModel>;

/// The step engine of the llm while it is loading.
pub type Started = engine::Started<LanguageModel, Loaded, LoadError>;

/// What a stage asks of its device outside its forwards. A test puts what fails in their place.
#[derive(Clone, Copy, Debug)]
struct OnDevice {
    place: fn(&Llama, &Array) -> Tensor,
    allocate: fn(&Llama, i64) -> KvCache,
}

const DEVICE: OnDevice = OnDevice {
    place: |model, embeddings| array::to_tensor(embeddings, model.device(), model.kind()),
    allocate: Llama::kv_cache,
};

/// The stage of the llm: the model, and the sequences that it continues.
#[derive(Debug)]
pub struct LanguageModel {
    model: Llama,
    text_ids: TextIds,
    scheduler: Scheduler,
    sequences: BTreeMap<Ticket, Sequence>,
    kv_entry_bytes: usize,
    metrics: Metrics,
    on_device: OnDevice,
}

/// The index in [`LanguageModel::UNITS`] of positions of prompts.
const PREFILL: usize = 0;
/// The index in [`LanguageModel::UNITS`] of tokens and embeddings of outputs.
const DECODE: usize = 1;

/// Starts the engine's thread, which loads and warms the model first.
pub fn start(config: ModelConfig, load_metrics: LoadMetrics, metrics: Metrics) -> Started {
    start_on(DEVICE, config, load_metrics, metrics)
}

fn start_on(
    on_device: OnDevice,
    config: ModelConfig,
    load_metrics: LoadMetrics,
    metrics: Metrics,
) -> Started {
    let (cores, max_waiting) = (config.cores, config.max_waiting);
    let options = Options { name: "llm", max_waiting, limit_name: "max_waiting" };
    let load = move || {
        let (model, loaded) = load(&config)?;
        Ok((LanguageModel::new(model, &loaded, &config, metrics, on_device), loaded))
    };
    engine::Engine::start(options, load_metrics, move || thread::set_up(cores), load)
}

impl LanguageModel {
    fn new(
        model: Llama,
        loaded: &Loaded,
        config: &ModelConfig,
        metrics: Metrics,
        on_device: OnDevice,
    ) -> Self {
        let kv_entry_bytes = model.config().kv_bytes(model.kind());
        let limits = SchedulerLimits { kv_entries: loaded.kv_entries, prefill_chunk: config.prefill_chunk };
        metrics.kv_budget.set((loaded.kv_entries * kv_entry_bytes) as i64);
        let (scheduler, sequences) = (Scheduler::new(limits), BTreeMap::new());
        Self { model, text_ids: loaded.text_ids, scheduler, sequences, kv_entry_bytes, metrics, on_device }
    }

    /// Gives a sequence its cache, on its own: what does not fit is no reason for anyone else to fail.
    fn admit(&mut self, ticket: Ticket) -> Result<(), EngineFault> {
        let sequence = self.sequences.get_mut(&ticket).expect("the scheduler admits only the living");
        let entries = sequence.kv_entries() as i64;
        sequence.admit(guarded(|| (self.on_device.allocate)(&self.model, entries))?);
        Ok(())
    }

    fn forward(&mut self, work: &BTreeMap<Ticket, Work>) -> Vec<step::StepOutput> {
        let working = self.sequences.iter_mut().filter_map(|(ticket, it)| Some((it, work.get(ticket)?)));
        let inputs: Vec<StepInput<'_>> = working.map(|(sequence, work)| sequence.feed(work)).collect();
        self.metrics.step_rows.observe(inputs.iter().map(|input| input.ids.len() as f64).sum());
        step::run(&self.model, inputs)
    }

    fn show_reserved(&self) {
        self.metrics.kv_reserved.set((self.scheduler.reserved() * self.kv_entry_bytes) as i64);
    }
}

impl Stage for LanguageModel {
    const UNITS: &'static [&'static str] = &["prefilled_position", "decoded_token"];
    type Request = Request;
    type Input = SlotEmbeddings;
    type Event = Event;
    type Error = SequenceError;
    type Work = Plan;

    /// One event for each token or embedding, and the end.
    fn max_events(request: &Request) -> usize {
        request.output.max_len() + 1
    }

    fn join(
        &mut self,
        ticket: Ticket,
        request: Request,
        Arrival { priority, span }: Arrival,
    ) -> Result<(), SequenceError> {
        let sequence = Sequence::new(request, self.text_ids, span);
        self.scheduler.submit(ticket, sequence.demand(priority))?;
        self.sequences.insert(ticket, sequence);
        Ok(())
    }

    fn input(&mut self, ticket: Ticket, SlotEmbeddings { slot, embeddings }: SlotEmbeddings) {
        let embeddings = (self.on_device.place)(&self.model, &embeddings);
        let sequence = self.sequences.get_mut(&ticket).expect("input is for whoever has joined");
        self.scheduler.set_ready(ticket, sequence.place(slot, embeddings));
    }

    fn plan(&mut self) -> Option<Batch<Plan>> {
        let plan = self.scheduler.plan();
        self.show_reserved();
        let tickets: Vec<Ticket> = plan.admitted.iter().chain(plan.work.keys()).copied().collect();
        let prefilled: usize = plan.work.values().map(Work::prefilled).sum();
        // Tokens that are decoded beside a prompt's chunk ride along: the chunk decides what the step takes.
        let (kind, units) = if prefilled > 0 { (PREFILL, prefilled) } else { (DECODE, plan.work.len()) };
        (!tickets.is_empty()).then_some(Batch { tickets, kind, units: units as f64, work: plan })
    }

    fn step(&mut self, Plan { admitted, mut work }: Plan, outbox: &mut Outbox<'_, Self>) {
        for ticket in admitted {
            match self.admit(ticket) {
                Ok(()) => {
                    let waited = outbox.begin(ticket).unwrap_or_default();
                    self.sequences.get_mut(&ticket).expect("it was admitted").waited(waited);
                }
                Err(fault) => {
                    work.remove(&ticket);
                    outbox.fault(ticket, &fault);
                }
            }
        }
        if work.is_empty() {
            return;
        }
        let outputs = self.forward(&work);
        for ((ticket, work), output) in work.into_iter().zip(outputs) {
            self.metrics.count(&work, &output);
            let sequence = self.sequences.get_mut(&ticket).expect("what works is alive");
            match guarded(|| sequence.advance(output)) {
                Ok(Ok(Advance { told, finished })) => {
                    told.into_iter().for_each(|event| outbox.send(ticket, event));
                    finished.into_iter().for_each(|event| outbox.finish(ticket, event));
                }
                Ok(Err(error)) => outbox.fail(ticket, error),
                Err(fault) => outbox.fault(ticket, &fault),
            }
        }
    }

    fn leave(&mut self, ticket: Ticket) {
        self.sequences.remove(&ticket);
        self.scheduler.remove(ticket);
        self.show_reserved();
    }

    fn units_left(&self) -> Vec<f64> {
        let decode: usize = self.sequences.values().map(Sequence::output_left).sum();
        vec![self.scheduler.prefill_left() as f64, decode as f64]
    }

    fn free_positions(&self) -> Option<usize> {
        Some(self.scheduler.free())
    }
}
