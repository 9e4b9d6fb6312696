//! The sockets of a server: accepted, counted, wrapped in TLS, and closed when they carry nothing. What HTTP/2 itself
//! bounds (streams, headers, windows, keepalive) is set in `server`.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use futures::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
    time::{Instant, Sleep, sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, rustls, server::TlsStream};
use tokio_util::{either::Either, task::AbortOnDropHandle};
use tonic::transport::server::Connected;

use crate::{reload::Reloaded, server::ServerConfig};

/// Bytes of HTTP/2's client preface and the smallest SETTINGS frame: nothing legitimate sends less.
const PREFACE_BYTES: usize = 24 + 9;
/// Most connections on their way from the handshake to the server.
const WAITING: usize = 16;
/// Pause after an error of `accept` such as too many open files: without it the loop would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

type Tls = Option<Reloaded<rustls::ServerConfig>>;

/// How long one connection may take to begin, and how long it may carry nothing.
#[derive(Clone, Copy, Debug)]
struct Timeouts {
    handshake: Duration,
    idle: Duration,
}

/// The connections that a server has accepted, as a stream. Dropping it closes the listener.
pub(crate) struct Connections {
    ready: mpsc::Receiver<Connection>,
    _accepting: AbortOnDropHandle<()>,
}

impl Connections {
    pub(crate) fn accept(listener: TcpListener, config: &ServerConfig, tls: Tls) -> Self {
        let (sender, ready) = mpsc::channel(WAITING);
        let timeouts = Timeouts {
            handshake: Duration::from_millis(config.handshake_ms),
            idle: Duration::from_millis(config.idle_ms),
        };
        let places = Arc::new(Semaphore::new(config.max_connections));
        let accepting = tokio::spawn(accept(listener, places, timeouts, tls, sender));
        Self { ready, _accepting: AbortOnDropHandle::new(accepting) }
    }
}

impl Stream for Connections {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.ready.poll_recv(context).map(|connection| connection.map(Ok))
    }
}

async fn accept(
    listener: TcpListener,
    places: Arc<Semaphore>,
    timeouts: Timeouts,
    tls: Tls,
    ready: mpsc::Sender<Connection>,
) {
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.try_join_next().is_some() {}
        let (socket, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection cannot be accepted");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // One over the limit is closed at once: its caller can go elsewhere.
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            tracing::debug!(%peer, "closed a connection beyond server.max_connections");
            continue;
        };
        let config = tls.as_ref().map(Reloaded::get);
        let ready = ready.clone();
        handshakes.spawn(async move {
            match timeout(timeouts.handshake, secure(socket, config)).await {
                Ok(Ok(io)) => {
                    // Nobody to hand it to: the server is going.
                    let _ = ready.send(Connection::new(io, place, timeouts)).await;
                }
                Ok(Err(error)) => tracing::debug!(%peer, %error, "a handshake failed"),
                Err(_) => tracing::debug!(%peer, "a handshake took longer than server.handshake_ms"),
            }
        });
    }
}

type Io = Either<TcpStream, TlsStream<TcpStream>>;

async fn secure(socket: TcpStream, config: Option<Arc<rustls::ServerConfig>>) -> io::Result<Io> {
    socket.set_nodelay(true)?;
    Ok(match config {
        None => Either::Left(socket),
        Some(config) => Either::Right(TlsAcceptor::from(config).accept(socket).await?),
    })
}

/// One caller's connection. It ends by itself when its caller does not get through HTTP/2's preface in time, or when
/// it has carried no call for as long as `server.idle_ms`.
pub(crate) struct Connection {
    io: Io,
    timeouts: Timeouts,
    activity: Activity,
    read_bytes: usize,
    /// Fires when it is time to look again at what the connection carries.
    look: Pin<Box<Sleep>>,
    given_up: bool,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    fn new(io: Io, place: OwnedSemaphorePermit, timeouts: Timeouts) -> Self {
        Self {
            io,
            timeouts,
            activity: Activity::default(),
            read_bytes: 0,
            look: Box::pin(sleep(timeouts.handshake)),
            given_up: false,
            _place: place,
        }
    }

    /// Returns whether the connection has been of no use for too long; looks at it once in a while.
    fn is_useless(&mut self, context: &mut Context<'_>) -> bool {
        while !self.given_up && self.look.as_mut().poll(context).is_ready() {
            let idle = self.activity.idle();
            if self.read_bytes < PREFACE_BYTES || idle >= self.timeouts.idle {
                self.given_up = true;
            } else {
                self.look.as_mut().reset(Instant::now() + self.timeouts.idle - idle);
            }
        }
        self.given_up
    }
}

impl AsyncRead for Connection {
    /// Reads, and says "end of file" of a useless connection, so that HTTP/2 closes it as if its caller had.
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_useless(context) {
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.io).poll_read(context, buffer);
        self.read_bytes = self.read_bytes.saturating_add(buffer.filled().len() - before);
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

impl Connected for Connection {
    type ConnectInfo = Activity;

    /// Returns the connection's activity, which tonic puts into every request that comes this way.
    fn connect_info(&self) -> Activity {
        self.activity.clone()
    }
}

/// How many calls a connection carries, and since when it carries none. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Activity(Arc<Mutex<Calls>>);

#[derive(Debug)]
struct Calls {
    running: usize,
    /// When the last call ended, or the connection began.
    last: Instant,
}

impl Default for Activity {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Calls { running: 0, last: Instant::now() })))
    }
}

impl Activity {
    /// Counts a call until the guard is dropped.
    pub(crate) fn call(&self) -> Call {
        self.lock().running += 1;
        Call(self.clone())
    }

    /// Returns for how long there has been no call.
    fn idle(&self) -> Duration {
        let calls = self.lock();
        if calls.running > 0 { Duration::ZERO } else { calls.last.elapsed() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Calls> {
        self.0.lock().expect("nobody panics while counting")
    }
}

/// The guard of one call of a connection, which counts until it is dropped.
#[derive(Debug)]
pub(crate) struct Call(Activity);

impl Drop for Call {
    fn drop(&mut self) {
        let mut calls = self.0.lock();
        calls.running -= 1;
        calls.last = Instant::now();
    }
}
