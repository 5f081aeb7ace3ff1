//! Holds the direction of dependencies that `src/lib.rs` promises, by reading the sources.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Every module of the crate, and the modules of the crate that it may name.
const MAY_NAME: &[(&str, &[&str])] = &[
    ("tensor", &[]),
    ("onnx", &["tensor"]),
    ("ipc", &["tensor"]),
    ("anatomy", &["tensor", "onnx", "ipc"]),
    ("rewrite", &["tensor", "onnx", "anatomy", "ipc"]),
    (
        "worker",
        &["tensor", "onnx", "anatomy", "rewrite", "ipc", "telemetry"],
    ),
    ("telemetry", &[]),
    ("shutdown", &[]),
    ("config", &["telemetry"]),
    ("engine", &["tensor", "ipc", "telemetry"]),
    ("model", &["tensor", "ipc", "engine", "telemetry"]),
    (
        "methods",
        &["tensor", "ipc", "engine", "model", "telemetry"],
    ),
    (
        "service",
        &[
            "tensor",
            "ipc",
            "engine",
            "model",
            "methods",
            "telemetry",
            "shutdown",
            "config",
        ],
    ),
];

/// Crates that only these modules may name.
const BELONGS_TO: &[(&str, &[&str])] = &[
    ("tonic", &["service", "cli"]),
    ("tonic_types", &["service", "cli"]),
    ("ort", &["worker"]),
    ("tokenizers", &["worker"]),
    ("memmap2", &["onnx", "ipc"]),
];

/// Crates that these modules may not name: they are pure.
const PURE: &[&str] = &["tensor", "onnx", "anatomy", "rewrite"];

/// The only files with `unsafe` code, each with its reason at the top.
const UNSAFE: &[&str] = &[
    "src/onnx/mapped.rs",
    "src/ipc/shm.rs",
    "src/worker/native.rs",
];

struct Source {
    path: PathBuf,
    module: String,
    /// Code without comments.
    code: String,
}

fn sources() -> Vec<Source> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    let mut paths = Vec::new();
    walk(Path::new("src"), &mut paths);
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let inside = path.strip_prefix("src").unwrap();
            let first = inside.iter().next().unwrap().to_str().unwrap();
            let module = first.trim_end_matches(".rs").to_owned();
            let code = fs::read_to_string(&path)
                .unwrap()
                .lines()
                .map(|line| line.split("//").next().unwrap_or("").to_owned() + "\n")
                .collect();
            Source { path, module, code }
        })
        .collect()
}

/// Whether `code` names `path::` as a whole word.
fn names(code: &str, path: &str) -> bool {
    let needle = format!("{path}::");
    code.match_indices(&needle)
        .any(|(at, _)| !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':'))
}

#[test]
fn modules_name_only_modules_to_their_left() {
    let modules: BTreeSet<&str> = MAY_NAME.iter().map(|(m, _)| *m).collect();
    let mut wrong = Vec::new();
    for source in sources() {
        let Some((_, allowed)) = MAY_NAME.iter().find(|(m, _)| *m == source.module) else {
            continue;
        };
        for other in &modules {
            if *other != source.module
                && !allowed.contains(other)
                && names(&source.code, &format!("crate::{other}"))
            {
                wrong.push(format!("{} names crate::{other}", source.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_module_is_in_the_table() {
    let known: BTreeSet<&str> = MAY_NAME
        .iter()
        .map(|(m, _)| *m)
        .chain(["lib", "main", "cli"])
        .collect();
    for source in sources() {
        assert!(
            known.contains(source.module.as_str()),
            "{}: say in tests/architecture.rs what `{}` may name",
            source.path.display(),
            source.module
        );
    }
}

#[test]
fn wire_runtime_and_tokenizer_crates_stay_in_their_modules() {
    let mut wrong = Vec::new();
    for source in sources() {
        for (krate, owners) in BELONGS_TO {
            if !owners.contains(&source.module.as_str()) && names(&source.code, krate) {
                wrong.push(format!("{} names {krate}", source.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_graph_modules_are_pure() {
    let mut wrong = Vec::new();
    for source in sources() {
        if PURE.contains(&source.module.as_str()) {
            for krate in ["tokio", "tonic", "ort"] {
                if names(&source.code, krate) {
                    wrong.push(format!("{} names {krate}", source.path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_code_is_in_three_files_only() {
    for source in sources() {
        let has = source
            .code
            .split(|c: char| !(c.is_alphanumeric() || c == '_'))
            .any(|word| word == "unsafe");
        let path = source.path.to_str().unwrap();
        assert!(
            !has || UNSAFE.contains(&path),
            "{path} has unsafe code; it belongs to one of {UNSAFE:?}"
        );
    }
}
