//! Steering vectors over real gRPC with real workers: what they are, that they are stored and applied as probes, every error.
#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/edits.rs"]
mod edits_support;
#[path = "support/probe.rs"]
mod probe_support;

use daemon::{TestDaemon, hooks, ids};
use edits_support::{tokens, vector};
use introspectd::service::wire::introspect::{
    self as pb, edit::Operation as Op, intervene_item::Item as Of,
    intervene_response::Item as Message, intervention_service_client::InterventionServiceClient,
    probe_kind::Kind, vector::Of as From,
};
use probe_support::client;
use safetensors::SafeTensors;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// An encoder and two decoders.
const MODELS: [&str; 3] = ["bert.legacy14", "gpt2.legacy14", "llama.legacy14"];
const NEGATIVE: [&[u32]; 3] = [&[2, 9, 17, 3], &[2, 30, 11, 5, 3], &[2, 8, 14, 3]];
const POSITIVE: [&[u32]; 2] = [&[2, 21, 8, 7, 3], &[2, 25, 12, 3]];
/// Same operators, other batch or place in the graph.
const CLOSE: f32 = 1e-5;
/// In double precision, of numbers that came in single precision from other batches.
const SINGLE: f64 = 1e-4;

fn example(of: &[u32], label: &str) -> pb::Example {
    pb::Example {
        input: Some(tokens(of)),
        of: Some(pb::example::Of::Label(label.to_owned())),
        ..pb::Example::default()
    }
}

/// Positive ones first: the order of the labels is the header's.
fn examples() -> Vec<pb::Example> {
    let positive = POSITIVE.iter().map(|t| example(t, "positive"));
    let negative = NEGATIVE.iter().map(|t| example(t, "negative"));
    positive.chain(negative).collect()
}

fn kind(kind: Kind) -> Option<pb::ProbeKind> {
    Some(pb::ProbeKind { kind: Some(kind) })
}

fn mean_difference() -> Option<pb::ProbeKind> {
    kind(Kind::MeanDifference(pb::MeanDifference {}))
}

fn header(model: &str) -> pb::TrainHeader {
    pb::TrainHeader {
        model: model.to_owned(),
        name: "mood".to_owned(),
        hooks: vec!["resid_post".to_owned()],
        kind: mean_difference(),
        labels: vec!["negative".to_owned(), "positive".to_owned()],
        unjudged: true,
        replace: true,
        ..pb::TrainHeader::default()
    }
}

async fn train(
    d: &TestDaemon,
    header: pb::TrainHeader,
    examples: Vec<pb::Example>,
) -> Result<pb::Probe, Status> {
    let trained = probe_support::train(d, header, examples).await?;
    Ok(trained.result.probe.expect("a training ends with a probe"))
}

/// The stored weights of a hook point.
async fn weights(d: &TestDaemon, model: &str, hook: &str) -> Vec<f32> {
    let request = pb::ExportProbeRequest {
        model: model.to_owned(),
        name: "mood".to_owned(),
        ..pb::ExportProbeRequest::default()
    };
    let answer = client(d).await.export_probe(request).await.unwrap();
    let tensors = answer.into_inner().files.unwrap().tensors;
    let file = SafeTensors::deserialize(&tensors).unwrap();
    let view = file.tensor(&format!("{hook}/weight")).unwrap();
    let bytes = view.data().chunks_exact(4);
    bytes
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

/// What a text is at a hook point, pooled.
async fn pooled(
    d: &TestDaemon,
    (model, hook): (&str, &str),
    of: &[u32],
    pooling: pb::Pooling,
) -> Vec<f64> {
    let selection = pb::Selection {
        pooling: pooling.into(),
        ..hooks(&[hook])
    };
    let captured = d.capture(ids(model, of, selection)).await.unwrap();
    captured.values(hook).into_iter().map(f64::from).collect()
}

async fn all_pooled(
    d: &TestDaemon,
    place: (&str, &str),
    texts: &[&[u32]],
    pooling: pb::Pooling,
) -> Vec<Vec<f64>> {
    let mut all = Vec::new();
    for of in texts {
        all.push(pooled(d, place, of, pooling).await);
    }
    all
}

fn mean(rows: &[Vec<f64>]) -> Vec<f64> {
    (0..rows[0].len())
        .map(|j| rows.iter().map(|r| r[j]).sum::<f64>() / rows.len() as f64)
        .collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn near(found: f64, wanted: f64, what: &str) {
    let off = (found - wanted).abs() / wanted.abs().max(1e-30);
    assert!(off < SINGLE, "{what}: {found} {wanted}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mean_difference_is_that_of_the_captures_and_its_separation_follows() {
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        for pooling in [pb::Pooling::Mean, pb::Pooling::Last, pb::Pooling::Cls] {
            let asked = pb::TrainHeader {
                pooling: pooling.into(),
                ..header(model)
            };
            let probe = train(&d, asked, examples()).await.unwrap();
            assert_eq!((probe.train_examples, probe.test_examples), (5, 0));
            assert_eq!(probe.labels, ["negative", "positive"]);
            for report in &probe.reports {
                let place = (model, report.hook.as_str());
                let negative = all_pooled(&d, place, &NEGATIVE, pooling).await;
                let positive = all_pooled(&d, place, &POSITIVE, pooling).await;
                let (from, to) = (mean(&negative), mean(&positive));
                let wanted: Vec<f64> = to.iter().zip(&from).map(|(a, b)| a - b).collect();
                let found = weights(&d, model, &report.hook).await;
                let largest = wanted.iter().fold(0.0f64, |m, v| m.max(v.abs()));
                let off = found.iter().zip(&wanted);
                let off = off.fold(0.0f64, |m, (a, b)| m.max((f64::from(*a) - b).abs()));
                assert!(
                    off <= largest * f64::from(CLOSE),
                    "{place:?} {pooling:?}: {off} of {largest}"
                );

                let told = report.direction.unwrap();
                let length = dot(&wanted, &wanted).sqrt();
                near(told.length, length, &report.hook);
                let squares = |rows: &[Vec<f64>], mean: &[f64]| -> f64 {
                    let along = rows.iter().map(|r| dot(r, &wanted) - dot(mean, &wanted));
                    along.map(|v| (v / length).powi(2)).sum()
                };
                let pooled = (squares(&negative, &from) + squares(&positive, &to)) / 3.0;
                if length > 0.0 && pooled > 0.0 {
                    near(
                        told.separation.unwrap(),
                        length / pooled.sqrt(),
                        &report.hook,
                    );
                }
                assert!(report.classes.is_none() && report.numbers.is_none());
            }
            let separation = |r: &pb::ProbeReport| r.direction.unwrap().separation;
            let most = probe.reports.iter().filter_map(separation);
            let most = most.fold(f64::NEG_INFINITY, f64::max);
            let best = probe.reports.iter().find(|r| r.hook == probe.best).unwrap();
            assert!(separation(best).is_none_or(|s| (s - most).abs() < SINGLE));
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn principal_components_have_length_one_and_lead_to_the_positive_texts() {
    let d = TestDaemon::with(&["gpt2.legacy14"]).await;
    let asked = pb::TrainHeader {
        kind: kind(Kind::Pca(pb::Pca {})),
        layers: vec![1],
        ..header("gpt2.legacy14")
    };
    let probe = train(&d, asked, examples()).await.unwrap();
    assert_eq!(probe.kind, "pca");
    let [report] = &probe.reports[..] else {
        panic!("only the layer that was named: {probe:?}")
    };
    assert_eq!(report.layer, Some(1));
    let told = report.direction.unwrap();
    near(told.length, 1.0, "length");
    assert!(told.separation.unwrap() > 0.0, "{told:?}");
    let place = ("gpt2.legacy14", report.hook.as_str());
    let found = weights(&d, "gpt2.legacy14", &report.hook).await;
    let found: Vec<f64> = found.into_iter().map(f64::from).collect();
    near(dot(&found, &found), 1.0, "stored length");
    let to = mean(&all_pooled(&d, place, &POSITIVE, pb::Pooling::Mean).await);
    let from = mean(&all_pooled(&d, place, &NEGATIVE, pb::Pooling::Mean).await);
    assert!(dot(&to, &found) > dot(&from, &found));

    // Stored as any probe is: known by its name, listed, scored, removed.
    let get = pb::GetProbeRequest {
        model: "gpt2.legacy14".to_owned(),
        name: "mood".to_owned(),
    };
    let stored = client(&d).await.get_probe(get.clone()).await.unwrap();
    let stored = stored.into_inner().probe.unwrap();
    let kept = stored.reports[0].direction.unwrap();
    near(kept.length, told.length, "length");
    let (kept, told) = (kept.separation.unwrap(), told.separation.unwrap());
    near(kept, told, "separation");
    assert_eq!((&stored.best, &stored.split), (&probe.best, &probe.split));
    let list = pb::ListProbesRequest {
        model: get.model.clone(),
    };
    let listed = client(&d).await.list_probes(list).await.unwrap();
    assert_eq!(listed.into_inner().probes, [stored]);
    let (model, name) = (get.model.clone(), get.name.clone());
    let delete = pb::DeleteProbeRequest { model, name };
    client(&d).await.delete_probe(delete).await.unwrap();
    let gone = client(&d).await.get_probe(get).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    d.stop().await;
}

/// The logits and one hook point with a vector added there.
async fn added(d: &TestDaemon, model: &str, hook: &str, of: From) -> Vec<(String, Vec<f32>)> {
    let add = pb::Add {
        vector: Some(pb::Vector { of: Some(of) }),
        scale: Some(1.0),
    };
    let edit = pb::Edit {
        hook: hook.to_owned(),
        operation: Some(Op::Add(add)),
        ..pb::Edit::default()
    };
    let request = pb::InterveneRequest {
        model: model.to_owned(),
        input: Some(tokens(&[2, 9, 17, 30, 11, 3])),
        intervention: Some(pb::Intervention {
            edits: vec![edit],
            ..pb::Intervention::default()
        }),
        selection: Some(pb::Selection {
            logits: pb::Logits::All.into(),
            ..hooks(&[hook])
        }),
    };
    let mut client = InterventionServiceClient::new(d.channel().await);
    let mut stream = client.intervene(request).await.unwrap().into_inner();
    let mut tensors = Vec::new();
    while let Some(message) = stream.message().await.unwrap() {
        let (of, item) = match message.item {
            Some(Message::Original(item)) => ("original", item),
            Some(Message::Modified(item)) => ("modified", item),
            _ => continue,
        };
        if let Some(Of::Tensor(t)) = item.item {
            let values = t.data.chunks_exact(4);
            let values = values.map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            tensors.push((format!("{of} {}", t.name), values.collect()));
        }
    }
    tensors
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vector_by_its_name_is_the_vector_by_its_values() {
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        let probe = train(&d, header(model), examples()).await.unwrap();
        for report in &probe.reports {
            let hook = report.hook.as_str();
            let values = weights(&d, model, hook).await;
            let named = From::Probe(pb::ProbeDirection {
                name: "mood".to_owned(),
                hook: hook.to_owned(),
                ..pb::ProbeDirection::default()
            });
            let given = From::Values(vector(&values));
            let by_name = added(&d, model, hook, named).await;
            let by_values = added(&d, model, hook, given).await;
            assert_eq!(by_name, by_values, "{model} {hook}");
            let of = |what: &str| {
                let name = format!("{what} {hook}");
                let found = by_name.iter().find(|(n, _)| *n == name);
                found.unwrap_or_else(|| panic!("{name}")).1.clone()
            };
            let (before, after) = (of("original"), of("modified"));
            for (at, (before, after)) in before.iter().zip(&after).enumerate() {
                let wanted = before + values[at % values.len()];
                let off = (after - wanted).abs() / wanted.abs().max(1.0);
                assert!(off < CLOSE, "{model} {hook} {at}: {after} {wanted}");
            }
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_unjudged_names_its_field() {
    let model = "bert.legacy14";
    let d = TestDaemon::with(&[model]).await;
    let number = pb::Example {
        of: Some(pb::example::Of::Number(1.0)),
        ..example(NEGATIVE[0], "")
    };
    let placed = pb::Example {
        part: pb::Part::Train.into(),
        ..example(NEGATIVE[0], "negative")
    };
    let pca = || pb::TrainHeader {
        kind: kind(Kind::Pca(pb::Pca {})),
        ..header(model)
    };
    let changed = |change: fn(&mut pb::TrainHeader)| {
        let mut changed = header(model);
        change(&mut changed);
        (changed, examples())
    };
    for ((header, examples), code, said) in [
        (
            changed(|h| h.kind = None),
            Code::InvalidArgument,
            "header.unjudged",
        ),
        (
            changed(|h| h.kind = kind(Kind::Logistic(pb::Logistic::default()))),
            Code::InvalidArgument,
            "header.unjudged",
        ),
        (
            changed(|h| h.kind = kind(Kind::Mlp(pb::Mlp::default()))),
            Code::InvalidArgument,
            "header.unjudged",
        ),
        (
            changed(|h| h.kind = kind(Kind::Ridge(pb::Ridge::default()))),
            Code::InvalidArgument,
            "header.unjudged",
        ),
        (
            changed(|h| h.codelength = true),
            Code::InvalidArgument,
            "header.codelength",
        ),
        (
            changed(|h| h.learning_curve = true),
            Code::InvalidArgument,
            "header.learning_curve",
        ),
        (
            changed(|h| h.test_fraction = 0.5),
            Code::InvalidArgument,
            "header.test_fraction",
        ),
        (
            changed(|h| h.layers = vec![0, 99]),
            Code::InvalidArgument,
            "header.layers[1]",
        ),
        (
            (header(model), vec![placed]),
            Code::InvalidArgument,
            "examples[0].part",
        ),
        (
            (pca(), vec![number]),
            Code::InvalidArgument,
            "examples[0].number",
        ),
        (
            (header(model), examples()[..2].to_vec()),
            Code::InvalidArgument,
            "same class",
        ),
        (
            changed(|h| h.labels.push("neither".to_owned())),
            Code::InvalidArgument,
            "two classes",
        ),
        (
            (header(model), Vec::new()),
            Code::InvalidArgument,
            "examples: there are none",
        ),
    ] {
        let error = train(&d, header, examples).await.unwrap_err();
        assert_eq!(error.code(), code, "{said}: {error}");
        let field = error.get_details_bad_request();
        let field = field.map_or(String::new(), |b| b.field_violations[0].field.clone());
        let told = format!("{field} {}", error.message());
        assert!(told.contains(said), "{said}: {told}");
    }
    // One text on either side is enough, and has no spread to compare by.
    let two = vec![
        example(NEGATIVE[0], "negative"),
        example(POSITIVE[0], "positive"),
    ];
    let probe = train(&d, header(model), two).await.unwrap();
    assert_eq!(probe.reports[0].direction.unwrap().separation, None);
    assert!(probe.reports[0].notes[0].contains("no separation"));
    d.stop().await;
}
