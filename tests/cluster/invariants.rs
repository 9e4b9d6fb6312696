//! The architecture's rules, read from the sources, so that breaking one breaks the build.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// What a package needs, directly and through others, from Cargo.lock (development dependencies included).
fn dependencies(package: &str) -> BTreeSet<String> {
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let mut needs: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut current = "";
    for line in lock.lines() {
        if let Some(name) = line.strip_prefix("name = ") {
            current = name.trim_matches('"');
        } else if let Some(entry) = line.strip_prefix(" \"") {
            // ` "name",` or ` "name version",`
            let name = entry.trim_end_matches(['"', ',']).split(' ').next().unwrap();
            needs.entry(current).or_default().push(name);
        }
    }
    assert!(needs.contains_key(package), "{package} is not in Cargo.lock");
    let (mut found, mut open) = (BTreeSet::new(), vec![package]);
    while let Some(name) = open.pop() {
        for need in needs.get(name).into_iter().flatten() {
            if found.insert((*need).to_owned()) {
                open.push(need);
            }
        }
    }
    found
}

#[test]
fn the_router_and_the_client_build_without_libtorch() {
    for package in ["emu2-proto", "emu2-serve", "emu2-router", "emu2-sheet", "emu2-client", "emu2-cli"] {
        let needs = dependencies(package);
        assert!(!needs.contains("tch") && !needs.contains("torch-sys"), "{package} depends on tch");
    }
    assert!(dependencies("emu2-llm").contains("tch"), "this test reads Cargo.lock wrongly");
}

/// Lines of code, without comments, that hold a forbidden word.
fn lines_with(path: &Path, words: &[&str]) -> Vec<String> {
    let source = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(
        !source.contains("mod tests {"),
        "{}: tests live beside it, so all of it is read",
        path.display()
    );
    let code = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    let found = code.filter(|line| words.iter().any(|word| line.contains(word)));
    found.map(|line| format!("{}: {}", path.display(), line.trim())).collect()
}

#[test]
fn an_edge_never_sees_a_tensor() {
    for service in ["encoder", "llm", "decoder"] {
        let edge = root().join("services").join(service).join("src/service.rs");
        assert_eq!(lines_with(&edge, &["tch::", "to_tensor", "from_tensor"]), Vec::<String>::new());
    }
}

#[test]
fn an_engine_never_sees_a_grpc_type() {
    for service in ["encoder", "llm", "decoder"] {
        let engine = root().join("services").join(service).join("src/engine.rs");
        let forbidden = ["tonic", "emu2_proto::v1", "emu2_proto::stage", "v1::", "stage::"];
        assert_eq!(lines_with(&engine, &forbidden), Vec::<String>::new());
    }
}

#[test]
fn a_main_is_three_steps() {
    for service in ["router", "encoder", "llm", "decoder"] {
        let main = root().join("services").join(service).join("src/main.rs");
        let source = fs::read_to_string(&main).unwrap();
        let steps = ["config::from_args()", "telemetry::init(", "run(config, listeners"];
        let found =
            steps.map(|step| source.find(step).unwrap_or_else(|| panic!("{}: no {step}", main.display())));
        assert!(found.is_sorted(), "{}: not in the order of {steps:?}", main.display());
        let lines = source.lines().count();
        assert!(lines <= 40, "{}: {lines} lines", main.display());
    }
}

#[test]
fn the_top_level_stays_as_it_is() {
    // Beside what the project fixed: only what tools expect at the root.
    let allowed = [
        "Cargo.toml",
        "Cargo.lock",
        "proto",
        "services",
        "deploy",
        "helm",
        "tests",
        "README.md",
        "Makefile",
        "LICENSE",
    ];
    let strangers: Vec<_> = fs::read_dir(root())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        // Build output of a plain cargo, and what the commands write.
        .filter(|name| !name.starts_with('.') && !["target", "out"].contains(&name.as_str()))
        .filter(|name| !allowed.contains(&name.as_str()))
        .collect();
    assert_eq!(strangers, Vec::<String>::new());
}
