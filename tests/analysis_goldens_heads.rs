//! Heads and neurons against PyTorch (`tests/fixtures/make/analysis.py`): measures, detectors with every exclusion, attention by offset,
//! positions, and the numbers of every neuron, by several exporters; and the induction heads of a model that was trained to have them.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/arrays.rs"]
mod arrays;
#[path = "support/daemon.rs"]
mod daemon;

use std::collections::BTreeMap;

use daemon::{TestDaemon, fixture};
use introspectd::service::wire::introspect::{
    self as pb, HeadMeasure as M, HeadPattern, analysis_service_client::AnalysisServiceClient,
    head_detector::Pattern, heads_response::Item as Of, neurons_request::Item as Asked,
    neurons_response::Item as Found,
};
use ndarray::ArrayD;

/// Same mathematics by other operators.
const REWRITTEN: f64 = 1e-4;

/// Models, and whose numbers they must have.
const CASES: [(&str, &str); 10] = [
    ("bert.legacy14", "bert"),
    ("bert.dynamo20", "bert"),
    ("distilbert.legacy14", "distilbert"),
    ("distilbert.dynamo20", "distilbert"),
    ("gpt2.legacy14", "gpt2"),
    ("gpt2.dynamo20", "gpt2"),
    ("llama.legacy14", "llama"),
    ("llama.dynamo20", "llama"),
    ("induction.legacy17", "induction"),
    ("circuit.legacy17", "circuit"),
];
const PATTERNS: [(HeadPattern, &str); 3] = [
    (HeadPattern::PreviousTokenHead, "previous_token_head"),
    (HeadPattern::DuplicateTokenHead, "duplicate_token_head"),
    (HeadPattern::InductionHead, "induction_head"),
];
const EXCLUDED: [(&str, bool, bool); 4] = [
    ("", false, false),
    ("_no_first", true, false),
    ("_no_current", false, true),
    ("_no_both", true, true),
];

type Golden = BTreeMap<String, ArrayD<f64>>;

fn ids(golden: &Golden, name: &str) -> Vec<u32> {
    golden[name].iter().map(|id| *id as u32).collect()
}

fn texts(golden: &Golden) -> Vec<Vec<u32>> {
    let rows = golden["texts/ids"].outer_iter();
    let real = |row: ndarray::ArrayViewD<'_, f64>| {
        row.iter()
            .filter(|id| **id >= 0.0)
            .map(|id| *id as u32)
            .collect()
    };
    rows.map(real).collect()
}

fn input(ids: &[u32]) -> pb::Input {
    pb::Input {
        kind: Some(pb::input::Kind::Tokens(pb::TokenIds {
            ids: ids.to_vec(),
            type_ids: Vec::new(),
        })),
    }
}

fn floats(data: &[u8]) -> Vec<f64> {
    let numbers = data.as_chunks::<4>().0.iter();
    numbers.map(|b| f64::from(f32::from_le_bytes(*b))).collect()
}

/// The header, and the tensors by name.
async fn heads(
    d: &TestDaemon,
    request: pb::HeadsRequest,
) -> (pb::HeadsHeader, BTreeMap<String, Vec<f64>>) {
    let mut client = AnalysisServiceClient::new(d.channel().await);
    let mut stream = client.heads(request).await.unwrap().into_inner();
    let (mut header, mut tensors) = (pb::HeadsHeader::default(), BTreeMap::new());
    while let Some(message) = stream.message().await.unwrap() {
        match message.item.unwrap() {
            Of::Header(h) => header = h,
            Of::Tensor(t) if t.dtype() == pb::DType::F32 => {
                let all: &mut Vec<f64> = tensors.entry(t.name).or_default();
                all.extend(floats(&t.data));
            }
            Of::Summary(_) => return (header, tensors),
            _ => {}
        }
    }
    panic!("a stream ends with its summary");
}

fn same(found: &[f64], wanted: &ArrayD<f64>, what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (a, b) in found.iter().zip(wanted) {
        assert!(
            (a - b).abs() <= REWRITTEN * b.abs().max(1.0),
            "{what}: {a} {b}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_are_those_of_pytorch() {
    let models: Vec<&str> = CASES.iter().map(|(model, _)| *model).collect();
    let d = TestDaemon::with(&models).await;
    for (model, name) in CASES {
        let golden = arrays::read(&format!("analysis/{name}.npz"));
        let twice = ids(&golden, "repeat/ids");
        let measures = [
            (M::Self_, "self", "heads/self"),
            (M::PreviousToken, "previous_token", "heads/previous_token"),
            (M::FirstToken, "first_token", "heads/first_token"),
            (M::Entropy, "entropy", "heads/entropy"),
            (M::Distance, "distance", "heads/distance"),
            (
                M::DuplicateToken,
                "duplicate_token",
                "heads/duplicate_token",
            ),
            (M::Induction, "induction", "heads/induction"),
            (M::SpecialTokens, "special_tokens", "heads/special"),
        ];
        let half = pb::TokenIds {
            ids: twice[..twice.len() / 2].to_vec(),
            type_ids: Vec::new(),
        };
        let request = pb::HeadsRequest {
            model: model.to_owned(),
            inputs: vec![input(&ids(&golden, "ids"))],
            measures: measures.iter().map(|(m, _, _)| (*m).into()).collect(),
            repeated: Some(pb::RepeatedSequences {
                given: vec![half],
                ..pb::RepeatedSequences::default()
            }),
            similarity: golden.contains_key("positions/cosine"),
            ..pb::HeadsRequest::default()
        };
        let (header, found) = heads(&d, request).await;
        for (_, ours, theirs) in measures {
            // Which tokens are special is the tokenizer's to say here, and the script's there.
            let special = header.inputs[0]
                .tokens
                .iter()
                .map(|t| f64::from(u8::from(t.special)));
            if ours == "special_tokens" && !special.eq(golden["special"].iter().copied()) {
                continue;
            }
            same(&found[ours], &golden[theirs], &format!("{model} {ours}"));
        }
        if let Some(wanted) = golden.get("positions/cosine") {
            same(
                &found["position_similarity"],
                wanted,
                &format!("{model} positions"),
            );
        }

        let mut detect = Vec::new();
        let mut names = Vec::new();
        for (pattern, named) in PATTERNS {
            for (similarity, how) in [(0, "mul"), (1, "abs")] {
                for (suffix, exclude_bos, exclude_current_token) in EXCLUDED {
                    names.push((
                        format!("detect.{}.{named}", detect.len()),
                        format!("detect/{named}/{how}{suffix}"),
                    ));
                    detect.push(pb::HeadDetector {
                        pattern: Some(Pattern::Named(pattern.into())),
                        similarity,
                        exclude_bos,
                        exclude_current_token,
                    });
                }
            }
        }
        let request = pb::HeadsRequest {
            model: model.to_owned(),
            inputs: vec![input(&twice)],
            measures: vec![M::Self_.into()],
            detect,
            ..pb::HeadsRequest::default()
        };
        let (_, found) = heads(&d, request).await;
        for (ours, theirs) in &names {
            same(&found[ours], &golden[theirs], &format!("{model} {theirs}"));
        }

        let request = pb::HeadsRequest {
            model: model.to_owned(),
            inputs: texts(&golden).iter().map(|t| input(t)).collect(),
            measures: vec![M::Self_.into()],
            offsets: true,
            ..pb::HeadsRequest::default()
        };
        let (_, found) = heads(&d, request).await;
        same(
            &found["offsets"],
            &golden["profile"],
            &format!("{model} offsets"),
        );
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn neurons_are_those_of_pytorch() {
    let models: Vec<&str> = CASES.iter().map(|(model, _)| *model).collect();
    let d = TestDaemon::with(&models).await;
    for (model, name) in CASES {
        let golden = arrays::read(&format!("analysis/{name}.npz"));
        let header = pb::NeuronsHeader {
            model: model.to_owned(),
            statistics: true,
            ..pb::NeuronsHeader::default()
        };
        let mut messages = vec![pb::NeuronsRequest {
            item: Some(Asked::Header(header)),
        }];
        for (text, chosen) in texts(&golden).iter().zip(&golden["texts/chosen"]) {
            let set = if *chosen > 0.0 {
                pb::NeuronSet::Unspecified
            } else {
                pb::NeuronSet::B
            };
            messages.push(pb::NeuronsRequest {
                item: Some(Asked::Text(pb::NeuronsText {
                    id: String::new(),
                    input: Some(input(text)),
                    set: set.into(),
                })),
            });
        }
        let mut client = AnalysisServiceClient::new(d.channel().await);
        let stream = client.neurons(futures::stream::iter(messages)).await;
        let mut stream = stream.unwrap().into_inner();
        let mut found: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        while let Some(message) = stream.message().await.unwrap() {
            if let Found::Tensor(t) = message.item.unwrap() {
                for what in ["mean", "max", "contrast"] {
                    if t.name.starts_with(&format!("{what}:")) {
                        found.entry(what).or_default().extend(floats(&t.data));
                    }
                }
            }
        }
        for (what, found) in found {
            same(
                found.as_slice(),
                &golden[&format!("neurons/{what}")],
                &format!("{model} {what}"),
            );
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_induction_heads_of_a_model_are_found() {
    let d = TestDaemon::with(&["induction.legacy17"]).await;
    let told = std::fs::read(fixture("../analysis/induction.json")).unwrap();
    let told: serde_json::Value = serde_json::from_slice(&told).unwrap();
    let threshold = told["threshold"].as_f64().unwrap();
    let trained = told["induction_heads"].as_array().unwrap().iter();
    let mut trained: Vec<(u64, u64)> = trained
        .map(|head| (head[0].as_u64().unwrap(), head[1].as_u64().unwrap()))
        .collect();
    trained.sort_unstable();
    assert!(!trained.is_empty());
    for seed in 0..3 {
        let request = pb::HeadsRequest {
            model: "induction.legacy17".to_owned(),
            measures: vec![M::Induction.into()],
            detect: vec![pb::HeadDetector {
                pattern: Some(Pattern::Named(HeadPattern::InductionHead.into())),
                ..pb::HeadDetector::default()
            }],
            repeated: Some(pb::RepeatedSequences {
                length: 24,
                seed,
                ..pb::RepeatedSequences::default()
            }),
            ..pb::HeadsRequest::default()
        };
        let (header, found) = heads(&d, request).await;
        let heads = u64::from(header.heads);
        let place = |at: usize| {
            (
                u64::from(header.layers[at / heads as usize]),
                at as u64 % heads,
            )
        };
        let scores = found["induction"].iter().enumerate();
        let above: Vec<(u64, u64)> = scores
            .filter(|(_, score)| **score > threshold)
            .map(|(at, _)| place(at))
            .collect();
        assert_eq!(above, trained, "seed {seed}: {:?}", found["induction"]);
        // Detectors rank them first, too.
        let mut ranked: Vec<usize> = (0..found["induction"].len()).collect();
        let detected = &found["detect.0.induction_head"];
        ranked.sort_by(|a, b| detected[*b].total_cmp(&detected[*a]));
        let mut best: Vec<(u64, u64)> = ranked[..trained.len()]
            .iter()
            .map(|at| place(*at))
            .collect();
        best.sort_unstable();
        assert_eq!(best, trained, "seed {seed}: {detected:?}");
    }
    d.stop().await;
}
