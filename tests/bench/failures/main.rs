//! What happens when something fails, with real processes: routers between clients and mock stages that are killed,
//! paused, restarted, or too slow. The table in services/router/README.md names these tests.
//!
//! | file | what fails |
//! |---|---|
//! | `resumed.rs` | a replica in the middle of an answer |
//! | `replicas.rs` | a pool; a rollout |
//! | `router.rs` | the router, its clients, too much at once |
//! | `redis.rs` | Redis |
//! | `tls.rs` | certificates |

mod redis;
mod replicas;
mod resumed;
mod router;
mod tls;

use std::time::{Duration, Instant};

use emu2_bench::{
    cluster::{Cluster, NO_CACHE, Plan, Replica, Stage},
    load::{self, Answer, Ask},
};
use tonic::Status;

/// How long anything here may take: far above what it takes.
const PATIENCE: Duration = Duration::from_secs(20);
/// Faults are found fast, so that tests are quick; healthy replicas stay well within.
const POOL: &str = "[pool]\nrefresh_ms = 100\nretry_ms = 20\ninfo_timeout_ms = 500\n";

/// Two replicas a stage, whose steps are long enough to be met in the middle.
fn plan() -> Plan {
    Plan {
        encoder: Stage::new("encoder", "--image-ms 150"),
        llm: Stage::new("llm", "--step-ms 8"),
        decoder: Stage::new("decoder", "--step-ms 15"),
        replicas: 2,
        tables: format!("{NO_CACHE}{POOL}"),
        ..Plan::default()
    }
}

async fn cluster(plan: Plan) -> Cluster {
    Cluster::start(plan).await.unwrap()
}

async fn send(cluster: &Cluster, ask: Ask) -> Result<Answer, Status> {
    load::send(&mut cluster.router().client(), ask).await
}

/// The replica that works on the only request.
async fn at_work(pool: &[Replica]) -> usize {
    let began = Instant::now();
    loop {
        for (index, replica) in pool.iter().enumerate() {
            if replica.metric("emu2_mock_running_calls").await > 0.0 {
                return index;
            }
        }
        assert!(began.elapsed() < PATIENCE, "no replica is at work");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Calls that run now, over all stages.
async fn running(cluster: &mut Cluster) -> f64 {
    let mut sum = 0.0;
    for replica in cluster.replicas() {
        sum += replica.metric("emu2_mock_running_calls").await;
    }
    sum
}

async fn until_idle(cluster: &mut Cluster) {
    let began = Instant::now();
    while running(cluster).await > 0.0 {
        assert!(began.elapsed() < PATIENCE, "stages still work for nobody");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Whether two answers to one request are the same.
#[track_caller]
fn assert_same(undisturbed: &Answer, answer: &Result<Answer, Status>) {
    let answer = answer.as_ref().unwrap_or_else(|status| panic!("the request failed: {status}"));
    assert_eq!(undisturbed.digest, answer.digest, "the answer is another one");
}
