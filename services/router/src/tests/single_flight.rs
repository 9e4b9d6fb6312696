//! Among routers a new picture is encoded once, by whoever holds its lease; and no lease can hurt.

use std::time::{Duration, Instant};

use emu2_proto::v1;
use emu2_serve::status::{self, Violation};
use tonic::{Code, Status};

use super::{
    mocks::{N_QUERY, SLOW, tensor},
    redis_server::RedisServer,
    sandbox::{Router, Sandbox, refusal, until},
};
use crate::{
    cache::{Kind, Recipe},
    config::{CacheConfig, Config},
};

/// Far longer than any test here: what ends sooner was ended.
const LONG_LEASE_MS: u64 = 60_000;

/// A lease that only its end or its holder's death ends, as everywhere here; its own length where that is the subject.
fn shared(redis: &RedisServer) -> CacheConfig {
    CacheConfig { lease_ms: LONG_LEASE_MS, wait_ms: 2 * LONG_LEASE_MS, ..redis.cache() }
}

async fn sandbox(redis: &RedisServer) -> Sandbox {
    Sandbox::with(|config| config.cache = shared(redis)).await
}

async fn another(sandbox: &Sandbox, redis: &RedisServer) -> Router {
    sandbox.another_router(|config| config.cache = shared(redis)).await
}

/// The name of a picture's lease or value.
fn name(of: &str, data: &[u8]) -> String {
    let recipe = Recipe {
        kind: Kind::Image,
        weights_digest: "e1",
        preprocessing_version: 1,
        n_query: N_QUERY,
        dtype: v1::Dtype::F32,
        tenant: "default",
        content: data,
    };
    format!("emu2:{of}:{{{}}}", recipe.key())
}

/// Somebody's lease on a picture, who will never bring it.
async fn lease_for_another(redis: &RedisServer, data: &[u8], lease: Duration) {
    redis.ask::<()>(&format!("SET {} somebody PX {}", name("lease", data), lease.as_millis())).await;
}

#[tokio::test]
async fn ten_routers_and_a_hundred_requests_encode_a_new_picture_once() {
    let Some(redis) = RedisServer::start().await else { return };
    let sandbox = sandbox(&redis).await;
    let mut routers = Vec::new();
    for _ in 0..10 {
        routers.push(another(&sandbox, &redis).await);
    }
    sandbox.encoder.hold();
    let requests = (0..100).map(|index| tokio::spawn(routers[index % 10].begin_embed(SLOW)));
    let requests: Vec<_> = requests.collect();
    until("every router has asked Redis", || async { redis.scripts_run().await >= 10 }).await;
    sandbox.encoder.let_go();
    for request in requests {
        assert_eq!(request.await.unwrap().unwrap().embeddings, Some(tensor("e1", SLOW, N_QUERY)));
    }
    assert_eq!(sandbox.encoder.calls(), 1);
    let mut misses = 0;
    let mut waited = 0;
    for router in &routers {
        misses += router.lookups("miss").await;
        waited += router.lookups("waited").await;
    }
    assert_eq!((misses, waited), (1, 99));
    until("the lease is given back", || async { redis.leases().await.is_empty() }).await;
}

#[tokio::test]
async fn a_lease_that_ends_without_a_value_is_taken_over_by_one() {
    let Some(redis) = RedisServer::start().await else { return };
    let sandbox = sandbox(&redis).await;
    let mut routers = Vec::new();
    for _ in 0..5 {
        routers.push(another(&sandbox, &redis).await);
    }
    lease_for_another(&redis, b"cat", Duration::from_millis(300)).await;
    let began = Instant::now();
    let requests: Vec<_> = routers.iter().map(|router| tokio::spawn(router.begin_embed(b"cat"))).collect();
    for request in requests {
        request.await.unwrap().unwrap();
    }
    assert!(began.elapsed() >= Duration::from_millis(250), "{:?}", began.elapsed());
    assert_eq!(sandbox.encoder.calls(), 1);
}

#[tokio::test]
async fn a_router_that_dies_while_it_leads_is_followed_by_another() {
    let Some(redis) = RedisServer::start().await else { return };
    let sandbox = sandbox(&redis).await;
    let short = |config: &mut Config| {
        config.cache = CacheConfig { deadline_ms: 100, lease_ms: 500, ..shared(&redis) };
    };
    let (runtime, leader) = sandbox.router_to_kill(short).await;
    sandbox.encoder.hold();
    runtime.spawn(leader.begin_embed(SLOW));
    until("the leader is at it", || async { sandbox.encoder.running() == 1 }).await;
    let waiting = tokio::spawn(sandbox.router.begin_embed(SLOW));
    // Longer than its lease: while it lives, it keeps it.
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!((sandbox.encoder.calls(), waiting.is_finished()), (1, false));

    runtime.shutdown_background();
    until("the other encodes it", || async { sandbox.encoder.calls() == 2 }).await;
    sandbox.encoder.let_go();
    assert_eq!(waiting.await.unwrap().unwrap().embeddings, Some(tensor("e1", SLOW, N_QUERY)));
}

#[tokio::test]
async fn a_flight_whose_last_waiter_leaves_gives_its_lease_back() {
    let Some(redis) = RedisServer::start().await else { return };
    let sandbox = sandbox(&redis).await;
    let other = another(&sandbox, &redis).await;
    sandbox.encoder.hold();
    let [first, second] = [(); 2].map(|()| tokio::spawn(sandbox.router.begin_embed(SLOW)));
    until("it is being encoded", || async { sandbox.encoder.running() == 1 }).await;
    first.abort();
    // The second may come only now: the encoder stays at work for it in any case.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!((sandbox.encoder.running(), redis.leases().await.len()), (1, 1));
    second.abort();
    until("the encoder is told", || async { sandbox.encoder.running() == 0 }).await;
    until("the lease is given back", || async { redis.leases().await.is_empty() }).await;
    sandbox.encoder.let_go();
    other.embed(SLOW).await.unwrap();
    assert_eq!(other.lookups("miss").await, 1);
}

#[tokio::test]
async fn a_bad_picture_is_refused_by_every_router_and_tried_by_one() {
    let Some(redis) = RedisServer::start().await else { return };
    let sandbox = sandbox(&redis).await;
    let other = another(&sandbox, &redis).await;
    let bad = status::invalid(vec![Violation::new("image", "must be a picture, got 3 bytes of text")]);
    sandbox.encoder.fail(Some(bad));
    let refused = sandbox.embed(b"txt").await.unwrap_err();
    let key = redis.only_key().await;
    assert!(redis.ttl(&key).await <= Duration::from_secs(10));

    let refused_too = other.embed(b"txt").await.unwrap_err();
    assert_eq!(sandbox.encoder.calls(), 1);
    assert_eq!(refusal(&refused_too), (Code::InvalidArgument, vec!["image".to_owned()]));
    assert_eq!(refused_too.message(), refused.message());

    // What a refusal is not: another key's, or damaged.
    let mut bytes = redis.get(&key).await;
    redis.set(&name("embeddings", b"cat"), bytes.clone()).await;
    bytes[20] ^= 1;
    redis.set(&key, bytes).await;
    sandbox.encoder.fail(None);
    other.embed(b"txt").await.unwrap();
    other.embed(b"cat").await.unwrap();
    assert_eq!(other.lookups("bad_value").await, 2);
}

#[tokio::test]
async fn a_failure_that_is_not_the_pictures_is_tried_by_the_next() {
    let Some(redis) = RedisServer::start().await else { return };
    let sandbox = sandbox(&redis).await;
    let other = another(&sandbox, &redis).await;
    sandbox.encoder.fail(Some(Status::internal("broken")));
    assert_eq!(sandbox.embed(b"cat").await.unwrap_err().code(), Code::Internal);
    sandbox.encoder.fail(None);
    assert!(!other.embed(b"cat").await.unwrap().cached);
    assert_eq!(other.lookups("miss").await, 1);
}

#[tokio::test]
async fn who_waits_too_long_computes_it_too() {
    let Some(redis) = RedisServer::start().await else { return };
    let sandbox = Sandbox::with(|config| config.cache = CacheConfig { wait_ms: 100, ..shared(&redis) }).await;
    lease_for_another(&redis, b"cat", Duration::from_secs(60)).await;
    sandbox.embed(b"cat").await.unwrap();
    assert_eq!(sandbox.router.lookups("waited_too_long").await, 1);
    // It is stored all the same, and the other's lease is left alone.
    redis.only_key().await;
    assert_eq!(redis.leases().await, [name("lease", b"cat")]);
}

/// One router leads, one waits, and Redis goes.
async fn goes_mid_flight(redis: &mut RedisServer, sandbox: &Sandbox, go: impl FnOnce(&mut RedisServer)) {
    let other = sandbox.another_router(quick(redis)).await;
    sandbox.encoder.hold();
    let leading = tokio::spawn(sandbox.router.begin_embed(SLOW));
    until("the first is at it", || async { sandbox.encoder.running() == 1 }).await;
    let before = redis.scripts_run().await;
    let waiting = tokio::spawn(other.begin_embed(SLOW));
    until("the second waits", || async { redis.scripts_run().await > before + 1 }).await;
    go(redis);
    until("the second waits no more", || async { sandbox.encoder.calls() == 2 }).await;
    sandbox.encoder.let_go();
    for request in [leading, waiting] {
        assert_eq!(request.await.unwrap().unwrap().embeddings, Some(tensor("e1", SLOW, N_QUERY)));
    }
    assert_eq!(other.lookups("bypassed").await, 1);
}

/// What one router wrote, another finds.
async fn is_used_again(sandbox: &Sandbox, redis: &RedisServer) {
    let other = sandbox.another_router(quick(redis)).await;
    until("Redis is used again", || async {
        sandbox.embed(b"dog").await.unwrap();
        other.embed(b"dog").await.unwrap();
        other.lookups("l2_hit").await > 0
    })
    .await;
}

fn quick(redis: &RedisServer) -> impl FnOnce(&mut Config) {
    // No memory, so that every request asks.
    let cache = CacheConfig { deadline_ms: 200, memory_bytes: 0, ..shared(redis) };
    |config| config.cache = cache
}

#[tokio::test]
async fn a_redis_that_is_killed_mid_flight_is_bypassed_and_used_again_when_it_is_back() {
    let Some(mut redis) = RedisServer::start().await else { return };
    let sandbox = Sandbox::with(quick(&redis)).await;
    goes_mid_flight(&mut redis, &sandbox, RedisServer::kill).await;
    sandbox.embed(b"cat").await.unwrap();
    redis.restart().await;
    is_used_again(&sandbox, &redis).await;
}

#[tokio::test]
async fn a_redis_that_is_paused_mid_flight_is_bypassed_and_used_again_when_it_goes_on() {
    let Some(mut redis) = RedisServer::start().await else { return };
    let sandbox = Sandbox::with(quick(&redis)).await;
    goes_mid_flight(&mut redis, &sandbox, |redis| redis.pause()).await;
    sandbox.embed(b"cat").await.unwrap();
    redis.resume();
    is_used_again(&sandbox, &redis).await;
}

#[tokio::test]
async fn a_redis_that_is_full_gives_what_it_has_and_stops_nothing() {
    let Some(redis) = RedisServer::start().await else { return };
    let sandbox = sandbox(&redis).await;
    sandbox.embed(b"cat").await.unwrap();
    redis.only_key().await;
    redis.ask::<()>("CONFIG SET maxmemory 1").await;
    let other = another(&sandbox, &redis).await;
    for picture in [b"dog", b"cow", b"pig", b"hen", b"ape"] {
        other.embed(picture).await.unwrap();
    }
    assert!(other.embed(b"cat").await.unwrap().cached);
    assert_eq!((other.lookups("miss").await, other.lookups("l2_hit").await), (5, 1));
    assert_eq!(redis.keys().await.len(), 1);
}

#[tokio::test]
async fn a_value_that_no_message_could_carry_is_not_read() {
    let Some(redis) = RedisServer::start().await else { return };
    let limited = |config: &mut Config| {
        config.cache = shared(&redis);
        config.server.max_message_bytes = 100_000;
    };
    let sandbox = Sandbox::with(limited).await;
    redis.set(&name("embeddings", b"cat"), vec![0; 100_001]).await;
    sandbox.embed(b"cat").await.unwrap();
    assert_eq!(sandbox.router.lookups("bad_value").await, 1);
    until("a good value is there", || async { redis.get(&name("embeddings", b"cat")).await.len() < 1_000 })
        .await;
}
