//! What is computed once, what is never trusted, and that nothing of Redis can hurt.

use std::{net::TcpListener, time::Duration};

use emu2_proto::v1::{EmbedRequest, Image};
use emu2_serve::tenant::{AuthConfig, AuthMode, TenantConfig, TokenHash};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

use super::{
    mocks::{N_QUERY, SLOW, tensor},
    redis_server::{RedisServer, cache_at, free_port},
    sandbox::{Sandbox, ask, finished, image, text, until},
};
use crate::config::{CacheConfig, PoolConfig};

/// Sixteen pictures whose embeddings are as much as the router may hold, their requests not counted.
#[tokio::test]
async fn embeddings_count_with_what_requests_hold_unless_they_lie_in_the_caches_memory() {
    let sandbox = Sandbox::with(|config| {
        (config.server.max_message_bytes, config.server.max_held_bytes) = (1 << 10, 1 << 10);
    })
    .await;
    let pictures: Vec<Vec<u8>> = (0..16_u8).map(|number| vec![number]).collect();
    let request = || ask(pictures.iter().cloned().map(image).collect());
    let refused = sandbox.events(request()).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("server.max_held_bytes"), "{refused}");
    assert!(refused.get_details_retry_info().is_some());
    for picture in &pictures {
        let image = Some(Image { data: picture.clone().into() });
        let request = EmbedRequest { model: "emu2".into(), image, ..Default::default() };
        let embeds = || async { sandbox.client().embed(request.clone()).await.is_ok() };
        until("what the refused one held is given back", embeds).await;
    }
    sandbox.events(request()).await.unwrap();
}

#[tokio::test]
async fn a_second_identical_image_is_not_encoded_again() {
    let sandbox = Sandbox::start().await;
    for cached in [0, 1] {
        let events = sandbox.events(ask(vec![image("cat"), text("?")])).await.unwrap();
        assert_eq!(finished(&events).usage.unwrap().cached_images, cached);
    }
    assert_eq!(sandbox.encoder.calls(), 1);
    assert_eq!(sandbox.router.lookups("l1_hit").await, 1);
    assert_eq!(sandbox.router.lookups("miss").await, 1);
}

#[tokio::test]
async fn ten_requests_at_once_encode_once() {
    let sandbox = Sandbox::start().await;
    sandbox.encoder.hold();
    let requests = (0..10).map(|_| {
        let mut client = sandbox.client();
        // Pictures are looked up in order: with the second in its slot, the first is waited for.
        let request = ask(vec![image(SLOW), image("fast")]);
        tokio::spawn(async move { client.generate(request).await.unwrap() })
    });
    let requests: Vec<_> = requests.collect();
    until("all wait for the picture", || async { sandbox.llm.slots.lock().unwrap().len() == 10 }).await;
    sandbox.encoder.let_go();
    for request in requests {
        super::sandbox::collect(request.await.unwrap().into_inner()).await.unwrap();
    }
    assert_eq!(sandbox.encoder.calls(), 2, "each picture once");
    assert_eq!(sandbox.router.lookups("miss").await, 2);
    assert!(sandbox.router.lookups("waited").await >= 9);
}

#[tokio::test]
async fn a_failure_is_told_to_all_that_waited_and_not_kept() {
    let sandbox = Sandbox::start().await;
    sandbox.encoder.fail(Some(Status::resource_exhausted("full")));
    for _ in 0..2 {
        assert_eq!(sandbox.embed(b"cat").await.unwrap_err().code(), Code::ResourceExhausted);
    }
    sandbox.encoder.fail(None);
    assert!(!sandbox.embed(b"cat").await.unwrap().cached);
    assert_eq!(sandbox.encoder.calls(), 3);
}

/// The replica is rolled in place while the router still believes its last `Info`.
#[tokio::test]
async fn new_weights_never_answer_for_old_ones() {
    let pool = PoolConfig { refresh_ms: 600_000, retry_ms: 20, ..Default::default() };
    let sandbox = Sandbox::with(|config| config.pool = pool).await;
    assert_eq!(sandbox.embed(b"cat").await.unwrap().weights_digest, "e1");
    sandbox.encoder.roll("e2");

    let dog = sandbox.embed(b"dog").await.unwrap();
    assert_eq!(dog.weights_digest, "e2");
    assert_eq!(dog.embeddings, Some(tensor("e2", b"dog", N_QUERY)));
    assert!(dog.cached, "what the old profile's request had computed was kept under the new digest");
    let cat = sandbox.embed(b"cat").await.unwrap();
    assert_eq!((cat.weights_digest.as_str(), cat.cached), ("e2", false));
    assert_eq!(cat.embeddings, Some(tensor("e2", b"cat", N_QUERY)));
}

/// The same weights behind newer code, while the router still believes its last `Info`.
#[tokio::test]
async fn new_preprocessing_never_answers_for_the_old() {
    let pool = PoolConfig { refresh_ms: 600_000, retry_ms: 20, ..Default::default() };
    let sandbox = Sandbox::with(|config| config.pool = pool).await;
    sandbox.embed(b"cat").await.unwrap();
    sandbox.encoder.rewrite(2);
    assert!(sandbox.embed(b"dog").await.unwrap().cached, "computed once, kept under the new version");
    assert!(!sandbox.embed(b"cat").await.unwrap().cached, "what the old version made is another value");
    assert_eq!(sandbox.encoder.calls(), 3);
}

/// Pictures of one prompt are all encoded with one set of weights, though the first was cached under others.
#[tokio::test]
async fn one_request_uses_one_set_of_weights() {
    let pool = PoolConfig { refresh_ms: 600_000, retry_ms: 20, ..Default::default() };
    let sandbox = Sandbox::with(|config| config.pool = pool).await;
    sandbox.embed(b"cat").await.unwrap();
    sandbox.encoder.roll("e2");
    sandbox.llm.roll("l2");
    let events = sandbox.events(ask(vec![image("cat"), image("dog")])).await.unwrap();
    assert_eq!(super::sandbox::words(&events), ["accepted", "text Hel", "text lo", "finished"]);
    // The last beginning's slots are those that were answered.
    let slots = sandbox.llm.slots.lock().unwrap();
    let mut last = slots[slots.len() - 2..].to_vec();
    last.sort_by_key(|(slot, _)| *slot);
    assert_eq!(last, [(0, tensor("e2", b"cat", N_QUERY)), (1, tensor("e2", b"dog", N_QUERY))]);
}

#[tokio::test]
async fn routers_share_values_through_redis() {
    let Some(redis) = RedisServer::start().await else { return };
    let sandbox = Sandbox::with(|config| config.cache = redis.cache()).await;
    let first = sandbox.embed(b"cat").await.unwrap();
    let key = redis.only_key().await;
    assert!(key.starts_with("emu2:embeddings:"), "{key}");
    let ttl = redis.ttl(&key).await;
    assert!(ttl <= Duration::from_secs(24 * 3600) && ttl > Duration::from_secs(23 * 3600), "{ttl:?}");

    let other = sandbox.another_router(|config| config.cache = redis.cache()).await;
    let second = other.embed(b"cat").await.unwrap();
    assert_eq!((second.embeddings, second.cached), (first.embeddings, true));
    assert_eq!(sandbox.encoder.calls(), 1);
    assert_eq!(other.lookups("l2_hit").await, 1);
    other.stop().await;
}

#[tokio::test]
async fn a_bad_value_is_a_miss_and_is_deleted() {
    let Some(redis) = RedisServer::start().await else { return };
    let sandbox = Sandbox::with(|config| config.cache = redis.cache()).await;
    let first = sandbox.embed(b"cat").await.unwrap();
    let key = redis.only_key().await;
    let good = redis.get(&key).await;
    let mut bad = good.clone();
    bad[20] ^= 1;
    redis.set(&key, bad.clone()).await;

    // With an encoder that fails nothing new is written, so that the deletion shows.
    let other = sandbox.another_router(|config| config.cache = redis.cache()).await;
    sandbox.encoder.fail(Some(Status::internal("broken")));
    assert_eq!(other.embed(b"cat").await.unwrap_err().code(), Code::Internal);
    until("the bad value is deleted", || async { redis.keys().await.is_empty() }).await;

    sandbox.encoder.fail(None);
    redis.set(&key, bad).await;
    let second = other.embed(b"cat").await.unwrap();
    assert_eq!((second.embeddings, second.cached), (first.embeddings, false));
    assert_eq!(other.lookups("bad_value").await, 1);
    until("the good value is back", || async { redis.get(&key).await == good }).await;
}

/// Nobody learns from a quick answer what another tenant has sent.
#[tokio::test]
async fn tenants_share_no_values() {
    let Some(redis) = RedisServer::start().await else { return };
    let tenant = |name: &str, sha256: &str| TenantConfig {
        name: name.into(),
        token_sha256: vec![TokenHash::new(sha256)],
        highest_priority: Default::default(),
        limits: Default::default(),
    };
    let tenants = vec![
        tenant("acme", "cdc6633563b40a9f0194bd97ce94150fb3a153ad956aba23c8b20f762c811106"),
        tenant("bolt", "6a03a8044da0b9360a513e79a106ff3b8b1e1dab47cacada454abcdac2c6ac72"),
    ];
    let sandbox = Sandbox::with(|config| {
        config.cache = redis.cache();
        config.auth = AuthConfig { mode: Some(AuthMode::Tokens), tenants, tenants_file: None };
    })
    .await;
    for (token, cached) in [("acme", false), ("bolt", false), ("acme", true)] {
        let image = Some(Image { data: b"cat".as_slice().into() });
        let mut request = Request::new(EmbedRequest { model: "emu2".into(), image, ..Default::default() });
        let token = format!("Bearer token-of-{token}-0123456789abcdef").parse().unwrap();
        request.metadata_mut().insert("authorization", token);
        assert_eq!(sandbox.client().embed(request).await.unwrap().into_inner().cached, cached);
    }
    until("both are written", || async { redis.keys().await.len() == 2 }).await;
}

/// Answers come, and late by at most the deadline, whatever listens at Redis' address.
async fn is_bypassed(cache: CacheConfig) {
    let deadline = Duration::from_millis(20);
    let cache = CacheConfig { deadline_ms: 20, memory_bytes: 0, ..cache };
    let sandbox = Sandbox::with(|config| config.cache = cache).await;
    for _ in 0..6 {
        let began = std::time::Instant::now();
        let answer = sandbox.embed(b"cat").await.unwrap();
        // Beyond the deadline: a busy machine's slack. The client's own timeouts are a second and more.
        assert!(began.elapsed() < deadline + Duration::from_millis(480), "{:?}", began.elapsed());
        assert_eq!(answer.embeddings, Some(tensor("e1", b"cat", N_QUERY)));
    }
    assert_eq!(sandbox.router.lookups("bypassed").await, 6);
    assert_eq!(sandbox.encoder.calls(), 6);
}

#[tokio::test]
async fn a_redis_that_does_not_answer_is_bypassed_within_the_deadline() {
    // Connections are taken by the kernel and never answered.
    let stalled = TcpListener::bind("127.0.0.1:0").unwrap();
    is_bypassed(cache_at(stalled.local_addr().unwrap().port())).await;
}

#[tokio::test]
async fn a_redis_that_is_down_is_bypassed() {
    is_bypassed(cache_at(free_port())).await;
}

#[tokio::test]
async fn a_redis_that_dies_is_missed_by_nobody() {
    let Some(redis) = RedisServer::start().await else { return };
    let sandbox =
        Sandbox::with(|config| config.cache = CacheConfig { memory_bytes: 0, ..redis.cache() }).await;
    sandbox.embed(b"cat").await.unwrap();
    redis.only_key().await;
    assert!(sandbox.embed(b"cat").await.unwrap().cached);
    drop(redis);
    for _ in 0..5 {
        assert!(!sandbox.embed(b"cat").await.unwrap().cached);
    }
}
