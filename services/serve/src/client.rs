//! The channel that a caller inside the cluster opens: the counterpart of [`crate::server`]'s settings.

use std::time::Duration;

use tonic::transport::{Endpoint, Error};

/// One large embedding message fits without waiting for a window update.
pub(crate) const STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// Shared by all streams of a connection: large, because a few streams whose reader is slow must not starve the rest.
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// A peer that vanished without closing is noticed after interval plus timeout.
pub(crate) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
pub(crate) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// An endpoint (`http://host:port`) with the cluster's window sizes, keepalive and connect timeout; call
/// `connect_lazy()` on it, and give clients the message limits of the configuration.
pub fn endpoint(uri: impl Into<String>) -> Result<Endpoint, Error> {
    Ok(Endpoint::from_shared(uri.into())?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}
