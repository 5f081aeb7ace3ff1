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

/// What a command says as JSON.
fn json(args: &[&str]) -> Value {
    let out = run(&[args, &["--json"]].concat()).ok().out;
    serde_json::from_str(&out).unwrap()
}

#[test]
fn edits_ride_on_every_command_that_runs_a_model() {
    let bert = model("bert.legacy14");
    let text = "the film is good";
    let edit = ["--edit", "z[layer=1;head=0] zero"];
    let intervened = json(&[&["intervene", &bert, text][..], &edit].concat());
    let predicted = json(&[&["predict", &bert, text][..], &edit].concat());
    let logit = |prediction: &Value| prediction["at"][0]["candidates"][0]["logit"].as_f64();
    let changed = logit(&predicted["predictions"][0]).unwrap();
    assert_eq!(Some(changed), logit(&intervened["modified"]));

    for command in [
        &["capture", "--hooks", "resid_post"][..],
        &["attribute", "-m", "input_x_gradient"],
        &["lens"],
        &["heads", "--measure", "entropy"],
        &["neurons", "--top", "5"],
    ] {
        let (name, options) = command.split_first().unwrap();
        let asked = [&[*name, &bert, text], options].concat();
        let (plain, edited) = (json(&asked), json(&[&asked[..], &edit].concat()));
        let without_times = |mut answer: Value| {
            answer.as_object_mut().unwrap().remove("summary");
            answer
        };
        assert_ne!(without_times(plain), without_times(edited), "{name}");
        run(&[&asked[..], &["--edit", "z[head=99] zero"]].concat())
            .failed(1, "intervention.edits[0].heads");
    }
}

#[test]
fn values_and_means_come_from_files() {
    let bert = model("bert.legacy14");
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let write = |name: &str, arrays: &[(&str, ndarray::Array1<f32>)]| {
        let mut file = ndarray_npy::NpzWriter::new(std::fs::File::create(path(name)).unwrap());
        for (name, array) in arrays {
            file.add_array(*name, array).unwrap();
        }
        file.finish().unwrap();
    };
    let captured = json(&["capture", &bert, "a film", "--hooks", "hidden_states.0"]);
    let tensors = captured["tensors"].as_object().unwrap();
    let shape = &tensors.values().next().unwrap()["shape"];
    let width = shape[1].as_u64().unwrap() as usize;
    write("one.npz", &[("v", ndarray::Array1::ones(width))]);
    write(
        "two.npz",
        &[
            ("up", ndarray::Array1::ones(width)),
            ("down", -ndarray::Array1::<f32>::ones(width)),
        ],
    );
    let ask = |edit: &str, more: &[&str]| {
        let args = ["predict", &bert, "the film is good", "--edit", edit];
        json(&[&args[..], more].concat())
    };
    let one = ask("resid_post[layer=0] add 1", &[]);
    let file = path("one.npz");
    assert_eq!(ask(&format!("resid_post[layer=0] add {file}"), &[]), one);
    let two = path("two.npz");
    let down = format!("resid_post[layer=0] add {two}:down -1");
    assert_eq!(ask(&down, &[]), one);
    assert_ne!(
        ask(&format!("resid_post[layer=0] project-out {file}"), &[]),
        one
    );

    std::fs::write(path("texts.txt"), "a good film\nthe bad film is the film\n").unwrap();
    let texts = path("texts.txt");
    let mean = ask("z[layer=1] mean", &["--mean-file", &texts]);
    let given = [
        "--mean",
        "a good film",
        "--mean",
        "the bad film is the film",
    ];
    assert_eq!(ask("z[layer=1] mean", &given), mean);
    assert_ne!(ask("z[layer=1] zero", &[]), mean);

    let ask = |edit: &str| run(&["predict", &bert, "a film", "--edit", edit]);
    ask("z mean").failed(2, "--mean-file");
    ask(&format!("z set {two}")).failed(2, "several arrays");
    ask(&format!("z set {two}:left")).failed(2, "no array \"left\"");
    ask("z set nowhere.npz").failed(2, "nowhere.npz");
    ask(&format!("z[layer=0] set {file}")).failed(1, "intervention.edits[0].set");
    run(&["predict", &bert, "a film", "--mean", "a film"]).failed(2, "mean");
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
