//! The three stages as servers that answer by a script, remember what they were asked, and can be held or killed.

mod decoder;
mod encoder;
mod llm;

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use emu2_proto::{
    stage::{
        DecodeStart, LlmStart, Load, RegressedEmbeddings, encode_request::Source,
        language_model_server::LanguageModelServer, visual_decoder_server::VisualDecoderServer,
        visual_encoder_server::VisualEncoderServer,
    },
    v1::{Dtype, Tensor},
};
use futures::{Stream, StreamExt};
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tonic::{
    Response, Status,
    metadata::MetadataMap,
    transport::{Server, server::TcpIncoming},
};

use self::{decoder::MockDecoder, encoder::MockEncoder, llm::MockLlm};

pub(super) const WIDTH: u32 = 4;
pub(super) const N_QUERY: u32 = 4;
/// A picture that begins so waits for the encoder's gate.
pub(super) const SLOW: &[u8] = b"slow";
pub(super) const PNG: &[u8] = b"a painted png";

type LoadStream = Pin<Box<dyn Stream<Item = Result<Load, Status>> + Send>>;

/// What a test and its stage share.
#[derive(Clone)]
pub(super) struct Script(Arc<Shared>);

pub(super) struct Shared {
    pub(super) digest: Mutex<String>,
    /// Of the preprocessing, or of the templates.
    pub(super) version: AtomicU32,
    pub(super) dtype: Mutex<Dtype>,
    /// Closed, it holds the stage at its one waiting point.
    pub(super) gate: watch::Sender<bool>,
    /// Answered in place of work.
    pub(super) fails: Mutex<Option<Status>>,
    /// Set, the stage neither says what it is nor moves.
    pub(super) hung: watch::Sender<bool>,
    /// What the decoder paints.
    pub(super) png: Mutex<Bytes>,
    /// What the stage tells of its load, at once to whoever watches it.
    pub(super) load: watch::Sender<Load>,
    /// Times that it was asked what it is.
    pub(super) asked: AtomicUsize,
    pub(super) calls: AtomicUsize,
    pub(super) running: AtomicUsize,
    /// Calls whose caller went away before their end.
    pub(super) cancelled: AtomicUsize,
    pub(super) metadata: Mutex<Vec<MetadataMap>>,
    pub(super) encoded: Mutex<Vec<Source>>,
    pub(super) starts: Mutex<Vec<LlmStart>>,
    pub(super) slots: Mutex<Vec<(u32, Tensor)>>,
    pub(super) decodes: Mutex<Vec<DecodeStart>>,
    pub(super) positive: Mutex<Vec<RegressedEmbeddings>>,
    pub(super) negative: Mutex<Vec<RegressedEmbeddings>>,
}

impl std::ops::Deref for Script {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Script {
    pub(super) fn new(digest: &str) -> Self {
        let shared = Shared {
            digest: Mutex::new(digest.into()),
            version: AtomicU32::new(1),
            dtype: Mutex::new(Dtype::F32),
            gate: watch::channel(true).0,
            fails: Mutex::default(),
            hung: watch::channel(false).0,
            png: Mutex::new(Bytes::from_static(PNG)),
            load: watch::Sender::default(),
            asked: AtomicUsize::new(0),
            calls: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            cancelled: AtomicUsize::new(0),
            metadata: Mutex::default(),
            encoded: Mutex::default(),
            starts: Mutex::default(),
            slots: Mutex::default(),
            decodes: Mutex::default(),
            positive: Mutex::default(),
            negative: Mutex::default(),
        };
        Self(Arc::new(shared))
    }

    pub(super) fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    pub(super) fn running(&self) -> usize {
        self.running.load(Ordering::SeqCst)
    }

    pub(super) fn hold(&self) {
        self.gate.send_replace(false);
    }

    pub(super) fn let_go(&self) {
        self.gate.send_replace(true);
    }

    /// Serves other weights from now on.
    pub(super) fn roll(&self, digest: &str) {
        *self.digest.lock().unwrap() = digest.into();
    }

    /// Reads pictures or prompts in another way from now on.
    pub(super) fn rewrite(&self, version: u32) {
        self.version.store(version, Ordering::SeqCst);
    }

    fn load(&self) -> Option<Load> {
        Some(*self.load.borrow())
    }

    fn watch_load(&self) -> Response<LoadStream> {
        Response::new(Box::pin(WatchStream::new(self.load.subscribe()).map(Ok)))
    }

    fn version(&self) -> u32 {
        self.version.load(Ordering::SeqCst)
    }

    /// Says so; what it makes stays as it is.
    pub(super) fn compute_in(&self, dtype: Dtype) {
        *self.dtype.lock().unwrap() = dtype;
    }

    fn dtype(&self) -> i32 {
        (*self.dtype.lock().unwrap()).into()
    }

    pub(super) fn fail(&self, status: Option<Status>) {
        *self.fails.lock().unwrap() = status;
    }

    fn digest(&self) -> String {
        self.digest.lock().unwrap().clone()
    }

    async fn gate(&self) {
        let _ = self.gate.subscribe().wait_for(|open| *open).await;
        self.hang().await;
    }

    async fn hang(&self) {
        let _ = self.hung.subscribe().wait_for(|hung| !hung).await;
    }

    /// Runs one call until it ends (`work` says whether with its result) or its caller leaves.
    fn respond<T, F, Work>(
        &self,
        metadata: &MetadataMap,
        work: F,
    ) -> Result<Response<ReceiverStream<T>>, Status>
    where
        T: Send + 'static,
        F: FnOnce(mpsc::Sender<T>) -> Work,
        Work: Future<Output = bool> + Send + 'static,
    {
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.metadata.lock().unwrap().push(metadata.clone());
        if let Some(status) = self.fails.lock().unwrap().clone() {
            return Err(status);
        }
        self.running.fetch_add(1, Ordering::SeqCst);
        let (sender, receiver) = mpsc::channel(1);
        let (work, script) = (work(sender.clone()), self.clone());
        tokio::spawn(async move {
            let whole = tokio::select! {
                whole = work => whole,
                () = sender.closed() => false,
            };
            script.cancelled.fetch_add(usize::from(!whole), Ordering::SeqCst);
            script.running.fetch_sub(1, Ordering::SeqCst);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// A stage on its own runtime, so that it can be killed with all its connections.
pub(super) struct Stage {
    pub(super) script: Script,
    pub(super) address: SocketAddr,
    runtime: Option<Runtime>,
}

#[derive(Clone, Copy)]
pub(super) enum Role {
    Encoder,
    Llm { instruct: bool },
    Decoder,
}

impl Stage {
    pub(super) fn start(role: Role, script: Script) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Self::start_on(listener, role, script)
    }

    pub(super) fn start_on(listener: std::net::TcpListener, role: Role, script: Script) -> Self {
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let served = script.clone();
        runtime.spawn(async move {
            let incoming = TcpIncoming::from(TcpListener::from_std(listener).unwrap());
            let mut server = Server::builder();
            let router = match role {
                Role::Encoder => server.add_service(VisualEncoderServer::new(MockEncoder(served))),
                Role::Llm { instruct } => {
                    server.add_service(LanguageModelServer::new(MockLlm(served, instruct)))
                }
                Role::Decoder => server.add_service(VisualDecoderServer::new(MockDecoder(served))),
            };
            router.serve_with_incoming(incoming).await.unwrap();
        });
        Self { script, address, runtime: Some(runtime) }
    }

    pub(super) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Ends the stage at once, its connections with it.
    pub(super) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.kill();
    }
}

impl std::ops::Deref for Stage {
    type Target = Script;

    fn deref(&self) -> &Script {
        &self.script
    }
}

/// Rows of one value each: the tensor of `content` under weights `digest`.
pub(super) fn tensor(digest: &str, content: &[u8], rows: u32) -> Tensor {
    let sum = digest
        .bytes()
        .chain(content.iter().copied())
        .fold(0_u32, |sum, byte| sum * 31 % 65_521 + u32::from(byte));
    let data: Vec<u8> = (0..rows * WIDTH).flat_map(|_| (sum as f32).to_le_bytes()).collect();
    Tensor { dtype: Dtype::F32.into(), shape: vec![rows, WIDTH], data: data.into() }
}
