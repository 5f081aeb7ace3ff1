//! `intervene`, without a daemon.

mod cli_support;

use std::{fs::File, path::Path};

use cli_support::{fixture, run};
use ndarray::ArrayD;
use ndarray_npy::NpzReader;
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

/// Runs with the heads of the first layer gone, and more arguments.
const SILENT: [&str; 3] = ["the film is good", "--edit", "z[layer=0] zero"];

/// An array of an .npz file.
fn array(path: &Path, name: &str) -> ArrayD<f32> {
    let mut npz = NpzReader::new(File::open(path).unwrap()).unwrap();
    npz.by_name(name).unwrap()
}

#[test]
fn hook_points_of_both_runs_are_compared() {
    let bert = model("bert.legacy14");
    let plain = [&["intervene", &bert], &SILENT[..]].concat();
    let hooks = ["--hooks", "resid_pre,pattern", "--layers", "0-1"];
    let page = run(&[&plain[..], &hooks].concat()).ok().out;
    for part in [
        "total variation",
        "RELATIVE CHANGE",
        "blocks.0.hook_resid_pre",
    ] {
        assert!(page.contains(part), "{part} in {page}");
    }
    let page = run(&plain).ok().out;
    assert!(!page.contains("RELATIVE CHANGE"), "{page}");

    let told = json(&[&plain[..], &hooks].concat());
    let of = |name: &str| {
        let mut hooks = told["hooks"].as_array().unwrap().iter();
        hooks.find(|h| h["name"] == name).unwrap()["relative_change"].as_f64()
    };
    assert_eq!(of("blocks.0.hook_resid_pre"), Some(0.0), "before the edit");
    assert!(of("blocks.1.hook_resid_pre") > Some(0.0), "behind it");
    let tensors = &told["tensors"];
    let shape = &tensors["modified:blocks.1.attn.hook_pattern"]["shape"];
    assert_eq!(
        shape,
        &tensors["original:blocks.1.attn.hook_pattern"]["shape"]
    );
    assert!(json(&plain)["tensors"].is_null());

    let captured = json(&[
        "capture",
        &bert,
        SILENT[0],
        "--hooks",
        "blocks.1.hook_resid_pre",
    ]);
    assert_eq!(
        captured["tensors"]["blocks.1.hook_resid_pre"]["data"],
        tensors["original:blocks.1.hook_resid_pre"]["data"]
    );
}

#[test]
fn files_are_what_their_endings_say() {
    let bert = model("bert.legacy14");
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let write = |name: &str, more: &[&str]| {
        let path = file(name).display().to_string();
        run(&[&["intervene", &bert], &SILENT[..], &["-o", &path], more].concat()).ok()
    };
    let hooks = ["--hooks", "resid_post,pattern", "--layers", "1"];
    write("both.npz", &hooks);
    let [original, modified, difference] = ["original", "modified", "difference"].map(|what| {
        array(
            &file("both.npz"),
            &format!("{what}:blocks.1.hook_resid_post"),
        )
    });
    assert_eq!(&modified - &original, difference);
    assert!(difference.iter().any(|d| *d != 0.0));
    let logits = array(&file("both.npz"), "difference:logits");
    assert_eq!(logits.ndim(), 1);

    write("both.json", &hooks);
    let told: Value = serde_json::from_slice(&std::fs::read(file("both.json")).unwrap()).unwrap();
    assert!(told["effect"][0]["kl"].is_number() && told["tensors"]["original:logits"].is_object());

    write("both.html", &hooks);
    let page = std::fs::read_to_string(file("both.html")).unwrap();
    for part in ["probability before and after", "head 1", "td class=\"bar\""] {
        assert!(page.contains(part), "{part}");
    }
    let said = write("both.png", &["--hooks", "z,pattern", "--layers", "1"]).err;
    assert!(
        said.contains("not drawn") && said.contains("hook_z"),
        "{said}"
    );
    let png = std::fs::read(file("both.png")).unwrap();
    assert!(png.starts_with(b"\x89PNG"));
    run(&[&["intervene", &bert], &SILENT[..], &["-o", "a.txt"]].concat())
        .failed(2, "ends in none of");
}

#[test]
fn the_output_is_compared_where_nothing_is_predicted() {
    // Without a mask in the text a masked language model predicts nothing, like an encoder without a head.
    let masked = model("encoder_layer.legacy17");
    let args = [
        "intervene",
        &masked,
        "--ids",
        "5,6,7,8,9,10,11,12,13,14,15,16",
    ];
    let edit = ["--edit", "z[layer=0] zero"];
    let told = json(&[&args[..], &edit].concat());
    let hooks = told["hooks"].as_array().unwrap();
    assert_eq!(hooks.len(), 1, "{told}");
    assert!(hooks[0]["relative_change"].as_f64() > Some(0.0), "{told}");
    assert_eq!(told["effect"], serde_json::json!([]));
    let page = run(&[&args[..], &edit].concat()).ok().out;
    assert!(
        page.contains("predicts nothing") && page.contains("RELATIVE CHANGE"),
        "{page}"
    );
    let hooks = ["--hooks", "resid_post"];
    let named = json(&[&args[..], &edit, &hooks].concat());
    let named = named["hooks"].as_array().unwrap();
    assert!(
        named
            .iter()
            .all(|h| h["name"].as_str().unwrap().contains("resid_post"))
    );
}

#[test]
fn models_without_a_tokenizer_take_ids() {
    let circuit = model("circuit.legacy17");
    let ids = ["--ids", "1,2,3,4,5"];
    let ask = |edit: &str, more: &[&str]| {
        json(&[&["intervene", &circuit, "--edit", edit][..], &ids, more].concat())
    };
    let source = ["--source-ids", "1,2,3,4,6"];
    let patched = ask("resid_pre[layer=0] interchange", &source);
    let other = json(&["predict", &circuit, "--ids", "1,2,3,4,6"]);
    assert_eq!(patched["modified"], other["predictions"][0]);
    let mean = ask("z mean", &["--mean-ids", "1,2", "--mean-ids", "3, 4,5"]);
    assert_ne!(mean["original"], mean["modified"]);
    let page = run(&[&["intervene", &circuit, "--edit", "z zero"][..], &ids].concat());
    let page = page.ok().out;
    assert!(page.starts_with("position 4\n"), "{page}");
    let sweep = [
        "sweep",
        &circuit,
        "--hooks",
        "resid_pre",
        "--by",
        "position",
    ];
    let page = run(&[&sweep[..], &ids].concat()).ok().out;
    assert!(page.contains("pos 4") && !page.contains("()"), "{page}");
    let mean = run(&[&sweep[..], &ids, &["--mean-ids", "1,2"]].concat());
    mean.ok();
    let wrong = ["--mean-ids", "a"];
    run(&[&sweep[..], &ids, &wrong].concat()).failed(2, "no token id");
}

#[test]
fn ranges_are_all_their_numbers() {
    let bert = model("bert.legacy14");
    let ask = |edit: &str| json(&["predict", &bert, "the film is good", "--edit", edit]);
    let range = ask("z[layer=0-1;head=1;pos=-3--1] zero");
    assert_eq!(range, ask("z[layer=0,1;head=1;pos=-3,-2,-1] zero"));
    assert_ne!(range, ask("z[layer=0;head=1] zero"));
}
