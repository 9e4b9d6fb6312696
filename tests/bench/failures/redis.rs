//! Redis killed, paused, and back: costs work, never an answer.

use std::time::Duration;

use emu2_bench::{
    cluster::{Cluster, Plan, Redis, Stage, metrics, value},
    load,
};

use crate::{POOL, assert_same, cluster, plan, send};

/// Every lookup asks Redis: there is no memory.
async fn with_redis(redis: &Redis) -> Cluster {
    let tables = format!("[cache]\nmemory_bytes = 0\nredis_url = {:?}\n{POOL}", redis.url());
    cluster(Plan { tables, encoder: Stage::new("encoder", ""), ..plan() }).await
}

async fn lookups(cluster: &Cluster, outcome: &str) -> f64 {
    let series = format!("emu2_router_cache_lookups_total{{kind=\"image\",outcome=\"{outcome}\"}}");
    value(&metrics(cluster.router().admin).await.unwrap(), &series).unwrap_or(0.0)
}

/// Asks until an answer came from Redis: writes are off the path, and the breaker opens again after a while.
async fn until_hit(cluster: &Cluster, image: u64) {
    let before = lookups(cluster, "l2_hit").await;
    for _ in 0..1_000 {
        send(cluster, load::embed(image)).await.unwrap();
        if lookups(cluster, "l2_hit").await > before {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("Redis is not used");
}

#[tokio::test]
async fn redis_killed_fails_no_request_and_is_used_again_when_it_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut redis = Redis::start(dir.path()).await.unwrap();
    let cluster = with_redis(&redis).await;
    until_hit(&cluster, 1).await;
    let undisturbed = send(&cluster, load::embed(1)).await.unwrap();
    redis.process.kill();
    for _ in 0..20 {
        assert_same(&undisturbed, &send(&cluster, load::embed(1)).await);
    }
    assert!(lookups(&cluster, "bypassed").await > 0.0);
    redis.restart().await.unwrap();
    until_hit(&cluster, 1).await;
}

#[tokio::test]
async fn redis_paused_fails_no_request_and_is_used_again_when_it_wakes() {
    let dir = tempfile::tempdir().unwrap();
    let redis = Redis::start(dir.path()).await.unwrap();
    let cluster = with_redis(&redis).await;
    until_hit(&cluster, 1).await;
    let undisturbed = send(&cluster, load::embed(1)).await.unwrap();
    redis.pause();
    for _ in 0..20 {
        assert_same(&undisturbed, &send(&cluster, load::embed(1)).await);
    }
    assert!(lookups(&cluster, "bypassed").await > 0.0);
    redis.go_on();
    until_hit(&cluster, 1).await;
}
