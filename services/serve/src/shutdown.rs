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
            // Whoever asks a second time wants the process gone, whatever is left of it.
            #[expect(
                clippy::disallowed_methods,
                reason = "nothing is to be waited for, destructors included"
            )]
            std::process::exit(1);
        });
        shutdown
    }

    /// Begins with this one, and may begin alone: the end of one service among several in a process.
    #[must_use]
    pub fn child(&self) -> Self {
        Self(self.0.child_token())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sigterm_begins_it() {
        let shutdown = Shutdown::on_signals();
        assert!(!shutdown.is_begun());
        let own_process = std::process::id().to_string();
        std::process::Command::new("kill").args(["-TERM", &own_process]).status().unwrap();
        shutdown.begun().await;
    }

    #[test]
    fn a_child_begins_alone_or_with_its_parent() {
        let parent = Shutdown::new();
        let (alone, with_parent) = (parent.child(), parent.child());
        alone.begin();
        assert!(!parent.is_begun() && !with_parent.is_begun());
        parent.begin();
        assert!(with_parent.is_begun());
    }
}
