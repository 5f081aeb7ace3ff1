//! `attribute`: what it prints and writes is what the service gives.

mod cli_support;

use std::{fs::File, path::Path};

use cli_support::{fixture, run};
use ndarray::{ArrayD, IxDyn, OwnedRepr};
use ndarray_npy::NpzReader;
use serde_json::Value;

const MODEL: &str = "bert.legacy14";
const TEXT: &str = "a very unlikely story";
/// What is printed has so many digits.
const PRINTED: f64 = 1e-3;

fn attribute(more: &[&str]) -> (bool, String, String) {
    let folder = fixture(MODEL);
    let folder = folder.to_str().unwrap();
    let mut args = vec!["attribute", folder];
    args.extend(more);
    let done = run(&args);
    (done.code == Some(0), done.out, done.err)
}

fn json(more: &[&str]) -> Value {
    let args: Vec<&str> = [TEXT, "--json"].iter().chain(more).copied().collect();
    let (ok, out, err) = attribute(&args);
    assert!(ok, "{err}");
    serde_json::from_str(&out).unwrap()
}

fn scores(found: &Value) -> Vec<f64> {
    let values = found["tensors"]["attributions"]["values"]
        .as_array()
        .unwrap();
    values.iter().map(|v| v.as_f64().unwrap()).collect()
}

#[test]
fn json_holds_the_scores_and_the_evidence() {
    let found = json(&["--target", "positive"]);
    assert_eq!(found["method"], "integrated_gradients");
    assert_eq!(found["terms"][0]["label"], "positive");
    assert_eq!(found["steps"], 50);
    let number = |name: &str| found[name].as_f64().unwrap();
    let change = number("value") - number("baseline_value");
    let sum: f64 = scores(&found).iter().sum();
    assert!((sum - change - number("delta")).abs() < PRINTED);
    assert_eq!(
        scores(&found).len(),
        found["tokens"].as_array().unwrap().len()
    );

    let words = json(&["--words", "-m", "kernel_shap"]);
    let names: Vec<&str> = words["features"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| f["text"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["a", "very", "unlikely", "story"]);
    assert_eq!(words["exact"], true);
}

#[test]
fn options_reach_the_method() {
    assert_eq!(json(&["--steps", "7"])["steps"], 7);
    let contrast = json(&[
        "--target",
        "0",
        "--against",
        "2",
        "--quantity",
        "log_probability",
    ]);
    assert_eq!(contrast["terms"][1]["weight"], -1.0);
    assert_eq!(
        contrast["target"],
        "log-probability of \"negative\", -\"positive\""
    );
    assert_eq!(json(&["--baseline", "zero"])["baseline"], "zero");
    assert_eq!(
        json(&[
            "--unit",
            "blocks.1.mlp.hook_post:2:10",
            "-m",
            "saliency",
            "--norm",
            "l2"
        ])["terms"][0]["position"],
        2
    );
    let random = |seed| json(&["-m", "smooth_grad", "--samples", "3", "--seed", seed]);
    assert_eq!(random("5")["seed"], 5);
    assert_ne!(scores(&random("5")), scores(&random("6")));
    let differences = json(&[
        "-m",
        "finite_difference",
        "--scheme",
        "central",
        "--steps",
        "3",
    ]);
    assert_eq!(differences["steps"], 3);
    assert!(
        differences["error"].is_null(),
        "central differences tell no error"
    );
    let one = json(&["--span", "7:21", "-m", "ablation"]);
    assert_eq!(one["features"][0]["text"], "unlikely story");
}

#[test]
fn files_hold_what_was_found() {
    let folder = tempfile::tempdir().unwrap();
    let expected = scores(&json(&[]));
    let write = |name: &str| {
        let path = folder.path().join(name);
        let (ok, _, err) = attribute(&[TEXT, "-o", path.to_str().unwrap()]);
        assert!(ok, "{err}");
        path
    };
    let array = |path: &Path, name: &str| -> ArrayD<f32> {
        let mut npz = NpzReader::new(File::open(path).unwrap()).unwrap();
        npz.by_name::<OwnedRepr<f32>, IxDyn>(name).unwrap()
    };
    let npz = array(&write("a.npz"), "attributions");
    for (a, b) in npz.iter().zip(&expected) {
        assert!((f64::from(*a) - b).abs() < PRINTED);
    }
    let whole: Value = serde_json::from_slice(&std::fs::read(write("a.json")).unwrap()).unwrap();
    assert_eq!(scores(&whole).len(), expected.len());
    let page = std::fs::read_to_string(write("a.html")).unwrap();
    assert!(
        page.contains("unlikely") || page.contains("##"),
        "the tokens"
    );
    assert!(page.contains("integrated_gradients"));
    let picture = png::Decoder::new(std::io::BufReader::new(File::open(write("a.png")).unwrap()));
    assert!(picture.read_info().unwrap().info().width > 400);
    let (ok, _, err) = attribute(&[TEXT, "-o", "a.txt"]);
    assert!(!ok && err.contains(".npz, .json, .png and .html"), "{err}");
}

#[test]
fn the_terminal_shows_scores_evidence_costs_and_comparisons() {
    let (ok, page, err) = attribute(&[TEXT, "--words"]);
    assert!(ok, "{err}");
    for part in [
        "FEATURE",
        "unlikely",
        "integrated_gradients",
        "hook_embed",
        "F(pad)",
        "delta",
    ] {
        assert!(page.contains(part), "{part}: {page}");
    }
    let (ok, cost, err) = attribute(&[TEXT, "--estimate", "--steps", "20"]);
    assert!(ok, "{err}");
    assert!(cost.contains("20 forward and backward"), "{cost}");
    let (ok, table, err) = attribute(&[TEXT, "--evaluate", "saliency,ablation"]);
    assert!(ok, "{err}");
    for part in [
        "INFIDELITY",
        "SUFFICIENCY",
        "saliency",
        "ablation",
        "Spearman",
    ] {
        assert!(table.contains(part), "{part}: {table}");
    }
}

#[test]
fn mistakes_are_named() {
    for (args, part) in [
        (vec![TEXT, "-m", "ablation", "--steps", "3"], "--steps"),
        (vec![TEXT, "--window", "3"], "--window"),
        (vec![TEXT, "-m", "nothing"], "integrated_gradients"),
        (vec![TEXT, "--baseline", "blue"], "--baseline blue"),
        (vec![TEXT, "--span", "4"], "--span 4"),
        (vec![TEXT, "--unit", "here"], "HOOK:POSITION:INDEX"),
        (
            vec![TEXT, "--quadrature", "simpson"],
            "--quadrature simpson",
        ),
        (vec![TEXT, "--target", "blue"], "none of the labels"),
        (vec![TEXT, "-m", "conductance"], "hook point"),
        (vec![], "required"),
    ] {
        let (ok, out, err) = attribute(&args);
        assert!(!ok && out.is_empty(), "{args:?}: {out}");
        assert!(err.contains(part), "{args:?}: {err}");
    }
}
