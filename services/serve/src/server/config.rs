//! Part `server` of every configuration.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::{config::Validate, tls::TlsConfig};

/// The admin port's distance from the gRPC port, by default.
const ADMIN_PORT_OFFSET: u16 = 1_000;

/// Part `server` of every configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Address of the gRPC port. It is on loopback unless configured; elsewhere `tls.mode` must be stated.
    pub listen: SocketAddr,
    /// Part `server.tls`: the server's certificate, and whether callers must show one.
    pub tls: TlsConfig,
    /// Address of the admin port: plain HTTP with /metrics, /healthz and /readyz. Without one there is no such port.
    pub admin: Option<SocketAddr>,
    /// Whether gRPC reflection tells the API to whoever may call.
    pub reflection: bool,
    /// Bytes of the largest message, in or out: a request of many photographs fits; buffers are bounded by it.
    pub max_message_bytes: usize,
    /// Requests that may run at a time; one more is refused at once, before its message is read.
    pub max_requests: usize,
    /// Bytes of requests that may be held at a time, over all of them: `max_requests` of the largest messages would be
    /// more than a machine has. Streams of messages are read one message at a time and are not counted. What a service
    /// fetches for a request counts as far as it says so ([`crate::admission::MemoryReservation`]).
    pub max_held_bytes: usize,
    /// Connections that may be open at a time; one more is closed at once. 1,024: hundreds of clients or routers, and
    /// tens of megabytes.
    pub max_connections: usize,
    /// Milliseconds for TLS, and again for the first bytes of HTTP/2.
    pub handshake_ms: u64,
    /// Milliseconds after which a connection that carries no call is closed. Five minutes: pooled clients connect anew
    /// at the next call.
    pub idle_ms: u64,
    /// Milliseconds in which a request of one message must have come in whole: the largest at 5 Mbit/s.
    pub receive_ms: u64,
    /// Milliseconds that a caller may leave one event of its answer unread before its work is dropped. 60,000: over any
    /// pause of a client that lives.
    pub stalled_ms: u64,
    /// Milliseconds that running requests may go on after SIGTERM; less than Kubernetes' termination grace period.
    pub shutdown_grace_ms: u64,
}

impl ServerConfig {
    /// Returns the defaults, with gRPC on this loopback port and the admin port 1000 above it (0 stays 0: any free
    /// port).
    pub fn on_port(port: u16) -> Self {
        let admin_port = if port == 0 { 0 } else { port.saturating_add(ADMIN_PORT_OFFSET) };
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], port)),
            admin: Some(SocketAddr::from(([127, 0, 0, 1], admin_port))),
            tls: TlsConfig::default(),
            reflection: true,
            max_message_bytes: 64 << 20,
            max_requests: 256,
            max_held_bytes: 1 << 30,
            max_connections: 1024,
            handshake_ms: 10_000,
            idle_ms: 300_000,
            receive_ms: 120_000,
            stalled_ms: 60_000,
            shutdown_grace_ms: 30_000,
        }
    }
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self::on_port(0)
    }
}

impl Validate for ServerConfig {
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut range = |key, min: u64, max: u64, value: u64| {
            if !(min..=max).contains(&value) {
                problems.push(format!("server.{key} must be {min} to {max}, got {value}"));
            }
        };
        range("max_message_bytes", 1 << 10, 1 << 30, self.max_message_bytes as u64);
        range("max_requests", 1, 65_536, self.max_requests as u64);
        range("max_held_bytes", self.max_message_bytes as u64, 1 << 40, self.max_held_bytes as u64);
        range("max_connections", 1, 65_536, self.max_connections as u64);
        for (key, value) in [
            ("handshake_ms", self.handshake_ms),
            ("idle_ms", self.idle_ms),
            ("receive_ms", self.receive_ms),
            ("stalled_ms", self.stalled_ms),
        ] {
            range(key, 1, 86_400_000, value);
        }
        range("shutdown_grace_ms", 0, 3_600_000, self.shutdown_grace_ms);
        problems.extend(self.tls.problems(self.listen.ip().is_loopback()));
        if self.admin == Some(self.listen) && self.listen.port() != 0 {
            problems.push(format!("server.admin must not be server.listen, got {}", self.listen));
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mistake_in_a_configuration_is_told() {
        assert!(ServerConfig::default().problems().is_empty());
        let same = "127.0.0.1:50051".parse().unwrap();
        let bad = ServerConfig {
            listen: same,
            admin: Some(same),
            max_message_bytes: 0,
            max_requests: 0,
            shutdown_grace_ms: u64::MAX,
            ..ServerConfig::default()
        };
        assert_eq!(bad.problems().len(), 4, "{:?}", bad.problems());
    }
}
