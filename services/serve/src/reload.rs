//! Values out of files that are replaced under a running process: mounted secrets and certificates.
//!
//! Files are read again every second and compared by content: Kubernetes swaps symlinks, others rename or overwrite,
//! and what is meant by "modified" differs. New content that cannot be used leaves the old value in force.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use tokio::{sync::watch, time::MissedTickBehavior};
use tokio_util::task::AbortOnDropHandle;

/// Time between two looks at the files. Kubernetes itself takes up to a minute to bring a new secret, and reading a few
/// kilobytes costs nothing.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// A value that is read out of files, and read again when they change.
#[derive(Debug)]
pub(crate) struct Reloaded<T> {
    current: watch::Receiver<Arc<T>>,
    _poll: Option<AbortOnDropHandle<()>>,
}

impl<T: Send + Sync + 'static> Reloaded<T> {
    /// Returns a value that never changes.
    pub(crate) fn fixed(value: T) -> Self {
        Self { current: watch::Sender::new(Arc::new(value)).subscribe(), _poll: None }
    }

    /// Reads the files now, which must work, and again for as long as the value is held. `parse` gets their contents
    /// in order; its errors are logged, so they must not quote what may be secret.
    pub(crate) fn open<F>(files: Vec<PathBuf>, parse: F) -> anyhow::Result<Self>
    where
        F: Fn(&[Vec<u8>]) -> anyhow::Result<T> + Send + 'static,
    {
        let contents = read(&files)?;
        let (sender, current) = watch::channel(Arc::new(parse(&contents)?));
        let poll = tokio::spawn(poll(files, contents, parse, sender));
        Ok(Self { current, _poll: Some(AbortOnDropHandle::new(poll)) })
    }

    /// Returns the value in force.
    pub(crate) fn get(&self) -> Arc<T> {
        Arc::clone(&self.current.borrow())
    }
}

async fn poll<T, F>(files: Vec<PathBuf>, mut contents: Vec<Vec<u8>>, parse: F, sender: watch::Sender<Arc<T>>)
where
    F: Fn(&[Vec<u8>]) -> anyhow::Result<T>,
{
    let mut ticks = tokio::time::interval(POLL_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut missing = false;
    loop {
        ticks.tick().await;
        // A few kilobytes of a local file system: not worth a thread.
        let read = match read(&files) {
            Ok(read) => read,
            Err(error) => {
                // Once: between two files of a swap, or for as long as someone has taken them away.
                if !std::mem::replace(&mut missing, true) {
                    tracing::warn!(
                        error = format!("{error:#}"),
                        "the files in force are gone, they stay in force"
                    );
                }
                continue;
            }
        };
        missing = false;
        if read == contents {
            continue;
        }
        match parse(&read) {
            Ok(value) => {
                tracing::info!(?files, "new files are in force");
                sender.send_replace(Arc::new(value));
            }
            // A certificate whose key has not come yet is one of these, for a moment.
            Err(error) => {
                tracing::warn!(
                    ?files,
                    error = format!("{error:#}"),
                    "new files cannot be used, the old stay in force"
                );
            }
        }
        contents = read;
    }
}

fn read(files: &[PathBuf]) -> anyhow::Result<Vec<Vec<u8>>> {
    let read = |file: &PathBuf| std::fs::read(file).with_context(|| unreadable(file));
    files.iter().map(read).collect()
}

fn unreadable(file: &Path) -> String {
    format!("{} cannot be read", file.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(contents: &[Vec<u8>]) -> anyhow::Result<u32> {
        Ok(String::from_utf8(contents.concat())?.parse()?)
    }

    #[tokio::test(start_paused = true)]
    async fn new_content_comes_into_force_and_unusable_content_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("number");
        let settled = async || tokio::time::sleep(POLL_INTERVAL * 2).await;
        std::fs::write(&file, "1").unwrap();
        let value = Reloaded::open(vec![file.clone()], number).unwrap();
        assert_eq!(*value.get(), 1);

        std::fs::write(&file, "2").unwrap();
        settled().await;
        assert_eq!(*value.get(), 2);

        for unusable in ["two", ""] {
            std::fs::write(&file, unusable).unwrap();
            settled().await;
            assert_eq!(*value.get(), 2);
        }
        std::fs::remove_file(&file).unwrap();
        settled().await;
        assert_eq!(*value.get(), 2);

        // As Kubernetes does it: another file under the same name.
        std::fs::write(folder.path().join("next"), "3").unwrap();
        std::fs::rename(folder.path().join("next"), &file).unwrap();
        settled().await;
        assert_eq!(*value.get(), 3);
    }

    #[tokio::test]
    async fn a_file_that_is_missing_or_unusable_at_the_start_is_an_error() {
        let error = Reloaded::open(vec!["/nowhere/number".into()], number).unwrap_err();
        assert!(error.to_string().contains("/nowhere/number"), "{error:#}");
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(Reloaded::open(vec![file.path().into()], number).is_err());
    }
}
