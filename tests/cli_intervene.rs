//! `intervene`, without a daemon.

mod cli_support;

use cli_support::{fixture, run};
use serde_json::Value;

fn model(name: &str) -> String {
    fixture(name).display().to_string()
}

#[test]
fn edits_change_what_is_said_and_those_of_nothing_do_not() {
    let bert = model("bert.legacy14");
    let ask = |edit: &str| {
        let args = ["intervene", &bert, "the film is good", "--edit", edit];
        let json = [&args[..], &["--json"]].concat();
        serde_json::from_str::<Value>(&run(&json).ok().out).unwrap()
    };
    let gone = ask("z[layer=1;head=0,1] zero");
    assert!(gone["effect"][0]["kl"].as_f64().unwrap() > 0.0, "{gone}");
    assert_ne!(gone["original"], gone["modified"]);
    let same = ask("mlp.hook_post scale 1");
    assert!(same["effect"][0]["kl"].as_f64().unwrap() < 1e-9, "{same}");

    let table = run(&[
        "intervene",
        &bert,
        "the film is good",
        "--source",
        "good film is the",
        "--edit",
        "resid_pre[layer=2;pos=0] interchange",
        "--edit",
        "z[layer=2] noise 0.5 3",
    ])
    .ok()
    .out;
    assert!(table.contains("total variation"), "{table}");
}

#[test]
fn the_next_token_has_its_position() {
    let gpt2 = model("gpt2.legacy14");
    let edit = "attn_out[layer=0] zero";
    let out = run(&["intervene", &gpt2, "the film is", "--edit", edit])
        .ok()
        .out;
    assert!(out.starts_with("position "), "{out}");
}

#[test]
fn mistakes_are_said() {
    let bert = model("bert.legacy14");
    run(&["intervene", &bert, "a film"]).failed(2, "--edit");
    let longer = [
        "intervene",
        &bert,
        "a film",
        "--source",
        "a film of the film",
    ];
    let edit = "resid_pre[layer=1;pos=0] interchange";
    run(&[&longer[..], &["--edit", edit]].concat())
        .failed(1, "intervention.edits[0].interchange.positions");
    let edit = "resid_pre[layer=1;pos=0] interchange -1";
    run(&[&longer[..], &["--edit", edit]].concat()).ok();
    let ask = |edit: &str| run(&["intervene", &bert, "a film", "--edit", edit]);
    ask("z[neck=1] zero").failed(2, "none of layer, head");
    ask("z[head=99] zero").failed(1, "intervention.edits[0].heads");
    ask("resid_pre interchange").failed(1, "intervention.edits[0].interchange.source");
    ask("resid_pre[layer=1] add probe:nobody").failed(1, "nobody");
}
