//! Real redis-servers of a test's own.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use redis::{AsyncCommands, AsyncConnectionConfig, FromRedisValue, aio::MultiplexedConnection};
use tempfile::TempDir;

use super::sandbox::{PATIENCE, until};
use crate::config::{CacheConfig, RedisUrl};

pub(super) struct RedisServer {
    process: Child,
    pub(super) port: u16,
    args: Vec<String>,
    directory: TempDir,
}

impl RedisServer {
    /// None, with a line that says so, where there is no redis-server.
    pub(super) async fn start() -> Option<Self> {
        let server = Self::with(&[])?;
        server.answers().await;
        Some(server)
    }

    /// With more arguments, which may come to anything: not waited for.
    pub(super) fn with(args: &[&str]) -> Option<Self> {
        let given = ["--save", "", "--appendonly", "no"].iter().chain(args).map(|arg| (*arg).to_owned());
        Self::launch(given.collect())
    }

    /// A Sentinel with this configuration, which it will write to.
    pub(super) fn sentinel(configuration: &Path) -> Option<Self> {
        Self::launch(vec![configuration.display().to_string(), "--sentinel".to_owned()])
    }

    fn launch(mut args: Vec<String>) -> Option<Self> {
        let (port, directory) = (free_port(), tempfile::tempdir().unwrap());
        // Before the test's own, the last of which counts; a configuration file stands before all.
        let at = usize::from(args.first().is_some_and(|arg| !arg.starts_with("--")));
        let ours = ["--bind", "127.0.0.1", "--port", &port.to_string()].map(ToOwned::to_owned);
        args.splice(at..at, ours);
        let process = spawn(&args, &directory)?;
        Some(Self { process, port, args, directory })
    }

    pub(super) async fn answers(&self) {
        until("redis-server answers", || async { self.connect().await.is_some() }).await;
    }

    pub(super) fn cache(&self) -> CacheConfig {
        cache_at(self.port)
    }

    async fn connect(&self) -> Option<MultiplexedConnection> {
        let client = redis::Client::open(format!("redis://127.0.0.1:{}", self.port)).unwrap();
        // The crate's own half a second is too little on a busy machine.
        let patient = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(PATIENCE))
            .set_response_timeout(Some(PATIENCE));
        client.get_multiplexed_async_connection_with_config(&patient).await.ok()
    }

    /// What it says to a command, written as on a command line.
    pub(super) async fn ask<T: FromRedisValue>(&self, command: &str) -> T {
        question(command).query_async(&mut self.connect().await.unwrap()).await.unwrap()
    }

    /// Whether a command's answer holds these words; one that changes its role answers nobody for a moment.
    pub(super) async fn says(&self, command: &str, words: &str) -> bool {
        let Some(mut connection) = self.connect().await else { return false };
        let answer = question(command).query_async::<String>(&mut connection).await;
        answer.is_ok_and(|answer| answer.contains(words))
    }

    /// Values' keys; leases have others.
    pub(super) async fn keys(&self) -> Vec<String> {
        self.ask("KEYS emu2:embeddings:*").await
    }

    pub(super) async fn leases(&self) -> Vec<String> {
        self.ask("KEYS emu2:lease:*").await
    }

    /// Scripts run so far: each is one look, renewal, release or publication.
    pub(super) async fn scripts_run(&self) -> u64 {
        let stats: String = self.ask("INFO commandstats").await;
        let calls = stats.lines().find_map(|line| line.strip_prefix("cmdstat_eval:calls="));
        calls.map_or(0, |line| line.split(',').next().unwrap().parse().unwrap())
    }

    pub(super) async fn get(&self, key: &str) -> Vec<u8> {
        self.connect().await.unwrap().get(key).await.unwrap()
    }

    pub(super) async fn set(&self, key: &str, value: Vec<u8>) {
        self.connect().await.unwrap().set(key, value).await.unwrap()
    }

    pub(super) async fn ttl(&self, key: &str) -> Duration {
        let seconds: i64 = self.connect().await.unwrap().ttl(key).await.unwrap();
        Duration::from_secs(u64::try_from(seconds).expect("the key lives for a time"))
    }

    /// The only key, once it has been written.
    pub(super) async fn only_key(&self) -> String {
        until("a value is written", || async { self.keys().await.len() == 1 }).await;
        self.keys().await.remove(0)
    }

    /// Takes connections still, and answers nothing.
    pub(super) fn pause(&self) {
        self.signal("-STOP");
    }

    pub(super) fn resume(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.process.id().to_string()]).status();
        assert!(status.unwrap().success());
    }

    pub(super) fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// On the same port, with nothing in it.
    pub(super) async fn restart(&mut self) {
        self.kill();
        self.process = spawn(&self.args, &self.directory).unwrap();
        self.answers().await;
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
    }
}

fn question(command: &str) -> redis::Cmd {
    let mut words = command.split(' ');
    let mut question = redis::cmd(words.next().unwrap());
    words.for_each(|word| {
        question.arg(word);
    });
    question
}

fn spawn(args: &[String], directory: &TempDir) -> Option<Child> {
    let mut command = Command::new("redis-server");
    let child = command.args(args).current_dir(directory.path()).stdout(Stdio::null()).spawn();
    if child.is_err() {
        println!("skipped: redis-server is not in PATH");
    }
    child.ok()
}

/// A cache whose Redis is whatever listens there.
pub(super) fn cache_at(port: u16) -> CacheConfig {
    cache_of(format!("redis://127.0.0.1:{port}"))
}

pub(super) fn cache_of(url: impl Into<String>) -> CacheConfig {
    // Wide enough for a busy machine: a healthy Redis must not look slow here.
    CacheConfig { redis_url: Some(RedisUrl::new(url)), deadline_ms: 1_000, ..Default::default() }
}

/// A port that nobody listens on just now.
pub(super) fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
