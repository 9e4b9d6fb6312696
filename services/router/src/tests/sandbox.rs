//! A router in front of scripted stages, and a client of it.

use std::{
    future::Future,
    net::SocketAddr,
    sync::OnceLock,
    time::{Duration, Instant},
};

use bytes::Bytes;
use emu2_proto::v1::{
    Box as Region, Chat, EmbedRequest, EmbedResponse, Finished, GenerateEvent, GenerateRequest, Image,
    ImageOutput, Part, Prompt, TextOutput,
    emu2_client::Emu2Client,
    generate_event::Event,
    generate_request::{Input, Output},
    part::Kind,
};
use emu2_serve::{server::Listeners, shutdown::Shutdown, telemetry};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::Runtime,
    task::JoinHandle,
};
use tonic::{Code, Status, Streaming, transport::Channel};
use tonic_types::StatusExt;

use super::mocks::{Role, Script, Stage};
use crate::config::{CacheConfig, Config, LimitsConfig, ModelConfig, PoolConfig};

/// Far above what anything here takes, far below a person's patience.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

pub(super) struct Sandbox {
    pub(super) encoder: Stage,
    pub(super) llm: Stage,
    pub(super) decoder: Stage,
    pub(super) router: Router,
}

pub(super) struct Router {
    pub(super) client: Emu2Client<Channel>,
    pub(super) admin: SocketAddr,
    shutdown: Shutdown,
    served: JoinHandle<anyhow::Result<()>>,
}

impl Sandbox {
    pub(super) async fn start() -> Self {
        Self::with(|_| {}).await
    }

    /// Models `emu2-gen` (everything) and `emu2` (no decoder, the same other stages).
    pub(super) async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let encoder = Stage::start(Role::Encoder, Script::new("e1"));
        let llm = Stage::start(Role::Llm { instruct: true }, Script::new("l1"));
        let decoder = Stage::start(Role::Decoder, Script::new("d1"));
        let mut config = config(&encoder, &llm, &decoder);
        change(&mut config);
        let router = Router::start(config).await;
        router.ready().await;
        Self { encoder, llm, decoder, router }
    }

    /// Another router in front of the same stages.
    pub(super) async fn another_router(&self, change: impl FnOnce(&mut Config)) -> Router {
        let mut config = config(&self.encoder, &self.llm, &self.decoder);
        change(&mut config);
        let router = Router::start(config).await;
        router.ready().await;
        router
    }

    /// Another router on a runtime of its own, whose end is as sudden as a process'.
    pub(super) async fn router_to_kill(&self, change: impl FnOnce(&mut Config)) -> (Runtime, Router) {
        let mut config = config(&self.encoder, &self.llm, &self.decoder);
        change(&mut config);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let router = runtime.spawn(Router::start(config)).await.unwrap();
        router.ready().await;
        (runtime, router)
    }

    pub(super) fn client(&self) -> Emu2Client<Channel> {
        self.router.client.clone()
    }

    pub(super) async fn events(&self, request: GenerateRequest) -> Result<Vec<Event>, Status> {
        collect(self.client().generate(request).await?.into_inner()).await
    }

    pub(super) async fn embed(&self, data: &'static [u8]) -> Result<EmbedResponse, Status> {
        self.router.embed(data).await
    }

    /// No stage works for anybody.
    pub(super) async fn idle(&self) {
        until("every stage is idle", || async {
            [&self.encoder, &self.llm, &self.decoder].iter().all(|stage| stage.running() == 0)
        })
        .await;
    }
}

impl Router {
    pub(super) async fn start(config: Config) -> Self {
        static TELEMETRY: OnceLock<telemetry::Telemetry> = OnceLock::new();
        TELEMETRY.get_or_init(|| {
            let config = telemetry::TelemetryConfig { log: "off".into(), ..Default::default() };
            telemetry::init("emu2-router", &config).unwrap()
        });
        let listeners = Listeners::bind(&config.server).await.unwrap();
        let (address, admin) = (listeners.grpc_addr(), listeners.admin_addr().unwrap());
        let shutdown = Shutdown::new();
        let served = tokio::spawn(crate::run(config, listeners, shutdown.clone()));
        let channel = emu2_serve::client::endpoint(format!("http://{address}")).unwrap().connect_lazy();
        Self { client: Emu2Client::new(channel), admin, shutdown, served }
    }

    pub(super) async fn is_ready(&self) -> bool {
        self.admin("/readyz").await.starts_with("HTTP/1.0 200")
    }

    async fn ready(&self) {
        until("the router is ready", || self.is_ready()).await;
    }

    pub(super) async fn embed(&self, data: &'static [u8]) -> Result<EmbedResponse, Status> {
        self.begin_embed(data).await
    }

    /// As [`Self::embed`], for a task of its own.
    pub(super) fn begin_embed(
        &self,
        data: &'static [u8],
    ) -> impl Future<Output = Result<EmbedResponse, Status>> + Send + use<> {
        let image = Some(Image { data: data.into() });
        let request = EmbedRequest { model: "emu2".into(), image, ..Default::default() };
        let mut client = self.client.clone();
        async move { Ok(client.embed(request).await?.into_inner()) }
    }

    pub(super) async fn metrics(&self) -> String {
        self.admin("/metrics").await
    }

    async fn admin(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.admin).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// Lookups of pictures that ended so.
    pub(super) async fn lookups(&self, outcome: &str) -> u64 {
        self.lookups_of("image", outcome).await
    }

    pub(super) async fn lookups_of(&self, kind: &str, outcome: &str) -> u64 {
        let series = format!("emu2_router_cache_lookups_total{{kind=\"{kind}\",outcome=\"{outcome}\"}} ");
        let metrics = self.metrics().await;
        let line = metrics.lines().find_map(|line| line.strip_prefix(&series));
        line.map_or(0, |count| count.trim().parse().unwrap())
    }

    pub(super) async fn stop(self) {
        self.shutdown.begin();
        self.served.await.unwrap().unwrap();
    }
}

pub(super) fn config(encoder: &Stage, llm: &Stage, decoder: &Stage) -> Config {
    let painter = ModelConfig {
        name: "emu2-gen".into(),
        encoder: vec![encoder.endpoint()],
        llm: vec![llm.endpoint()],
        decoder: vec![decoder.endpoint()],
    };
    let reader = ModelConfig { name: "emu2".into(), decoder: vec![], ..painter.clone() };
    Config {
        models: vec![painter, reader],
        limits: LimitsConfig { max_parts: 600, ..Default::default() },
        cache: CacheConfig { deadline_ms: 100, ..Default::default() },
        pool: PoolConfig { refresh_ms: 200, retry_ms: 20, ..Default::default() },
        server: emu2_serve::server::ServerConfig { shutdown_grace_ms: 1_000, ..Default::default() },
        ..Default::default()
    }
}

/// Waits until a condition holds.
pub(super) async fn until<F, Condition>(what: &str, mut condition: F)
where
    F: FnMut() -> Condition,
    Condition: Future<Output = bool>,
{
    let began = Instant::now();
    while !condition().await {
        assert!(began.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// All events, or the status that ended them.
pub(super) async fn collect(mut stream: Streaming<GenerateEvent>) -> Result<Vec<Event>, Status> {
    let mut events = Vec::new();
    while let Some(event) = stream.message().await? {
        events.push(event.event.expect("an event of some kind"));
    }
    Ok(events)
}

/// The event of one kind each, and the rest of the answer's order, as short words.
pub(super) fn words(events: &[Event]) -> Vec<String> {
    let word = |event: &Event| match event {
        Event::Accepted(_) => "accepted".to_owned(),
        Event::TextDelta(delta) => format!("text {}", delta.text),
        Event::EmbeddingProgress(progress) => format!("embedding {}/{}", progress.done, progress.total),
        Event::DenoiseProgress(progress) => format!("step {}/{}", progress.step, progress.steps),
        Event::ImageChunk(chunk) => format!("chunk at {}", chunk.offset),
        Event::Image(image) => format!("image {}x{}", image.width, image.height),
        Event::Finished(_) => "finished".to_owned(),
    };
    events.iter().map(word).collect()
}

pub(super) fn finished(events: &[Event]) -> &Finished {
    let Some(Event::Finished(finished)) = events.last() else { panic!("not finished: {events:?}") };
    finished
}

pub(super) fn text(text: &str) -> Part {
    Part { kind: Some(Kind::Text(text.into())) }
}

pub(super) fn image(data: impl Into<Bytes>) -> Part {
    Part { kind: Some(Kind::Image(Image { data: data.into() })) }
}

pub(super) fn region(phrase: &str) -> Part {
    Part {
        kind: Some(Kind::Box(Region {
            left: 0.25,
            top: 0.25,
            right: 0.5,
            bottom: 0.75,
            phrase: phrase.into(),
        })),
    }
}

/// A text request.
pub(super) fn ask(parts: Vec<Part>) -> GenerateRequest {
    let output = Some(Output::Text(TextOutput::default()));
    GenerateRequest {
        model: "emu2".into(),
        input: Some(Input::Prompt(Prompt { parts })),
        output,
        seed: Some(1),
        ..Default::default()
    }
}

pub(super) fn ask_chat(chat: Chat) -> GenerateRequest {
    GenerateRequest { input: Some(Input::Chat(chat)), ..ask(vec![]) }
}

/// An image request of two steps.
pub(super) fn paint(parts: Vec<Part>, guidance_scale: f32) -> GenerateRequest {
    let output = ImageOutput { steps: Some(2), guidance_scale: Some(guidance_scale), ..Default::default() };
    GenerateRequest { model: "emu2-gen".into(), output: Some(Output::Image(output)), ..ask(parts) }
}

/// Code and violated fields of a refusal.
pub(super) fn refusal(status: &Status) -> (Code, Vec<String>) {
    let violations = status.get_details_bad_request().map(|it| it.field_violations).unwrap_or_default();
    (status.code(), violations.into_iter().map(|it| it.field).collect())
}
