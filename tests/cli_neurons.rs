//! `neurons`, without a daemon.

mod cli_support;

use cli_support::{fixture, run};
use serde_json::Value;

fn model(name: &str) -> String {
    fixture(name).display().to_string()
}

#[test]
fn a_text_is_shown_token_by_token() {
    let bert = model("bert.legacy14");
    let page = run(&[
        "neurons",
        &bert,
        "the film is good",
        "--top",
        "4",
        "--by",
        "max",
    ]);
    let page = page.ok().out;
    assert!(
        page.contains("NEURON") && page.contains("text 1") && page.contains('['),
        "{page}"
    );
    let json = run(&[
        "neurons",
        &bert,
        "the film is good",
        "--neuron",
        "1.3,0.2",
        "--json",
    ]);
    let json: Value = serde_json::from_str(&json.ok().out).unwrap();
    let told: Vec<(u64, u64)> = json["neurons"]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| (n["layer"].as_u64().unwrap(), n["index"].as_u64().unwrap()))
        .collect();
    assert_eq!(told, [(1, 3), (0, 2)]);
    let shape = &json["texts"][0]["activations"]["shape"];
    assert_eq!(shape[0], 2);
    assert_eq!(
        shape[1].as_u64().unwrap() as usize,
        json["texts"][0]["tokens"].as_array().unwrap().len()
    );
}

#[test]
fn sets_of_texts_are_compared_and_written() {
    let bert = model("bert.legacy14");
    let folder = tempfile::tempdir().unwrap();
    let (good, bad) = (
        folder.path().join("good.txt"),
        folder.path().join("bad.txt"),
    );
    std::fs::write(&good, "the film is good\na good film\n").unwrap();
    std::fs::write(&bad, "the film is bad\n\nbad\n").unwrap();
    let (good, bad) = (good.to_str().unwrap(), bad.to_str().unwrap());
    let ask = [
        "neurons",
        &bert,
        "--text-file",
        good,
        "--contrast",
        bad,
        "--top",
        "3",
    ];
    let json = run(&[&ask[..], &["--json", "--all"]].concat()).ok().out;
    let json: Value = serde_json::from_str(&json).unwrap();
    let contrasts: Vec<f64> = json["neurons"]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n["contrast"].as_f64().unwrap())
        .collect();
    assert_eq!(contrasts.len(), 3);
    assert!(contrasts.windows(2).all(|w| w[0] >= w[1]), "{contrasts:?}");
    assert!(json["statistics"]["mean:blocks.0.mlp.hook_post"]["data"].is_array());
    for ending in ["npz", "json", "png", "html"] {
        let file = folder.path().join(format!("neurons.{ending}"));
        run(&[&ask[..], &["-o", file.to_str().unwrap()]].concat()).ok();
        assert!(std::fs::metadata(&file).unwrap().len() > 300, "{ending}");
    }
}

#[test]
fn ids_and_tensors_are_texts_too() {
    let circuit = model("circuit.legacy17");
    let ask = |more: &[&str]| {
        let args = ["neurons", &circuit, "--ids", "1,2,3,4", "--top", "2"];
        run(&[&args[..], more].concat()).ok().out
    };
    let page = ask(&["--by", "max"]);
    assert!(page.contains("text 1") && !page.contains("[]"), "{page}");
    let told: Value = serde_json::from_str(&ask(&["--json"])).unwrap();
    let activations = &told["texts"][0]["activations"]["shape"];
    assert_eq!(activations, &serde_json::json!([2, 4]));
}

#[test]
fn mistakes_are_said() {
    let bert = model("bert.legacy14");
    run(&["neurons", &bert]).failed(2, "TEXT");
    run(&["neurons", &bert, "--ids", "1", "--text-file", "-"]).failed(2, "--text-file");
    let ask = |more: &[&str]| run(&[&["neurons", &bert, "a film"], more].concat());
    ask(&["--neuron", "3"]).failed(2, "LAYER.INDEX");
    ask(&["--neuron", "0.1000000"]).failed(1, "header.neurons[0].index");
    ask(&["--hook", "pattern"]).failed(1, "header.hook");
    ask(&["--by", "contrast"]).failed(1, "header.by");
    ask(&["--examples", "1000"]).failed(1, "header.examples");
    ask(&["--contrast", "/no/such/file"]).failed(1, "cannot read");
}
