//! Lenses over real gRPC with real workers: relations that any model must keep, and every error.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/lens.rs"]
mod lens_support;

use std::{collections::BTreeMap, fs, path::Path};

use daemon::{TestDaemon, hooks, ids, request as captured};
use introspectd::{
    onnx::{Attribute, Folder, Limits, Model, Patch, Weights},
    service::wire::introspect as pb,
};
use lens_support::{Answer, ask, far, tokens};
use safetensors::{Dtype, tensor::TensorView};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

const IDS: [u32; 6] = [2, 9, 17, 30, 11, 3];
const OTHER: [u32; 6] = [2, 21, 8, 14, 25, 3];
/// Same operators, other batch.
const CLOSE: f64 = 1e-5;
/// Same mathematics by other operators.
const REWRITTEN: f64 = 1e-4;
/// Models with scores at every position, whose stream is the plain sum of what layers write.
const DECODERS: [&str; 6] = [
    "gpt2.legacy14",
    "gpt2.dynamo20",
    "gpt2.fused",
    "llama.legacy14",
    "llama.attention23",
    "llama_wide.genai",
];
const CLASSIFIERS: [&str; 4] = [
    "bert.legacy14",
    "bert.fused",
    "distilbert.legacy14",
    "bert.half",
];

fn lens(model: &str) -> pb::LensRequest {
    pb::LensRequest {
        model: model.to_owned(),
        input: tokens(&IDS),
        ..pb::LensRequest::default()
    }
}

fn part(model: &str, part: pb::LensPart) -> pb::LensRequest {
    pb::LensRequest {
        parts: vec![part.into()],
        ..lens(model)
    }
}

fn index(index: u32) -> pb::Choice {
    pb::Choice {
        what: Some(pb::choice::What::Index(index)),
        position: None,
    }
}

fn choice(label: u32) -> Option<pb::Target> {
    Some(pb::Target {
        quantity: 0,
        of: Some(pb::target::Of::Choice(index(label))),
    })
}

fn contrast(a: u32, b: u32) -> Option<pb::Target> {
    Some(pb::Target {
        quantity: 0,
        of: Some(pb::target::Of::Contrast(pb::Contrast {
            choice: Some(index(a)),
            against: Some(index(b)),
        })),
    })
}

/// What the model says of a row, all of it.
async fn own(d: &TestDaemon, model: &str, intervention: Option<pb::Intervention>) -> Vec<f64> {
    let selection = pb::Selection {
        logits: pb::Logits::All.into(),
        ..hooks(&["blocks.0.hook_resid_pre"])
    };
    let request = pb::CaptureRequest {
        intervention,
        ..ids(model, &IDS, selection)
    };
    let info = d.model(model).await;
    let answer = d.capture(request).await.unwrap();
    let values = answer.values(&info.main_output);
    values.into_iter().map(f64::from).collect()
}

/// The field that an error names.
fn field_of(error: &Status) -> String {
    let found = error.get_details_bad_request();
    found.map_or(String::new(), |b| b.field_violations[0].field.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_end_every_position_says_what_the_model_says() {
    let d = TestDaemon::with(&DECODERS).await;
    for model in DECODERS {
        let request = pb::LensRequest {
            logits: true,
            target: choice(7),
            ..lens(model)
        };
        let answer = ask(&d, request)
            .await
            .unwrap_or_else(|e| panic!("{model}: {e:?}"));
        let logits = own(&d, model, None).await;
        let end = answer.state("logits", answer.last());
        assert!(far(end, &logits) < CLOSE, "{model}: {}", far(end, &logits));
        let labels = logits.len() / IDS.len();
        assert_eq!(answer.header.states.len(), 4, "{model}");
        assert_eq!(answer.array("logits").axes, ["state", "pos", "label"]);
        assert_eq!(answer.array("entropy").shape, [4, IDS.len()]);
        assert_eq!(answer.array("top_index").shape, [4, IDS.len(), 5]);
        assert!(!answer.tensors.contains_key("whole_entropy"), "{model}");
        // What is kept is what all scores say.
        let all = answer.values("logits");
        for (place, scores) in all.chunks_exact(labels).enumerate() {
            let most = scores.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - most).exp()).sum();
            let p = |s: f64| (s - most).exp() / sum;
            let entropy: f64 = scores.iter().map(|s| -p(*s) * p(*s).ln()).sum();
            assert!((answer.values("entropy")[place] - entropy).abs() < REWRITTEN);
            let best = answer.values("top_index")[place * 5] as usize;
            assert_eq!(scores[best], most);
            let probability = answer.values("top_probability")[place * 5];
            assert!((probability - p(most)).abs() < CLOSE);
            let above = scores.iter().filter(|s| **s > scores[7]).count();
            assert_eq!(answer.values("target_rank")[place], above as f64);
            assert_eq!(answer.values("target")[place], scores[7]);
            let log = answer.values("target_log_probability")[place];
            assert!((log - p(scores[7]).ln()).abs() < REWRITTEN);
        }
        for index in answer.values("top_index") {
            assert!(answer.labels.contains_key(&(*index as u32)), "{model}");
        }
        assert!(answer.summary.rows < 12, "{}", answer.summary.rows);
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn classifiers_read_whole_states_and_each_vector_by_itself() {
    let d = TestDaemon::with(&CLASSIFIERS).await;
    for model in CLASSIFIERS {
        let request = pb::LensRequest {
            logits: true,
            ..lens(model)
        };
        let answer = ask(&d, request)
            .await
            .unwrap_or_else(|e| panic!("{model}: {e:?}"));
        let tolerance = if model == "bert.half" { 2e-2 } else { CLOSE };
        let logits = own(&d, model, None).await;
        let end = answer.state("whole_logits", answer.last());
        assert!(far(end, &logits) < tolerance, "{model}");
        // These poolers read the first position.
        let labels = logits.len();
        for state in 0..=answer.last() {
            let whole = answer.state("whole_logits", state);
            let first = &answer.state("logits", state)[..labels];
            assert!(far(first, whole) < tolerance, "{model} {state}");
        }
        assert_eq!(answer.array("whole_entropy").axes, ["state"]);
        assert_eq!(answer.array("entropy").axes, ["state", "pos"]);
        assert_eq!(answer.header.terms.len(), 1, "the prediction is followed");
        let rank = answer.state("whole_target_rank", answer.last());
        assert_eq!(rank, [0.0], "{model}");
        // The states of models that normalise every sum are Hugging Face's.
        let last = d.capture(ids(model, &IDS, hooks(&["hidden_states.3"])));
        assert_eq!(
            last.await.unwrap().header.tensors[0],
            answer.header.states[3],
            "{model}"
        );
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_of_fixed_length_is_read_in_whole_rows() {
    let models = ["encoder_layer.legacy17", "encoder_layer.dynamo20"];
    let d = TestDaemon::with(&models).await;
    let row = [IDS, OTHER].concat();
    for model in models {
        let request = pb::LensRequest {
            input: tokens(&row),
            logits: true,
            parts: vec![pb::LensPart::Lens.into(), pb::LensPart::Residual.into()],
            ..lens(model)
        };
        let answer = ask(&d, request)
            .await
            .unwrap_or_else(|e| panic!("{model}: {e:?}"));
        let selection = pb::Selection {
            logits: pb::Logits::All.into(),
            ..hooks(&["blocks.0.hook_resid_pre"])
        };
        let shown = d.capture(ids(model, &row, selection)).await.unwrap();
        let own = shown.values(&d.model(model).await.main_output);
        let own: Vec<f64> = own.into_iter().map(f64::from).collect();
        let end = answer.state("logits", answer.last());
        assert!(far(end, &own) < CLOSE, "{model}");
        assert_eq!(answer.array("residual_norm").shape[1], row.len());
        // It is no causal model: nothing is followed unless it is named.
        assert!(answer.header.terms.is_empty(), "{model}");
        assert!(!answer.tensors.contains_key("target_rank"));
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn positions_are_read_as_they_are_named() {
    let d = TestDaemon::with(&["gpt2.legacy14", "bert.legacy14", "bert.int8"]).await;
    for model in ["gpt2.legacy14", "bert.legacy14"] {
        let all = ask(&d, lens(model)).await.unwrap();
        let request = pb::LensRequest {
            positions: vec![-1, 2],
            ..lens(model)
        };
        let some = ask(&d, request).await.unwrap();
        assert_eq!(some.header.positions, [5, 2]);
        for state in 0..=all.last() {
            let (all, some) = (all.state("entropy", state), some.state("entropy", state));
            assert!(far(some, &[all[5], all[2]]) < REWRITTEN, "{model} {state}");
        }
    }
    let answer = ask(&d, lens("bert.int8")).await.unwrap();
    assert_eq!(answer.array("entropy").shape, [4, IDS.len()]);
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_model_has_a_lens_too() {
    let d = TestDaemon::with(&["vit.legacy14"]).await;
    let pixels: Vec<u8> = (0..3 * 32 * 32)
        .flat_map(|n| ((n as f32 * 0.37).sin()).to_le_bytes())
        .collect();
    let kind = pb::input::Kind::Tensors(pb::NamedTensors {
        tensors: vec![pb::Tensor {
            name: "pixel_values".to_owned(),
            dtype: pb::DType::F32.into(),
            shape: vec![1, 3, 32, 32],
            data: pixels.into(),
            ..pb::Tensor::default()
        }],
    });
    let parts = [
        pb::LensPart::Lens,
        pb::LensPart::Attribution,
        pb::LensPart::Residual,
    ];
    let request = pb::LensRequest {
        input: Some(pb::Input {
            kind: Some(kind.clone()),
        }),
        parts: parts.map(Into::into).to_vec(),
        logits: true,
        ..lens("vit.legacy14")
    };
    let answer = ask(&d, request).await.unwrap();
    let selection = pb::Selection {
        logits: pb::Logits::All.into(),
        ..hooks(&["blocks.0.hook_resid_pre"])
    };
    let shown = d.capture(captured("vit.legacy14", kind, selection));
    let shown = shown.await.unwrap();
    let info = d.model("vit.legacy14").await;
    let own = shown.values(&info.main_output);
    let own: Vec<f64> = own.into_iter().map(f64::from).collect();
    let end = answer.state("whole_logits", answer.last());
    assert!(far(end, &own) < CLOSE);
    adds_up("vit.legacy14", &answer);
    // The head reads the first position alone.
    let array = answer.array("contributions");
    for of_component in array.values.chunks_exact(array.shape[1]) {
        assert!(of_component[1..].iter().all(|c| *c == 0.0));
    }
    d.stop().await;
}

/// Contributions and the bias are the logit; heads and their bias are what attention writes.
fn adds_up(model: &str, answer: &Answer) {
    let facts = answer.attribution.as_ref().unwrap();
    let contributions = answer.array("contributions");
    let sum: f64 = contributions.values.iter().sum::<f64>() + facts.bias;
    let size: f64 = contributions.values.iter().map(|c| c.abs()).sum();
    assert!(
        (sum - facts.value).abs() < CLOSE * size,
        "{model}: {sum} {}",
        facts.value
    );
    assert!(facts.affine, "{model}: {facts:?}");
    let nothing = facts.value_of_nothing.unwrap();
    assert!(
        (nothing - facts.bias).abs() < REWRITTEN * size,
        "{model}: {nothing} {}",
        facts.bias
    );
    let positions = contributions.shape[1];
    let heads = answer.array("head_contributions");
    let [layers, count, _] = heads.shape[..] else {
        panic!("{:?}", heads.shape);
    };
    assert_eq!(layers, facts.layers.len());
    let bias = answer.values("head_bias");
    for (at, layer) in facts.layers.iter().enumerate() {
        let name = format!("blocks.{layer}.hook_attn_out");
        let component = facts.components.iter().position(|c| *c == name).unwrap();
        for position in 0..positions {
            let of = |head: usize| heads.values[(at * count + head) * positions + position];
            let sum = (0..count).map(of).sum::<f64>() + bias[at * positions + position];
            let whole = contributions.values[component * positions + position];
            assert!((sum - whole).abs() < CLOSE * size, "{model} {name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn contributions_sum_up_to_the_logit() {
    let d = TestDaemon::with(&DECODERS).await;
    for model in DECODERS {
        let logits = own(&d, model, None).await;
        let labels = logits.len() / IDS.len();
        let last = &logits[logits.len() - labels..];
        for (target, value) in [
            (choice(7), last[7]),
            (contrast(7, 12), last[7] - last[12]),
            (None, last.iter().copied().fold(f64::MIN, f64::max)),
        ] {
            let request = pb::LensRequest {
                target,
                ..part(model, pb::LensPart::Attribution)
            };
            let answer = ask(&d, request)
                .await
                .unwrap_or_else(|e| panic!("{model}: {e:?}"));
            let facts = answer.attribution.as_ref().unwrap();
            assert!((facts.value - value).abs() < REWRITTEN, "{model}");
            assert_eq!(facts.components[0], "blocks.0.hook_resid_pre");
            assert_eq!(facts.components.len(), 7, "{model}");
            adds_up(model, &answer);
            // Only the last position is read directly.
            let array = answer.array("contributions");
            for of_component in array.values.chunks_exact(IDS.len()) {
                assert!(of_component[..5].iter().all(|c| *c == 0.0), "{model}");
                assert!(of_component[5] != 0.0, "{model}");
            }
        }
        let request = pb::LensRequest {
            no_heads: true,
            ..part(model, pb::LensPart::Attribution)
        };
        let answer = ask(&d, request).await.unwrap();
        assert!(!answer.tensors.contains_key("head_contributions"));
    }
    d.stop().await;
}

/// The fixture of GPT-2 with a norm behind every output projection, as Gemma 2 has them.
fn normed(repository: &Path) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/gpt2.legacy14");
    let to = repository.join("normed");
    fs::create_dir_all(&to).unwrap();
    for file in ["tokenizer.json", "config.json"] {
        fs::copy(from.join(file), to.join(file)).unwrap();
    }
    let source = Folder::open(&from).unwrap();
    let model = Model::open(&source, "model.onnx", &Limits::default()).unwrap();
    let mut patch = Patch::new(&model.graph, "normed");
    for layer in 0..3 {
        let name = format!("/model/transformer/h.{layer}/attn/c_proj/Reshape_1_output_0");
        let value = model.graph.value(&name).expect("the fixture's value");
        patch.intercept(value, |patch, value| {
            let square = patch.op("Mul", &[value, value], Vec::new());
            let axes = vec![Attribute::ints("axes", &[-1])];
            let mean = patch.op("ReduceMean", &[square], axes);
            let root = patch.op("Sqrt", &[mean], Vec::new());
            patch.op("Div", &[value, root], Vec::new())
        });
    }
    let normed = model.with_graph(patch.apply().unwrap());
    fs::write(to.join("model.onnx"), normed.encode(Weights::Inline)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn where_heads_cannot_be_told_apart_components_come_with_a_note() {
    let repository = tempfile::tempdir().unwrap();
    normed(repository.path());
    let d = TestDaemon::over(repository, |_| {}).await;
    d.daemon.settled().await;
    let answer = ask(&d, part("normed", pb::LensPart::Attribution))
        .await
        .unwrap();
    assert!(!answer.tensors.contains_key("head_contributions"));
    assert_eq!(answer.attribution.as_ref().unwrap().components.len(), 7);
    let notes = &answer.summary.notes;
    assert!(
        notes
            .iter()
            .any(|n| n.starts_with("no contributions of heads")),
        "{notes:?}"
    );
    let facts = answer.attribution.as_ref().unwrap();
    let sum: f64 = answer.array("contributions").values.iter().sum();
    assert!((sum + facts.bias - facts.value).abs() < REWRITTEN);
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_is_gone_contributes_nothing() {
    let d = TestDaemon::with(&["gpt2.legacy14"]).await;
    let model = "gpt2.legacy14";
    let intervention = pb::Intervention {
        edits: vec![pb::Edit {
            hook: "attn.hook_z".to_owned(),
            layers: vec![2],
            heads: vec![1],
            operation: Some(pb::edit::Operation::Zero(pb::Zero {})),
            ..pb::Edit::default()
        }],
        ..pb::Intervention::default()
    };
    let request = |intervention| pb::LensRequest {
        target: choice(7),
        intervention,
        logits: true,
        parts: vec![pb::LensPart::Attribution.into(), pb::LensPart::Lens.into()],
        ..lens(model)
    };
    let before = ask(&d, request(None)).await.unwrap();
    let after = ask(&d, request(Some(intervention.clone()))).await.unwrap();
    adds_up(model, &after);
    let head = |a: &Answer| a.values("head_contributions")[(2 * 4 + 1) * IDS.len() + 5];
    assert!(head(&before).abs() > REWRITTEN);
    assert_eq!(head(&after), 0.0);
    let edited = own(&d, model, Some(intervention)).await;
    assert!(far(after.state("logits", 3), &edited) < CLOSE);
    // Before the edit nothing is otherwise.
    let same = far(after.state("logits", 2), before.state("logits", 2));
    assert!(same < CLOSE, "{same}");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_is_measured_as_it_stands() {
    let models = ["gpt2.legacy14", "bert.legacy14"];
    let d = TestDaemon::with(&models).await;
    for model in models {
        let answer = ask(&d, part(model, pb::LensPart::Residual))
            .await
            .unwrap_or_else(|e| panic!("{model}: {e:?}"));
        let names: Vec<&str> = answer.header.states.iter().map(String::as_str).collect();
        let shown = d.capture(ids(model, &IDS, hooks(&names))).await.unwrap();
        let states: Vec<Vec<f64>> = names
            .iter()
            .map(|n| shown.values(n).into_iter().map(f64::from).collect())
            .collect();
        let width = states[0].len() / IDS.len();
        let vector = |state: usize, p: usize| &states[state][p * width..][..width];
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let norm = |state, p| dot(vector(state, p), vector(state, p)).sqrt();
        let cosine = |a, b, p| dot(vector(a, p), vector(b, p)) / (norm(a, p) * norm(b, p));
        for state in 0..states.len() {
            for p in 0..IDS.len() {
                let found = answer.state("residual_norm", state)[p];
                assert!((found - norm(state, p)).abs() < REWRITTEN * found);
                if state + 1 < states.len() {
                    let found = answer.state("residual_step_cosine", state)[p];
                    assert!((found - cosine(state, state + 1, p)).abs() < REWRITTEN);
                }
            }
            for other in 0..states.len() {
                let all = (0..IDS.len()).map(|p| cosine(state, other, p));
                let mean = all.sum::<f64>() / IDS.len() as f64;
                let found = answer.state("residual_cosine", state)[other];
                assert!((found - mean).abs() < REWRITTEN, "{model} {state} {other}");
            }
        }
    }
    d.stop().await;
}

/// A file of maps in a model's folder.
fn put_tuned(d: &TestDaemon, model: &str, parts: &[(&str, Vec<usize>, Vec<f32>)]) {
    let folder = d.repository.path().join(model).join("lenses");
    fs::create_dir_all(&folder).unwrap();
    let bytes: Vec<Vec<u8>> = parts
        .iter()
        .map(|(_, _, v)| v.iter().flat_map(|v| v.to_le_bytes()).collect())
        .collect();
    let views: BTreeMap<&str, TensorView<'_>> = parts
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), b)| {
            (
                *name,
                TensorView::new(Dtype::F32, shape.clone(), b).unwrap(),
            )
        })
        .collect();
    let all = safetensors::serialize(views, None).unwrap();
    fs::write(folder.join("mine.safetensors"), all).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tuned_lens_maps_states_before_they_are_read() {
    let model = "gpt2.legacy14";
    let d = TestDaemon::with(&[model]).await;
    let tuned = |name: &str| pb::LensRequest {
        tuned: name.to_owned(),
        logits: true,
        ..lens(model)
    };
    let missing = ask(&d, tuned("mine")).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
    let plain = ask(&d, tuned("")).await.unwrap();
    // Nothing added to anything: the logit lens.
    let zero: Vec<(&str, Vec<usize>, Vec<f32>)> = vec![
        ("0.weight", vec![32, 32], vec![0.0; 1024]),
        ("0.bias", vec![32], vec![0.0; 32]),
        ("1.bias", vec![32], vec![0.0; 32]),
    ];
    put_tuned(&d, model, &zero);
    let same = ask(&d, tuned("mine")).await.unwrap();
    assert_eq!(same.values("logits"), plain.values("logits"));
    assert_eq!(same.header.tuned, "mine");
    assert!(same.summary.notes.iter().any(|n| n.contains("2 of 3")));
    // State 0 less itself is nothing, and the head says of nothing what its bias says, wherever it stands.
    let mut minus = vec![0.0; 1024];
    (0..32).for_each(|i| minus[i * 33] = -1.0);
    put_tuned(&d, model, &[("0.weight", vec![32, 32], minus)]);
    let gone = ask(&d, tuned("mine")).await.unwrap();
    let first = gone.state("logits", 0);
    let labels = first.len() / IDS.len();
    for at in 1..IDS.len() {
        assert!(far(&first[at * labels..][..labels], &first[..labels]) < CLOSE);
    }
    for state in 1..4 {
        assert_eq!(gone.state("logits", state), plain.state("logits", state));
    }
    put_tuned(&d, model, &[("0.bias", vec![16], vec![0.0; 16])]);
    let error = ask(&d, tuned("mine")).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    put_tuned(&d, model, &[("0.bias", vec![32], vec![f32::NAN; 32])]);
    let error = ask(&d, tuned("mine")).await.unwrap_err();
    assert_eq!(error.code(), Code::DataLoss, "{error:?}");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_model_lacks_is_said_with_the_reason() {
    let d = TestDaemon::with(&["bert.legacy14"]).await;
    let error = ask(&d, part("bert.legacy14", pb::LensPart::Attribution))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(
        error.message().contains("normalises its own sum"),
        "{error:?}"
    );
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_named_by_their_field() {
    let d = TestDaemon::with(&["gpt2.legacy14", "bert.legacy14"]).await;
    let base = || lens("gpt2.legacy14");
    let of = |of: pb::target::Of| {
        Some(pb::Target {
            quantity: 0,
            of: Some(of),
        })
    };
    let unit = of(pb::target::Of::Unit(pb::Unit {
        hook: "blocks.0.hook_resid_post".to_owned(),
        position: 0,
        index: 0,
    }));
    let continuation = of(pb::target::Of::Continuation(pb::Continuation {
        what: Some(pb::continuation::What::Text("a".to_owned())),
    }));
    let probability = pb::Target {
        quantity: pb::Quantity::Probability.into(),
        of: choice(7).unwrap().of,
    };
    let cases: Vec<(pb::LensRequest, &str)> = vec![
        (
            pb::LensRequest {
                model: String::new(),
                ..base()
            },
            "model",
        ),
        (
            pb::LensRequest {
                input: None,
                ..base()
            },
            "input",
        ),
        (
            pb::LensRequest {
                input: tokens(&[]),
                ..base()
            },
            "input.tokens.ids",
        ),
        (
            pb::LensRequest {
                input: tokens(&[99_999]),
                ..base()
            },
            "input.tokens.ids[0]",
        ),
        (
            pb::LensRequest {
                parts: vec![1, 9],
                ..base()
            },
            "parts[1]",
        ),
        (
            pb::LensRequest {
                parts: vec![1; 17],
                ..base()
            },
            "parts",
        ),
        (
            pb::LensRequest {
                top_k: 101,
                ..base()
            },
            "top_k",
        ),
        (
            pb::LensRequest {
                positions: vec![0, 6],
                ..base()
            },
            "positions[1]",
        ),
        (
            pb::LensRequest {
                positions: vec![-7],
                ..base()
            },
            "positions[0]",
        ),
        (
            pb::LensRequest {
                positions: vec![5, -1],
                ..base()
            },
            "positions[1]",
        ),
        (
            pb::LensRequest {
                positions: vec![0; 65_537],
                ..base()
            },
            "positions",
        ),
        (
            pb::LensRequest {
                target: choice(99_999),
                ..base()
            },
            "target.choice.index",
        ),
        (
            pb::LensRequest {
                target: unit,
                ..base()
            },
            "target.unit",
        ),
        (
            pb::LensRequest {
                target: continuation,
                ..base()
            },
            "target.continuation",
        ),
        (
            pb::LensRequest {
                target: Some(probability),
                ..base()
            },
            "target.quantity",
        ),
        (
            pb::LensRequest {
                target: contrast(1, 1),
                ..base()
            },
            "target.contrast.against",
        ),
        (
            pb::LensRequest {
                tuned: "../x".to_owned(),
                ..base()
            },
            "tuned",
        ),
        (
            pb::LensRequest {
                tuned: "x".to_owned(),
                ..part("gpt2.legacy14", pb::LensPart::Residual)
            },
            "tuned",
        ),
    ];
    for (request, field) in cases {
        let error = ask(&d, request).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{field}: {error:?}");
        assert_eq!(field_of(&error), field, "{error:?}");
    }
    let nobody = ask(&d, lens("nobody")).await.unwrap_err();
    assert_eq!(nobody.code(), Code::NotFound);
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_take_too_much_is_refused_before_it_runs() {
    let d = TestDaemon::tuned(&["bert.legacy14"], |config| config.max_rows = 20).await;
    let error = ask(&d, lens("bert.legacy14")).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert!(error.message().contains("fewer positions"), "{error:?}");
    let request = pb::LensRequest {
        positions: vec![0],
        ..lens("bert.legacy14")
    };
    ask(&d, request).await.unwrap();
    d.stop().await;
    let d = TestDaemon::tuned(&["gpt2.legacy14"], |config| config.max_capture = 20_000).await;
    let request = pb::LensRequest {
        logits: true,
        ..lens("gpt2.legacy14")
    };
    let error = ask(&d, request).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error:?}");
    ask(&d, lens("gpt2.legacy14")).await.unwrap();
    d.stop().await;
}
