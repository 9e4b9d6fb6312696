//! A pool that is gone, and pools that are restarted or rolled to other weights.

use std::time::Duration;

use emu2_bench::{
    cluster::{Cluster, Stage},
    load::{self, Ask, Record, Stop, mixed, text},
};
use rustix::process::Signal;
use tonic::Code;

use crate::{POOL, assert_same, at_work, cluster, plan, send};

fn a_text() -> Ask {
    load::write(vec![text("Tell me a story.")], 60)
}

#[tokio::test]
async fn a_stage_without_replicas_is_unavailable_and_comes_back() {
    let mut plan = plan();
    plan.tables += "failover_wait_ms = 300\n";
    let mut cluster = cluster(plan).await;
    let undisturbed = send(&cluster, a_text()).await.unwrap();
    let mut client = cluster.router().client();
    let (cut, ()) = tokio::join!(load::send(&mut client, a_text()), async {
        at_work(&cluster.llms).await;
        cluster.llms.iter_mut().for_each(|replica| replica.process.kill());
    });
    assert_eq!(cut.unwrap_err().code(), Code::Unavailable);
    assert_eq!(send(&cluster, a_text()).await.unwrap_err().code(), Code::Unavailable);
    send(&cluster, load::embed(1)).await.expect("the other stages serve");
    for replica in &mut cluster.llms {
        replica.restart().await.unwrap();
    }
    cluster.routers[0].ready().await.unwrap();
    assert_same(&undisturbed, &send(&cluster, a_text()).await);
}

/// Every replica of every stage, one after another, under load.
#[tokio::test]
async fn a_rolling_restart_fails_no_request() {
    let (_, record) = rolled("").await;
    assert_eq!(record.failures().count(), 0, "{}", record.reasons());
}

/// As a restart, to other weights. A request that can no longer end with the weights that it began with is told to be
/// asked again; nothing else fails, and no value of the old weights is served for the new ones.
#[tokio::test]
async fn weights_that_are_rolled_leave_nothing_behind() {
    let (mut cluster, record) = rolled("--digest w2").await;
    for (sent, status) in record.failures() {
        assert_eq!(status.code(), Code::Unavailable, "request {}: {status}", sent.number);
        assert!(status.message().contains("ask again"), "request {}: {status}", sent.number);
    }
    let mut plan = cluster.plan.clone();
    for stage in [&mut plan.encoder, &mut plan.llm, &mut plan.decoder] {
        stage.arguments.extend(["--digest".into(), "w2".into()]);
    }
    let fresh = Cluster::start(plan).await.unwrap();
    cluster.routers[0].ready().await.unwrap();
    for number in 0..6 {
        assert_same(&send(&fresh, mixed(number)).await.unwrap(), &send(&cluster, mixed(number)).await);
    }
}

/// Every replica in order, each with further arguments, while six clients ask for everything.
async fn rolled(arguments: &str) -> (Cluster, Record) {
    let mut plan = plan();
    plan.tables = POOL.into();
    plan.encoder = Stage::new("encoder", "--image-ms 2");
    plan.llm = Stage::new("llm", "--step-ms 1");
    plan.decoder = Stage::new("decoder", "--step-ms 2");
    let mut cluster = cluster(plan).await;
    let stop = Stop::default();
    let channels = [cluster.router().client()];
    let again = |number| mixed(number % 30);
    let (record, ()) = tokio::join!(load::closed_loop(&channels, 6, usize::MAX, &stop, again), async {
        for replica in cluster.replicas() {
            // As a rollout waits until a new replica is used; the router looks every 100 ms.
            tokio::time::sleep(Duration::from_millis(300)).await;
            replica.process.signal(Signal::TERM);
            assert!(replica.process.ended().await.unwrap().success());
            let stage =
                Stage::new(replica.stage.role, &format!("{} {arguments}", replica.stage.arguments.join(" ")));
            replica.restart_as(stage).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        stop.stop();
    });
    assert!(record.answers().count() > 0);
    (cluster, record)
}
