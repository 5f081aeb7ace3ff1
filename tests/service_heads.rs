//! Measures of heads over real gRPC with real workers: by their definitions from captured patterns, detectors, offsets, every error.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/edits.rs"]
mod edits_support;

use std::collections::BTreeMap;

use daemon::{TestDaemon, hooks, ids};
use edits_support::tokens;
use introspectd::service::wire::introspect::{
    self as pb, HeadMeasure as M, HeadPattern, analysis_service_client::AnalysisServiceClient,
    edit::Operation, head_detector::Pattern as Given, heads_response::Item as Message,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// The four development architectures.
const MODELS: [&str; 4] = [
    "bert.legacy14",
    "distilbert.legacy14",
    "gpt2.legacy14",
    "llama.legacy14",
];
const IDS: [u32; 6] = [2, 9, 17, 9, 11, 3];
const OTHER: [u32; 5] = [2, 21, 8, 21, 3];
/// Same operators, other batch or place in the graph.
const CLOSE: f64 = 1e-5;
/// Same mathematics by other operators.
const REWRITTEN: f64 = 1e-4;

#[derive(Debug, Default)]
struct Answer {
    header: pb::HeadsHeader,
    rankings: BTreeMap<String, pb::HeadRanking>,
    tensors: BTreeMap<String, (pb::Tensor, Vec<u8>)>,
    order: Vec<String>,
    summary: pb::Summary,
}

impl Answer {
    fn values(&self, name: &str) -> Vec<f64> {
        let (_, bytes) = &self.tensors[name];
        let numbers = bytes.as_chunks::<4>().0.iter();
        numbers.map(|b| f64::from(f32::from_le_bytes(*b))).collect()
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        let (tensor, _) = &self.tensors[name];
        tensor.shape.iter().map(|n| *n as usize).collect()
    }
}

async fn ask(d: &TestDaemon, request: pb::HeadsRequest) -> Result<Answer, Status> {
    let mut client = AnalysisServiceClient::new(d.channel().await);
    let mut stream = client.heads(request).await?.into_inner();
    let mut answer = Answer::default();
    let (mut messages, mut crc, mut ended) = (0, 0, false);
    while let Some(message) = stream.message().await? {
        assert!(!ended, "the summary comes last");
        match message.item.unwrap() {
            Message::Header(header) => answer.header = header,
            Message::Progress(p) => assert!(p.rows_done <= p.rows_planned),
            Message::Ranking(r) => {
                answer.rankings.insert(r.name.clone(), r);
            }
            Message::Tensor(t) => {
                crc = crc32c::crc32c_append(crc, &t.data);
                let data = t.data.clone();
                if t.offset == 0 {
                    answer.order.push(t.name.clone());
                }
                let entry = answer.tensors.entry(t.name.clone());
                let (_, bytes) = entry.or_insert((t, Vec::new()));
                bytes.extend_from_slice(&data);
            }
            Message::Summary(s) => {
                assert_eq!((s.messages, s.crc32c), (messages, crc));
                answer.summary = s;
                ended = true;
            }
        }
        messages += 1;
    }
    assert!(ended, "a stream ends with its summary");
    assert_eq!(answer.order, answer.header.tensors);
    Ok(answer)
}

fn on(model: &str, inputs: &[&[u32]]) -> pb::HeadsRequest {
    pb::HeadsRequest {
        model: model.to_owned(),
        inputs: inputs.iter().map(|i| tokens(i)).collect(),
        ..pb::HeadsRequest::default()
    }
}

fn detector(pattern: HeadPattern) -> pb::HeadDetector {
    pb::HeadDetector {
        pattern: Some(Given::Named(pattern.into())),
        ..pb::HeadDetector::default()
    }
}

/// The patterns of a row: `[layer][head][query][key]`.
async fn patterns(d: &TestDaemon, model: &str, of: &[u32]) -> Vec<Vec<Vec<Vec<f64>>>> {
    let answer = d
        .capture(ids(model, of, hooks(&["pattern"])))
        .await
        .unwrap();
    let n = of.len();
    let layers = answer.order.iter().filter(|name| name.contains("pattern"));
    layers
        .map(|name| {
            let values: Vec<f64> = answer.values(name).into_iter().map(f64::from).collect();
            let heads = values.chunks_exact(n * n);
            heads
                .map(|head| head.chunks_exact(n).map(<[f64]>::to_vec).collect())
                .collect()
        })
        .collect()
}

/// `f` of every head.
fn each(patterns: &[Vec<Vec<Vec<f64>>>], f: impl Fn(&[Vec<f64>]) -> f64) -> Vec<f64> {
    let heads = patterns.iter().flatten();
    heads.map(|head| f(head)).collect()
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len() as f64;
    values.sum::<f64>() / n
}

fn same(found: &[f64], wanted: &[f64], within: f64, what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (a, b) in found.iter().zip(wanted) {
        assert!(
            (a - b).abs() <= within * b.abs().max(1.0),
            "{what}: {a} {b}"
        );
    }
}

/// The measures of one row by their definitions.
fn measured(patterns: &[Vec<Vec<Vec<f64>>>], special: &[bool]) -> Vec<(&'static str, Vec<f64>)> {
    let rows = |f: &dyn Fn(usize, &[f64]) -> f64| {
        each(patterns, |head| {
            mean(head.iter().enumerate().map(|(q, row)| f(q, row)))
        })
    };
    let entropy = |_, row: &[f64]| -> f64 {
        -row.iter()
            .filter(|w| **w > 0.0)
            .map(|w| w * w.ln())
            .sum::<f64>()
    };
    let distance = |q: usize, row: &[f64]| -> f64 {
        let far = row
            .iter()
            .enumerate()
            .map(|(k, w)| w * q.abs_diff(k) as f64);
        far.sum::<f64>() / row.iter().sum::<f64>()
    };
    let on_special = |_, row: &[f64]| -> f64 {
        row.iter()
            .zip(special)
            .filter(|(_, s)| **s)
            .map(|(w, _)| w)
            .sum()
    };
    vec![
        ("entropy", rows(&entropy)),
        ("distance", rows(&distance)),
        ("self", rows(&|q, row| row[q])),
        (
            "previous_token",
            each(patterns, |head| {
                mean(head.iter().enumerate().skip(1).map(|(q, row)| row[q - 1]))
            }),
        ),
        ("first_token", rows(&|_, row| row[0])),
        ("special_tokens", rows(&on_special)),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn measures_are_what_they_are_defined_as_and_averaged_over_inputs() {
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        let both = ask(&d, on(model, &[&IDS, &OTHER])).await.unwrap();
        let info = d.model(model).await;
        assert_eq!(both.header.layers.len(), info.dims.unwrap().layers as usize);
        let special = |at: usize| -> Vec<bool> {
            let tokens = both.header.inputs[at].tokens.iter();
            tokens.map(|t| t.special).collect()
        };
        let first = measured(&patterns(&d, model, &IDS).await, &special(0));
        let second = measured(&patterns(&d, model, &OTHER).await, &special(1));
        for ((name, a), (_, b)) in first.iter().zip(&second) {
            let wanted: Vec<f64> = a.iter().zip(b).map(|(a, b)| (a + b) / 2.0).collect();
            same(
                &both.values(name),
                &wanted,
                CLOSE,
                &format!("{model} {name}"),
            );
            let values = both.values(name);
            let best = &both.rankings[*name].heads[0];
            let at = best.layer as usize * both.header.heads as usize + best.head as usize;
            assert!(values.iter().all(|v| *v <= values[at]), "{model} {name}");
        }
        // One by one or together: the same.
        let one = ask(&d, on(model, &[&IDS])).await.unwrap();
        same(&one.values("entropy"), &first[0].1, CLOSE, model);
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repeated_sequences_are_returned_and_measured_as_defined() {
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        let asked = pb::HeadsRequest {
            measures: vec![M::DuplicateToken.into(), M::Induction.into()],
            repeated: Some(pb::RepeatedSequences {
                length: 7,
                count: 2,
                seed: 5,
                ..pb::RepeatedSequences::default()
            }),
            ..on(model, &[&IDS])
        };
        let answer = ask(&d, asked.clone()).await.unwrap();
        assert_eq!(answer.header.tensors, ["duplicate_token", "induction"]);
        assert_eq!((answer.header.seed, answer.header.repeated_length), (5, 7));
        let sequences: Vec<&[u32]> = answer.header.sequences.iter().map(|s| &s.ids[..]).collect();
        let mut wanted = [Vec::new(), Vec::new()];
        for ids in &sequences {
            assert_eq!(ids[..7], ids[7..], "{model}");
            let patterns = patterns(&d, model, ids).await;
            for (behind, wanted) in wanted.iter_mut().enumerate() {
                let back = |head: &[Vec<f64>]| mean((7..14).map(|q| head[q][q - 7 + behind]));
                wanted.push(each(&patterns, back));
            }
        }
        for (name, rows) in ["duplicate_token", "induction"].iter().zip(&wanted) {
            let wanted: Vec<f64> = rows[0]
                .iter()
                .zip(&rows[1])
                .map(|(a, b)| (a + b) / 2.0)
                .collect();
            same(
                &answer.values(name),
                &wanted,
                CLOSE,
                &format!("{model} {name}"),
            );
        }
        let again = ask(&d, asked.clone()).await.unwrap();
        assert_eq!(again.header.sequences, answer.header.sequences);
        same(
            &again.values("induction"),
            &answer.values("induction"),
            CLOSE,
            model,
        );

        // The same sequences, given.
        let half = |s: &pb::TokenIds| pb::TokenIds {
            ids: s.ids[..7].to_vec(),
            type_ids: Vec::new(),
        };
        let given = pb::HeadsRequest {
            repeated: Some(pb::RepeatedSequences {
                given: answer.header.sequences.iter().map(half).collect(),
                ..pb::RepeatedSequences::default()
            }),
            ..asked.clone()
        };
        let given = ask(&d, given).await.unwrap();
        same(
            &given.values("induction"),
            &answer.values("induction"),
            CLOSE,
            model,
        );

        // Within the template, where there is one.
        let within = pb::HeadsRequest {
            inputs: Vec::new(),
            measures: vec![M::Induction.into(), M::SpecialTokens.into()],
            repeated: Some(pb::RepeatedSequences {
                special_tokens: true,
                ..asked.repeated.clone().unwrap()
            }),
            ..asked
        };
        let within = ask(&d, within).await.unwrap();
        let ids = &within.header.sequences[0].ids;
        let start = ids.iter().position(|id| *id == sequences[0][0]).unwrap();
        assert_eq!(ids[start..start + 14], *sequences[0], "{model}");
        if model.starts_with("bert") {
            assert_eq!((start, ids.len()), (1, 16), "between [CLS] and [SEP]");
            assert!(within.values("special_tokens").iter().any(|v| *v > 0.0));
        }
    }
    d.stop().await;
}

/// Induction heads read what heads that attend to the token before have written (Olsson et al. 2022): without these they find nothing.
#[tokio::test(flavor = "multi_thread")]
async fn an_intervention_on_some_heads_changes_what_later_heads_attend_to() {
    const MODEL: &str = "induction.legacy17";
    let d = TestDaemon::with(&[MODEL]).await;
    let asked = |edits: Vec<pb::Edit>| pb::HeadsRequest {
        model: MODEL.to_owned(),
        measures: vec![M::PreviousToken.into(), M::Induction.into()],
        intervention: (!edits.is_empty()).then(|| pb::Intervention {
            edits,
            ..pb::Intervention::default()
        }),
        ..pb::HeadsRequest::default()
    };
    let zero = |hook: &str, heads: Vec<u32>| pb::Edit {
        hook: hook.to_owned(),
        layers: vec![0],
        heads,
        operation: Some(Operation::Zero(pb::Zero {})),
        ..pb::Edit::default()
    };
    let plain = ask(&d, asked(Vec::new())).await.unwrap();
    let heads = plain.header.heads as usize;
    let of_layer = |answer: &Answer, name: &str, layer: usize| {
        answer.values(name)[layer * heads..][..heads].to_vec()
    };
    let strongest = |values: Vec<f64>| values.into_iter().fold(0.0, f64::max);
    let previous = of_layer(&plain, "previous_token", 0);
    let (looking, others): (Vec<u32>, Vec<u32>) =
        (0..u32::try_from(heads).unwrap()).partition(|h| previous[*h as usize] > 0.5);
    assert!(!looking.is_empty() && !others.is_empty(), "{previous:?}");
    assert!(strongest(of_layer(&plain, "induction", 1)) > 0.5);

    let without = ask(&d, asked(vec![zero("attn.hook_z", looking)])).await;
    let without = without.unwrap();
    assert!(strongest(of_layer(&without, "induction", 1)) < 0.1);
    same(
        &of_layer(&without, "previous_token", 0),
        &previous,
        CLOSE,
        "what attends stands before what it writes",
    );
    let others = ask(&d, asked(vec![zero("attn.hook_z", others)])).await;
    assert!(strongest(of_layer(&others.unwrap(), "induction", 1)) > 0.5);

    // A pattern that is edited is measured as its readers read it.
    let gone = ask(&d, asked(vec![zero("attn.hook_pattern", vec![1])])).await;
    let gone = of_layer(&gone.unwrap(), "previous_token", 0);
    assert!(gone[1] == 0.0 && gone[0] > 0.0, "{gone:?}");

    let refused = ask(&d, asked(vec![zero("attn.hook_z", vec![99])])).await;
    let status = refused.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status.message().contains("intervention.edits[0].heads"),
        "{status:?}"
    );
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn detectors_score_as_transformer_lens_does() {
    let d = TestDaemon::with(&["gpt2.legacy14", "bert.legacy14"]).await;
    for model in ["gpt2.legacy14", "bert.legacy14"] {
        let n = IDS.len();
        let duplicate = |q: usize, k: usize| f64::from(u8::from(k < q && IDS[k] == IDS[q]));
        let named = [
            (HeadPattern::PreviousTokenHead, "previous_token_head"),
            (HeadPattern::DuplicateTokenHead, "duplicate_token_head"),
            (HeadPattern::InductionHead, "induction_head"),
        ];
        let sought = |which: usize, q: usize, k: usize| match which {
            0 => f64::from(u8::from(k + 1 == q)),
            1 => duplicate(q, k),
            2 if k > 0 => duplicate(q, k - 1),
            _ => 0.0,
        };
        let mut detect = Vec::new();
        let mut settings = Vec::new();
        for (which, (pattern, _)) in named.iter().enumerate() {
            for abs in [false, true] {
                for (bos, current) in [(false, false), (true, false), (false, true), (true, true)] {
                    detect.push(pb::HeadDetector {
                        similarity: i32::from(abs),
                        exclude_bos: bos,
                        exclude_current_token: current,
                        ..detector(*pattern)
                    });
                    settings.push((which, abs, bos, current));
                }
            }
        }
        let request = pb::HeadsRequest {
            measures: vec![M::Entropy.into()],
            detect,
            ..on(model, &[&IDS])
        };
        let answer = ask(&d, request).await.unwrap();
        let patterns = patterns(&d, model, &IDS).await;
        for (at, (which, abs, bos, current)) in settings.into_iter().enumerate() {
            let wanted = each(&patterns, |head| {
                let (mut on, mut all, mut off) = (0.0, 0.0, 0.0);
                for (q, row) in head.iter().enumerate() {
                    for (k, a) in row.iter().enumerate() {
                        if !(bos && k == 0 || current && k == q) {
                            let d = sought(which, q, k);
                            on += a * d;
                            all += a;
                            off += (a - d).abs();
                        }
                    }
                }
                if abs { 1.0 - off / n as f64 } else { on / all }
            });
            let name = format!("detect.{at}.{}", named[which].1);
            let found = answer.values(&name);
            // The first query of a causal model has nothing but itself: with both left out, 0 / 0 for none of its heads here.
            same(&found, &wanted, CLOSE, &format!("{model} {name}"));
        }
        // The same pattern given is the same detector.
        let values: Vec<f32> = (0..n * n)
            .map(|at| f32::from(u8::from(at % n + 1 == at / n)))
            .collect();
        let given = pb::HeadDetector {
            pattern: Some(Given::Given(matrix(n, n, &values))),
            ..pb::HeadDetector::default()
        };
        let request = pb::HeadsRequest {
            detect: vec![given, detector(HeadPattern::PreviousTokenHead)],
            ..on(model, &[&IDS])
        };
        let answer = ask(&d, request).await.unwrap();
        same(
            &answer.values("detect.0.given"),
            &answer.values("detect.1.previous_token_head"),
            CLOSE,
            model,
        );
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn offsets_are_means_over_the_pairs_that_exist() {
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        let request = pb::HeadsRequest {
            offsets: true,
            layers: vec![1],
            measures: vec![M::Self_.into()],
            ..on(model, &[&OTHER, &IDS])
        };
        let answer = ask(&d, request).await.unwrap();
        let longest = IDS.len();
        let shape = answer.shape("offsets");
        assert_eq!(shape[0], 1);
        assert_eq!(shape[2], 2 * longest - 1);
        let rows = [
            patterns(&d, model, &OTHER).await,
            patterns(&d, model, &IDS).await,
        ];
        let found = answer.values("offsets");
        for head in 0..shape[1] {
            for (at, found) in found[head * shape[2]..][..shape[2]].iter().enumerate() {
                let (mut sum, mut count) = (0.0, 0.0);
                for pattern in &rows {
                    for (q, row) in pattern[1][head].iter().enumerate() {
                        for (k, weight) in row.iter().enumerate() {
                            if longest - 1 + q == at + k {
                                sum += weight;
                                count += 1.0;
                            }
                        }
                    }
                }
                let wanted: f64 = sum / count;
                assert!((found - wanted).abs() <= CLOSE, "{model} {head} {at}");
            }
        }
        let (_, entries) = &answer.tensors["offsets.entries"];
        let middle = i64::from_le_bytes(entries.as_chunks::<8>().0[longest - 1]);
        assert_eq!(middle as usize, IDS.len() + OTHER.len());
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn positions_are_compared_where_a_model_adds_them() {
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        let request = pb::HeadsRequest {
            similarity: true,
            measures: vec![M::Self_.into()],
            ..on(model, &[&OTHER, &IDS])
        };
        if model.starts_with("llama") {
            let error = ask(&d, request).await.unwrap_err();
            assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
            assert!(error.message().contains("hook_pos_embed"), "{error:?}");
            continue;
        }
        let answer = ask(&d, request).await.unwrap();
        let n = IDS.len();
        assert_eq!(answer.shape("position_similarity"), [n, n], "{model}");
        let found = answer.values("position_similarity");
        let shown = d
            .capture(ids(
                model,
                &IDS,
                hooks(&["hook_embed", "hook_pos_embed", "hook_embed_out"]),
            ))
            .await
            .unwrap();
        let added = shown.values("hook_pos_embed");
        let width = added.len() / n;
        if model.starts_with("gpt2") {
            // Nothing else is added, and nothing is normalised.
            let (before, after) = (
                shown.values("hook_embed"),
                shown.values("blocks.0.hook_resid_pre"),
            );
            for ((a, b), p) in before.iter().zip(&after).zip(&added) {
                assert!(f64::from((b - a - p).abs()) <= REWRITTEN, "{model}");
            }
        }
        // Without them, a token is the same everywhere.
        let zero = pb::Edit {
            hook: "hook_pos_embed".to_owned(),
            operation: Some(pb::edit::Operation::Zero(pb::Zero {})),
            ..pb::Edit::default()
        };
        let without = pb::CaptureRequest {
            intervention: Some(pb::Intervention {
                edits: vec![zero],
                ..pb::Intervention::default()
            }),
            ..ids(model, &[9; 4], hooks(&["blocks.0.hook_resid_pre"]))
        };
        let without = d
            .capture(without)
            .await
            .unwrap()
            .values("blocks.0.hook_resid_pre");
        for row in without.chunks_exact(width) {
            let off = row
                .iter()
                .zip(&without)
                .map(|(a, b)| f64::from((a - b).abs()));
            assert!(off.fold(0.0, f64::max) <= REWRITTEN, "{model}");
        }
        // They are the same for other tokens.
        let others = d
            .capture(ids(model, &OTHER, hooks(&["hook_pos_embed"])))
            .await
            .unwrap();
        assert_eq!(
            others.values("hook_pos_embed"),
            added[..OTHER.len() * width],
            "{model}"
        );
        let row = |at: usize| &added[at * width..][..width];
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter()
                .zip(b)
                .map(|(x, y)| f64::from(*x) * f64::from(*y))
                .sum()
        };
        for (at, found) in found.iter().enumerate() {
            let (a, b) = (row(at / n), row(at % n));
            let wanted = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
            assert!((found - wanted).abs() <= CLOSE, "{model} {at}");
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_have_heads_too() {
    let d = TestDaemon::with(&["vit.legacy14"]).await;
    let pixels = pb::Input {
        kind: Some(pb::input::Kind::Tensors(pb::NamedTensors {
            tensors: vec![image(&d).await],
        })),
    };
    let request = pb::HeadsRequest {
        model: "vit.legacy14".to_owned(),
        inputs: vec![pixels],
        offsets: true,
        ..pb::HeadsRequest::default()
    };
    let answer = ask(&d, request.clone()).await.unwrap();
    let names = &answer.header.tensors;
    assert!(names.iter().any(|n| n == "entropy"), "{names:?}");
    assert!(
        !names
            .iter()
            .any(|n| n == "induction" || n == "special_tokens")
    );
    assert!(answer.summary.notes.iter().any(|n| n.contains("induction")));
    for (measure, detect) in [
        (M::SpecialTokens, Vec::new()),
        (M::Entropy, vec![detector(HeadPattern::InductionHead)]),
        (M::Induction, Vec::new()),
    ] {
        let asked = pb::HeadsRequest {
            measures: vec![measure.into()],
            detect,
            ..request.clone()
        };
        let error = ask(&d, asked).await.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    }
    d.stop().await;
}

/// An input of the image model.
async fn image(d: &TestDaemon) -> pb::Tensor {
    let info = d.model("vit.legacy14").await;
    let input = &info.inputs[0];
    let shape: Vec<u64> = input
        .dims
        .iter()
        .map(|n| u64::try_from(*n).ok().filter(|n| *n > 0).unwrap_or(1))
        .collect();
    let n = shape.iter().product::<u64>();
    let values = (0..n).map(|at| ((at * 37 % 101) as f32 / 50.0 - 1.0).to_le_bytes());
    pb::Tensor {
        name: input.name.clone(),
        dtype: pb::DType::F32.into(),
        shape,
        data: values.flatten().collect::<Vec<u8>>().into(),
        ..pb::Tensor::default()
    }
}

fn matrix(rows: usize, columns: usize, values: &[f32]) -> pb::Tensor {
    pb::Tensor {
        dtype: pb::DType::F32.into(),
        shape: vec![rows as u64, columns as u64],
        data: values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>()
            .into(),
        ..pb::Tensor::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_field_is_named() {
    let d = TestDaemon::with(&["gpt2.legacy14"]).await;
    let good = || on("gpt2.legacy14", &[&IDS]);
    let repeated = |r: pb::RepeatedSequences| pb::HeadsRequest {
        repeated: Some(r),
        ..good()
    };
    let detect = |detector: pb::HeadDetector| pb::HeadsRequest {
        detect: vec![detector],
        ..good()
    };
    let given = |t: pb::Tensor| {
        detect(pb::HeadDetector {
            pattern: Some(Given::Given(t)),
            ..pb::HeadDetector::default()
        })
    };
    let half = |ids: Vec<u32>, type_ids: Vec<u32>| pb::RepeatedSequences {
        given: vec![pb::TokenIds { ids, type_ids }],
        ..pb::RepeatedSequences::default()
    };
    let cases: Vec<(&str, pb::HeadsRequest)> = vec![
        (
            "model",
            pb::HeadsRequest {
                model: String::new(),
                ..good()
            },
        ),
        ("inputs[1]", on("gpt2.legacy14", &[&IDS, &[]])),
        ("inputs[1]", on("gpt2.legacy14", &[&IDS, &[1_000_000]])),
        ("inputs[0]", on("gpt2.legacy14", &[&[5; 4000]])),
        (
            "inputs[1]",
            pb::HeadsRequest {
                inputs: vec![tokens(&IDS), pb::Input { kind: None }],
                ..good()
            },
        ),
        (
            "layers[1]",
            pb::HeadsRequest {
                layers: vec![0, 99],
                ..good()
            },
        ),
        (
            "measures[0]",
            pb::HeadsRequest {
                measures: vec![0],
                ..good()
            },
        ),
        (
            "measures[1]",
            pb::HeadsRequest {
                measures: vec![1, 77],
                ..good()
            },
        ),
        (
            "measures",
            pb::HeadsRequest {
                measures: vec![1; 17],
                ..good()
            },
        ),
        ("detect[0].pattern", detect(pb::HeadDetector::default())),
        (
            "detect[0].named",
            detect(detector(HeadPattern::Unspecified)),
        ),
        (
            "detect[0].similarity",
            detect(pb::HeadDetector {
                similarity: 9,
                ..detector(HeadPattern::InductionHead)
            }),
        ),
        ("detect[0].given.shape", given(matrix(2, 2, &[0.0; 4]))),
        ("detect[0].given.shape", given(matrix(2, 3, &[0.0; 6]))),
        ("detect[0].given.data", given(matrix(6, 6, &[f32::NAN; 36]))),
        ("detect[0].given.data", given(matrix(6, 6, &[0.0; 3]))),
        ("detect[0].given.dtype", given(pb::Tensor::default())),
        (
            "detect",
            pb::HeadsRequest {
                detect: vec![detector(HeadPattern::InductionHead); 65],
                ..good()
            },
        ),
        (
            "repeated.count",
            repeated(pb::RepeatedSequences {
                count: 65,
                ..Default::default()
            }),
        ),
        (
            "repeated.length",
            repeated(pb::RepeatedSequences {
                length: 100_000,
                ..Default::default()
            }),
        ),
        (
            "repeated.given[0].ids",
            repeated(half(Vec::new(), Vec::new())),
        ),
        (
            "repeated.given[0].ids[1]",
            repeated(half(vec![1, 1_000_000], Vec::new())),
        ),
        (
            "repeated.length",
            repeated(pb::RepeatedSequences {
                length: 65,
                ..Default::default()
            }),
        ),
        (
            "repeated.given[0].ids",
            repeated(half(vec![1; 5000], Vec::new())),
        ),
        (
            "repeated.given[0].type_ids",
            repeated(half(vec![1], vec![0])),
        ),
    ];
    for (field, request) in cases {
        let error = ask(&d, request).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{field}: {error:?}");
        let details = error.get_details_bad_request().unwrap();
        let named = &details.field_violations[0].field;
        assert!(named.starts_with(field), "{field}: {named} ({error:?})");
    }
    let unknown = ask(&d, on("nobody", &[&IDS])).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    d.stop().await;
}
