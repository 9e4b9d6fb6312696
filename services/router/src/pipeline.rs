//! One request through its stages, top to bottom: embeddings of its pictures (side by side) → llm → decoder. Every
//! stage is opened at once and fed as things become ready: the llm prefills what has arrived while later pictures
//! are still being encoded, and the decoder takes rows as the llm regresses them.
//!
//! All of it is one future: when nobody listens any more it is dropped, and every stage's stream with it.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use emu2_proto::{
    stage::{
        DecodeFinished, DecodeRequest, DecodeStart, LlmFinished, LlmRequest, LlmStart, RegressedEmbeddings,
        RegressionParameters, SlotEmbeddings, TextParameters, decode_event, decode_request, llm_event,
        llm_request, llm_start,
    },
    v1::{
        Accepted, DenoiseProgress, EmbeddingProgress, FinishReason, GenerateEvent, ImageResult, TextDelta,
        finished::Parameters, generate_event::Event,
    },
};
use emu2_serve::{deadline::Deadline, status, stream::Sender};
use futures::{StreamExt, TryStreamExt, stream, try_join};
use tonic::Status;
use tracing::{Instrument, info_span};

use crate::{
    cache::Found,
    embeddings::Embeddings,
    error::{self, Stop},
    pool::Stage,
    report::Report,
    request::{Generation, Task, effective_text},
    stages::{self, Answers, Decoder, DecoderCall, Llm, LlmCall, Requests},
};

/// Times that a request begins because it finds its stages' weights replaced: each stage may be found so once.
pub(crate) const MAX_BEGINNINGS: usize = 4;

type LlmAnswers = Answers<Llm, emu2_proto::stage::LlmEvent>;
type DecoderAnswers = Answers<Decoder, emu2_proto::stage::DecodeEvent>;

/// A checked request on its way.
pub(crate) struct Job {
    pub(crate) generation: Generation,
    pub(crate) embeddings: Embeddings,
    pub(crate) request_id: String,
    pub(crate) deadline: Deadline,
    pub(crate) images_in_flight: usize,
}

impl Job {
    /// Works until the answer is whole, something fails, or nobody listens.
    pub(crate) async fn run(self, sender: Sender<GenerateEvent>) {
        let client = Client { sender: sender.clone(), sees_progress: AtomicBool::new(false) };
        let outcome = tokio::select! {
            biased;
            () = sender.closed() => return,
            outcome = self.answer(&client) => outcome,
        };
        if let Err(stop) = outcome {
            let status = Status::from(stop);
            tracing::info!(
                code = status::code_name(status.code()),
                message = status.message(),
                "request failed"
            );
            // A client that has just left needs no status.
            let _ = sender.send(Err(status)).await;
        }
    }

    async fn answer(mut self, client: &Client) -> Result<(), Stop> {
        let model = self.embeddings.model.name.clone();
        let seed = self.generation.seed;
        let request_id = self.request_id.clone();
        client.send(Event::Accepted(Accepted { request_id, model, seed })).await?;
        for _ in 0..MAX_BEGINNINGS {
            match Box::pin(self.attempt(client)).await {
                // Nothing that the client saw depends on the old weights.
                Err(Stop::Rolled) if !client.sees_progress.load(Ordering::Relaxed) => {
                    let paints = !matches!(self.generation.task, Task::Write { .. });
                    self.embeddings.profile = self.embeddings.model.profile(paints)?;
                }
                outcome => return outcome,
            }
        }
        Err(Stop::Rolled)
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
        parameters: &TextParameters,
        report: &mut Report,
        client: &Client,
    ) -> Result<(), Stop> {
        let span = info_span!("llm");
        let output = llm_start::Output::Text(*parameters);
        let llm = self.open_llm(input, output).instrument(span.clone()).await?;
        let (pictures, finished) = try_join!(
            self.fill_slots(llm.requests),
            self.read_text(llm.answers, report, client).instrument(span)
        )?;
        report.pictures(&pictures);
        let reason = if finished.complete { FinishReason::EndOfText } else { FinishReason::MaxNewTokens };
        report.result(reason, Parameters::Text(effective_text(parameters)));
        Ok(())
    }

    async fn paint(
        &self,
        input: &llm_start::Input,
        start: &DecodeStart,
        report: &mut Report,
        client: &Client,
    ) -> Result<(), Stop> {
        let (llm_span, decoder_span) = (info_span!("llm"), info_span!("decoder"));
        let output = llm_start::Output::Regression(RegressionParameters {});
        let (llm, decoder) = try_join!(
            self.open_llm(input, output).instrument(llm_span.clone()),
            self.open_decoder(start).instrument(decoder_span.clone())
        )?;
        let total = start.queries;
        let conditions = async {
            // Dropped when both are through: that tells the decoder that no more comes.
            let requests = decoder.requests;
            let positive =
                self.forward_regressed(llm.answers, &requests, total, report, client).instrument(llm_span);
            try_join!(positive, self.send_negative(start, &requests))
        };
        let (pictures, _, finished) = try_join!(
            self.fill_slots(llm.requests),
            conditions,
            self.read_image(decoder.answers, client).instrument(decoder_span)
        )?;
        report.pictures(&pictures);
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
        let decoder = self.open_decoder(start).instrument(span.clone()).await?;
        let conditions = async {
            let requests = decoder.requests;
            try_join!(self.send_picture(&requests), self.send_negative(start, &requests))
        };
        let ((pictures, ()), finished) =
            try_join!(conditions, self.read_image(decoder.answers, client).instrument(span))?;
        report.pictures(&pictures);
        report.painted(&finished, start);
        Ok(())
    }

    async fn open_llm(&self, input: &llm_start::Input, output: llm_start::Output) -> Result<LlmCall, Stop> {
        let Embeddings { model, profile, metrics, .. } = &self.embeddings;
        let start = LlmStart { input: Some(input.clone()), output: Some(output) };
        let call = stages::generate(&model.llm, &profile.llm.weights_digest, start, self.deadline, metrics);
        call.await.map_err(|status| of_llm(&status))
    }

    async fn open_decoder(&self, start: &DecodeStart) -> Result<DecoderCall, Stop> {
        let Embeddings { model, profile, metrics, .. } = &self.embeddings;
        let (Some(pool), Some(info)) = (&model.decoder, &profile.decoder) else {
            return Err(status::internal("an image was asked of a model without a decoder").into());
        };
        let call = stages::decode(pool, &info.weights_digest, start.clone(), self.deadline, metrics);
        call.await.map_err(|status| of_decoder(&status))
    }

    /// Sends every picture's embeddings to its slot as soon as they are there.
    async fn fill_slots(&self, requests: Requests<LlmRequest>) -> Result<Pictures, Stop> {
        let began = Instant::now();
        let mut pictures = Pictures::default();
        let slots = 0..self.generation.pictures.len();
        let mut looked_up =
            stream::iter(slots.map(|slot| self.slot(slot))).buffer_unordered(self.images_in_flight);
        while let Some((slot, found)) = looked_up.try_next().await? {
            pictures.count(&found, began);
            let embeddings = SlotEmbeddings { slot: slot as u32, embeddings: Some(found.tensor) };
            let request = LlmRequest { message: Some(llm_request::Message::Embeddings(embeddings)) };
            if !requests.send(request).await {
                break;
            }
        }
        Ok(pictures)
    }

    async fn slot(&self, slot: usize) -> Result<(usize, Found), Stop> {
        let found = self
            .embeddings
            .picture(&self.generation.pictures[slot])
            .instrument(info_span!("embeddings", slot));
        Ok((slot, found.await?))
    }

    /// The only picture, as the positive of autoencoding.
    async fn send_picture(&self, requests: &Requests<DecodeRequest>) -> Result<Pictures, Stop> {
        let began = Instant::now();
        let (_, found) = self.slot(0).await?;
        let mut pictures = Pictures::default();
        pictures.count(&found, began);
        requests.send(positive(RegressedEmbeddings { start: 0, embeddings: Some(found.tensor) })).await;
        Ok(pictures)
    }

    async fn send_negative(
        &self,
        start: &DecodeStart,
        requests: &Requests<DecodeRequest>,
    ) -> Result<(), Stop> {
        if start.guidance_scale <= 1.0 {
            return Ok(());
        }
        let span = info_span!("negative");
        let found = match self.generation.task {
            Task::Autoencode { .. } => self.embeddings.mean_colour().instrument(span).await?,
            _ => self.embeddings.empty_prompt().instrument(span).await?,
        };
        let negative = RegressedEmbeddings { start: 0, embeddings: Some(found.tensor) };
        requests.send(DecodeRequest { message: Some(decode_request::Message::Negative(negative)) }).await;
        Ok(())
    }

    async fn read_text(
        &self,
        mut answers: LlmAnswers,
        report: &mut Report,
        client: &Client,
    ) -> Result<LlmFinished, Stop> {
        loop {
            match self.next_of_llm(&mut answers, report).await? {
                llm_event::Event::Text(text) if !text.text.is_empty() => {
                    client.progress(Event::TextDelta(TextDelta { text: text.text })).await?;
                }
                llm_event::Event::Finished(finished) => {
                    report.llm(&finished);
                    return Ok(finished);
                }
                _ => {}
            }
        }
    }

    /// Regressed rows to the decoder, one by one, and how far they are to the client.
    async fn forward_regressed(
        &self,
        mut answers: LlmAnswers,
        requests: &Requests<DecodeRequest>,
        total: u32,
        report: &mut Report,
        client: &Client,
    ) -> Result<(), Stop> {
        loop {
            match self.next_of_llm(&mut answers, report).await? {
                llm_event::Event::Embeddings(rows) => {
                    let count =
                        rows.embeddings.as_ref().and_then(|it| it.shape.first()).copied().unwrap_or(0);
                    let done = rows.start.saturating_add(count);
                    if !requests.send(positive(rows)).await {
                        return Ok(());
                    }
                    report.regressed(done);
                    client.progress(Event::EmbeddingProgress(EmbeddingProgress { done, total })).await?;
                }
                llm_event::Event::Finished(finished) => {
                    report.llm(&finished);
                    return Ok(());
                }
                _ => {}
            }
        }
    }

    /// The llm's next event. Its first one names the weights it works with.
    async fn next_of_llm(
        &self,
        answers: &mut LlmAnswers,
        report: &mut Report,
    ) -> Result<llm_event::Event, Stop> {
        let event = answers.next().await.map_err(|status| of_llm(&status))?.event;
        let event = event.ok_or_else(|| status::internal("the llm sent an event of no kind"))?;
        if let llm_event::Event::Accepted(accepted) = &event {
            if accepted.weights_digest != self.embeddings.profile.llm.weights_digest {
                answers.lease().refresh().await;
                return Err(Stop::Rolled);
            }
            report.prompt(accepted.prompt_positions);
        }
        Ok(event)
    }

    /// Steps as they are done; the image once the decoder has said which weights painted it.
    async fn read_image(&self, mut answers: DecoderAnswers, client: &Client) -> Result<DecodeFinished, Stop> {
        let mut result = None;
        loop {
            match answers.next().await.map_err(|status| of_decoder(&status))?.event {
                Some(decode_event::Event::Step(step)) => {
                    let progress = DenoiseProgress { step: step.step, steps: step.steps };
                    client.progress(Event::DenoiseProgress(progress)).await?;
                }
                Some(decode_event::Event::Image(image)) => {
                    result = Some(ImageResult { png: image.png, height: image.height, width: image.width });
                }
                Some(decode_event::Event::Finished(finished)) => {
                    let expected = self.embeddings.profile.decoder.as_ref().map(|info| &info.weights_digest);
                    if expected != Some(&finished.weights_digest) {
                        answers.lease().refresh().await;
                        return Err(Stop::Rolled);
                    }
                    let result = result.ok_or_else(|| status::internal("the decoder sent no image"))?;
                    client.progress(Event::Image(result)).await?;
                    return Ok(finished);
                }
                None => {}
            }
        }
    }
}

/// What became of a request's pictures.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pictures {
    pub(crate) images: u32,
    pub(crate) cached: u32,
    /// From the first lookup to the last picture that the cache did not hold.
    pub(crate) encode_ms: f64,
}

impl Pictures {
    fn count(&mut self, found: &Found, began: Instant) {
        self.images += 1;
        if found.outcome.is_hit() {
            self.cached += 1;
        } else {
            self.encode_ms = began.elapsed().as_secs_f64() * 1e3;
        }
    }
}

/// The client's end of the answer.
struct Client {
    sender: Sender<GenerateEvent>,
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

/// The llm's prompt has the request's own names; embeddings are ours.
fn of_llm(status: &Status) -> Stop {
    let public = |field: &str| {
        let field = field.strip_prefix("start.").unwrap_or(field);
        let top = field.split(['.', '[']).next().unwrap_or(field);
        ["prompt", "chat", "text", "input"].contains(&top).then(|| field.to_owned())
    };
    error::of_stage(Llm::NAME, status, public).into()
}

/// The decoder's start is flat; the request has it under `image`.
fn of_decoder(status: &Status) -> Stop {
    const SHARED: [&str; 8] = [
        "height",
        "width",
        "steps",
        "guidance_scale",
        "original_height",
        "original_width",
        "crop_top",
        "crop_left",
    ];
    let public = |field: &str| {
        let field = field.strip_prefix("start.").unwrap_or(field);
        SHARED.contains(&field).then(|| format!("image.{field}"))
    };
    error::of_stage(Decoder::NAME, status, public).into()
}
