//! The same prompt with another seed needs the decoder alone.

use emu2_proto::v1::GenerateRequest;

use super::{
    mocks::{N_QUERY, SLOW},
    redis_server::RedisServer,
    sandbox::{Sandbox, finished, image, paint, text, until, words},
};
use crate::config::CacheConfig;

fn with_seed(seed: u64, request: GenerateRequest) -> GenerateRequest {
    GenerateRequest { seed: Some(seed), ..request }
}

/// Without guidance, so that no negative is asked of the llm.
fn a_cat() -> GenerateRequest {
    paint(vec![text("a cat like"), image("cat")], 1.0)
}

const AGAIN: [&str; 6] = ["accepted", "embedding 4/4", "step 1/2", "step 2/2", "image 64x64", "finished"];

#[tokio::test]
async fn the_same_prompt_with_another_seed_skips_the_llm() {
    let sandbox = Sandbox::start().await;
    let first = sandbox.events(with_seed(1, a_cat())).await.unwrap();
    assert_eq!(finished(&first).usage.unwrap().cached_embeddings, 0);
    let second = sandbox.events(with_seed(2, a_cat())).await.unwrap();
    assert_eq!(words(&second), AGAIN);
    let usage = finished(&second).usage.unwrap();
    assert_eq!((usage.regressed_embeddings, usage.cached_embeddings), (N_QUERY, N_QUERY));
    assert_eq!((usage.images, usage.cached_images), (1, 1));
    assert_eq!((sandbox.llm.calls(), sandbox.encoder.calls(), sandbox.decoder.calls()), (1, 1, 2));

    // What the decoder got in one piece is what it got row by row.
    let positive = sandbox.decoder.positive.lock().unwrap();
    let (rows, whole) = positive.split_at(N_QUERY as usize);
    let rows: Vec<u8> =
        rows.iter().flat_map(|row| row.embeddings.as_ref().unwrap().data.iter().copied()).collect();
    assert_eq!(whole.len(), 1);
    assert_eq!((whole[0].start, &whole[0].embeddings.as_ref().unwrap().data[..]), (0, &rows[..]));
}

#[tokio::test]
async fn another_prompt_is_not_taken_for_it() {
    let sandbox = Sandbox::start().await;
    for request in [
        a_cat(),
        paint(vec![text("a cat unlike"), image("cat")], 1.0),
        paint(vec![image("cat"), text("a cat like")], 1.0),
        paint(vec![text("a cat like"), image("dog")], 1.0),
        paint(vec![text("a cat like")], 1.0),
    ] {
        sandbox.events(request).await.unwrap();
    }
    assert_eq!(sandbox.llm.calls(), 5);
    // The first's picture was new: it was not even looked up. So was the fourth's.
    assert_eq!(sandbox.router.lookups_of("regressed", "miss").await, 3);
}

#[tokio::test]
async fn routers_share_what_the_llm_regressed() {
    let Some(redis) = RedisServer::start().await else { return };
    let sandbox = Sandbox::with(|config| config.cache = redis.cache()).await;
    sandbox.events(a_cat()).await.unwrap();
    until("both values are written", || async { redis.keys().await.len() == 2 }).await;
    let other = sandbox.another_router(|config| config.cache = redis.cache()).await;
    let events = super::sandbox::collect(other.client.clone().generate(a_cat()).await.unwrap().into_inner());
    assert_eq!(words(&events.await.unwrap()), AGAIN);
    assert_eq!(sandbox.llm.calls(), 1);
    assert_eq!((other.lookups("l2_hit").await, other.lookups_of("regressed", "l2_hit").await), (1, 1));
}

/// A picture that Redis holds is asked for once; one that it does not, once more by whoever computes it, with its lease.
#[tokio::test]
async fn the_pictures_of_a_prompt_are_asked_for_once() {
    let Some(redis) = RedisServer::start().await else { return };
    let cache = || CacheConfig { memory_bytes: 0, ..redis.cache() };
    let sandbox = Sandbox::with(|config| config.cache = cache()).await;
    sandbox.embed(b"old").await.unwrap();
    redis.only_key().await;
    let before = redis.scripts_run().await;
    sandbox.events(paint(vec![image("old"), image("new")], 1.0)).await.unwrap();
    until("all is written", || async { redis.keys().await.len() == 3 }).await;
    // Two looks, a lease, and two values: the new picture's and what was regressed.
    assert_eq!(redis.scripts_run().await - before, 5);
    let lookups = [sandbox.router.lookups("l2_hit").await, sandbox.router.lookups("miss").await];
    assert_eq!(lookups, [1, 2], "the old one was new once");
}

#[tokio::test]
async fn a_prompt_with_a_new_picture_does_not_keep_the_llm_waiting() {
    let sandbox = Sandbox::start().await;
    sandbox.encoder.hold();
    let mut client = sandbox.client();
    let request = paint(vec![text("a cat like"), image(SLOW)], 1.0);
    let answer = tokio::spawn(async move { client.generate(request).await });
    until("the llm has the prompt", || async { sandbox.llm.calls() == 1 }).await;
    until("the encoder has the picture", || async { sandbox.encoder.running() == 1 }).await;
    sandbox.encoder.let_go();
    super::sandbox::collect(answer.await.unwrap().unwrap().into_inner()).await.unwrap();
}

#[tokio::test]
async fn a_part_of_a_regression_is_not_kept() {
    let sandbox = Sandbox::start().await;
    sandbox.llm.hold();
    let mut stream = sandbox.client().generate(a_cat()).await.unwrap().into_inner();
    for _ in ["accepted", "embedding 1/4"] {
        stream.message().await.unwrap().unwrap();
    }
    drop(stream);
    sandbox.idle().await;
    sandbox.llm.let_go();
    sandbox.events(a_cat()).await.unwrap();
    assert_eq!((sandbox.llm.calls(), sandbox.router.lookups_of("regressed", "miss").await), (2, 1));
}

/// The llm's templates are replaced in place, while the router still believes its last `Info`.
#[tokio::test]
async fn what_is_kept_bears_the_names_that_came_with_it() {
    let sandbox = Sandbox::with(|config| config.pool.refresh_ms = 600_000).await;
    sandbox.llm.rewrite(2);
    for _ in 0..2 {
        sandbox.events(a_cat()).await.unwrap();
    }
    assert_eq!(sandbox.llm.calls(), 2, "nothing of the old templates is there");
}
