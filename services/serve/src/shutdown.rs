//! The end of a process as one token that is set once and watched by everything.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The end of a process, or of one service in it, which begins once. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Shutdown(CancellationToken);

impl Shutdown {
    /// Returns a shutdown that begins when [`Shutdown::begin`] is called.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns a shutdown that begins on SIGTERM or SIGINT; a second signal ends the process at once. It needs a tokio
    /// runtime, and panics where signals cannot be handled.
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

    /// Returns a shutdown that begins with this one, and may begin alone: the end of one service among several in a
    /// process.
    #[must_use]
    pub(crate) fn child(&self) -> Self {
        Self(self.0.child_token())
    }

    /// Begins the shutdown; once it has begun, this changes nothing.
    pub fn begin(&self) {
        self.0.cancel();
    }

    /// Returns whether the shutdown has begun.
    pub fn is_begun(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Waits until the shutdown has begun.
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
