//! Progress bars of the stages that load in a cluster of this process. Where standard error is no terminal, the
//! stages' own log lines tell.

use std::{
    io::{self, IsTerminal, Write},
    net::SocketAddr,
    time::Duration,
};

use emu2_standalone::cluster::StageEndpoint;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Time between two looks at a stage's readiness page.
const REFRESH: Duration = Duration::from_millis(200);
/// Bytes of a readiness page that are read at most; a page has some dozens.
const MAX_PAGE_BYTES: u64 = 4096;

/// The bars of all stages, and a writer for log lines between them. Clones share the terminal.
#[derive(Clone, Debug)]
pub(crate) struct Bars(MultiProgress);

impl Bars {
    /// Returns bars on standard error; hidden where that is no terminal.
    pub(crate) fn on_standard_error() -> Self {
        let target = if io::stderr().is_terminal() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        Self(MultiProgress::with_draw_target(target))
    }

    /// Shows how far these stages are by their readiness pages, until dropped.
    pub(crate) async fn follow(&self, stages: &[StageEndpoint]) {
        if self.0.is_hidden() {
            return std::future::pending().await;
        }
        let mut bars: Vec<Bar> = Vec::new();
        for stage in stages {
            // An encoder that models share is one service.
            let Some(admin) = stage.admin.filter(|admin| bars.iter().all(|bar| bar.admin != *admin)) else {
                continue;
            };
            let bar = self.0.add(bar(format!("{} {}", stage.model, stage.stage)));
            bars.push(Bar { admin, bar });
        }
        loop {
            for Bar { admin, bar } in &bars {
                match readiness(*admin).await {
                    Some(page) => show(bar, &page),
                    // Its end is reported by whoever runs it.
                    None => bar.finish_and_clear(),
                }
            }
            tokio::time::sleep(REFRESH).await;
        }
    }
}

/// The bar of one stage; dropping it removes it from the terminal.
struct Bar {
    admin: SocketAddr,
    bar: ProgressBar,
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Log lines on standard error; bars make room for them.
impl Write for Bars {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

fn bar(name: String) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:>20} {bar:40} {pos:>3} % {msg}");
    let bar = ProgressBar::new(100).with_prefix(name);
    bar.with_style(style.expect("the template is well formed"))
}

fn show(bar: &ProgressBar, page: &str) {
    match percent(page) {
        Some(percent) => {
            bar.set_message("");
            bar.set_position(percent);
        }
        None if page.starts_with("ready") => bar.finish_and_clear(),
        None => bar.set_message(page.trim_end().to_owned()),
    }
}

/// Returns the percentage of a page such as "not ready: loading 42 %".
fn percent(page: &str) -> Option<u64> {
    page.trim_end().strip_prefix("not ready: loading ")?.strip_suffix(" %")?.parse().ok()
}

/// Returns the readiness page of an admin port of this process; none when it does not answer.
async fn readiness(admin: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect(admin).await.ok()?;
    stream.write_all(b"GET /readyz HTTP/1.0\r\n\r\n").await.ok()?;
    let mut answer = String::new();
    stream.take(MAX_PAGE_BYTES).read_to_string(&mut answer).await.ok()?;
    answer.split_once("\r\n\r\n").map(|(_, page)| page.to_owned())
}

#[cfg(test)]
mod tests {
    use emu2_serve::server::{Listeners, Server, ServerConfig};
    use emu2_serve::shutdown::Shutdown;

    use super::*;

    #[tokio::test]
    async fn a_bar_follows_the_readiness_page() {
        let config = ServerConfig::default();
        let listeners = Listeners::bind(&config).await.unwrap();
        let admin = listeners.admin_addr().unwrap();
        let server = Server::new("probe", &config, listeners);
        let (readiness, shutdown) = (server.readiness(), Shutdown::new());
        let served = tokio::spawn(server.run(shutdown.clone()));
        let bar = bar("emu2 llm".to_owned());
        let look = async || show(&bar, &super::readiness(admin).await.unwrap());
        look().await;
        assert_eq!((bar.position(), bar.message().as_str()), (0, "not ready: starting"));
        readiness.loading(42);
        look().await;
        assert_eq!((bar.position(), bar.message().as_str(), bar.is_finished()), (42, "", false));
        readiness.ready();
        look().await;
        assert!(bar.is_finished());
        shutdown.begin();
        served.await.unwrap().unwrap();
        assert_eq!(super::readiness(admin).await, None);
    }
}
