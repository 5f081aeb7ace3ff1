//! `steer`, without a daemon.

mod cli_support;

use cli_support::{fixture, run};
use serde_json::Value;

/// A copy of a model, beside which vectors are stored.
fn place(name: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("models").join("model");
    std::fs::create_dir_all(&model).unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    let model = model.display().to_string();
    (folder, model)
}

#[test]
fn a_vector_is_learned_listed_and_applied() {
    let (folder, model) = place("gpt2.legacy14");
    let file = folder.path().join("negative.txt");
    std::fs::write(&file, "a bad film\n\nthe end of it\n").unwrap();
    let file = file.display().to_string();
    let learn = [
        "steer",
        "learn",
        &model,
        "--name",
        "mood",
        "--positive",
        "a good film",
        "--positive",
        "the story is good",
        "--negative-file",
        &file,
    ];
    let table = run(&learn).ok();
    for part in [
        "SEPARATION",
        "blocks.0.hook_resid_post",
        "4 examples, from negative to positive",
        "*",
    ] {
        assert!(table.out.contains(part), "{part}: {}", table.out);
    }
    assert!(table.err.contains("stored as mood"), "{}", table.err);
    run(&learn).failed(1, "there is a probe \"mood\" already");
    let more = ["--replace", "--kind", "pca", "--layers", "1", "--json"];
    let told = run(&[&learn[..], &more].concat()).ok();
    let told: Value = serde_json::from_str(&told.out).unwrap();
    assert_eq!(told["kind"], "pca");
    assert_eq!(told["reports"].as_array().unwrap().len(), 1);
    assert!((told["reports"][0]["length"].as_f64().unwrap() - 1.0).abs() < 1e-6);
    assert!(told["reports"][0]["separation"].as_f64().unwrap() > 0.0);

    let listed = run(&["steer", "list", &model]).ok().out;
    assert!(
        listed.contains("mood") && listed.contains("negative to positive"),
        "{listed}"
    );
    let listed = run(&["steer", "list", &model, "--json"]).ok().out;
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed["vectors"][0]["name"], "mood");
    let shown = run(&["probe", "show", &model, "mood"]).ok().out;
    assert!(shown.contains("SEPARATION"), "{shown}");
    let picture = folder.path().join("curve.png").display().to_string();
    run(&["probe", "show", &model, "mood", "-o", &picture]).failed(1, "no curve");

    let apply = |more: &[&str]| {
        let args = ["steer", "apply", &model, "the film is", "mood", "--json"];
        let out = run(&[&args[..], more].concat()).ok().out;
        serde_json::from_str::<Value>(&out).unwrap()
    };
    let pushed = apply(&["--layer", "1", "--scale=-3"]);
    assert!(pushed["effect"][0]["kl"].as_f64().unwrap() > 0.0);
    let edit = "blocks.1.hook_resid_post add probe:mood@blocks.1.hook_resid_post -3";
    let args = ["intervene", &model, "the film is", "--json", "--edit", edit];
    let same: Value = serde_json::from_str(&run(&args).ok().out).unwrap();
    assert_eq!(pushed["effect"], same["effect"]);
    assert_eq!(
        apply(&["--scale", "0"])["effect"][0]["flipped"],
        Value::Bool(false)
    );
    let page = run(&["steer", "apply", &model, "the film is", "mood"]).ok();
    assert!(page.out.starts_with("position "), "{}", page.out);
    run(&["steer", "apply", &model, "a", "mood", "--layer", "0"])
        .failed(1, "has nothing of layer 0: it has blocks.1.hook_resid_post");
}

#[test]
fn mistakes_are_said() {
    let (folder, model) = place("bert.legacy14");
    let learn = ["steer", "learn", &model, "--name", "mood"];
    run(&learn).failed(2, "--positive");
    let texts = ["--positive", "a good film", "--negative", "a bad film"];
    let ask = |more: &[&str]| run(&[&learn[..], &texts, more].concat());
    ask(&["--kind", "mlp"]).failed(2, "--kind");
    ask(&["--layers", "77"]).failed(1, "header.layers[0]");
    ask(&["--hooks", "nothing"]).failed(1, "header.hooks[0]");
    let empty = folder.path().join("empty.txt");
    std::fs::write(&empty, "\n\n").unwrap();
    let empty = empty.display().to_string();
    ask(&["--positive-file", &empty]).failed(1, "there are no texts");
    run(&["steer", "apply", &model, "a film", "nobody"]).failed(1, "no probe \"nobody\"");
    let none = run(&["steer", "list", &model]).ok().out;
    assert!(none.contains("there are no vectors yet"), "{none}");
}
