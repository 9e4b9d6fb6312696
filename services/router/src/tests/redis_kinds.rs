//! Every kind of Redis that a URL can name, each as real processes: what one router writes, another finds.

use std::path::PathBuf;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio::net::TcpStream;

use super::{
    redis_server::{RedisServer, cache_of, free_port},
    sandbox::{Router, Sandbox, until},
};
use crate::config::CacheConfig;

/// Two routers of one cache: what the first encodes, the second finds.
async fn is_shared(cache: CacheConfig) -> (Sandbox, Router) {
    // Without memory, so that every request asks Redis.
    let cache = CacheConfig { memory_bytes: 0, ..cache };
    let sandbox = Sandbox::with(|config| config.cache = cache.clone()).await;
    let other = sandbox.another_router(|config| config.cache = cache).await;
    for router in [&sandbox.router, &other] {
        is_used(router).await;
    }
    is_found(&sandbox, &other, b"cat").await;
    (sandbox, other)
}

/// Not at once: a request does not wait for long until Redis is connected.
async fn is_used(router: &Router) {
    until("Redis is used", || async {
        router.embed(b"first").await.unwrap();
        router.lookups("l2_hit").await > 0
    })
    .await;
}

async fn is_found(sandbox: &Sandbox, other: &Router, picture: &'static [u8]) {
    let before = sandbox.encoder.calls();
    sandbox.embed(picture).await.unwrap();
    // The lease stands until the value does, so it is waited for, if need be.
    other.embed(picture).await.unwrap();
    assert_eq!(sandbox.encoder.calls(), before + 1);
}

async fn is_bypassed(cache: CacheConfig) {
    let cache = CacheConfig { deadline_ms: 100, ..cache };
    let sandbox = Sandbox::with(|config| config.cache = cache).await;
    assert!(!sandbox.embed(b"cat").await.unwrap().cached);
    assert_eq!(sandbox.router.lookups("bypassed").await, 1);
}

#[tokio::test]
async fn one_server_with_a_password() {
    let Some(redis) = RedisServer::with(&["--requirepass", "hunter2"]) else { return };
    redis.answers().await;
    let at = |credentials: &str| cache_of(format!("redis://{credentials}127.0.0.1:{}", redis.port));
    is_shared(at(":hunter2@")).await;
    is_bypassed(at(":wrong@")).await;
    is_bypassed(at("")).await;
}

/// A CA and a certificate for loopback, as files.
struct Certificates {
    directory: TempDir,
}

impl Certificates {
    fn new() -> Self {
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Under one name for all, as rcgen has it, Redis takes every certificate for one that signed itself.
        ca.distinguished_name.push(DnType::CommonName, "a CA");
        let ca_certificate = ca.self_signed(&ca_key).unwrap();
        let key = KeyPair::generate().unwrap();
        let names = ["127.0.0.1".to_owned(), "localhost".to_owned()];
        let certificate =
            CertificateParams::new(names).unwrap().signed_by(&key, &Issuer::new(ca, ca_key)).unwrap();

        let certificates = Self { directory: tempfile::tempdir().unwrap() };
        for (name, pem) in
            [("ca", ca_certificate.pem()), ("cert", certificate.pem()), ("key", key.serialize_pem())]
        {
            std::fs::write(certificates.path(name), pem).unwrap();
        }
        certificates
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name).with_extension("pem")
    }

    /// A server with TLS alone, on the port that is given; `asks`: for clients' certificates.
    async fn server(&self, port: u16, asks: &str) -> Option<RedisServer> {
        let [ca, cert, key] = ["ca", "cert", "key"].map(|name| self.path(name).display().to_string());
        let tls = ["--tls-port", &port.to_string(), "--tls-auth-clients", asks].map(ToOwned::to_owned);
        let files = ["--tls-ca-cert-file", &ca, "--tls-cert-file", &cert, "--tls-key-file", &key];
        let args: Vec<&str> = tls.iter().map(String::as_str).chain(files).chain(["--port", "0"]).collect();
        let server = RedisServer::with(&args)?;
        until("it listens", || async { TcpStream::connect(("127.0.0.1", port)).await.is_ok() }).await;
        Some(server)
    }

    /// A cache that trusts the CA.
    fn trusting(&self, url: String) -> CacheConfig {
        CacheConfig { redis_ca_file: Some(self.path("ca")), ..cache_of(url) }
    }

    /// And one that shows its certificate, too.
    fn showing(&self, cache: CacheConfig) -> CacheConfig {
        let (redis_cert_file, redis_key_file) = (Some(self.path("cert")), Some(self.path("key")));
        CacheConfig { redis_cert_file, redis_key_file, ..cache }
    }
}

#[tokio::test]
async fn one_server_with_tls() {
    let (certificates, strangers) = (Certificates::new(), Certificates::new());
    let port = free_port();
    let Some(_redis) = certificates.server(port, "no").await else { return };
    let url = || format!("rediss://localhost:{port}");
    is_shared(certificates.trusting(url())).await;
    // Signed by nobody we know, and no TLS at all.
    is_bypassed(strangers.trusting(url())).await;
    is_bypassed(cache_of(format!("redis://localhost:{port}"))).await;
}

#[tokio::test]
async fn one_server_that_asks_for_certificates_and_new_ones_in_place_of_old() {
    let (certificates, strangers) = (Certificates::new(), Certificates::new());
    let port = free_port();
    let Some(mut redis) = certificates.server(port, "yes").await else { return };
    let cache = certificates.trusting(format!("rediss://localhost:{port}"));
    is_bypassed(cache.clone()).await;
    is_bypassed(strangers.showing(cache.clone())).await;
    let (sandbox, _) = is_shared(certificates.showing(cache)).await;

    // Another authority on both sides: the next connection goes by the files as they are then.
    for name in ["ca", "cert", "key"] {
        std::fs::copy(strangers.path(name), certificates.path(name)).unwrap();
    }
    redis.kill();
    let Some(_renewed) = certificates.server(port, "yes").await else { return };
    until("a value is found in it", || async {
        let before = sandbox.router.lookups("l2_hit").await;
        sandbox.embed(b"dog").await.unwrap();
        sandbox.router.lookups("l2_hit").await > before
    })
    .await;
}

/// Some three seconds: a node of a Cluster takes no commands for two seconds after it came up.
#[tokio::test]
async fn a_cluster_of_three() {
    let mut nodes = Vec::new();
    for slots in ["0 5460", "5461 10922", "10923 16383"] {
        // Where it would be by default, ten thousand higher, there is often no port.
        let bus = free_port();
        let args = ["--cluster-enabled", "yes", "--cluster-port", &bus.to_string()];
        let Some(node) = RedisServer::with(&args) else { return };
        node.answers().await;
        node.ask::<()>(&format!("CLUSTER SET-CONFIG-EPOCH {}", nodes.len() + 1)).await;
        node.ask::<()>(&format!("CLUSTER ADDSLOTSRANGE {slots}")).await;
        nodes.push((node, bus));
    }
    let [(first, first_bus), (second, _), (third, _)] = nodes.as_slice() else {
        panic!("three were started")
    };
    for node in [second, third] {
        node.ask::<()>(&format!("CLUSTER MEET 127.0.0.1 {} {first_bus}", first.port)).await;
    }
    for node in [first, second, third] {
        until("the cluster is whole", || async {
            node.says("CLUSTER INFO", "cluster_state:ok").await
                && node.says("CLUSTER INFO", "cluster_known_nodes:3").await
        })
        .await;
    }
    let url = format!("redis-cluster://127.0.0.1:{},127.0.0.1:{}", free_port(), second.port);
    let (sandbox, other) = is_shared(cache_of(url)).await;
    // By their keys these lie on all three.
    for picture in [b"dog", b"cow", b"pig", b"hen", b"ape", b"bee", b"fox", b"owl"] {
        is_found(&sandbox, &other, picture).await;
    }
    for node in [first, second, third] {
        assert!(!node.keys().await.is_empty());
    }
}

/// Some three seconds: a Sentinel takes its time to believe that a master is lost and to choose another.
#[tokio::test]
async fn sentinels_name_the_master_before_and_after_a_failover() {
    // A replica is not kept waiting for others that might come.
    let Some(mut master) = RedisServer::with(&["--repl-diskless-sync-delay", "0"]) else { return };
    master.answers().await;
    let master_port = master.port.to_string();
    let Some(replica) = RedisServer::with(&["--replicaof", "127.0.0.1", &master_port]) else { return };
    replica.answers().await;
    until("the replica has its master", || async {
        replica.says("INFO replication", "master_link_status:up").await
    })
    .await;
    // A Sentinel writes what it learns into its configuration, so it has to have one.
    let directory = tempfile::tempdir().unwrap();
    let configuration = directory.path().join("sentinel.conf");
    let lines = [
        format!("sentinel monitor cache 127.0.0.1 {master_port} 1"),
        "sentinel down-after-milliseconds cache 300".to_owned(),
        "sentinel failover-timeout cache 2000".to_owned(),
    ];
    std::fs::write(&configuration, lines.join("\n")).unwrap();
    let Some(sentinel) = RedisServer::sentinel(&configuration) else { return };
    sentinel.answers().await;
    until("the Sentinel knows the replica", || async { sentinel.says("INFO sentinel", "slaves=1").await })
        .await;

    let url = format!("redis-sentinel://127.0.0.1:{},127.0.0.1:{}#cache", free_port(), sentinel.port);
    let (sandbox, other) = is_shared(cache_of(url)).await;
    assert_eq!(master.keys().await.len(), 2);
    master.kill();
    until("the replica is the master", || async { replica.says("INFO replication", "role:master").await })
        .await;
    until("a picture is written there", || async {
        sandbox.embed(b"dog").await.unwrap();
        other.embed(b"dog").await.unwrap().cached
    })
    .await;
}
