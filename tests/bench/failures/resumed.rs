//! A replica that dies or hangs in the middle of an answer: another goes on, and the client sees one answer, the same
//! as undisturbed.

use std::time::Duration;

use emu2_bench::{
    cluster::Cluster,
    load::{self, Ask, image, text},
};
use rustix::process::Signal;

use crate::{assert_same, at_work, cluster, plan, send};

const ENCODER: usize = 0;
const LLM: usize = 1;
const DECODER: usize = 2;

fn a_text() -> Ask {
    load::write(vec![text("Tell me a story.")], 60)
}

fn an_image() -> Ask {
    load::draw(vec![text("a cat on a roof")], 30, 7)
}

/// Asks undisturbed, then again while `strike` happens to the replica of `stage` that is at work; both answers must be
/// the same.
async fn struck(stage: usize, ask: Ask, strike: impl AsyncFnOnce(&mut Cluster, usize)) {
    let mut cluster = cluster(plan()).await;
    let undisturbed = send(&cluster, ask.clone()).await.unwrap();
    let mut client = cluster.router().client();
    let (answer, ()) = tokio::join!(load::send(&mut client, ask), async {
        let replica = at_work(cluster.pool(stage)).await;
        // In the middle: past its start, and far from its end.
        tokio::time::sleep(Duration::from_millis(60)).await;
        strike(&mut cluster, replica).await;
    });
    assert_same(&undisturbed, &answer);
}

async fn kill(stage: usize, ask: Ask) {
    struck(stage, ask, async |cluster, replica| cluster.pool(stage)[replica].process.kill()).await;
}

/// Paused until another replica has taken over, then let go: what it still has to say belongs to an attempt that is
/// over.
async fn hang(stage: usize, ask: Ask) {
    struck(stage, ask, async |cluster, replica| {
        let mut others = std::mem::take(cluster.pool(stage));
        let hung = others.remove(replica);
        hung.process.signal(Signal::STOP);
        at_work(&others).await;
        hung.process.signal(Signal::CONT);
        others.insert(replica, hung);
        *cluster.pool(stage) = others;
    })
    .await;
}

#[tokio::test]
async fn a_replica_killed_in_the_middle_of_a_text_is_not_seen() {
    kill(LLM, a_text()).await;
}

#[tokio::test]
async fn a_replica_killed_while_it_regresses_an_image_is_not_seen() {
    kill(LLM, an_image()).await;
}

#[tokio::test]
async fn a_replica_killed_while_it_denoises_is_not_seen() {
    kill(DECODER, load::draw(vec![image(1)], 30, 7)).await;
}

#[tokio::test]
async fn a_replica_killed_while_it_encodes_is_not_seen() {
    kill(ENCODER, load::embed(1)).await;
    kill(ENCODER, load::write(vec![image(1), text("What is this?")], 8)).await;
}

#[tokio::test]
async fn a_replica_that_hangs_in_a_text_and_wakes_is_not_seen() {
    hang(LLM, a_text()).await;
}

#[tokio::test]
async fn a_replica_that_hangs_while_it_denoises_and_wakes_is_not_seen() {
    hang(DECODER, load::draw(vec![image(1)], 30, 7)).await;
}
