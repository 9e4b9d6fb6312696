//! A real redis-server of a test's own.

use std::{
    process::{Child, Command, Stdio},
    time::Duration,
};

use redis::{AsyncCommands, aio::MultiplexedConnection};

use super::sandbox::until;
use crate::config::{CacheConfig, RedisUrl};

pub(super) struct RedisServer {
    process: Child,
    port: u16,
}

impl RedisServer {
    /// None, with a line that says so, where there is no redis-server.
    pub(super) async fn start() -> Option<Self> {
        let port = free_port();
        let mut command = Command::new("redis-server");
        command.args([
            "--port",
            &port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        ]);
        let Ok(process) = command.stdout(Stdio::null()).spawn() else {
            println!("skipped: redis-server is not in PATH");
            return None;
        };
        let server = Self { process, port };
        until("redis-server answers", || async { server.connect().await.is_some() }).await;
        Some(server)
    }

    pub(super) fn cache(&self) -> CacheConfig {
        cache_at(self.port)
    }

    async fn connect(&self) -> Option<MultiplexedConnection> {
        let client = redis::Client::open(format!("redis://127.0.0.1:{}", self.port)).unwrap();
        client.get_multiplexed_async_connection().await.ok()
    }

    pub(super) async fn keys(&self) -> Vec<String> {
        self.connect().await.unwrap().keys("*").await.unwrap()
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
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A cache whose Redis is whatever listens there.
pub(super) fn cache_at(port: u16) -> CacheConfig {
    let redis_url = Some(RedisUrl::new(format!("redis://127.0.0.1:{port}")));
    // Wide enough for a busy machine: a healthy Redis must not look slow here.
    CacheConfig { redis_url, deadline_ms: 1_000, ..Default::default() }
}

/// A port that nobody listens on just now.
pub(super) fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
