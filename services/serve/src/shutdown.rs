//! The end of a process as one token: begun once, watched by everything.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Cloning shares the token.
#[derive(Clone, Debug, Default)]
pub struct Shutdown(CancellationToken);

impl Shutdown {
    pub fn new() -> Self {
        Self::default()
    }

    /// Begins on SIGTERM or SIGINT; a second one ends the process at once. Needs a tokio runtime.
    pub fn on_signals() -> Self {
        let shutdown = Self::new();
        let begun = shutdown.clone();
        let mut terminate = signal(SignalKind::terminate()).expect("SIGTERM can be handled");
        let mut interrupt = signal(SignalKind::interrupt()).expect("SIGINT can be handled");
        tokio::spawn(async move {
            let mut next = async || {
                tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                }
            };
            let name = next().await;
            tracing::info!(signal = name, "shutting down");
            begun.begin();
            let name = next().await;
            tracing::warn!(signal = name, "second signal: not waiting for running requests");
            std::process::exit(1);
        });
        shutdown
    }

    pub fn begin(&self) {
        self.0.cancel();
    }

    pub fn is_begun(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Returns once shutdown has begun; at once when it already has.
    pub async fn begun(&self) {
        self.0.cancelled().await;
    }
}
