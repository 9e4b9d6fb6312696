//! Requests by number, the digests of their answers, and clients that send them: one after another each, or at a set
//! rate.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use blake3::{Hash, Hasher};
use bytes::Bytes;
use emu2_proto::v1::{
    EmbedRequest, GenerateEvent, GenerateRequest, Image, ImageOutput, Part, Prompt, TextOutput,
    emu2_client::Emu2Client,
    generate_event::Event,
    generate_request::{Input, Output},
    part::Kind,
};
use futures::StreamExt;
use tokio::task::JoinSet;
use tonic::{Code, Status, Streaming, transport::Channel};

use crate::cluster::MODEL;

/// How many bytes an image of a request has: a small photograph's size.
const IMAGE_BYTES: usize = 16 << 10;
/// How long a request may take. Everything here ends long before; what does not is a failure.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// What a client asks.
#[derive(Clone, Debug)]
pub enum Ask {
    /// The embeddings of an image.
    Embed(EmbedRequest),
    /// A text or an image.
    Generate(GenerateRequest),
}

/// An answer that is whole and in order.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// The digest of everything in it that the request decides: text, image, embeddings, seed.
    pub digest: Hash,
    /// The time to the first result: a piece of text, an image, embeddings.
    pub first: Duration,
    /// The time to the end.
    pub total: Duration,
}

/// Returns the bytes of an image, told apart by number.
pub fn image_bytes(number: u64) -> Bytes {
    let mut bytes = vec![0; IMAGE_BYTES];
    Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes.into()
}

/// Makes a part of an image, told apart by number.
pub fn image(number: u64) -> Part {
    Part { kind: Some(Kind::Image(Image { data: image_bytes(number) })) }
}

/// Makes a part of text.
pub fn text(text: impl Into<String>) -> Part {
    Part { kind: Some(Kind::Text(text.into())) }
}

/// Asks for the embeddings of the image of this number.
pub fn embed(number: u64) -> Ask {
    Ask::Embed(EmbedRequest {
        model: MODEL.into(),
        image: Some(Image { data: image_bytes(number) }),
        n_query: None,
        ..Default::default()
    })
}

/// Asks for an output after a prompt of these parts.
pub fn generate(parts: Vec<Part>, output: Output, seed: u64) -> Ask {
    Ask::Generate(GenerateRequest {
        model: MODEL.into(),
        input: Some(Input::Prompt(Prompt { parts })),
        output: Some(output),
        seed: Some(seed),
        ..Default::default()
    })
}

/// Asks for a greedy text of so many tokens.
pub fn write(parts: Vec<Part>, tokens: u32) -> Ask {
    let output = TextOutput { max_new_tokens: Some(tokens), num_beams: Some(1), ..Default::default() };
    generate(parts, Output::Text(output), 1)
}

/// Asks for an image under guidance in so many denoising steps.
pub fn draw(parts: Vec<Part>, steps: u32, seed: u64) -> Ask {
    let output = ImageOutput { steps: Some(steps), ..Default::default() };
    generate(parts, Output::Image(output), seed)
}

/// Asks for everything that clients do, in turn: text (greedy, sampled, beams), images (generated, autoencoded),
/// embeddings.
pub fn mixed(number: u64) -> Ask {
    let words = || text(format!("request {number}"));
    match number % 6 {
        0 => write(vec![image(number), words()], 24),
        1 => {
            let output = TextOutput { max_new_tokens: Some(24), do_sample: true, ..Default::default() };
            generate(vec![words()], Output::Text(output), number)
        }
        2 => {
            let output = TextOutput { max_new_tokens: Some(12), num_beams: Some(5), ..Default::default() };
            generate(vec![image(number), words(), image(number + 1_000_000)], Output::Text(output), number)
        }
        3 => draw(vec![image(number), words()], 12, number),
        4 => draw(vec![image(number)], 12, number),
        _ => embed(number),
    }
}

/// Sends one request and checks the order of its answer: nothing repeated, nothing after the end.
///
/// # Errors
///
/// The request failed, took longer than a minute, or its answer is out of order (`DATA_LOSS`).
pub async fn send(client: &mut Emu2Client<Channel>, ask: Ask) -> Result<Answer, Status> {
    let sending = async {
        match ask {
            Ask::Embed(request) => embedded(client, request).await,
            Ask::Generate(request) => {
                let began = Instant::now();
                read(client.generate(request).await?.into_inner(), began).await
            }
        }
    };
    let timed_out = || Status::deadline_exceeded("the bench waited long enough");
    tokio::time::timeout(TIME_LIMIT, sending).await.map_err(|_| timed_out())?.map_err(as_grpc_says)
}

/// A connection that broke is UNAVAILABLE to gRPC's own clients; tonic's calls most ways of breaking UNKNOWN. Only a
/// status that was made on this side of the wire has a source.
fn as_grpc_says(status: Status) -> Status {
    let local = std::error::Error::source(&status).is_some();
    match status.code() {
        Code::Unknown if local => Status::unavailable(format!("the connection broke: {}", status.message())),
        _ => status,
    }
}

async fn embedded(client: &mut Emu2Client<Channel>, request: EmbedRequest) -> Result<Answer, Status> {
    let began = Instant::now();
    let answer = client.embed(request).await?.into_inner();
    let total = began.elapsed();
    let tensor = answer.embeddings.ok_or_else(|| out_of_order("no embeddings"))?;
    let mut hasher = Hasher::new();
    hasher.update(answer.weights_digest.as_bytes()).update(&tensor.data);
    Ok(Answer { digest: hasher.finalize(), first: total, total })
}

/// Reads a stream of events to its end; durations count from `began`.
///
/// # Errors
///
/// The stream failed, or its events are out of order (`DATA_LOSS`).
pub async fn read(mut events: Streaming<GenerateEvent>, began: Instant) -> Result<Answer, Status> {
    let mut transcript = Transcript::default();
    let mut first = None;
    while let Some(event) = events.message().await? {
        let event = event.event.ok_or_else(|| out_of_order("an event of no kind"))?;
        if matches!(event, Event::TextDelta(_) | Event::Image(_)) {
            first.get_or_insert_with(|| began.elapsed());
        }
        transcript.add(event)?;
    }
    let total = began.elapsed();
    Ok(Answer { digest: transcript.digest()?, first: first.unwrap_or(total), total })
}

/// What has been shown of an answer.
#[derive(Default)]
pub struct Transcript {
    /// The text so far.
    pub text: String,
    hasher: Hasher,
    embeddings: u32,
    steps: u32,
    images: usize,
    began: bool,
    finished: bool,
}

impl Transcript {
    /// Adds an event.
    ///
    /// # Errors
    ///
    /// The event is out of order (`DATA_LOSS`).
    pub fn add(&mut self, event: Event) -> Result<(), Status> {
        if self.finished || self.began == matches!(event, Event::Accepted(_)) {
            return Err(out_of_order(format!("{event:?} begun {} finished {}", self.began, self.finished)));
        }
        match event {
            Event::Accepted(accepted) => {
                self.began = true;
                self.hasher.update(&accepted.seed.to_le_bytes());
            }
            Event::TextDelta(delta) => self.text.push_str(&delta.text),
            // From the cache, all at once.
            Event::EmbeddingProgress(progress) if self.embeddings == 0 && progress.done == progress.total => {
                self.embeddings = progress.done;
            }
            Event::EmbeddingProgress(progress) => advance(&mut self.embeddings, progress.done, "embeddings")?,
            Event::DenoiseProgress(progress) => advance(&mut self.steps, progress.step, "steps")?,
            Event::ImageChunk(chunk) => drop(self.hasher.update(&chunk.data)),
            Event::Image(image) => {
                self.images += 1;
                self.hasher.update(&image.png);
            }
            Event::Finished(finished) => {
                self.finished = true;
                self.hasher.update(&finished.reason.to_le_bytes()).update(&finished.seed.to_le_bytes());
            }
        }
        Ok(())
    }

    fn digest(mut self) -> Result<Hash, Status> {
        if !self.finished || self.images > 1 {
            return Err(out_of_order(format!("finished {}, {} images", self.finished, self.images)));
        }
        self.hasher.update(self.text.as_bytes());
        Ok(self.hasher.finalize())
    }
}

/// Progress goes forward, and by one.
fn advance(done: &mut u32, now: u32, what: &str) -> Result<(), Status> {
    if now != *done + 1 {
        return Err(out_of_order(format!("{what} went from {done} to {now}")));
    }
    *done = now;
    Ok(())
}

fn out_of_order(what: impl std::fmt::Display) -> Status {
    Status::data_loss(format!("the answer is out of order: {what}"))
}

/// What became of one request of a load.
#[derive(Clone, Debug)]
pub struct Sent {
    /// The request's number in the load.
    pub number: u64,
    /// The time from the load's beginning to the request's.
    pub at: Duration,
    /// The time from the request to its end.
    pub took: Duration,
    /// The answer, or why there is none.
    pub outcome: Result<Answer, Status>,
}

/// Everything that a load sent, in no order.
#[derive(Default)]
pub struct Record(
    /// The requests.
    pub Vec<Sent>,
);

impl Record {
    /// Returns the answers.
    pub fn answers(&self) -> impl Iterator<Item = &Answer> {
        self.0.iter().filter_map(|sent| sent.outcome.as_ref().ok())
    }

    /// Returns the requests that failed, and why.
    pub fn failures(&self) -> impl Iterator<Item = (&Sent, &Status)> {
        self.0.iter().filter_map(|sent| Some((sent, sent.outcome.as_ref().err()?)))
    }

    /// Returns the requests that were refused because the cluster was full.
    pub fn refused(&self) -> impl Iterator<Item = &Sent> {
        let full = |status: &Status| status.code() == Code::ResourceExhausted;
        self.failures().filter(move |(_, status)| full(status)).map(|(sent, _)| sent)
    }

    /// Describes the first few failures, for a note.
    pub fn reasons(&self) -> String {
        let reasons = self.failures().take(3).map(|(sent, status)| {
            format!(
                "request {} at {:.2} s: {:?} {}",
                sent.number,
                sent.at.as_secs_f64(),
                status.code(),
                status.message()
            )
        });
        reasons.collect::<Vec<_>>().join("; ")
    }
}

/// The signal to the clients of a load that it is over: they finish what they are at. Clones are one signal.
#[derive(Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Ends the load.
    pub fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Sends requests from `clients` callers, each asking again as soon as it is answered, numbers given out in order from
/// 0, until stopped or `limit` requests were sent. Channels are shared in turn: one connection carries many streams, as
/// in real use.
pub async fn closed_loop<F>(
    channels: &[Emu2Client<Channel>],
    clients: usize,
    limit: usize,
    stop: &Stop,
    ask: F,
) -> Record
where
    F: Fn(u64) -> Ask + Clone + Send + 'static,
{
    let (next, began) = (Arc::new(AtomicUsize::new(0)), Instant::now());
    let mut callers = JoinSet::new();
    for caller in 0..clients {
        let mut client = channels[caller % channels.len()].clone();
        let (next, stop, ask) = (Arc::clone(&next), stop.clone(), ask.clone());
        callers.spawn(async move {
            let mut sent = Vec::new();
            while !stop.is_stopped() {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= limit {
                    break;
                }
                let number = number as u64;
                let (at, begins) = (began.elapsed(), Instant::now());
                let outcome = send(&mut client, ask(number)).await;
                sent.push(Sent { number, at, took: begins.elapsed(), outcome });
            }
            sent
        });
    }
    Record(callers.join_all().await.into_iter().flatten().collect())
}

/// Sends requests at a set rate for so long, whether or not earlier ones are answered.
pub async fn open_loop<F>(
    channels: &[Emu2Client<Channel>],
    rate_per_second: f64,
    length: Duration,
    ask: F,
) -> Record
where
    F: Fn(u64) -> Ask,
{
    let began = Instant::now();
    let mut running = JoinSet::new();
    let count = (rate_per_second * length.as_secs_f64()) as u64;
    for number in 0..count {
        let due = Duration::from_secs_f64(number as f64 / rate_per_second);
        if let Some(early) = due.checked_sub(began.elapsed()) {
            tokio::time::sleep(early).await;
        }
        let mut client = channels[number as usize % channels.len()].clone();
        let ask = ask(number);
        running.spawn(async move {
            let (at, begins) = (began.elapsed(), Instant::now());
            let outcome = send(&mut client, ask).await;
            Sent { number, at, took: begins.elapsed(), outcome }
        });
    }
    Record(running.join_all().await)
}

/// Sends requests at once, each on its client; returns their answers in order.
pub async fn at_once(asks: Vec<(Emu2Client<Channel>, Ask)>) -> Vec<Result<Answer, Status>> {
    let sending = asks.into_iter().map(|(mut client, ask)| async move { send(&mut client, ask).await });
    let count = sending.len().max(1);
    futures::stream::iter(sending).buffered(count).collect().await
}
