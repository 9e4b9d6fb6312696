//! What the model that ships can do: some cases of its evaluation, and its own demo, through the gRPC of a cluster.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use emu2_client::ConnectionArgs;
use emu2_trainer::eval::{self, Eval};
use serde_json::Value;

use crate::support::binary;

/// Of each ability; the same scenes and seeds every time.
const CASES: u64 = 20;

/// What nano scores at least on these cases. `make eval` measures with fifteen times as many
/// (deploy/models/nano/README.md); this is far enough below that rounding on another processor breaks nothing, and far
/// above what a model that lost it scores.
const LEAST: [(&str, &str, f64); 17] = [
    ("name", "right", 0.85),
    ("count", "right", 0.85),
    ("pair", "right", 0.75),
    ("background", "right", 0.9),
    ("tuples", "right", 0.8),
    ("direction", "right", 0.85),
    ("locate", "iou", 0.3),
    ("circle", "right", 0.45),
    ("autoencode", "background", 0.9),
    ("autoencode", "object", 0.55),
    ("text_to_image", "count", 0.75),
    ("text_to_image", "background", 0.85),
    ("text_to_image", "object", 0.6),
    ("subject", "background", 0.85),
    ("subject", "object", 0.45),
    ("boxed", "inside", 0.85),
    ("boxed", "object", 0.55),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn nano() -> PathBuf {
    root().join("deploy/models/nano")
}

fn drawings() -> PathBuf {
    let fetcher = root().join("deploy/fetch/drawings.py");
    let output = Command::new("python3").arg(fetcher).arg("--unseen").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nano_can_do_what_it_was_trained_for() {
    let folder = tempfile::tempdir().unwrap();
    let results = folder.path().join("results.json");
    let asked = Eval {
        addr: None,
        connection: ConnectionArgs::default(),
        model_dir: nano(),
        drawings: drawings(),
        concepts: None,
        answers: folder.path().join("answers.jsonl"),
        results: results.clone(),
        cases: CASES,
        other_cases: 1,
        seed: 1,
        steps: 20,
        guidance_scale: 3.0,
        concurrency: 8,
        only: None,
    };
    eval::eval(asked).await.unwrap();
    let results: Value = serde_json::from_slice(&fs::read(results).unwrap()).unwrap();
    let rows = results["rows"].as_array().unwrap();
    let mean = |ability: &str, score: &str| {
        let row = rows.iter().find(|row| row["ability"] == ability && row["score"] == score);
        let trained = &row.unwrap_or_else(|| panic!("{ability} has no {score}"))["columns"]["trained"];
        assert_eq!(trained["cases"], CASES);
        trained["mean"].as_f64().unwrap()
    };
    let lost: Vec<_> = LEAST
        .iter()
        .map(|&(ability, score, least)| (ability, score, mean(ability, score), least))
        .filter(|(_, _, mean, least)| mean < least)
        .collect();
    assert!(lost.is_empty(), "ability, score, mean, least: {lost:?}");
}

/// `make demo`: a right caption, right answers after examples, images, and all of it on one sheet.
#[test]
fn the_demo_of_nano_is_right() {
    let folder = tempfile::tempdir().unwrap();
    let demo = binary("emu2")
        .args(["demo", "--model-dir"])
        .arg(nano())
        .arg("--out")
        .arg(folder.path())
        .output()
        .unwrap();
    let told = String::from_utf8(demo.stdout).unwrap();
    assert!(demo.status.success(), "{told}{}", String::from_utf8_lossy(&demo.stderr));
    let said = |word| told.lines().filter_map(move |line| line.trim().strip_prefix(word).map(str::trim));
    let (answers, right): (Vec<_>, Vec<_>) = (said("answer:").collect(), said("right:").collect());
    assert_eq!(answers, right, "{told}");
    assert!(right.len() >= 3, "{told}");
    let sheet = image::open(folder.path().join("sheet.png")).unwrap();
    assert!(sheet.height() > 300, "{}", sheet.height());
}
