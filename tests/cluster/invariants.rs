//! The architecture's rules, read from the sources, so that breaking one breaks the build.

mod circles;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use cargo_metadata::{Metadata, MetadataCommand, PackageId};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// What cargo resolves the workspace to, for the one platform that is built for.
fn metadata() -> &'static Metadata {
    static METADATA: OnceLock<Metadata> = OnceLock::new();
    METADATA.get_or_init(|| {
        let mut command = MetadataCommand::new();
        command.manifest_path(root().join("Cargo.toml"));
        let platform = ["--locked", "--filter-platform", "x86_64-unknown-linux-gnu"];
        command.other_options(platform.map(str::to_owned)).exec().expect("cargo describes the workspace")
    })
}

/// The source folders of the workspace's libraries, those of tests left out.
fn sources() -> Vec<PathBuf> {
    let libraries = metadata().workspace_packages().into_iter().flat_map(|package| &package.targets);
    let libraries = libraries.filter(|target| target.is_lib()).map(|target| target.src_path.as_std_path());
    let sources: Vec<_> = libraries.map(|lib| lib.parent().unwrap().to_owned()).collect();
    assert!(sources.contains(&root().join("services/router/src")), "{sources:?}");
    sources
}

/// The names of what a package needs, directly and through others, development dependencies included.
fn dependencies(package: &str) -> BTreeSet<&'static str> {
    let metadata = metadata();
    let nodes = &metadata.resolve.as_ref().expect("cargo resolves dependencies").nodes;
    let needs: BTreeMap<&PackageId, _> = nodes.iter().map(|node| (&node.id, &node.dependencies)).collect();
    let names: BTreeMap<_, _> = metadata.packages.iter().map(|one| (&one.id, one.name.as_str())).collect();
    let start = names.iter().find(|(_, name)| **name == package);
    let (mut found, mut open) = (BTreeSet::new(), vec![*start.unwrap_or_else(|| panic!("no {package}")).0]);
    while let Some(id) = open.pop() {
        for need in needs[id] {
            if found.insert(names[need]) {
                open.push(need);
            }
        }
    }
    found
}

#[test]
fn what_computes_nothing_builds_without_libtorch() {
    let packages = [
        "emu2-proto",
        "emu2-serve",
        "emu2-router",
        "emu2-sheet",
        "emu2-client",
        "emu2-cli",
        "emu2-bench",
        "emu2-engine",
    ];
    for package in packages {
        let needs = dependencies(package);
        assert!(!needs.contains("tch") && !needs.contains("torch-sys"), "{package} depends on tch");
    }
    assert!(dependencies("emu2-llm").contains("tch"), "this test reads cargo's metadata wrongly");
}

/// The files below a folder, those of tests left out.
fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.file_stem().and_then(|stem| stem.to_str()) {
            Some("tests") => {}
            _ if path.is_dir() => files.extend(rust_files(&path)),
            _ => files.push(path),
        }
    }
    files
}

/// The files of a service that hold one of its layers: `NAME.rs` and everything in the folder `NAME`, without tests.
fn layer(service: &str, name: &str) -> Vec<PathBuf> {
    let folder = root().join("services").join(service).join("src").join(name);
    let below = if folder.exists() { rust_files(&folder) } else { Vec::new() };
    [vec![folder.with_extension("rs")], below].concat()
}

/// The services that compute: those with an engine.
fn stages() -> Vec<String> {
    let services = fs::read_dir(root().join("services")).unwrap().map(|entry| entry.unwrap().path());
    let stages = services.filter(|service| service.join("src/service.rs").exists());
    let stages = stages.filter(|service| service.join("src/engine.rs").exists());
    let stages: Vec<_> =
        stages.map(|service| service.file_name().unwrap().to_string_lossy().into_owned()).collect();
    assert!(stages.len() >= 3, "{stages:?}");
    stages
}

/// Lines of code, without comments and tests, that hold a forbidden word.
fn lines_with(path: &Path, words: &[&str]) -> Vec<String> {
    let source = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    // Tests stand last in a file.
    let code = source.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let code = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let found = code.filter(|line| words.iter().any(|word| line.contains(word)));
    found.map(|line| format!("{}: {}", path.display(), line.trim())).collect()
}

#[test]
fn an_edge_never_sees_a_tensor() {
    for file in stages().iter().flat_map(|service| layer(service, "service")) {
        assert_eq!(lines_with(&file, &["tch::", "to_tensor", "from_tensor"]), Vec::<String>::new());
    }
}

#[test]
fn an_engine_never_sees_a_grpc_type() {
    for file in stages().iter().flat_map(|service| layer(service, "engine")) {
        // `stage` is also a module of emu2-engine, whose trait a stage implements: named here by its own types.
        let forbidden = ["tonic", "emu2_proto::v1", "emu2_proto::stage", "v1::", "stage::"];
        let mut found = lines_with(&file, &forbidden);
        found.retain(|line| !line.contains("stage::{Arrival"));
        assert_eq!(found, Vec::<String>::new());
    }
}

/// A shape that is taken apart whole, by `size2` to `size6`, says how many dimensions there are and fails where there
/// are others; an index goes on with the wrong one.
#[test]
fn no_size_of_a_tensor_is_taken_by_index() {
    for file in sources().iter().flat_map(|source| rust_files(source)) {
        assert_eq!(lines_with(&file, &[".size()["]), Vec::<String>::new());
    }
}

#[test]
fn a_main_is_three_steps() {
    for service in stages().iter().map(String::as_str).chain(["router"]) {
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
