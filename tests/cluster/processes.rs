//! A cluster of real processes: the four service binaries with their configuration files on loopback ports.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, ExitStatus, Stdio},
    time::Duration,
};

use emu2_bench::processes::free_address;
use emu2_nn::golden;
use tonic::transport::Endpoint;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::support::{admin_page, binary};

/// One running service; killed when dropped.
pub(crate) struct Process {
    child: Child,
    pub(crate) addr: SocketAddr,
    admin: SocketAddr,
    /// What it writes to standard error.
    errors: PathBuf,
}

/// Router, encoders, llms and decoders of the tiny Emu2-Gen.
pub(crate) struct Processes {
    pub(crate) router: Process,
    /// Encoders first, then llms, then decoders.
    pub(crate) stages: Vec<Process>,
    _dir: tempfile::TempDir,
}

impl Processes {
    /// One of each; `extra` is added to every service's TOML.
    pub(crate) async fn start(extra: &str) -> Self {
        Self::replicated(1, extra, "").await
    }

    /// So many replicas of each stage; `routing` is added to the router's TOML alone.
    pub(crate) async fn replicated(replicas: usize, extra: &str, routing: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model_dir = golden::model_dir("emu2-gen");
        let config = format!("model_dir = {model_dir:?}\ncores = 1\n{extra}");
        let stages: Vec<_> = ["emu2-encoder", "emu2-llm", "emu2-decoder"]
            .into_iter()
            .flat_map(|name| std::iter::repeat_n(name, replicas))
            .map(|name| Process::start(dir.path(), name, &config))
            .collect();
        let endpoints: Vec<_> = stages
            .chunks(replicas)
            .map(|pool| pool.iter().map(|stage| format!("http://{}", stage.addr)).collect::<Vec<_>>())
            .collect();
        let models = format!(
            "\n[[models]]\nname = \"emu2-gen\"\nencoder = {:?}\nllm = {:?}\ndecoder = {:?}\n",
            endpoints[0], endpoints[1], endpoints[2]
        );
        let router = Process::start(dir.path(), "emu2-router", &format!("{extra}{routing}{models}"));
        let processes = Self { router, stages, _dir: dir };
        for process in processes.stages.iter().chain([&processes.router]) {
            process.serving().await;
        }
        processes
    }
}

impl Process {
    pub(crate) fn start(dir: &Path, name: &str, config: &str) -> Self {
        let (addr, admin) = (free_address(), free_address());
        let file = dir.join(format!("{name}-{}.toml", addr.port()));
        // Tables come last in TOML.
        let (keys, tables) =
            config.split_once("\n[").map_or((config, String::new()), |(k, t)| (k, format!("\n[{t}")));
        let server = format!("\n[server]\nlisten = \"{addr}\"\nadmin = \"{admin}\"\n");
        fs::write(&file, format!("{keys}{server}{tables}")).unwrap();
        let errors = dir.join(format!("{name}-{}.errors", addr.port()));
        let mut command = binary(name);
        command.arg("--config").arg(&file).stdout(Stdio::null()).stderr(fs::File::create(&errors).unwrap());
        Self { child: command.spawn().unwrap(), addr, admin, errors }
    }

    /// Waits until its health says SERVING.
    pub(crate) async fn serving(&self) {
        for _ in 0..600 {
            if self.health().await == Some(ServingStatus::Serving) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("the service at {} is not ready after a minute", self.addr);
    }

    /// None while it does not listen.
    pub(crate) async fn health(&self) -> Option<ServingStatus> {
        let channel = Endpoint::from_shared(format!("http://{}", self.addr)).unwrap().connect().await.ok()?;
        let health = HealthClient::new(channel).check(HealthCheckRequest::default()).await.ok()?.into_inner();
        Some(health.status())
    }

    pub(crate) fn errors(&self) -> String {
        fs::read_to_string(&self.errors).unwrap()
    }

    /// A gauge or counter by its name with its labels, if it has any; 0 while it is not told.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let answer = admin_page(self.admin, "/metrics").await;
        let value = answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.trim().parse().unwrap())
    }

    pub(crate) fn terminate(&self) {
        self.signal("TERM");
    }

    /// At once, as a machine that fails.
    pub(crate) fn kill(&self) {
        self.signal("KILL");
    }

    /// It keeps its connections and answers nothing.
    pub(crate) fn pause(&self) {
        self.signal("STOP");
    }

    pub(crate) fn wake(&self) {
        self.signal("CONT");
    }

    fn signal(&self, signal: &str) {
        let sent = std::process::Command::new("kill")
            .args([&format!("-{signal}"), &self.child.id().to_string()])
            .status();
        assert!(sent.unwrap().success());
    }

    /// Waits for the process to end by itself.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        for _ in 0..600 {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the service at {} did not end", self.addr);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Only fails when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
