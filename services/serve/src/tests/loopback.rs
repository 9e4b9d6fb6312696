//! A server on a loopback port for tests, answering the public API in ways that tests steer.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use emu2_proto::{
    stage::{self, visual_encoder_server::VisualEncoder},
    v1::{self, emu2_client::Emu2Client, emu2_server::Emu2, generate_event::Event},
};
use fake_opentelemetry_collector::{ExportedSpan, FakeCollectorServer};
use futures::{Stream, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{Semaphore, watch},
    task::JoinHandle,
};
use tonic::{
    Request, Response, Status, Streaming,
    metadata::{KeyAndValueRef, MetadataMap},
    transport::Channel,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::{
    client,
    deadline::Deadline,
    message,
    readiness::Readiness,
    server::{Listeners, Server, ServerConfig},
    shutdown::Shutdown,
    status, stream,
    telemetry::{self, LogFormat, Telemetry, TelemetryConfig},
    tenant::Tenant,
    trace::{self, RequestId},
};

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The handlers of the test server. `EmbedRequest.model` says what becomes of a call.
#[derive(Clone)]
pub(crate) struct Probe {
    /// A stream sends one event for each permit added here.
    pub(crate) steps: Arc<Semaphore>,
    /// Streams whose sender has seen that nobody listens.
    pub(crate) closed_streams: watch::Sender<usize>,
    /// Calls that have come in whole and wait for ever.
    pub(crate) waiting: watch::Sender<usize>,
}

impl Probe {
    pub(crate) fn new() -> Self {
        Self {
            steps: Arc::new(Semaphore::new(0)),
            closed_streams: watch::Sender::new(0),
            waiting: watch::Sender::new(0),
        }
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Emu2 for Probe {
    type GenerateStream = stream::Events<v1::GenerateEvent>;

    /// `seed` text events, one for each step that the test allows.
    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let (sender, events) = stream::channel(4, Deadline::of(&request));
        let count = request.into_inner().seed();
        let probe = self.clone();
        tokio::spawn(async move {
            for _ in 0..count {
                tokio::select! {
                    () = sender.closed() => return probe.closed_streams.send_modify(|count| *count += 1),
                    step = probe.steps.acquire() => step.unwrap().forget(),
                }
                let event = Event::TextDelta(v1::TextDelta { text: "x".into() });
                let _ = sender.send(Ok(v1::GenerateEvent { event: Some(event) })).await;
            }
        });
        Ok(Response::new(events))
    }

    async fn embed(&self, request: Request<v1::EmbedRequest>) -> Result<Response<v1::EmbedResponse>, Status> {
        match request.get_ref().model.as_str() {
            "wait" => {
                self.waiting.send_modify(|count| *count += 1);
                std::future::pending().await
            }
            "panic" => panic!("a handler's bug"),
            "tenant" => Err(status::not_found("tenant", Tenant::of(&request).name())),
            "headers" => Err(status::not_found("headers", &format!("{:?}", request.metadata()))),
            "range" => Err(Status::out_of_range("page 9")),
            model => Err(status::not_found("model", model)),
        }
    }

    /// Names, as `key: value`, what this handler would send to the next service.
    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        assert_eq!(Some(RequestId::of(&request)), trace::request_id());
        let outgoing = tokio::spawn(tracing::Instrument::in_current_span(async move {
            let mut outgoing = MetadataMap::new();
            trace::inject(&mut outgoing);
            outgoing
        }));
        let outgoing = outgoing.await.unwrap();
        let pairs = outgoing.iter().map(|pair| match pair {
            KeyAndValueRef::Ascii(key, value) => format!("{key}: {}", value.to_str().unwrap()),
            KeyAndValueRef::Binary(key, _) => key.to_string(),
        });
        let models = pairs.map(|name| v1::Model { name, ..Default::default() }).collect();
        Ok(Response::new(v1::ListModelsResponse { models }))
    }
}

#[tonic::async_trait]
impl VisualEncoder for Probe {
    type EncodeStream = Answers<stage::EncodeResponse>;
    type WatchLoadStream = Answers<stage::Load>;

    /// One report, and no end.
    async fn watch_load(
        &self,
        _: Request<stage::EncoderWatchLoadRequest>,
    ) -> Result<Response<Self::WatchLoadStream>, Status> {
        let first = futures::stream::iter([Ok(stage::Load::default())]);
        Ok(Response::new(Box::pin(first.chain(futures::stream::pending()))))
    }

    async fn info(
        &self,
        _: Request<stage::EncoderInfoRequest>,
    ) -> Result<Response<stage::EncoderInfo>, Status> {
        Ok(Response::new(stage::EncoderInfo::default()))
    }

    /// Acknowledges each message by its n_query; a message that cannot be read ends the stream.
    async fn encode(
        &self,
        request: Request<Streaming<stage::EncodeRequest>>,
    ) -> Result<Response<Self::EncodeStream>, Status> {
        let requests = futures::stream::try_unfold(request.into_inner(), async |mut requests| {
            let next = message::next(&mut requests).await?;
            let answer =
                |preprocessing_version| stage::EncodeResponse { preprocessing_version, ..Default::default() };
            Ok(next.map(|request| (answer(request.n_query), requests)))
        });
        Ok(Response::new(Box::pin(requests)))
    }
}

/// A running server and what a test needs to steer it.
pub(crate) struct Loopback {
    pub(crate) address: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) probe: Probe,
    pub(crate) readiness: Readiness,
    pub(crate) shutdown: Shutdown,
    running: JoinHandle<anyhow::Result<()>>,
}

impl Loopback {
    /// Ready to serve.
    pub(crate) async fn start(config: ServerConfig) -> Self {
        Self::start_with(config, |server| server).await
    }

    pub(crate) async fn start_with(config: ServerConfig, build: impl FnOnce(Server) -> Server) -> Self {
        let loopback = Self::build(config, build).await;
        loopback.readiness.ready();
        loopback
    }

    pub(crate) async fn start_not_ready(config: ServerConfig) -> Self {
        Self::build(config, |server| server).await
    }

    async fn build(config: ServerConfig, build: impl FnOnce(Server) -> Server) -> Self {
        exported();
        let listeners = Listeners::bind(&config).await.unwrap();
        let (address, admin) = (listeners.grpc_addr(), listeners.admin_addr().unwrap());
        let probe = Probe::new();
        let limit = config.max_message_bytes;
        let emu2 = v1::emu2_server::Emu2Server::new(probe.clone()).max_decoding_message_size(limit);
        let encoder = stage::visual_encoder_server::VisualEncoderServer::new(probe.clone());
        let server = Server::new("probe", &config, listeners)
            .service(emu2)
            .service(encoder.max_decoding_message_size(limit));
        let server = build(server);
        let readiness = server.readiness();
        let shutdown = Shutdown::new();
        let running = tokio::spawn(server.run(shutdown.clone()));
        Self { address, admin, probe, readiness, shutdown, running }
    }

    pub(crate) fn channel(&self) -> Channel {
        client::endpoint(format!("http://{}", self.address)).unwrap().connect_lazy()
    }

    pub(crate) fn client(&self) -> Emu2Client<Channel> {
        Emu2Client::new(self.channel())
    }

    /// Opens a stream of `count` events.
    pub(crate) async fn generate(&self, count: u64) -> Streaming<v1::GenerateEvent> {
        let request = v1::GenerateRequest { seed: Some(count), ..Default::default() };
        self.client().generate(request).await.unwrap().into_inner()
    }

    /// What the admin port answers: status and body.
    pub(crate) async fn admin(&self, path: &str) -> (u16, String) {
        let mut connection = TcpStream::connect(self.admin).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
        connection.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// Waits until the server has ended after its shutdown.
    pub(crate) async fn ended(self) {
        tokio::time::timeout(PATIENCE, self.running).await.unwrap().unwrap().unwrap();
    }
}

pub(crate) fn embed(model: &str) -> v1::EmbedRequest {
    v1::EmbedRequest { model: model.into(), ..Default::default() }
}

/// The names of the services that reflection tells of.
pub(crate) async fn reflected(server: &Loopback) -> Result<Vec<String>, Status> {
    let list = MessageRequest::ListServices(String::new());
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let mut client = ServerReflectionClient::new(server.channel());
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await?.into_inner();
    match answers.message().await?.unwrap().message_response {
        Some(MessageResponse::ListServicesResponse(list)) => {
            Ok(list.service.into_iter().map(|service| service.name).collect())
        }
        other => panic!("{other:?}"),
    }
}

/// Spans that this test process has exported, through a real collector on a runtime of its own.
pub(crate) struct Exported {
    pub(crate) telemetry: Telemetry,
    pub(crate) spans: Arc<Mutex<Vec<ExportedSpan>>>,
}

/// Tracing is installed once in a process, so all tests share it.
pub(crate) fn exported() -> &'static Exported {
    static EXPORTED: OnceLock<Exported> = OnceLock::new();
    EXPORTED.get_or_init(|| {
        let (started, telemetry) = std::sync::mpsc::sync_channel(1);
        let spans = Arc::new(Mutex::new(Vec::new()));
        let collected = Arc::clone(&spans);
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                let mut collector = FakeCollectorServer::start().await.unwrap();
                let config = TelemetryConfig {
                    log: "off".into(),
                    log_format: LogFormat::Text,
                    otlp_endpoint: Some(collector.endpoint()),
                };
                started.send(telemetry::init("serve-tests", &config).unwrap()).unwrap();
                loop {
                    let spans = collector.exported_spans(1, Duration::from_millis(20)).await;
                    collected.lock().unwrap().extend(spans);
                }
            });
        });
        Exported { telemetry: telemetry.recv().unwrap(), spans }
    })
}
