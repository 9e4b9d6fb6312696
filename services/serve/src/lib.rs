//! How every service of the cluster starts, sheds load, reports and stops. It knows no model and no tensor.
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | defaults, then a TOML file, then `EMU2__…` environment; unknown keys refused; all mistakes at once |
//! | [`telemetry`] | logs, spans and their export; the guard that flushes them |
//! | [`trace`] | request ids and W3C trace context, in from a caller and out to the next service |
//! | [`server`] | [`server::Server`]: gRPC with health, reflection and the layers below, and the admin port |
//! | [`readiness`] | whether this replica wants work, as health checks and `/readyz` tell it |
//! | [`shutdown`] | SIGTERM and SIGINT as one token that everything watches |
//! | [`deadline`] | the caller's `grpc-timeout` as a budget that is handed down |
//! | [`stream`] | the response stream of an RPC: bounded, ended by its deadline, its work dropped when nobody listens |
//! | [`admission`] | permits for requests and their bytes: full is answered at once, never waited for unseen |
//! | [`tenant`] | API tokens, and the tenant that a caller's token is bound to |
//! | [`priority`] | classes of requests, and how a line of waiting work honours them |
//! | [`parameters`] | parameters of a request: defaults filled in, limits checked |
//! | [`message`] | what tonic says of bad or oversized messages, put in the API's terms |
//! | [`status`] | errors as `google.rpc.Status` with details |
//! | [`client`] | the channel that a caller inside the cluster opens |
//! | [`tls`] | certificates of servers and of their callers, read again when they change |
//! | [`metrics`] | names and buckets of the metrics that every service has |
//! | `methods` | what the contracts say of each RPC |
//! | `rpc` | the layer around every RPC: id, span, deadline, count, and the end of it all |
//! | `admin` | `/metrics`, `/healthz`, `/readyz` |
//! | `logs` | a log line as JSON |
//! | `connections` | the sockets of a server: accepted, counted, wrapped in TLS, closed when idle |
//! | `reload` | values of files that are replaced under a running process |
//!
//! A service is `config → telemetry → run(config, listeners, shutdown)`; see [`server`].

pub mod admission;
pub mod client;
pub mod config;
pub mod deadline;
pub mod message;
pub mod metrics;
pub mod parameters;
pub mod priority;
pub mod readiness;
pub mod server;
pub mod shutdown;
pub mod status;
pub mod stream;
pub mod telemetry;
pub mod tenant;
pub mod tls;
pub mod trace;

mod admin;
mod connections;
mod logs;
mod methods;
mod reload;
mod rpc;

#[cfg(test)]
mod tests;
