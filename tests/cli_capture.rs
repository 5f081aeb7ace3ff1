//! The commands about a model: against a daemon, and in process through the same service.

mod cli_support;

use std::{collections::BTreeMap, fs::File, path::Path};

use cli_support::{Server, fixture, run};
use introspectd::service::wire::introspect::{
    CaptureRequest, Input, Selection, TokenIds, capture_response::Item,
    capture_service_client::CaptureServiceClient, input::Kind,
};
use ndarray::{ArrayD, Axis, IxDyn, OwnedRepr};
use ndarray_npy::{NpzReader, NpzWriter, ReadableElement};
use serde_json::Value;

/// Tolerance `Rewritten`: other operators, same mathematics.
const REWRITTEN: f32 = 1e-4;
const MODEL: &str = "bert.legacy14";

fn array<T: ReadableElement>(path: &Path, name: &str) -> ArrayD<T> {
    NpzReader::new(File::open(path).unwrap())
        .unwrap()
        .by_name::<OwnedRepr<T>, IxDyn>(name)
        .unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Largest difference, relative to the largest value.
#[track_caller]
fn assert_close(what: &str, got: &ArrayD<f32>, expected: &ArrayD<f32>) {
    assert_eq!(got.shape(), expected.shape(), "{what}");
    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let off = got
        .iter()
        .zip(expected)
        .fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(off <= REWRITTEN * largest, "{what}: off by {off:.1e}");
}

fn ids(path: &Path) -> Vec<u32> {
    let all = array::<i64>(path, "in_input_ids");
    all.index_axis(Axis(0), 0)
        .iter()
        .map(|id| u32::try_from(*id).unwrap())
        .collect()
}

fn joined(ids: &[u32]) -> String {
    ids.iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(",")
}

/// What the daemon sends, put together by hand.
async fn capture(server: &Server, tokens: &[u32], hooks: &[&str]) -> BTreeMap<String, ArrayD<f32>> {
    let endpoint = tonic::transport::Endpoint::from_shared(server.url()).unwrap();
    let mut client = CaptureServiceClient::new(endpoint.connect().await.unwrap());
    let request = CaptureRequest {
        model: MODEL.into(),
        input: Some(Input {
            kind: Some(Kind::Tokens(TokenIds {
                ids: tokens.to_vec(),
                type_ids: Vec::new(),
            })),
        }),
        selection: Some(Selection {
            hooks: hooks.iter().map(|h| (*h).to_owned()).collect(),
            ..Selection::default()
        }),
        intervention: None,
    };
    let mut stream = client.capture(request).await.unwrap().into_inner();
    let mut bytes: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(Item::Tensor(t)) = message.item {
            let shape = t
                .shape
                .iter()
                .map(|d| usize::try_from(*d).unwrap())
                .collect();
            bytes
                .entry(t.name)
                .or_insert((shape, Vec::new()))
                .1
                .extend_from_slice(&t.data);
        }
    }
    bytes
        .into_iter()
        .map(|(name, (shape, bytes))| {
            let values = bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|c| f32::from_le_bytes(*c))
                .collect();
            (name, ArrayD::from_shape_vec(IxDyn(&shape), values).unwrap())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_npz_holds_what_the_daemon_sends_and_what_pytorch_computes() {
    let server = Server::with(&[MODEL]).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.npz");
    let reference = fixture(MODEL).join("reference.npz");
    let tokens = ids(&reference);
    let hooks = ["attentions.*", "hidden_states.*"];
    let args = [
        "capture",
        MODEL,
        "--ids",
        &joined(&tokens),
        "--hooks",
        &hooks.join(","),
        "-o",
    ];
    server
        .run(&[&args[..], &[file.to_str().unwrap()]].concat())
        .await
        .ok();

    let sent = capture(&server, &tokens, &hooks).await;
    assert!(
        sent.len() >= 8,
        "three attentions, four hidden states, logits"
    );
    for (name, expected) in &sent {
        assert_eq!(&array::<f32>(&file, name), expected, "{name}, bit for bit");
    }
    let written = array::<i64>(&file, "token_ids");
    assert!(
        written
            .iter()
            .zip(&tokens)
            .all(|(a, b)| *a == i64::from(*b))
    );

    // Aliases lead to canonical names by what `inspect` tells.
    let model: Value =
        serde_json::from_str(&server.run(&["inspect", MODEL, "--json"]).await.ok().out).unwrap();
    let canonical = |alias: &str| {
        let hooks = model["hooks"].as_array().unwrap();
        let hook = hooks
            .iter()
            .find(|h| h["aliases"].as_array().unwrap().iter().any(|a| a == alias));
        hook.unwrap_or_else(|| panic!("no {alias}"))["name"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    for (alias, golden) in [
        ("attentions.0", "attn_0"),
        ("attentions.2", "attn_2"),
        ("hidden_states.0", "hidden_0"),
        ("hidden_states.3", "hidden_3"),
    ] {
        let expected = array::<f32>(&reference, golden).index_axis_move(Axis(0), 0);
        assert_close(alias, &array(&file, &canonical(alias)), &expected);
    }
    let expected = array::<f32>(&reference, "logits").index_axis_move(Axis(0), 0);
    assert_close("logits", &array(&file, "logits"), &expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_file_is_what_its_ending_says() {
    let server = Server::with(&[MODEL]).await;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();

    server
        .run(&["capture", MODEL, "some text", "-o", &path("a.json")])
        .await
        .ok();
    let json: Value = serde_json::from_slice(&std::fs::read(path("a.json")).unwrap()).unwrap();
    let tokens = json["tokens"].as_array().unwrap().len();
    let printed = server
        .run(&["capture", MODEL, "some text", "--json"])
        .await
        .ok()
        .out;
    let printed: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(
        printed["tensors"], json["tensors"],
        "the same on standard output"
    );
    let pattern = &json["tensors"]["blocks.0.attn.hook_pattern"];
    assert_eq!(pattern["shape"], serde_json::json!([4, tokens, tokens]));
    let first_row: f64 = pattern["data"][0][0]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_f64().unwrap())
        .sum();
    assert!(
        (first_row - 1.0).abs() < f64::from(REWRITTEN),
        "{first_row}"
    );

    server
        .run(&[
            "capture",
            MODEL,
            "some text",
            "--dtype",
            "bf16",
            "--sparse=2",
            "-o",
            &path("s.json"),
        ])
        .await
        .ok();
    let sparse: Value = serde_json::from_slice(&std::fs::read(path("s.json")).unwrap()).unwrap();
    let kept = &sparse["tensors"]["blocks.0.attn.hook_pattern"];
    assert_eq!(kept["dtype"], "bf16");
    assert!(
        kept["counts"]
            .as_array()
            .unwrap()
            .iter()
            .all(|c| c.as_u64().unwrap() <= 2)
    );

    server
        .run(&[
            "capture",
            MODEL,
            "some text",
            "--layers",
            "1",
            "--heads",
            "2,0",
            "-o",
            &path("a.png"),
        ])
        .await
        .ok();
    let png = png::Decoder::new(std::io::BufReader::new(File::open(path("a.png")).unwrap()));
    assert!(png.read_info().unwrap().info().width > 50);
    server
        .run(&[
            "capture",
            MODEL,
            "<script>",
            "--sparse",
            "-o",
            &path("a.html"),
        ])
        .await
        .ok();
    let page = std::fs::read_to_string(path("a.html")).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.matches("</script>").count() == 1);

    // A float that half precision cannot hold exactly comes back as what it can.
    for (dtype, name) in [("f32", "full.npz"), ("f16", "half.npz")] {
        let args = [
            "capture",
            MODEL,
            "some text",
            "--hooks",
            "resid_post.0",
            "--dtype",
            dtype,
            "-o",
        ];
        server.run(&[&args[..], &[&path(name)]].concat()).await.ok();
    }
    let name = "blocks.0.hook_resid_post";
    let full = array::<f32>(Path::new(&path("full.npz")), name);
    let half = array::<f32>(Path::new(&path("half.npz")), name);
    let rounded = full.mapv(|v| half::f16::from_f32(v).to_f32());
    assert_eq!(half, rounded);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_terminal_shows_prediction_heat_map_and_times() {
    let server = Server::with(&[MODEL]).await;
    let page = server
        .run(&[
            "capture",
            MODEL,
            "some text",
            "--layers",
            "1",
            "--heads",
            "3",
        ])
        .await
        .ok()
        .out;
    assert!(page.contains("layer 1, head 3"), "{page}");
    assert!(page.contains("PREDICTION"), "{page}");
    assert!(page.contains("run "), "{page}");
    assert!(!page.contains('\x1b'), "no colour into a pipe: {page}");
    let page = server
        .run(&["predict", MODEL, "one", "two", "--json"])
        .await
        .ok()
        .out;
    let json: Value = serde_json::from_str(&page).unwrap();
    assert_eq!(json["predictions"].as_array().unwrap().len(), 2);
    let table = server.run(&["tokenize", MODEL, "é b"]).await.ok().out;
    assert!(table.contains("0..2"), "bytes, not characters: {table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_line_of_a_file_is_answered_or_told_by_its_number() {
    let server = Server::with(&[MODEL]).await;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let long = "word ".repeat(5000);
    std::fs::write(
        path("texts.txt"),
        format!("first\n\n{long}\r\nfourth\r\nfifth"),
    )
    .unwrap();

    let ran = server
        .run(&[
            "capture",
            MODEL,
            "--text-file",
            &path("texts.txt"),
            "--sparse",
            "-o",
            &path("out.jsonl"),
        ])
        .await
        .failed(1, "line 3: ");
    assert!(ran.err.contains("1 of 4 texts failed"), "{ran:?}");
    let lines: Vec<u64> = std::fs::read_to_string(path("out.jsonl"))
        .unwrap()
        .lines()
        .map(|l| {
            serde_json::from_str::<Value>(l).unwrap()["line"]
                .as_u64()
                .unwrap()
        })
        .collect();
    assert_eq!(lines, [1, 4, 5]);

    let args = [
        "capture",
        MODEL,
        "--text-file",
        "-",
        "--hooks",
        "resid_post",
        "--pooling",
        "mean",
        "-o",
        &path("each/"),
    ];
    server.run_in(&args, Some("one\ntwo\n")).await.ok();
    for name in ["each/000001.npz", "each/000002.npz"] {
        let mean = array::<f32>(Path::new(&path(name)), "blocks.2.hook_resid_post");
        assert_eq!(mean.shape(), [32], "the position axis is gone");
    }

    let bytes = [b'a', 0xff, b'\n'];
    std::fs::write(path("latin.txt"), bytes).unwrap();
    server
        .run(&[
            "capture",
            MODEL,
            "--text-file",
            &path("latin.txt"),
            "-o",
            &path("x.jsonl"),
        ])
        .await
        .failed(1, "line 1 is not UTF-8");
    server
        .run(&[
            "capture",
            MODEL,
            "--text-file",
            &path("none.txt"),
            "-o",
            &path("x.jsonl"),
        ])
        .await
        .failed(1, "cannot read");
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_of_the_daemon_are_told_with_code_field_and_what_to_do() {
    let server = Server::with(&[MODEL, "vit.legacy14"]).await;
    for (args, code, said) in [
        (
            &["capture", "nothere", "text"][..],
            "NOT_FOUND",
            "models list",
        ),
        (&["inspect", "nothere"], "NOT_FOUND", "models list"),
        (&["models", "load", "nothere"], "NOT_FOUND", "models list"),
        (
            &["capture", MODEL, "text", "--hooks", "no_such"],
            "INVALID_ARGUMENT",
            "selection.hooks[0]",
        ),
        (
            &["capture", MODEL, "text", "--layers", "99"],
            "INVALID_ARGUMENT",
            "field",
        ),
        (
            &["capture", MODEL, "text", "--heads", "99"],
            "INVALID_ARGUMENT",
            "field",
        ),
        (
            &["capture", MODEL, "text", "--positions=-99"],
            "INVALID_ARGUMENT",
            "field",
        ),
        (
            &["capture", MODEL, "--ids", "4000000000"],
            "INVALID_ARGUMENT",
            "field",
        ),
        (
            &["capture", "vit.legacy14", "text"],
            "FAILED_PRECONDITION",
            "no tokenizer",
        ),
        (
            &["tokenize", "vit.legacy14", "text"],
            "FAILED_PRECONDITION",
            "no tokenizer",
        ),
    ] {
        let ran = server.run(args).await.failed(1, &format!("code    {code}"));
        assert!(ran.err.contains(said), "{args:?}: {ran:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn models_come_and_go() {
    let server = Server::with(&[MODEL]).await;
    let state = async || {
        let out = server.run(&["models", "list", "--json"]).await.ok().out;
        let list: Value = serde_json::from_str(&out).unwrap();
        list["models"][0]["state"].as_str().unwrap().to_owned()
    };
    assert_eq!(state().await, "ready");
    server.run(&["models", "unload", MODEL]).await.ok();
    assert_eq!(state().await, "unloaded");
    server
        .run(&["predict", MODEL, "text"])
        .await
        .failed(1, "FAILED_PRECONDITION");
    server.run(&["models", "load", MODEL]).await.ok();
    let reloaded = server.run(&["models", "reload", MODEL]).await.ok().out;
    assert!(reloaded.contains("is ready"), "{reloaded}");
    std::fs::create_dir(server.root.path().join("empty")).unwrap();
    let list = server.run(&["models", "list", "--rescan"]).await.ok().out;
    assert!(
        list.contains("LEFT OUT") && list.contains("empty"),
        "{list}"
    );
}

#[test]
fn a_folder_is_inspected_without_a_daemon() {
    let folder = fixture(MODEL).display().to_string();
    let json: Value = serde_json::from_str(&run(&["inspect", &folder, "--json"]).ok().out).unwrap();
    assert_eq!(json["status"]["name"], MODEL);
    assert_eq!(json["dims"]["layers"], 3);
    assert_eq!(json["certificate"]["passed"], true);
    let names: Vec<&str> = json["hooks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|h| h["name"].as_str().unwrap())
        .collect();
    assert!(names.contains(&"blocks.2.attn.hook_pattern"), "{names:?}");
    let page = run(&["inspect", &folder]).ok().out;
    for part in [
        "Anatomy",
        "Hook points",
        "Certificate",
        "blocks.L.attn.hook_pattern",
        "0-2",
    ] {
        assert!(page.contains(part), "{part} in {page}");
    }
    let graph = run(&["inspect", &folder, "--graph"]).ok().out;
    assert!(
        graph.contains("Softmax") && graph.contains("input_ids"),
        "{graph}"
    );
    let repository = fixture(MODEL).parent().unwrap().display().to_string();
    let listed = run(&["inspect", MODEL, "--hooks", "--models", &repository])
        .ok()
        .out;
    assert!(listed.contains("attentions.1"), "{listed}");
}

/// An image model takes tensors from a file; what comes of them is what PyTorch computed.
#[test]
fn tensors_come_from_an_npz() {
    let model = "vit.legacy14";
    let reference = fixture(model).join("reference.npz");
    let pixels = array::<f32>(&reference, "in_pixel_values");
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut npz = NpzWriter::new(File::create(path("in.npz")).unwrap());
    npz.add_array("pixel_values", &pixels.slice_axis(Axis(0), (..1).into()))
        .unwrap();
    npz.finish().unwrap();
    let (inputs, out) = (
        path("in.npz").display().to_string(),
        path("out.npz").display().to_string(),
    );
    let folder_of_model = fixture(model).display().to_string();
    run(&[
        "capture",
        &folder_of_model,
        "--inputs",
        &inputs,
        "--hooks",
        "attentions.0",
        "-o",
        &out,
    ])
    .ok();
    let expected = array::<f32>(&reference, "logits").index_axis_move(Axis(0), 0);
    assert_close("logits", &array(&path("out.npz"), "logits"), &expected);
    run(&["capture", &folder_of_model, "--inputs", "none.npz"]).failed(1, "cannot read inputs");
}
