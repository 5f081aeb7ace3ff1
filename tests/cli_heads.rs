//! `heads`, without a daemon.

mod cli_support;

use cli_support::{fixture, run};
use serde_json::Value;

fn model(name: &str) -> String {
    fixture(name).display().to_string()
}

#[test]
fn measures_come_as_maps_json_and_files() {
    let bert = model("bert.legacy14");
    let map = run(&["heads", &bert, "the film is good", "good film"])
        .ok()
        .out;
    for name in ["entropy", "previous_token", "induction", "layer 1"] {
        assert!(map.contains(name), "{name} is not in {map}");
    }
    let json = run(&[
        "heads",
        &bert,
        "the film is good",
        "--measure",
        "self,induction",
        "--json",
    ]);
    let json: Value = serde_json::from_str(&json.ok().out).unwrap();
    let names: Vec<&String> = json["tensors"].as_object().unwrap().keys().collect();
    assert_eq!(names, ["induction", "self"]);
    assert_eq!(json["sequences"].as_array().unwrap().len(), 4);
    assert!(json["rankings"]["self"][0]["score"].as_f64().unwrap() > 0.0);

    let folder = tempfile::tempdir().unwrap();
    let texts = folder.path().join("texts.txt");
    std::fs::write(&texts, "the film is good\n\ngood film\n").unwrap();
    for ending in ["npz", "json", "png", "html"] {
        let file = folder.path().join(format!("heads.{ending}"));
        let (texts, path) = (texts.to_str().unwrap(), file.to_str().unwrap());
        run(&[
            "heads",
            &bert,
            "--text-file",
            texts,
            "--positions",
            "-o",
            path,
        ])
        .ok();
        assert!(std::fs::metadata(&file).unwrap().len() > 500, "{ending}");
    }
    let html = std::fs::read_to_string(folder.path().join("heads.html")).unwrap();
    assert!(html.contains("similarity of positions") && html.contains("attention by offset"));
}

#[test]
fn heads_of_a_kind_are_looked_for_on_repeated_tokens() {
    let gpt2 = model("gpt2.legacy14");
    let found = run(&[
        "heads",
        &gpt2,
        "--measure",
        "induction",
        "--detect",
        "induction_head",
        "--exclude-bos",
        "--seed",
        "3",
        "--json",
    ]);
    let json: Value = serde_json::from_str(&found.ok().out).unwrap();
    assert_eq!(json["seed"], 3);
    assert!(json["tensors"]["detect.0.induction_head"]["data"].is_array());
    // A model that turns its queries and keys has no positions to compare, and the offsets come all the same.
    let llama = model("llama.legacy14");
    let map = run(&["heads", &llama, "the film", "--positions"]).ok().out;
    assert!(
        map.contains("attention by offset") && !map.contains("similarity of"),
        "{map}"
    );
}

#[test]
fn mistakes_are_said() {
    let bert = model("bert.legacy14");
    let ask = |more: &[&str]| run(&[&["heads", &bert, "a film"], more].concat());
    ask(&["--measure", "nothing"]).failed(2, "nothing");
    ask(&["--abs"]).failed(2, "--detect");
    ask(&["--layers", "99"]).failed(1, "layers[0]");
    ask(&["--repeat", "100000"]).failed(1, "repeated.length");
    ask(&["-o", "heads.txt"]).failed(2, "none of .npz");
    run(&["heads", &bert, "--text-file", "/no/such/file"]).failed(1, "cannot read");
}
