//! An image is encoded once, whoever asks: the cache as clients see it, in process and through a real Redis.

use std::{
    net::SocketAddr,
    process::{Child, Command, Stdio},
    time::Duration,
};

use emu2_bench::processes::free_address;
use emu2_nn::golden;
use emu2_proto::v1;
use emu2_standalone::cluster::ClusterConfig;

use crate::support::{ask, client, events, finished, fresh_png, greedy, image, shared, start, text};

/// A real redis-server on a free port; killed when dropped.
struct Redis {
    server: Child,
    addr: SocketAddr,
    _dir: tempfile::TempDir,
}

impl Redis {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let addr = free_address();
        let server = Command::new("redis-server")
            .args([
                "--port",
                &addr.port().to_string(),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--appendonly",
                "no",
            ])
            .arg("--dir")
            .arg(dir.path())
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed: run `make redis`");
        let redis = Self { server, addr, _dir: dir };
        for _ in 0..200 {
            if tokio::net::TcpStream::connect(redis.addr).await.is_ok() {
                return redis;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!("redis-server does not listen on {}", redis.addr);
    }

    /// Returns once something is written: that is off a request's path.
    async fn holds_a_key(&self) {
        let client = redis::Client::open(format!("redis://{}", self.addr)).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        for _ in 0..400 {
            if redis::cmd("DBSIZE").query_async::<u64>(&mut connection).await.unwrap() > 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!("nothing was written to Redis");
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        // Only fails when it has ended already.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

async fn embed(addr: SocketAddr, png: &[u8]) -> v1::EmbedResponse {
    let image = Some(v1::Image { data: png.to_vec().into() });
    let request = v1::EmbedRequest { model: "emu2".to_owned(), image, n_query: None, ..Default::default() };
    client(addr).await.embed(request).await.unwrap().into_inner()
}

#[tokio::test]
async fn a_second_identical_image_is_not_encoded_again() {
    let mut client = shared().client().await;
    let request = || ask("emu2", vec![image(fresh_png(50)), image(fresh_png(50)), text("Same?")], greedy(1));
    let usage = |events: &[_]| finished(events).usage.unwrap();
    let first = usage(&events(&mut client, request()).await.unwrap());
    assert_eq!(first.images, 2);
    assert!(first.cached_images <= 1, "the first of two equal images cannot be cached: {first:?}");
    let second = usage(&events(&mut client, request()).await.unwrap());
    assert_eq!((second.images, second.cached_images), (2, 2));
}

/// Two clusters that share nothing but Redis: what one encoded, the other does not.
#[tokio::test]
async fn routers_share_what_is_encoded_through_redis() {
    let redis = Redis::start().await;
    let config = || ClusterConfig {
        redis_url: Some(format!("redis://{}", redis.addr).into()),
        ..ClusterConfig::local(vec![golden::model_dir("emu2-base")])
    };
    let (one, other) = tokio::join!(start(config()), start(config()));
    let png = fresh_png(60);
    let encoded = embed(one.addr, &png).await;
    assert!(!encoded.cached);
    redis.holds_a_key().await;
    let shared = embed(other.addr, &png).await;
    assert!(shared.cached, "the other router did not find it in Redis");
    assert_eq!(shared.embeddings, encoded.embeddings);
    one.stop().await.unwrap();
    other.stop().await.unwrap();
}

/// Redis is a help, never a need: the same answers when it dies under a running cluster.
#[tokio::test]
async fn a_dead_redis_is_bypassed() {
    let redis = Redis::start().await;
    let config = ClusterConfig {
        redis_url: Some(format!("redis://{}", redis.addr).into()),
        ..ClusterConfig::local(vec![golden::model_dir("emu2-base")])
    };
    let cluster = start(config).await;
    let before = embed(cluster.addr, &fresh_png(70)).await;
    drop(redis);
    for seed in 71..75 {
        assert!(!embed(cluster.addr, &fresh_png(seed)).await.cached);
    }
    let after = embed(cluster.addr, &fresh_png(70)).await;
    assert_eq!(after.embeddings, before.embeddings);
    cluster.stop().await.unwrap();
}
