//! Metrics by their names: of which part of the system, and in which unit.

use std::{collections::BTreeSet, net::SocketAddr};

use emu2_nn::golden;
use emu2_standalone::cluster::ClusterConfig;

use crate::support::{admin_page, ask, client, events, greedy, start, text};

/// The last word of a name: a unit of Prometheus, or what is counted.
const UNITS: [&str; 13] = [
    "seconds",
    "bytes",
    "requests",
    "images",
    "rows",
    "positions",
    "steps",
    "embeddings",
    "lookups",
    // Attempts that are lost, and requests that are in a state.
    "lost",
    "left",
    "running",
    "waiting",
];
/// Metrics that every stage has under the same names.
const OF_STAGES: [&str; 7] = [
    "emu2_stage_backlog_seconds",
    "emu2_stage_callers_left",
    "emu2_stage_failed_requests",
    "emu2_stage_queue_wait_seconds",
    "emu2_stage_running",
    "emu2_stage_step_seconds",
    "emu2_stage_waiting",
];

/// The names of the metrics of a page, each with its type.
async fn metrics(admin: SocketAddr) -> (BTreeSet<(String, String)>, String) {
    let page = admin_page(admin, "/metrics").await;
    let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    (types.map(|(name, kind)| (name.to_owned(), kind.trim().to_owned())).collect(), page)
}

#[tokio::test]
async fn every_metric_names_its_part_and_its_unit_and_every_stage_has_the_same() {
    let cluster = start(ClusterConfig::local(vec![golden::model_dir("emu2-gen")])).await;
    events(&mut client(cluster.addr).await, ask("emu2-gen", vec![text("a")], greedy(4))).await.unwrap();
    let stages = cluster.stages.iter().map(|member| (member.stage, member.admin.unwrap()));
    let pages: Vec<_> = stages.chain([("router", cluster.admin.unwrap())]).collect();
    for (part, admin) in pages {
        let (metrics, page) = metrics(admin).await;
        assert!(metrics.len() > 3, "{part}: {metrics:?}");
        for (name, kind) in &metrics {
            let of = [format!("emu2_{part}_"), "emu2_rpc_".to_owned(), "emu2_stage_".to_owned()];
            assert!(of.iter().any(|prefix| name.starts_with(prefix)), "{part}: whose is {name}?");
            let unit = name.rsplit('_').next().unwrap();
            assert!(UNITS.contains(&unit), "{part}: {name} has no unit");
            assert!(kind != "unknown", "{part}: {name}");
        }
        if part != "router" {
            let common = metrics.iter().map(|(name, _)| name.as_str());
            let common: Vec<_> = common.filter(|name| name.starts_with("emu2_stage_")).collect();
            assert_eq!(common, OF_STAGES, "{part}");
            let samples = page.lines().filter(|line| line.starts_with("emu2_stage_"));
            let label = format!("stage=\"{part}\"");
            assert!(
                samples.clone().count() > 0 && samples.clone().all(|line| line.contains(&label)),
                "{page}"
            );
        }
    }
    cluster.stop().await.unwrap();
}
