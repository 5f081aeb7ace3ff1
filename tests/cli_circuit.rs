//! `circuit`, without a daemon.

mod cli_support;

use cli_support::{fixture, run};
use serde_json::Value;

/// The question of `tests/fixtures/analysis/circuit.npz`.
fn question() -> Vec<String> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let file = std::fs::File::open(path.join("tests/fixtures/analysis/circuit.npz")).unwrap();
    let mut golden = ndarray_npy::NpzReader::new(file).unwrap();
    let mut numbers = |name: &str| {
        let array: ndarray::Array1<i64> = golden.by_name(name).unwrap();
        array.iter().map(i64::to_string).collect::<Vec<_>>()
    };
    let target = numbers("target");
    let model = fixture("circuit.legacy17").display().to_string();
    let (ids, source) = (numbers("ids").join(","), numbers("source").join(","));
    [
        "circuit",
        &model,
        "--ids",
        &ids,
        "--source-ids",
        &source,
        "--target",
        &target[0],
        "--against",
        &target[1],
    ]
    .map(str::to_owned)
    .to_vec()
}

fn ask(more: &[&str]) -> cli_support::Ran {
    let question = question();
    let args: Vec<&str> = question.iter().map(String::as_str).collect();
    run(&[&args[..], more].concat())
}

#[test]
fn the_circuit_is_listed_drawn_and_written() {
    let page = ask(&[]).ok().out;
    assert!(
        page.contains("a1.h2 → logits") && page.contains("100.0 %"),
        "{page}"
    );
    let json: Value = serde_json::from_str(&ask(&["--json"]).ok().out).unwrap();
    assert_eq!(json["edges"].as_array().unwrap().len(), 3);
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).display().to_string();
    for name in ["c.dot", "c.png", "c.html", "c.npz", "c.json"] {
        ask(&["-o", &file(name)]).ok();
        assert!(std::fs::metadata(file(name)).unwrap().len() > 0);
    }
    let dot = std::fs::read_to_string(file("c.dot")).unwrap();
    assert!(dot.contains("\"embed\" -> \"a0.h1\""), "{dot}");
    let layers = ask(&["--nodes", "layers"]).ok().out;
    assert!(layers.contains("a1 → logits"), "{layers}");
}

#[test]
fn mistakes_are_said() {
    ask(&["-o", "circuit.svg"]).failed(2, "ends in none of");
    ask(&["--edges", "100001"]).failed(1, "edges");
    let bert = fixture("bert.legacy14").display().to_string();
    let args = [
        "circuit",
        &bert,
        "the film is good",
        "--source",
        "good film is the",
    ];
    run(&args).failed(1, "normalises");
}
