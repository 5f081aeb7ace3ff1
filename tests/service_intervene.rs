//! Interventions over real gRPC with real workers: what every edit does, how edits compose, where they ride, every error.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/sweep.rs"]
mod sweep_support;

use std::collections::{BTreeMap, HashMap};

use daemon::{TestDaemon, hooks, ids, text};
use introspectd::service::wire::introspect::{
    self as pb, edit::Operation as Op, intervene_item::Item as Of,
    intervene_response::Item as Message, intervention_service_client::InterventionServiceClient,
};
use sweep_support::swept;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// The four development architectures.
const MODELS: [&str; 4] = [
    "bert.legacy14",
    "distilbert.legacy14",
    "gpt2.legacy14",
    "llama.dynamo20",
];
const IDS: [u32; 6] = [2, 9, 17, 30, 11, 3];
const OTHER: [u32; 6] = [2, 21, 8, 14, 25, 3];
/// Same operators, other batch or place in the graph.
const CLOSE: f32 = 1e-5;
/// Same mathematics by other operators.
const REWRITTEN: f32 = 1e-4;

/// One of both runs.
#[derive(Debug, Default)]
struct Run {
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    prediction: Option<pb::Prediction>,
}

impl Run {
    fn take(&mut self, item: pb::InterveneItem) {
        match item.item.unwrap() {
            Of::Tensor(t) => {
                assert_eq!(t.dtype(), pb::DType::F32);
                let values = t.data.chunks_exact(4);
                let values = values.map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                let shape = t.shape.iter().map(|n| *n as usize).collect();
                let (_, all) = self
                    .tensors
                    .entry(t.name)
                    .or_insert_with(|| (shape, Vec::new()));
                assert_eq!(t.offset as usize, all.len() * 4);
                all.extend(values);
            }
            Of::Prediction(p) => self.prediction = Some(p),
            other => panic!("{other:?}"),
        }
    }

    fn values(&self, name: &str) -> &[f32] {
        &self.tensors[name].1
    }
}

#[derive(Debug, Default)]
struct Answer {
    original: Run,
    modified: Run,
    effect: Option<pb::InterventionEffect>,
    summary: pb::Summary,
}

impl Answer {
    /// The only place of the prediction.
    fn effect(&self) -> &pb::EffectAt {
        &self.effect.as_ref().unwrap().at[0]
    }
}

async fn ask(d: &TestDaemon, request: pb::InterveneRequest) -> Result<Answer, Status> {
    let mut client =
        InterventionServiceClient::new(d.channel().await).max_decoding_message_size(64 << 20);
    let mut stream = client.intervene(request).await?.into_inner();
    let mut answer = Answer::default();
    let (mut messages, mut crc, mut ended) = (0, 0, false);
    while let Some(message) = stream.message().await? {
        assert!(!ended, "the summary comes last");
        match message.item.unwrap() {
            Message::Header(_) => assert_eq!(messages, 0),
            Message::Original(item) => {
                crc = checked(crc, &item);
                answer.original.take(item);
            }
            Message::Modified(item) => {
                crc = checked(crc, &item);
                answer.modified.take(item);
            }
            Message::Effect(effect) => answer.effect = Some(effect),
            Message::Summary(summary) => {
                assert_eq!((summary.messages, summary.crc32c), (messages, crc));
                answer.summary = summary;
                ended = true;
            }
        }
        messages += 1;
    }
    assert!(ended, "a stream ends with its summary");
    Ok(answer)
}

fn checked(crc: u32, item: &pb::InterveneItem) -> u32 {
    match item.item.as_ref().unwrap() {
        Of::Tensor(t) => crc32c::crc32c_append(crc, &t.data),
        _ => crc,
    }
}

fn tokens(of: &[u32]) -> pb::Input {
    pb::Input {
        kind: Some(pb::input::Kind::Tokens(pb::TokenIds {
            ids: of.to_vec(),
            type_ids: Vec::new(),
        })),
    }
}

fn edit(hook: &str, operation: Op) -> pb::Edit {
    pb::Edit {
        hook: hook.to_owned(),
        operation: Some(operation),
        ..pb::Edit::default()
    }
}

fn edits(edits: Vec<pb::Edit>) -> pb::Intervention {
    pb::Intervention {
        edits,
        ..pb::Intervention::default()
    }
}

/// With a source called "other".
fn from(other: &[u32], edits: Vec<pb::Edit>) -> pb::Intervention {
    let source = pb::InterventionSource {
        input: Some(tokens(other)),
        edits: Vec::new(),
    };
    pb::Intervention {
        edits,
        sources: HashMap::from([("other".to_owned(), source)]),
    }
}

fn interchange() -> Op {
    Op::Interchange(pb::Interchange {
        source: "other".to_owned(),
        positions: Vec::new(),
    })
}

fn request(
    model: &str,
    intervention: pb::Intervention,
    selection: pb::Selection,
) -> pb::InterveneRequest {
    pb::InterveneRequest {
        model: model.to_owned(),
        input: Some(tokens(&IDS)),
        intervention: Some(intervention),
        selection: Some(selection),
    }
}

fn vector(values: &[f32]) -> pb::Tensor {
    pb::Tensor {
        dtype: pb::DType::F32.into(),
        shape: vec![values.len() as u64],
        data: values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>()
            .into(),
        ..pb::Tensor::default()
    }
}

fn given(values: &[f32]) -> Option<pb::Vector> {
    Some(pb::Vector {
        of: Some(pb::vector::Of::Values(vector(values))),
    })
}

fn far(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(1e-30f32, |m, v| m.max(v.abs()));
    let off = a.iter().zip(b).map(|(x, y)| (x - y).abs());
    off.fold(0.0, f32::max) / largest
}

/// The whole output, and these hook points.
fn all(names: &[&str]) -> pb::Selection {
    pb::Selection {
        logits: pb::Logits::All.into(),
        ..hooks(names)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_that_changes_nothing_changes_no_bit() {
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        let info = d.model(model).await;
        let kinds = [
            "hook_embed",
            "blocks.0.hook_resid_post",
            "blocks.1.attn.hook_q",
            "attn.hook_z",
            "attn.hook_pattern",
            "blocks.1.hook_attn_out",
            "blocks.0.hook_mlp_out",
            "mlp.hook_post",
        ];
        for hook in kinds {
            let answer = ask(
                &d,
                request(model, edits(vec![edit(hook, Op::Scale(1.0))]), all(&[])),
            )
            .await
            .unwrap_or_else(|e| panic!("{model} {hook}: {e:?}"));
            let (a, b) = (
                answer.original.values(&info.main_output),
                answer.modified.values(&info.main_output),
            );
            let plain = d.capture(ids(model, &IDS, all(&[]))).await.unwrap();
            assert_eq!(a, plain.values(&info.main_output), "{model}");
            // The plain graph is the file's, fusions of the runtime included; the edited one is not.
            assert!(far(b, a) <= CLOSE, "{model} {hook}: {}", far(b, a));
            let shown = all(&["blocks.0.hook_resid_pre"]);
            let rewritten = d.capture(ids(model, &IDS, shown)).await.unwrap();
            assert_eq!(b, rewritten.values(&info.main_output), "{model} {hook}");
            if let Some(effect) = &answer.effect {
                assert!(effect.at.iter().all(|e| e.kl < 1e-9 && !e.flipped));
            }
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_layer_of_another_run_gives_its_answer() {
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        let info = d.model(model).await;
        let other = d.capture(ids(model, &OTHER, all(&[]))).await.unwrap();
        let wanted = other.values(&info.main_output);
        for hook in ["hidden_states.0", "hidden_states.1"] {
            let patch = from(&OTHER, vec![edit(hook, interchange())]);
            let answer = ask(&d, request(model, patch, all(&[]))).await.unwrap();
            let got = answer.modified.values(&info.main_output);
            assert!(far(got, &wanted) <= CLOSE, "{model} {hook}");
            assert!(far(answer.original.values(&info.main_output), &wanted) > CLOSE);
        }
        // The last position of the last layer alone: that of the other run, and all others as they were.
        let hook = "hidden_states.1";
        let patch = pb::Edit {
            positions: vec![-1],
            ..edit(hook, interchange())
        };
        let shown = all(&[hook]);
        let answer = ask(&d, request(model, from(&OTHER, vec![patch]), shown))
            .await
            .unwrap();
        let name = info
            .hooks
            .iter()
            .find(|h| h.aliases.iter().any(|a| a == hook))
            .unwrap();
        let theirs = d.capture(ids(model, &OTHER, hooks(&[hook]))).await.unwrap();
        let (ours, edited) = (
            answer.original.values(&name.name),
            answer.modified.values(&name.name),
        );
        let cut = ours.len() / IDS.len() * (IDS.len() - 1);
        assert!(far(&edited[..cut], &ours[..cut]) <= CLOSE, "{model}");
        assert_eq!(
            edited[cut..],
            theirs.values(&name.name)[cut..],
            "{model} {hook}"
        );
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_does_what_it_says_where_it_says() {
    let d = TestDaemon::with(&["bert.legacy14"]).await;
    let model = "bert.legacy14";
    let z = "blocks.1.attn.hook_z";
    let post = "blocks.1.mlp.hook_post";
    let stream = "blocks.0.hook_resid_post";
    let show = |hook: &str| all(&[hook]);
    let run = async |hook: &str, given: Vec<pb::Edit>| {
        let answer = ask(&d, request(model, edits(given), show(hook)))
            .await
            .unwrap_or_else(|e| panic!("{hook}: {e:?}"));
        let (shape, before) = answer.original.tensors[hook].clone();
        (shape, before, answer.modified.values(hook).to_vec())
    };

    // A head at two positions.
    let head = pb::Edit {
        heads: vec![1],
        positions: vec![0, -2],
        ..edit(z, Op::Zero(pb::Zero {}))
    };
    let (shape, before, after) = run(z, vec![head]).await;
    let [length, count, width] = shape[..] else {
        panic!("{shape:?}")
    };
    for (at, (a, b)) in before.iter().zip(&after).enumerate() {
        let (pos, head) = (at / (count * width), at / width % count);
        let gone = head == 1 && (pos == 0 || pos == length - 2);
        assert_eq!(*b, if gone { 0.0 } else { *a }, "{pos} {head}");
    }

    // Neurons of all positions: set, scaled, clamped, one after the other.
    let neurons = |operation| pb::Edit {
        dims: vec![3, 5],
        ..edit(post, operation)
    };
    let (shape, before, after) = run(
        post,
        vec![
            neurons(Op::Set(vector(&[2.0, -4.0]))),
            neurons(Op::Scale(0.5)),
            neurons(Op::Clamp(pb::Clamp {
                low: Some(-1.5),
                high: None,
            })),
        ],
    )
    .await;
    let width = shape[1];
    for (at, (a, b)) in before.iter().zip(&after).enumerate() {
        let wanted = match at % width {
            3 => 1.0,
            5 => -1.5,
            _ => *a,
        };
        assert_eq!(*b, wanted);
    }

    // The order of edits matters.
    let width = 32;
    let ones = vec![1.0; width];
    let add = || {
        edit(
            stream,
            Op::Add(pb::Add {
                vector: given(&ones),
                scale: Some(3.0),
            }),
        )
    };
    let twice = || edit(stream, Op::Scale(2.0));
    let (_, before, after) = run(stream, vec![add(), twice()]).await;
    let wanted: Vec<f32> = before.iter().map(|v| (v + 3.0) * 2.0).collect();
    assert!(far(&after, &wanted) <= CLOSE);
    let (_, before, after) = run(stream, vec![twice(), add()]).await;
    let wanted: Vec<f32> = before.iter().map(|v| v * 2.0 + 3.0).collect();
    assert!(far(&after, &wanted) <= CLOSE);

    // What points along a direction goes, and nothing else.
    let direction: Vec<f32> = (0..width).map(|i| (i as f32 - 7.0) / 5.0).collect();
    let project = edit(stream, Op::ProjectOut(given(&direction).unwrap()));
    let (_, before, after) = run(stream, vec![project]).await;
    let square: f32 = direction.iter().map(|v| v * v).sum();
    for (a, b) in before.chunks(width).zip(after.chunks(width)) {
        let along: f32 = a.iter().zip(&direction).map(|(x, d)| x * d).sum::<f32>() / square;
        let wanted: Vec<f32> = a
            .iter()
            .zip(&direction)
            .map(|(x, d)| x - along * d)
            .collect();
        assert!(far(b, &wanted) <= REWRITTEN);
    }

    // The mean over two texts and all their positions.
    let texts = [tokens(&OTHER), tokens(&OTHER[..4])];
    let mean = edit(
        stream,
        Op::Mean(pb::Mean {
            inputs: texts.to_vec(),
        }),
    );
    let (_, _, after) = run(stream, vec![mean]).await;
    let mut sum = vec![0.0f64; width];
    for input in [&OTHER[..], &OTHER[..4]] {
        let values = d.capture(ids(model, input, hooks(&[stream]))).await;
        for row in values.unwrap().values(stream).chunks(width) {
            for (s, v) in sum.iter_mut().zip(row) {
                *s += f64::from(*v);
            }
        }
    }
    #[allow(clippy::cast_possible_truncation)]
    let wanted: Vec<f32> = sum.iter().map(|s| (s / 10.0) as f32).collect();
    for row in after.chunks(width) {
        assert!(far(row, &wanted) <= CLOSE);
    }

    // Noise is drawn from its seed.
    let noise = |seed| {
        let noise = pb::Noise {
            deviation: 0.5,
            seed,
        };
        vec![edit(stream, Op::Noise(noise))]
    };
    let (_, before, one) = run(stream, noise(1)).await;
    let (_, _, same) = run(stream, noise(1)).await;
    let (_, _, other) = run(stream, noise(2)).await;
    assert_eq!(one, same);
    assert_ne!(one, other);
    let squares: f32 = one
        .iter()
        .zip(&before)
        .map(|(b, a)| (b - a) * (b - a))
        .sum();
    let deviation = (squares / before.len() as f32).sqrt();
    // Of 192 draws, three standard errors.
    assert!((deviation - 0.5).abs() < 0.5 * 3.0 / (2.0f32 * 192.0).sqrt());

    // One query of one head looks nowhere.
    let pattern = "blocks.0.attn.hook_pattern";
    let blind = pb::Edit {
        heads: vec![0],
        positions: vec![2],
        keys: vec![1, 3],
        ..edit(pattern, Op::Zero(pb::Zero {}))
    };
    let (shape, before, after) = run(pattern, vec![blind]).await;
    let n = shape[2];
    for (at, (a, b)) in before.iter().zip(&after).enumerate() {
        let (head, query, key) = (at / (n * n), at / n % n, at % n);
        let gone = head == 0 && query == 2 && (key == 1 || key == 3);
        assert_eq!(*b, if gone { 0.0 } else { *a });
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_reaches_a_receiver_by_one_path() {
    let d = TestDaemon::with(&["gpt2.legacy14"]).await;
    let model = "gpt2.legacy14";
    let info = d.model(model).await;
    // The receiver, the last MLP, takes what it would be if the first attention were that of another run; everything else is as it is.
    let sender = edit("blocks.0.hook_attn_out", interchange());
    let mut path = from(
        &OTHER,
        vec![edit(
            "blocks.1.hook_mlp_out",
            Op::Interchange(pb::Interchange {
                source: "sent".to_owned(),
                positions: Vec::new(),
            }),
        )],
    );
    path.sources.insert(
        "sent".to_owned(),
        pb::InterventionSource {
            input: Some(tokens(&IDS)),
            edits: vec![sender.clone()],
        },
    );
    let out = "blocks.1.hook_mlp_out";
    let by_path = ask(&d, request(model, path.clone(), all(&[out])))
        .await
        .unwrap();
    let whole = ask(&d, request(model, from(&OTHER, vec![sender]), all(&[out])))
        .await
        .unwrap();
    assert_eq!(by_path.modified.values(out), whole.modified.values(out));
    let logits = &info.main_output;
    assert!(
        far(
            by_path.modified.values(logits),
            whole.modified.values(logits)
        ) > CLOSE
    );
    assert!(
        far(
            by_path.modified.values(logits),
            by_path.original.values(logits)
        ) > CLOSE
    );

    // A source that is made from itself is refused.
    let circle = pb::Edit {
        operation: Some(Op::Interchange(pb::Interchange {
            source: "sent".to_owned(),
            positions: Vec::new(),
        })),
        ..path.sources["sent"].edits[0].clone()
    };
    path.sources.get_mut("sent").unwrap().edits = vec![circle];
    let error = ask(&d, request(model, path, all(&[]))).await.unwrap_err();
    let field = field(&error);
    assert_eq!(
        field,
        "intervention.sources[\"sent\"].edits[0].interchange.source"
    );
    assert!(error.message().contains("sent from sent"), "{error}");
    d.stop().await;
}

/// The field that is named.
fn field(error: &Status) -> String {
    assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
    let details = error.get_error_details();
    details.bad_request().unwrap().field_violations[0]
        .field
        .clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn interventions_ride_on_other_calls() {
    let d = TestDaemon::with(&["bert.legacy14"]).await;
    let model = "bert.legacy14";
    let info = d.model(model).await;
    let zero = || {
        edits(vec![pb::Edit {
            layers: vec![1],
            heads: vec![0, 2],
            ..edit("attn.hook_z", Op::Zero(pb::Zero {}))
        }])
    };
    let answer = ask(&d, request(model, zero(), all(&[]))).await.unwrap();
    let modified = answer.modified.values(&info.main_output);
    let effect = answer.effect();
    assert!(effect.kl > 0.0 && effect.total_variation > 0.0);
    assert!(!effect.changes[0].label.is_empty());

    // A capture.
    let mut capture = ids(model, &IDS, all(&[]));
    capture.intervention = Some(zero());
    let captured = d.capture(capture).await.unwrap();
    assert_eq!(captured.values(&info.main_output), modified);

    // An attribution: the number that it explains is that of the edited model.
    let mut client =
        pb::attribution_service_client::AttributionServiceClient::new(d.channel().await);
    let label = effect.changes[0].index;
    let choice = pb::Choice {
        what: Some(pb::choice::What::Index(label)),
        position: None,
    };
    let question = pb::AttributeRequest {
        model: model.to_owned(),
        input: Some(tokens(&IDS)),
        target: Some(pb::Target {
            of: Some(pb::target::Of::Choice(choice)),
            ..pb::Target::default()
        }),
        intervention: Some(zero()),
        ..pb::AttributeRequest::default()
    };
    let mut stream = client.attribute(question).await.unwrap().into_inner();
    let mut explained = None;
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(pb::attribute_response::Item::Result(result)) = message.item {
            explained = Some(result);
        }
    }
    let explained = explained.unwrap();
    let logit = f64::from(effect.changes[0].logit_after);
    assert!((explained.value - logit).abs() < f64::from(REWRITTEN));
    assert!(explained.residual_ratio.unwrap() < 0.05, "{explained:?}");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_edits_name_their_field() {
    let d = TestDaemon::with(&["bert.legacy14"]).await;
    let model = "bert.legacy14";
    let zero = || Op::Zero(pb::Zero {});
    let stream = "blocks.0.hook_resid_post";
    let cases: Vec<(pb::Intervention, &str)> = vec![
        (edits(vec![]), "intervention.edits"),
        (
            edits(vec![
                edit(stream, Op::Scale(1.0)),
                edit("hook_nonsense", zero()),
            ]),
            "intervention.edits[1].hook",
        ),
        (
            edits(vec![edit("logits", zero())]),
            "intervention.edits[0].hook",
        ),
        (
            edits(vec![pb::Edit {
                heads: vec![99],
                ..edit("attn.hook_z", zero())
            }]),
            "intervention.edits[0].heads",
        ),
        (
            edits(vec![pb::Edit {
                heads: vec![0],
                ..edit(stream, zero())
            }]),
            "intervention.edits[0].heads",
        ),
        (
            edits(vec![pb::Edit {
                layers: vec![7],
                ..edit("attn.hook_z", zero())
            }]),
            "intervention.edits[0].layers[0]",
        ),
        (
            edits(vec![pb::Edit {
                positions: vec![0, 6],
                ..edit(stream, zero())
            }]),
            "intervention.edits[0].positions[1]",
        ),
        (
            edits(vec![pb::Edit {
                dims: vec![32],
                ..edit(stream, zero())
            }]),
            "intervention.edits[0].dims",
        ),
        (
            edits(vec![pb::Edit {
                dims: vec![1, 1],
                ..edit(stream, zero())
            }]),
            "intervention.edits[0].dims",
        ),
        (
            edits(vec![edit(stream, Op::Set(vector(&[1.0; 31])))]),
            "intervention.edits[0].set",
        ),
        (
            edits(vec![edit(stream, Op::Set(vector(&[f32::NAN; 32])))]),
            "intervention.edits[0].set",
        ),
        (
            edits(vec![edit(
                stream,
                Op::ProjectOut(given(&[0.0; 32]).unwrap()),
            )]),
            "intervention.edits[0].project_out",
        ),
        (
            edits(vec![edit(stream, Op::Scale(f32::INFINITY))]),
            "intervention.edits[0].scale",
        ),
        (
            edits(vec![edit(
                stream,
                Op::Clamp(pb::Clamp {
                    low: Some(1.0),
                    high: Some(0.0),
                }),
            )]),
            "intervention.edits[0].clamp",
        ),
        (
            edits(vec![edit(stream, Op::Mean(pb::Mean::default()))]),
            "intervention.edits[0].mean.inputs",
        ),
        (
            edits(vec![edit(stream, interchange())]),
            "intervention.edits[0].interchange.source",
        ),
        (
            from(&[2, 5, 3], vec![edit(stream, interchange())]),
            "intervention.edits[0].interchange.positions",
        ),
        (
            edits(vec![pb::Edit {
                operation: None,
                ..edit(stream, zero())
            }]),
            "intervention.edits[0].operation",
        ),
    ];
    for (intervention, wanted) in cases {
        let error = ask(&d, request(model, intervention.clone(), all(&[])))
            .await
            .unwrap_err();
        assert_eq!(field(&error), wanted, "{intervention:?}: {error}");
    }
    // A source of another length, mapped.
    let mapped = pb::Edit {
        positions: vec![1, 4],
        ..edit(
            stream,
            Op::Interchange(pb::Interchange {
                source: "other".to_owned(),
                positions: vec![1, -1],
            }),
        )
    };
    let answer = ask(
        &d,
        request(model, from(&[2, 5, 3], vec![mapped]), all(&[stream])),
    )
    .await
    .unwrap();
    let theirs = d.capture(ids(model, &[2, 5, 3], hooks(&[stream]))).await;
    let theirs = theirs.unwrap().values(stream);
    let edited = answer.modified.values(stream);
    assert_eq!(edited[32..64], theirs[32..64]);
    assert_eq!(edited[4 * 32..5 * 32], theirs[64..96]);

    // The process is alive, and answers.
    d.capture(text(model, "the film", hooks(&[])))
        .await
        .unwrap();
    d.stop().await;
}

fn chosen(index: u32) -> Option<pb::Target> {
    let choice = pb::Choice {
        what: Some(pb::choice::What::Index(index)),
        position: None,
    };
    Some(pb::Target {
        of: Some(pb::target::Of::Choice(choice)),
        ..pb::Target::default()
    })
}

fn sweep(
    model: &str,
    hook: &str,
    by: &[pb::SweepAxis],
    change: pb::sweep_request::Change,
) -> pb::SweepRequest {
    pb::SweepRequest {
        model: model.to_owned(),
        input: Some(tokens(&IDS)),
        target: chosen(1),
        hooks: vec![hook.to_owned()],
        by: by.iter().map(|b| (*b).into()).collect(),
        change: Some(change),
        ..pb::SweepRequest::default()
    }
}

fn zeroed() -> pb::sweep_request::Change {
    pb::sweep_request::Change::Zero(pb::Zero {})
}

fn patched(ids: &[u32]) -> pb::sweep_request::Change {
    pb::sweep_request::Change::Patch(tokens(ids))
}

/// The score of a label at the last place, of the changed model.
async fn one_score(d: &TestDaemon, model: &str, intervention: pb::Intervention) -> f64 {
    let info = d.model(model).await;
    let width = match info.labels.len() {
        0 => usize::try_from(info.dims.unwrap().vocab.unwrap()).unwrap(),
        n => n,
    };
    let mut request = ids(model, &IDS, all(&[]));
    request.intervention = Some(intervention);
    let values = d.capture(request).await.unwrap().values(&info.main_output);
    f64::from(values[values.len() - width + 1])
}

fn close(found: f32, wanted: f64, what: &str) {
    let off = (f64::from(found) - wanted).abs();
    assert!(off < f64::from(REWRITTEN), "{what}: {found} for {wanted}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_is_every_edit_by_itself() {
    use pb::SweepAxis::{Dim, Head, Position};
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        // Heads, zeroed.
        let found = swept(&d, sweep(model, "attn.hook_z", &[Head], zeroed()));
        let found = found.await.unwrap();
        let hooks = &found.header.hooks;
        assert_eq!(found.header.rows, 4 * hooks.len() as u64);
        assert_eq!(found.summary.rows, found.header.rows + 1);
        assert_eq!(found.result, pb::SweepResult::default());
        for (layer, hook) in (0u32..).zip(hooks) {
            for head in [0u32, 3] {
                let alone = pb::Edit {
                    layers: vec![layer],
                    heads: vec![head],
                    ..edit("attn.hook_z", Op::Zero(pb::Zero {}))
                };
                let wanted = one_score(&d, model, edits(vec![alone])).await - found.header.value;
                let effect = found.of("effects", hook)[head as usize];
                close(effect, wanted, &format!("{model} {hook} {head}"));
            }
        }

        // Positions of the stream, patched from another run.
        let found = swept(
            &d,
            sweep(model, "hook_resid_post", &[Position], patched(&OTHER)),
        );
        let found = found.await.unwrap();
        let restored = found.header.source_value.unwrap() - found.header.value;
        let hook = &found.header.hooks[0];
        assert_eq!(found.of("effects", hook).len(), IDS.len());
        for position in [1i32, 5] {
            let alone = pb::Edit {
                positions: vec![position],
                ..edit(hook, interchange())
            };
            let wanted = one_score(&d, model, from(&OTHER, vec![alone])).await - found.header.value;
            let at = usize::try_from(position).unwrap();
            close(found.of("effects", hook)[at], wanted, hook);
            close(found.of("normalized", hook)[at], wanted / restored, hook);
        }
        // Everything at one layer restores everything.
        let whole = swept(&d, sweep(model, "hook_resid_post", &[], patched(&OTHER)));
        let whole = whole.await.unwrap();
        for hook in &whole.header.hooks {
            let all = whole.of("normalized", hook);
            assert_eq!(all.len(), 1);
            close(all[0], 1.0, hook);
        }

        // Heads at positions.
        let both = swept(&d, {
            let asked = sweep(model, "attn.hook_z", &[Head, Position], patched(&OTHER));
            pb::SweepRequest {
                layers: vec![1],
                ..asked
            }
        });
        let both = both.await.unwrap();
        let hook = &both.header.hooks[0];
        let (axes, shape) = &both.shapes[&format!("effects:{hook}")];
        assert_eq!((&axes[0][..], &axes[1][..]), ("pos", "head"));
        assert_eq!(shape, &[IDS.len() as u64, 4]);
        let alone = pb::Edit {
            positions: vec![5],
            heads: vec![2],
            ..edit(hook, interchange())
        };
        let wanted = one_score(&d, model, from(&OTHER, vec![alone])).await - both.header.value;
        close(both.of("effects", hook)[5 * 4 + 2], wanted, hook);

        // So many rows of later layers begin in the middle of the model, after one that tells that nothing is lost by it.
        let last = u32::try_from(found.header.hooks.len() - 1).unwrap();
        let neurons = pb::SweepRequest {
            layers: vec![last],
            ..sweep(model, "mlp.hook_post", &[Dim, Position], patched(&OTHER))
        };
        let all = swept(&d, neurons.clone()).await.unwrap();
        // The source, the input, the input from the middle on.
        assert_eq!(all.summary.rows, all.header.rows + 3, "{model}");
        let few = pb::SweepRequest {
            method: pb::SweepMethod::Both.into(),
            most: 9,
            ..neurons
        };
        let few = swept(&d, few).await.unwrap();
        assert_eq!(few.summary.rows, 2 + 1 + 9, "{model}");
        let hook = &few.header.hooks[0];
        let whole = few.of("effects", hook).iter().enumerate();
        let run: Vec<_> = whole.filter(|(_, e)| e.is_finite()).collect();
        assert_eq!(run.len(), 9);
        for (part, effect) in run {
            close(
                all.of("effects", hook)[part],
                f64::from(*effect),
                &format!("{model} {hook} {part}"),
            );
        }

        // Neurons, put to their mean.
        let mean = || pb::Mean {
            inputs: vec![tokens(&OTHER)],
        };
        let change = pb::sweep_request::Change::Mean(mean());
        let neurons = pb::SweepRequest {
            layers: vec![1],
            ..sweep(model, "mlp.hook_post", &[Dim], change)
        };
        let found = swept(&d, neurons).await.unwrap();
        let hook = &found.header.hooks[0];
        assert_eq!(found.of("effects", hook).len(), 64);
        let alone = pb::Edit {
            dims: vec![17],
            ..edit(hook, Op::Mean(mean()))
        };
        let wanted = one_score(&d, model, edits(vec![alone])).await - found.header.value;
        close(found.of("effects", hook)[17], wanted, hook);
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn estimates_are_what_small_changes_do() {
    use pb::SweepAxis::{Head, Position};
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        let both = |most| pb::SweepRequest {
            method: pb::SweepMethod::Both.into(),
            most,
            ..sweep(model, "attn.hook_z", &[Head], patched(&OTHER))
        };
        let found = swept(&d, both(0)).await.unwrap();
        let parts = 4 * found.header.hooks.len();
        assert_eq!(found.result.compared, parts as u64);
        assert!(found.result.correlation.unwrap() > 0.0, "{model}");

        // An estimate is the derivative along the change: a small part of it, forth and back.
        let hook = &found.header.hooks[1];
        let ours = d.capture(ids(model, &IDS, hooks(&[hook]))).await.unwrap();
        let theirs = d.capture(ids(model, &OTHER, hooks(&[hook]))).await.unwrap();
        let change = theirs.values(hook).into_iter().zip(ours.values(hook));
        let change: Vec<f32> = change.map(|(b, a)| b - a).collect();
        let width = change.len() / IDS.len() / 4;
        let of_head = |head: usize| {
            let places = change.chunks_exact(width).skip(head).step_by(4);
            places.flatten().copied().collect::<Vec<f32>>()
        };
        let moved = async |scale: f32| {
            let values = pb::Tensor {
                shape: vec![IDS.len() as u64, 1, width as u64],
                ..vector(&of_head(2))
            };
            let add = Op::Add(pb::Add {
                vector: Some(pb::Vector {
                    of: Some(pb::vector::Of::Values(values)),
                }),
                scale: Some(scale),
            });
            let alone = pb::Edit {
                heads: vec![2],
                ..edit(hook, add)
            };
            one_score(&d, model, edits(vec![alone])).await
        };
        const STEP: f32 = 0.05;
        let slope = (moved(STEP).await - moved(-STEP).await) / f64::from(2.0 * STEP);
        let estimate = f64::from(found.of("estimates", hook)[2]);
        let size = slope.abs().max(0.1);
        assert!(
            (estimate - slope).abs() / size < 1e2 * f64::from(REWRITTEN),
            "{model}: {estimate} by gradient, {slope} by difference"
        );

        // The parts of the greatest estimates are run, and no others.
        let some = swept(&d, both(3)).await.unwrap();
        assert_eq!(some.result.compared, 3);
        let mut ran: Vec<(f32, bool)> = Vec::new();
        for hook in &some.header.hooks {
            let estimates = some.of("estimates", hook);
            for (at, effect) in some.of("effects", hook).iter().enumerate() {
                if !effect.is_nan() {
                    close(*effect, f64::from(found.of("effects", hook)[at]), hook);
                }
                ran.push((estimates[at].abs(), !effect.is_nan()));
            }
        }
        ran.sort_by(|a, b| b.0.total_cmp(&a.0));
        assert!(ran[..3].iter().all(|r| r.1) && ran[3..].iter().all(|r| !r.1));

        // Of a stream that is a sum, the estimates of what is written into it add up: all heads of a layer are their sum.
        let estimate = |hook: &str, by: &[pb::SweepAxis]| pb::SweepRequest {
            method: pb::SweepMethod::Estimate.into(),
            ..sweep(model, hook, by, patched(&OTHER))
        };
        let by_place = swept(&d, estimate("attn.hook_z", &[Head, Position])).await;
        let (by_place, whole) = (
            by_place.unwrap(),
            swept(&d, estimate("attn.hook_z", &[])).await.unwrap(),
        );
        for hook in &whole.header.hooks {
            assert!(!whole.tensors.contains_key(&format!("effects:{hook}")));
            let sum: f32 = by_place.of("estimates", hook).iter().sum();
            close(sum, f64::from(whole.of("estimates", hook)[0]), hook);
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_divergence_is_that_of_the_predictions() {
    let d = TestDaemon::with(&MODELS).await;
    let target = Some(pb::Target {
        of: Some(pb::target::Of::Divergence(pb::Divergence::default())),
        ..pb::Target::default()
    });
    for model in MODELS {
        let asked = pb::SweepRequest {
            target: target.clone(),
            ..sweep(model, "attn.hook_z", &[pb::SweepAxis::Head], zeroed())
        };
        let found = swept(&d, asked.clone()).await.unwrap();
        assert_eq!(found.header.quantity(), pb::Quantity::Divergence);
        assert!(found.header.value.abs() < 1e-6, "{}", found.header.value);
        let hook = &found.header.hooks[1];
        let alone = pb::Edit {
            heads: vec![2],
            ..edit(hook, Op::Zero(pb::Zero {}))
        };
        let answer = ask(&d, request(model, edits(vec![alone]), all(&[])));
        let effect = answer.await.unwrap().effect.unwrap();
        close(
            found.of("effects", hook)[2],
            effect.at.last().unwrap().kl,
            hook,
        );

        // Of a patching it is the distance from the source, which is none where everything is restored.
        let patching = pb::SweepRequest {
            target: target.clone(),
            ..sweep(model, "hook_resid_post", &[], patched(&OTHER))
        };
        let found = swept(&d, patching).await.unwrap();
        assert!(found.header.source_value.unwrap().abs() < 1e-5);
        assert!(found.header.value > 0.0);
        for hook in &found.header.hooks {
            close(found.of("normalized", hook)[0], 1.0, hook);
        }

        let refused = pb::SweepRequest {
            method: pb::SweepMethod::Estimate.into(),
            ..asked
        };
        assert_eq!(field(&swept(&d, refused).await.err().unwrap()), "method");
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_is_patched_as_nested_sources_patch_it() {
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        let layers = u32::try_from(d.model(model).await.dims.unwrap().layers).unwrap();
        let last = layers - 1;
        let receivers = [
            pb::Receiver {
                hook: "attn.hook_q".to_owned(),
                layers: vec![last],
                heads: vec![1],
                ..pb::Receiver::default()
            },
            pb::Receiver {
                hook: "hook_resid_post".to_owned(),
                layers: vec![last],
                ..pb::Receiver::default()
            },
        ];
        for receiver in receivers {
            let asked = |change| pb::SweepRequest {
                path: Some(pb::PathPatch {
                    receivers: vec![receiver.clone()],
                    freeze_mlps: false,
                }),
                ..sweep(model, "attn.hook_z", &[pb::SweepAxis::Head], change)
            };
            let found = swept(&d, asked(patched(&OTHER))).await.unwrap();
            // By hand: a source in which one head is the other run's, and all others are held.
            let hook = "blocks.0.attn.hook_z";
            let interchanged = |hook: &str, source: &str| {
                edit(
                    hook,
                    Op::Interchange(pb::Interchange {
                        source: source.to_owned(),
                        positions: Vec::new(),
                    }),
                )
            };
            let sender = 2u32;
            let others = (0..4).filter(|h| *h != sender).collect();
            let mut held = vec![
                pb::Edit {
                    heads: others,
                    ..interchanged(hook, "input")
                },
                pb::Edit {
                    heads: vec![sender],
                    ..interchanged(hook, "other")
                },
            ];
            held.extend(
                (1..layers).map(|l| interchanged(&format!("blocks.{l}.attn.hook_z"), "input")),
            );
            let source = |ids: &[u32], edits| pb::InterventionSource {
                input: Some(tokens(ids)),
                edits,
            };
            let by_hand = pb::Intervention {
                edits: vec![pb::Edit {
                    layers: receiver.layers.clone(),
                    heads: receiver.heads.clone(),
                    ..interchanged(&receiver.hook, "path")
                }],
                sources: [
                    ("input".to_owned(), source(&IDS, Vec::new())),
                    ("other".to_owned(), source(&OTHER, Vec::new())),
                    ("path".to_owned(), source(&IDS, held)),
                ]
                .into(),
            };
            let wanted = one_score(&d, model, by_hand).await - found.header.value;
            assert!(wanted.abs() > 1e-6, "{model}: the path does something");
            close(found.of("effects", hook)[sender as usize], wanted, hook);
            // From the input itself nothing comes.
            let nothing = swept(&d, asked(patched(&IDS))).await.unwrap();
            for hook in &nothing.header.hooks {
                for effect in nothing.of("effects", hook) {
                    close(*effect, 0.0, hook);
                }
            }
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_sweeps_name_their_field() {
    use pb::sweep_request::Change;
    let d = TestDaemon::with(&["bert.legacy14"]).await;
    let head = pb::SweepAxis::Head;
    let good = || sweep("bert.legacy14", "attn.hook_z", &[head], zeroed());
    let path = |receivers: &[(&str, u32)]| {
        let receiver = |(hook, head): &(&str, u32)| pb::Receiver {
            hook: (*hook).to_owned(),
            heads: vec![*head],
            ..pb::Receiver::default()
        };
        pb::SweepRequest {
            change: Some(patched(&OTHER)),
            path: Some(pb::PathPatch {
                receivers: receivers.iter().map(receiver).collect(),
                freeze_mlps: true,
            }),
            ..good()
        }
    };
    swept(&d, good()).await.unwrap();
    let with = |change: &dyn Fn(&mut pb::SweepRequest)| {
        let mut request = good();
        change(&mut request);
        request
    };
    let cases = [
        (with(&|r| r.hooks = vec!["nothing".to_owned()]), "hooks[0]"),
        (with(&|r| r.hooks.push("logits".to_owned())), "hooks[1]"),
        (with(&|r| r.hooks = Vec::new()), "hooks"),
        (with(&|r| r.hooks = vec!["z".to_owned(); 65]), "hooks"),
        (with(&|r| r.layers = vec![9]), "layers[0]"),
        (with(&|r| r.by = vec![77]), "by[0]"),
        (with(&|r| r.by = vec![0]), "by[0]"),
        (with(&|r| r.by = vec![head.into(), head.into()]), "by[1]"),
        (
            with(&|r| r.hooks = vec!["hook_resid_pre".to_owned()]),
            "by[0]",
        ),
        (with(&|r| r.change = None), "change"),
        (
            with(&|r| r.change = Some(Change::Mean(pb::Mean::default()))),
            "mean.inputs",
        ),
        (with(&|r| r.change = Some(patched(&[2, 5, 3]))), "patch"),
        (with(&|r| r.target = chosen(99)), "target.choice.index"),
        (with(&|r| r.input = None), "input"),
        (with(&|r| r.method = 9), "method"),
        (with(&|r| r.most = 3), "most"),
        (path(&[]), "path.receivers"),
        (path(&[("attn.hook_q", 9)]), "path.receivers[0].heads"),
        (path(&[("nothing", 0)]), "path.receivers[0].hook"),
        (path(&[("attn.hook_q", 0), ("q.1", 1)]), "path.receivers[1]"),
        (
            pb::SweepRequest {
                change: Some(zeroed()),
                ..path(&[("attn.hook_q", 0)])
            },
            "path",
        ),
        (
            pb::SweepRequest {
                method: pb::SweepMethod::Estimate.into(),
                ..path(&[("attn.hook_q", 0)])
            },
            "method",
        ),
    ];
    for (request, wanted) in cases {
        let error = swept(&d, request.clone()).await.err().unwrap();
        assert_eq!(field(&error), wanted, "{request:?}: {error}");
    }
    let short = TestDaemon::tuned(&["bert.legacy14"], |c| c.max_rows = 11).await;
    let error = swept(&short, good()).await.err().unwrap();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    let estimate = with(&|r| r.method = pb::SweepMethod::Estimate.into());
    swept(&short, estimate).await.unwrap();
    short.stop().await;
    d.stop().await;
}
