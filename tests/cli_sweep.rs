//! `sweep`, without a daemon: on the terminal, as JSON and as files.

mod cli_support;

use std::fs::File;

use cli_support::{fixture, run};
use ndarray::ArrayD;
use ndarray_npy::NpzReader;
use serde_json::Value;

const CLEAN: &str = "the film is good";
const CORRUPTED: &str = "good film is the";

fn model(name: &str) -> String {
    fixture(name).display().to_string()
}

#[test]
fn heads_are_shown_layer_by_layer_and_the_greatest_are_listed() {
    let bert = model("bert.legacy14");
    let page = run(&["sweep", &bert, CLEAN]).ok().out;
    for part in ["attn.hook_z by head", "layer 0", "layer 2", "EFFECTS"] {
        assert!(page.contains(part), "{part} in {page}");
    }
    assert!(page.contains("the greatest 10 of 12 parts"), "{page}");
}

#[test]
fn a_patching_says_what_is_restored_and_how_well_gradients_foretell_it() {
    let bert = model("bert.legacy14");
    let args = [
        "sweep",
        &bert,
        CORRUPTED,
        "--patch",
        CLEAN,
        "--hooks",
        "resid_pre,mlp_out",
        "--by",
        "position",
        "--method",
        "both",
    ];
    let page = run(&args).ok().out;
    assert!(
        page.contains("RESTORED") && page.contains("correlate by r ="),
        "{page}"
    );
    let json = run(&[&args[..], &["--json"]].concat()).ok().out;
    let json: Value = serde_json::from_str(&json).unwrap();
    let hooks = json["hooks"].as_array().unwrap();
    assert_eq!(hooks[0], "blocks.0.hook_resid_pre");
    let tensor = &json["tensors"]["effects:blocks.0.hook_mlp_out"];
    assert_eq!(tensor["axes"], serde_json::json!(["pos"]));
    assert!(json["correlation"].is_number() && json["source_value"].is_number());
}

#[test]
fn files_are_what_their_endings_say() {
    let bert = model("bert.legacy14");
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).display().to_string();
    for name in ["sweep.npz", "sweep.json", "sweep.png", "sweep.html"] {
        run(&["sweep", &bert, CLEAN, "--layers", "1", "-o", &file(name)]).ok();
    }
    let mut npz = NpzReader::new(File::open(file("sweep.npz")).unwrap()).unwrap();
    let effects: ArrayD<f32> = npz.by_name("effects:blocks.1.attn.hook_z").unwrap();
    assert_eq!(effects.shape(), [4]);
    let html = std::fs::read_to_string(file("sweep.html")).unwrap();
    assert_eq!(html.matches("<td ").count(), 4);
    assert!(
        std::fs::read(file("sweep.png"))
            .unwrap()
            .starts_with(b"\x89PNG")
    );
    let ask = |more: &[&str]| run(&[&["sweep", &bert, CLEAN], more].concat());
    ask(&["-o", "sweep.txt"]).failed(2, "ends in none of");
}

#[test]
fn mistakes_are_said() {
    let bert = model("bert.legacy14");
    let ask = |more: &[&str]| run(&[&["sweep", &bert, CLEAN], more].concat());
    ask(&["--hooks", "nothing"]).failed(1, "hooks[0]");
    ask(&["--hooks", "resid_pre", "--by", "head"]).failed(1, "by[0]");
    ask(&["--most", "3"]).failed(1, "most");
    ask(&["--path-to", "q"]).failed(1, "path");
    ask(&["--path-to", "q[neck=1]"]).failed(2, "none of layer");
    ask(&["--mean-file", "nowhere.txt"]).failed(1, "cannot be read");
    ask(&["--divergence", "--method", "estimate"]).failed(1, "method");
    ask(&["--patch", "a film of the film"]).failed(1, "as many tokens");
    let paths = ["--patch", CORRUPTED, "--path-to", "q[layer=2;head=1]"];
    let page = ask(&paths).ok().out;
    assert!(page.contains("RESTORED"), "{page}");
    let mean = ["--mean", CORRUPTED, "--mean", "a film", "--divergence"];
    let page = ask(&mean).ok().out;
    assert!(page.contains("divergence of the prediction"), "{page}");
}
