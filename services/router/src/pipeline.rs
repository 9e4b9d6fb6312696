//! One request through its stages, top to bottom: embeddings of its images (side by side) → llm → decoder. Every
//! stage is opened at once and fed as things become ready: the llm prefills what has arrived while later images are
//! still being encoded, and the decoder takes rows as the llm regresses them. A stage whose replica is lost goes
//! on elsewhere (`stage_call`), which nothing here sees.
//!
//! All of it is one future: when nobody listens any more it is dropped, and every stage's stream with it.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use bytes::Bytes;
use emu2_proto::{
    stage::{
        DecodeFinished, DecodeRequest, DecodeStart, LlmAccepted, LlmFinished, LlmRequest, LlmStart,
        RegressedEmbeddings, RegressionParameters, SlotEmbeddings, decode_event, decode_request, llm_event,
        llm_request, llm_start,
    },
    v1::{
        self, Accepted, DenoiseProgress, EmbeddingProgress, FinishReason, GenerateEvent, ImageChunk,
        ImageResult, TextDelta, TextOutput, finished::Parameters, generate_event::Event,
    },
};
use emu2_serve::{status, stream};
use futures::{StreamExt, TryStreamExt, stream::iter, try_join};
use tokio::sync::mpsc::Sender;
use tonic::Status;
use tracing::{Instrument, info_span};

use crate::{
    admission,
    cache::Found,
    context::MAX_BEGINNINGS,
    embeddings::{EmbeddingStore, Lookup, SentPrompt},
    error::{self, Stop},
    pool::Stage,
    report::{ImageCounts, Report},
    request::{Generation, Task},
    stage_call::Session,
    stages::{self, DecodeCall, LlmCall},
};

/// The largest PNG that goes out whole. An ordinary gRPC client takes messages of 4 MB.
const WHOLE_PNG_BYTES_MAX: usize = 2 << 20;
/// The bytes of a larger one that one event carries.
const PNG_CHUNK_BYTES: usize = 1 << 20;

type Llm = Session<LlmCall>;
type Decoder = Session<DecodeCall>;

/// A checked request on its way.
pub(crate) struct Job {
    pub(crate) generation: Generation,
    pub(crate) store: EmbeddingStore,
    pub(crate) request_id: String,
    pub(crate) images_in_flight: usize,
}

impl Job {
    /// Works until the answer is whole, something fails, or nobody listens.
    pub(crate) async fn run(self, sender: stream::Sender<GenerateEvent>) {
        let client = Client { sender: sender.clone(), sees_progress: AtomicBool::new(false) };
        let work = async {
            self.answer(&client).await.map_err(Status::from).inspect_err(|status| {
                tracing::info!(
                    code = status::code_name(status.code()),
                    message = status.message(),
                    "request failed"
                );
            })
        };
        sender.run(work).await;
    }

    async fn answer(mut self, client: &Client) -> Result<(), Stop> {
        let model = self.store.context.model.name.clone();
        let seed = self.generation.seed;
        let request_id = self.request_id.clone();
        client.send(Event::Accepted(Accepted { request_id, model, seed })).await?;
        for _ in 0..MAX_BEGINNINGS {
            match Box::pin(self.attempt(client)).await {
                // Nothing that the client saw depends on the old weights.
                Err(Stop::WeightsChanged) if !client.sees_progress.load(Ordering::Relaxed) => {
                    let paints = !matches!(self.generation.task, Task::Write { .. });
                    self.store.context.renew_profile(paints)?;
                }
                outcome => return outcome,
            }
        }
        Err(Stop::WeightsChanged)
    }

    async fn attempt(&self, client: &Client) -> Result<(), Stop> {
        let mut report = Report::new(self.generation.seed);
        match &self.generation.task {
            Task::Write { input, parameters } => self.write(input, parameters, &mut report, client).await?,
            Task::Paint { input, start } => self.paint(input, start, &mut report, client).await?,
            Task::Autoencode { start } => self.autoencode(start, &mut report, client).await?,
        }
        client.send(Event::Finished(report.finished())).await
    }

    async fn write(
        &self,
        input: &llm_start::Input,
        parameters: &TextOutput,
        report: &mut Report,
        client: &Client,
    ) -> Result<(), Stop> {
        let span = info_span!("llm");
        let (slots, llm) = self.ask_llm(input, llm_start::Output::Text(*parameters));
        let ((counts, _), finished) =
            try_join!(self.fill_slots(slots, &[]), self.read_text(llm, report, client).instrument(span))?;
        report.images(counts);
        let reason = if finished.complete { FinishReason::EndOfText } else { FinishReason::MaxNewTokens };
        report.result(reason, Parameters::Text(*parameters));
        Ok(())
    }

    async fn paint(
        &self,
        input: &llm_start::Input,
        start: &DecodeStart,
        report: &mut Report,
        client: &Client,
    ) -> Result<(), Stop> {
        let lookups = self.store.look_for(&self.generation.images, self.images_in_flight);
        let lookups = lookups.instrument(info_span!("embeddings")).await?;
        let known: Option<Vec<Found>> = lookups.iter().map(|lookup| lookup.found.clone()).collect();
        let Some(known) = known else {
            return self.paint_new(input, &lookups, start, report, client).await;
        };
        let embeddings: Vec<v1::Tensor> = known.iter().map(|found| found.tensor.clone()).collect();
        match self.store.regressed(SentPrompt { input, embeddings: &embeddings }).await {
            Some(regressed) => {
                report.images(ImageCounts::all_cached(&known));
                self.paint_again(regressed.tensor, start, report, client).await
            }
            None => self.paint_new(input, &lookups, start, report, client).await,
        }
    }

    async fn paint_new(
        &self,
        input: &llm_start::Input,
        lookups: &[Lookup],
        start: &DecodeStart,
        report: &mut Report,
        client: &Client,
    ) -> Result<(), Stop> {
        let context = &self.store.context;
        admission::check_painting(&context.model, start, start.queries, context.caller.deadline)?;
        let (llm_span, decoder_span) = (info_span!("llm"), info_span!("decoder"));
        let (slots, llm) = self.ask_llm(input, llm_start::Output::Regression(RegressionParameters {}));
        let (conditions, decoder) = self.ask_decoder(start)?;
        let conditions = async {
            // Dropped when both are through: that tells the decoder that no more comes.
            let conditions = conditions;
            let positive = async {
                let rows = self.forward_regressed(llm, &conditions, start.queries, report, client);
                let ((counts, sent), regressed) =
                    try_join!(self.fill_slots(slots, lookups), rows.instrument(llm_span))?;
                if let Some((accepted, regressed)) = regressed {
                    let prompt = SentPrompt { input, embeddings: &sent };
                    self.store.keep_regressed(&accepted, prompt, regressed);
                }
                Ok(counts)
            };
            try_join!(positive, self.send_negative(start, &conditions))
        };
        let ((counts, ()), finished) =
            try_join!(conditions, self.read_image(decoder, client).instrument(decoder_span))?;
        report.images(counts);
        report.painted(&finished, start);
        Ok(())
    }

    /// Paints from what the llm regressed for the same prompt before.
    async fn paint_again(
        &self,
        regressed: v1::Tensor,
        start: &DecodeStart,
        report: &mut Report,
        client: &Client,
    ) -> Result<(), Stop> {
        let total = start.queries;
        client.progress(Event::EmbeddingProgress(EmbeddingProgress { done: total, total })).await?;
        report.regressed_before(total);
        let (conditions, decoder) = self.ask_decoder(start)?;
        let conditions = async {
            let conditions = conditions;
            let rows = RegressedEmbeddings { start: 0, embeddings: Some(regressed) };
            // A decoder that has hung up says why where it is read.
            let _ = conditions.send(positive(rows)).await;
            self.send_negative(start, &conditions).await
        };
        let ((), finished) =
            try_join!(conditions, self.read_image(decoder, client).instrument(info_span!("decoder")))?;
        report.painted(&finished, start);
        Ok(())
    }

    async fn autoencode(
        &self,
        start: &DecodeStart,
        report: &mut Report,
        client: &Client,
    ) -> Result<(), Stop> {
        let span = info_span!("decoder");
        let (conditions, decoder) = self.ask_decoder(start)?;
        let conditions = async {
            let conditions = conditions;
            try_join!(self.send_image(&conditions), self.send_negative(start, &conditions))
        };
        let ((counts, ()), finished) =
            try_join!(conditions, self.read_image(decoder, client).instrument(span))?;
        report.images(counts);
        report.painted(&finished, start);
        Ok(())
    }

    /// Where embeddings of the prompt's slots go, and what comes of them.
    fn ask_llm(&self, input: &llm_start::Input, output: llm_start::Output) -> (Sender<LlmRequest>, Llm) {
        let (input, output, seed) = (Some(input.clone()), Some(output), self.generation.seed);
        let start = LlmStart { input, output, resume: None, seed };
        let call = LlmCall::new(start, &self.store.context.profile.llm.weights_digest);
        Session::new(call, self.store.context.llm_route(Some(self.generation.beginning())))
    }

    /// Where the image's conditions go, and what comes of them.
    fn ask_decoder(&self, start: &DecodeStart) -> Result<(Sender<DecodeRequest>, Decoder), Stop> {
        let route = self.store.context.decoder_route()?;
        let call = DecodeCall::new(start.clone(), &route.digest);
        Ok(Session::new(call, route))
    }

    /// Sends every image's embeddings to its slot as soon as they are there, and returns them in the order of the
    /// slots. `lookups`: by slot, what the cache was asked before.
    async fn fill_slots(
        &self,
        slots: Sender<LlmRequest>,
        lookups: &[Lookup],
    ) -> Result<(ImageCounts, Vec<v1::Tensor>), Stop> {
        let began = Instant::now();
        let count = self.generation.images.len();
        let (mut counts, mut sent) = (ImageCounts::default(), vec![v1::Tensor::default(); count]);
        let find = |slot: usize| self.slot(slot, lookups.get(slot));
        let mut looked_up = iter((0..count).map(find)).buffer_unordered(self.images_in_flight);
        while let Some((slot, found)) = looked_up.try_next().await? {
            counts.count(&found, began);
            sent[slot] = found.tensor.clone();
            let embeddings = SlotEmbeddings { slot: slot as u32, embeddings: Some(found.tensor) };
            let request = LlmRequest { message: Some(llm_request::Message::Embeddings(embeddings)) };
            if slots.send(request).await.is_err() {
                break;
            }
        }
        Ok((counts, sent))
    }

    async fn slot(&self, slot: usize, lookup: Option<&Lookup>) -> Result<(usize, Found), Stop> {
        let image = &self.generation.images[slot];
        let lookup = lookup.cloned().unwrap_or_else(|| self.store.lookup(image));
        let found = self.store.image(image, lookup).instrument(info_span!("embeddings", slot));
        Ok((slot, found.await?))
    }

    /// The only image, as the positive of autoencoding.
    async fn send_image(&self, conditions: &Sender<DecodeRequest>) -> Result<ImageCounts, Stop> {
        let began = Instant::now();
        let (_, found) = self.slot(0, None).await?;
        let mut counts = ImageCounts::default();
        counts.count(&found, began);
        // A decoder that has hung up says why where it is read.
        let _ =
            conditions.send(positive(RegressedEmbeddings { start: 0, embeddings: Some(found.tensor) })).await;
        Ok(counts)
    }

    async fn send_negative(
        &self,
        start: &DecodeStart,
        conditions: &Sender<DecodeRequest>,
    ) -> Result<(), Stop> {
        if start.image.unwrap_or_default().guidance_scale() <= 1.0 {
            return Ok(());
        }
        let span = info_span!("negative");
        let found = match self.generation.task {
            Task::Autoencode { .. } => self.store.mean_colour().instrument(span).await?,
            _ => self.store.empty_prompt().instrument(span).await?,
        };
        let negative = RegressedEmbeddings { start: 0, embeddings: Some(found.tensor) };
        let message = Some(decode_request::Message::Negative(negative));
        let _ = conditions.send(DecodeRequest { message }).await;
        Ok(())
    }

    async fn read_text(
        &self,
        mut llm: Llm,
        report: &mut Report,
        client: &Client,
    ) -> Result<LlmFinished, Stop> {
        loop {
            match next_of_llm(&mut llm, report).await? {
                Some(llm_event::Event::Text(text)) if !text.text.is_empty() => {
                    client.progress(Event::TextDelta(TextDelta { text: text.text })).await?;
                }
                Some(llm_event::Event::Finished(finished)) => return Ok(finished),
                _ => {}
            }
        }
    }

    /// Regressed rows to the decoder, one by one, and how far they are to the client. All of them in the end, unless
    /// the decoder has hung up.
    async fn forward_regressed(
        &self,
        mut llm: Llm,
        conditions: &Sender<DecodeRequest>,
        total: u32,
        report: &mut Report,
        client: &Client,
    ) -> Result<Option<(LlmAccepted, v1::Tensor)>, Stop> {
        loop {
            match next_of_llm(&mut llm, report).await? {
                Some(llm_event::Event::Embeddings(rows)) => {
                    let count =
                        rows.embeddings.as_ref().and_then(|it| it.shape.first()).copied().unwrap_or(0);
                    let done = rows.start.saturating_add(count);
                    if conditions.send(positive(rows)).await.is_err() {
                        return Ok(None);
                    }
                    report.regressed(done);
                    client.progress(Event::EmbeddingProgress(EmbeddingProgress { done, total })).await?;
                }
                Some(llm_event::Event::Finished(_)) => break,
                _ => {}
            }
        }
        let (call, _) = llm.into_parts();
        Ok(Some(call.regressed(total)?))
    }

    /// Steps as they are done; the image once the decoder has said which weights painted it.
    async fn read_image(&self, mut decoder: Decoder, client: &Client) -> Result<DecodeFinished, Stop> {
        let mut result = None;
        loop {
            match decoder
                .next()
                .await
                .map_err(|stop| error::in_terms_of_request(stages::Decoder::NAME, stop))?
                .event
            {
                Some(decode_event::Event::Step(step)) => {
                    let progress = DenoiseProgress { step: step.step, steps: step.steps };
                    client.progress(Event::DenoiseProgress(progress)).await?;
                }
                Some(decode_event::Event::Image(image)) => {
                    result = Some(ImageResult { png: image.png, height: image.height, width: image.width });
                }
                Some(decode_event::Event::Finished(finished)) => {
                    let result = result.ok_or_else(|| status::internal("the decoder sent no image"))?;
                    for event in image_events(result) {
                        client.progress(event).await?;
                    }
                    return Ok(finished);
                }
                None => {}
            }
        }
    }
}

/// The llm's next event, and what it says for the report.
async fn next_of_llm(llm: &mut Llm, report: &mut Report) -> Result<Option<llm_event::Event>, Stop> {
    let event = llm.next().await.map_err(|stop| error::in_terms_of_request(stages::Llm::NAME, stop))?.event;
    match &event {
        Some(llm_event::Event::Accepted(accepted)) => report.prompt(accepted.prompt_positions),
        Some(llm_event::Event::Finished(finished)) => report.llm(finished),
        _ => {}
    }
    Ok(event)
}

/// The client's end of the answer.
struct Client {
    sender: stream::Sender<GenerateEvent>,
    /// Whether it has been shown anything that a new beginning would repeat.
    sees_progress: AtomicBool,
}

impl Client {
    async fn send(&self, event: Event) -> Result<(), Stop> {
        Ok(self.sender.send(Ok(GenerateEvent { event: Some(event) })).await?)
    }

    async fn progress(&self, event: Event) -> Result<(), Stop> {
        self.sees_progress.store(true, Ordering::Relaxed);
        self.send(event).await
    }
}

fn positive(rows: RegressedEmbeddings) -> DecodeRequest {
    DecodeRequest { message: Some(decode_request::Message::Positive(rows)) }
}

/// An image as its client is sent it: in chunks before the event of the image where its PNG is large.
fn image_events(image: ImageResult) -> Vec<Event> {
    if image.png.len() <= WHOLE_PNG_BYTES_MAX {
        return vec![Event::Image(image)];
    }
    let total = image.png.len();
    let offsets = (0..total).step_by(PNG_CHUNK_BYTES);
    let chunk = |offset: usize| {
        let data = image.png.slice(offset..total.min(offset + PNG_CHUNK_BYTES));
        Event::ImageChunk(ImageChunk { data, offset: offset as u64, total: total as u64 })
    };
    let mut events: Vec<_> = offsets.map(chunk).collect();
    events.push(Event::Image(ImageResult { png: Bytes::new(), ..image }));
    events
}
