//! `lens`, without a daemon.

mod cli_support;

use cli_support::{fixture, run};
use serde_json::Value;

fn model(name: &str) -> String {
    fixture(name).display().to_string()
}

const IDS: &str = "2,9,17,30,11,3";

#[test]
fn every_state_says_something_on_the_terminal() {
    let gpt2 = model("gpt2.legacy14");
    let page = run(&["lens", &gpt2, "the film is"]).ok().out;
    for said in ["embed", "layer 2", "entropy", "probability of", "rank of"] {
        assert!(page.contains(said), "{said}: {page}");
    }
    let args = [
        "lens",
        &gpt2,
        "--ids",
        IDS,
        "--target",
        "7",
        "--attribution",
    ];
    let page = run(&args).ok().out;
    for said in ["2 mlp_out", "bias", "contribution of each head", "sum = "] {
        assert!(page.contains(said), "{said}: {page}");
    }
    assert!(!page.contains("entropy"), "{page}");
    let page = run(&["lens", &model("bert.legacy14"), "a film", "--residual"]);
    assert!(page.ok().out.contains("length of the residual stream"));
    let page = run(&["lens", &model("bert.legacy14"), "the film is good"]);
    assert!(page.ok().out.contains("WHOLE"));
}

#[test]
fn json_and_files_hold_all_of_it() {
    let gpt2 = model("gpt2.legacy14");
    let all = ["--lens", "--attribution", "--residual", "--logits"];
    let ask = [
        "lens",
        &gpt2,
        "--ids",
        IDS,
        "--target",
        "7",
        "--against",
        "12",
    ];
    let json = run(&[&ask[..], &all, &["--json"]].concat()).ok().out;
    let json: Value = serde_json::from_str(&json).unwrap();
    let tensors = json["tensors"].as_object().unwrap();
    for name in ["logits", "head_contributions", "residual_cosine"] {
        assert!(tensors.contains_key(name), "{name}: {:?}", tensors.keys());
    }
    assert_eq!(json["terms"][1]["weight"], -1.0);
    assert_eq!(json["attribution"]["affine"], true);
    let folder = tempfile::tempdir().unwrap();
    for ending in ["npz", "json", "png", "html"] {
        let path = folder.path().join(format!("lens.{ending}"));
        let path = path.to_str().unwrap();
        run(&[&ask[..], &all, &["-o", path]].concat()).ok();
        assert!(std::fs::metadata(path).unwrap().len() > 100, "{ending}");
    }
    let page = std::fs::read_to_string(folder.path().join("lens.html")).unwrap();
    assert!(page.contains("contribution of each component"));
    let file = std::fs::File::open(folder.path().join("lens.npz")).unwrap();
    let mut file = ndarray_npy::NpzReader::new(file).unwrap();
    let norm: ndarray::ArrayD<f32> = file.by_name("residual_norm").unwrap();
    assert_eq!(norm.shape(), [4, 6]);
}

#[test]
fn mistakes_are_said() {
    let gpt2 = model("gpt2.legacy14");
    let ask = |more: &[&str]| run(&[&["lens", &gpt2, "--ids", IDS], more].concat());
    ask(&["--no-heads"]).failed(2, "--attribution");
    ask(&["-o", "lens.txt"]).failed(2, ".npz");
    ask(&["--positions=9"]).failed(1, "positions[0]");
    ask(&["--tuned", "nothing"]).failed(1, "nothing");
    ask(&["--target", "nobody"]).failed(1, "target.choice.label");
    let bert = run(&["lens", &model("bert.legacy14"), "a film", "--attribution"]);
    bert.failed(1, "normalises its own sum");
}
