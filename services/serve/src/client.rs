//! The channel that a caller inside the cluster opens, with the counterparts of the settings of [`crate::server`].

use std::{sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{self, pki_types::ServerName},
};
use tonic::{
    codegen::http::Uri,
    transport::{Channel, Endpoint, Error},
};

use crate::{reload::Reloaded, tls::ClientTlsConfig};

/// Flow-control window of one stream: a large embedding message fits without waiting for an update.
pub(crate) const STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// Flow-control window that all streams of a connection share: large, because a few streams whose reader is slow must
/// not starve the rest.
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// Largest frame: one image's embeddings travel in one (HTTP/2's own default would cut them into 15, each written on
/// its own).
pub(crate) const FRAME_BYTES: u32 = 256 << 10;
/// Time between two keepalive pings. A peer that vanished without closing is noticed after interval plus timeout.
pub(crate) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Longest wait for the answer to a keepalive ping.
pub(crate) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Returns an endpoint for `http://host:port` or `https://…` with the cluster's window and frame sizes, keepalive and
/// connect timeout (3 s). For `http` call `connect_lazy()` on it; a [`Connector`] serves both. Clients need the message
/// limits of the configuration besides. Fails on what is no URI.
pub fn endpoint(uri: impl Into<String>) -> Result<Endpoint, Error> {
    Ok(Endpoint::from_shared(uri.into())?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// A connector opens channels, in the clear to `http://` and over TLS to `https://`. Clones share its certificates. The
/// default knows no CA, so it opens no channel over TLS.
#[derive(Clone, Debug, Default)]
pub struct Connector {
    tls: Option<Arc<Tls>>,
}

#[derive(Debug)]
struct Tls {
    config: Reloaded<rustls::ClientConfig>,
    server_name: Option<ServerName<'static>>,
}

impl Connector {
    /// Reads the files of a caller's TLS, now and again whenever they change. Fails on files that cannot be read or do
    /// not belong together, and on a server name that is neither a DNS name nor an address.
    pub fn open(config: &ClientTlsConfig) -> anyhow::Result<Self> {
        let server_name = config.server_name.clone().map(ServerName::try_from).transpose()?;
        let tls = config.open()?.map(|config| Arc::new(Tls { config, server_name }));
        Ok(Self { tls })
    }

    /// Returns a channel that connects when it is first used, and again whenever the connection is lost. Fails on what
    /// is no URI, and on `https://` without a CA.
    pub fn channel(&self, uri: &str) -> anyhow::Result<Channel> {
        let endpoint = endpoint(uri)?;
        Ok(match self.tls_of(&endpoint)? {
            None => endpoint.connect_lazy(),
            Some(tls) => {
                let dial = tower::service_fn(move |uri: Uri| dial(uri, Arc::clone(&tls)));
                endpoint.connect_with_connector_lazy(dial)
            }
        })
    }

    /// Returns a channel as [`Connector::channel`] does, with the first connection made now; fails where it cannot be
    /// made.
    pub async fn connect(&self, uri: &str) -> anyhow::Result<Channel> {
        let endpoint = endpoint(uri)?;
        Ok(match self.tls_of(&endpoint)? {
            None => endpoint.connect().await?,
            Some(tls) => {
                let dial = tower::service_fn(move |uri: Uri| dial(uri, Arc::clone(&tls)));
                endpoint.connect_with_connector(dial).await?
            }
        })
    }

    fn tls_of(&self, endpoint: &Endpoint) -> anyhow::Result<Option<Arc<Tls>>> {
        if endpoint.uri().scheme_str() != Some("https") {
            return Ok(None);
        }
        let missing = || format!("{} needs TLS, and no CA is configured", endpoint.uri());
        self.tls.clone().with_context(missing).map(Some)
    }
}

/// Connects over TLS with the files as they are at this moment.
async fn dial(uri: Uri, tls: Arc<Tls>) -> anyhow::Result<TokioIo<TlsStream<TcpStream>>> {
    let host = uri.host().context("an endpoint without a host")?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let port = uri.port_u16().unwrap_or(443);
    let name = match &tls.server_name {
        Some(name) => name.clone(),
        None => ServerName::try_from(host.to_owned())?,
    };
    let socket = TcpStream::connect((host, port)).await?;
    socket.set_nodelay(true)?;
    let connector = TlsConnector::from(tls.config.get());
    let stream = connector.connect(name, socket).await;
    let stream = stream.with_context(|| format!("no TLS with {uri}"))?;
    ensure!(stream.get_ref().1.alpn_protocol() == Some(b"h2"), "{uri} does not speak HTTP/2 over TLS");
    Ok(TokioIo::new(stream))
}
