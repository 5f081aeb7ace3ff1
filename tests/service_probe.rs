//! Probes over real gRPC with a real worker: trained, judged, stored, scored; every error, and what must not be lost.
#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/probe.rs"]
mod probe_support;

use std::os::unix::fs::PermissionsExt as _;

use daemon::TestDaemon;
use introspectd::service::wire::introspect as pb;
use probe_support::{
    MODEL, Trained, by, class, client, demo, field_of, header, number, praise, score, scoring,
    text, train,
};
use tonic::Code;
use tonic_types::StatusExt as _;

/// The same arithmetic by another way.
const CLOSE: f32 = 1e-4;

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_is_trained_at_every_layer_stored_and_scored() {
    let d = demo().await;
    let asked = pb::TrainHeader {
        codelength: true,
        learning_curve: true,
        seed: 5,
        ..header("praise")
    };
    let trained = train(&d, asked.clone(), praise(160)).await.unwrap();
    let probe = trained.result.probe.unwrap();
    assert!(trained.result.stored);
    assert_eq!(probe.labels, ["bad", "good"]);
    assert_eq!((probe.train_examples, probe.test_examples), (128, 32));
    assert_eq!(probe.kind, "logistic");
    let options = [("c".to_owned(), 1.0), ("test_fraction".to_owned(), 0.2)];
    assert_eq!(probe.options, options.into_iter().collect());
    let hooks: Vec<&str> = probe.reports.iter().map(|r| r.hook.as_str()).collect();
    assert_eq!(hooks.len(), 5, "{hooks:?}");
    assert_eq!(
        trained.reports.len(),
        5,
        "one report for each as it is done"
    );
    for report in &probe.reports {
        let m = report.classes.as_ref().unwrap();
        assert!(report.converged, "{report:?}");
        assert!((m.majority - 0.5).abs() < 1e-9);
        assert!(m.accuracy_low <= m.accuracy && m.accuracy <= m.accuracy_high);
        assert_eq!(m.confusion.iter().sum::<u64>(), 32);
        let selectivity = m.accuracy - m.control_accuracy.unwrap();
        assert!((m.selectivity.unwrap() - selectivity).abs() < 1e-9);
        assert!(m.codelength_bits.unwrap() > 0.0 && !m.learning_curve.is_empty());
    }
    let best = probe.reports.iter().find(|r| r.hook == probe.best).unwrap();
    assert!(best.classes.as_ref().unwrap().accuracy > 0.95, "{best:?}");

    // The same examples and seed give the same split and the same measures.
    let again = train(
        &d,
        pb::TrainHeader {
            name: String::new(),
            ..asked
        },
        praise(160),
    )
    .await
    .unwrap();
    let again_probe = again.result.probe.unwrap();
    assert!(!again.result.stored);
    assert_eq!(again_probe.split, probe.split);
    let accuracy = |p: &pb::Probe| -> Vec<f64> {
        let of = p
            .reports
            .iter()
            .map(|r| r.classes.as_ref().unwrap().accuracy);
        of.collect()
    };
    assert_eq!(accuracy(&again_probe), accuracy(&probe));

    // Scored alone, in a stream, at another layer, with the prediction, and by the caller's own hidden states.
    let good = score(&d, scoring("praise", "a wonderful film"))
        .await
        .unwrap();
    let [one] = &good.scores[..] else {
        panic!("{good:?}")
    };
    let says = one.input.as_ref().unwrap();
    assert_eq!(
        (says.label.as_str(), one.hook.as_str()),
        ("good", probe.best.as_str())
    );
    assert!((says.probabilities.iter().sum::<f32>() - 1.0).abs() < CLOSE);
    assert!(good.prediction.is_none() && !good.tokens.is_empty() && one.tokens.is_empty());
    let mut request = scoring("praise", "a wonderful film");
    request.probes.push(pb::ProbeReference {
        hook: "hidden_states.1".to_owned(),
        ..by("praise")
    });
    (request.per_token, request.predict) = (true, true);
    let both = score(&d, request).await.unwrap();
    assert_eq!(both.scores.len(), 2);
    assert_eq!(both.scores[1].tokens.len(), both.tokens.len());
    assert_eq!(
        both.prediction.unwrap().at[0].candidates[0].label,
        "positive"
    );
    let values = both.scores[0].input.as_ref().unwrap().values[0];
    assert!((values - says.values[0]).abs() < CLOSE);

    let captured = d
        .capture(pb::CaptureRequest {
            model: MODEL.to_owned(),
            input: Some(text("a wonderful film")),
            selection: Some(pb::Selection {
                hooks: vec![probe.best.clone()],
                ..pb::Selection::default()
            }),
            intervention: None,
        })
        .await
        .unwrap();
    let hidden = captured.values(&probe.best);
    let width = 128;
    let request = pb::ScoreRequest {
        of: Some(pb::score_request::Of::Hidden(pb::Tensor {
            dtype: pb::DType::F32.into(),
            shape: vec![(hidden.len() / width) as u64, width as u64],
            data: hidden
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect::<Vec<u8>>()
                .into(),
            ..pb::Tensor::default()
        })),
        ..scoring("praise", "")
    };
    let own = score(&d, request).await.unwrap();
    let own = own.scores[0].input.as_ref().unwrap().values[0];
    assert!(
        (own - says.values[0]).abs() < CLOSE,
        "{own} {}",
        says.values[0]
    );

    let texts = ["a wonderful film", "", "a terrible plot"];
    let requests: Vec<pb::ScoreStreamRequest> = texts
        .iter()
        .enumerate()
        .map(|(i, t)| pb::ScoreStreamRequest {
            id: i.to_string(),
            request: Some(if t.is_empty() {
                scoring("no-such-probe", "x")
            } else {
                scoring("praise", t)
            }),
        })
        .collect();
    let answer = client(&d)
        .await
        .score_stream(tokio_stream::iter(requests))
        .await;
    let mut stream = answer.unwrap().into_inner();
    let mut heard = Vec::new();
    while let Some(message) = stream.message().await.unwrap() {
        use pb::score_stream_response::Answer;
        heard.push(match message.answer.unwrap() {
            Answer::Scores(s) => format!(
                "{} {}",
                message.id,
                s.scores[0].input.as_ref().unwrap().label
            ),
            Answer::Failure(f) => format!("{} failed {}", message.id, f.code),
            Answer::Summary(s) => format!("{} of {}", s.answered, s.answered + s.failed),
        });
    }
    assert_eq!(heard, ["0 good", "1 failed 5", "2 bad", "2 of 3"]);
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_tokens_and_every_kind_can_be_read() {
    let d = demo().await;
    // The length of a text, told by its last hidden state.
    let texts: Vec<pb::Example> = (1..=60)
        .map(|i| {
            number(
                &vec!["word"; i % 15 + 1].join(" "),
                f64::from(u8::try_from(i % 15).unwrap()),
            )
        })
        .collect();
    let trained = train(&d, header(""), texts).await.unwrap();
    let probe = trained.result.probe.unwrap();
    assert_eq!((probe.kind.as_str(), probe.labels.len()), ("ridge", 0));
    let best = probe.reports.iter().find(|r| r.hook == probe.best).unwrap();
    let metrics = best.numbers.as_ref().unwrap();
    assert!(
        metrics.r_squared > 0.8 && metrics.spearman > 0.8,
        "{best:?}"
    );

    // Tokens by the word that they belong to.
    let tokens: Vec<pb::Example> = (0..40)
        .map(|i| {
            let (first, second) = (["good", "bad", "new"][i % 3], ["film", "song"][i % 2]);
            let span = |start: usize, end: usize, label: &str| pb::SpanLabel {
                start: start as u32,
                end: end as u32,
                label: label.to_owned(),
            };
            let end = first.len() + 1 + second.len();
            pb::Example {
                of: Some(pb::example::Of::Tokens(pb::TokenLabels {
                    spans: vec![
                        span(0, first.len(), "adjective"),
                        span(first.len() + 1, end, "noun"),
                    ],
                    ..pb::TokenLabels::default()
                })),
                ..class(&format!("{first} {second}"), "")
            }
        })
        .collect();
    let asked = pb::TrainHeader {
        hooks: vec!["hidden_states.0".to_owned()],
        ..header("words")
    };
    let trained = train(&d, asked, tokens).await.unwrap();
    let probe = trained.result.probe.unwrap();
    assert_eq!(probe.pooling, i32::from(pb::Pooling::Unspecified));
    assert_eq!(probe.train_examples + probe.test_examples, 80);
    let said = score(&d, scoring("words", "bad film")).await.unwrap();
    let labels: Vec<&str> = said.scores[0]
        .tokens
        .iter()
        .map(|t| t.label.as_str())
        .collect();
    assert_eq!(labels[1..3], ["adjective", "noun"], "{labels:?}");
    assert!(said.scores[0].input.is_none());

    for (kind, name) in [
        (
            pb::probe_kind::Kind::MeanDifference(pb::MeanDifference {}),
            "mean_difference",
        ),
        (pb::probe_kind::Kind::Pca(pb::Pca {}), "pca"),
        (
            pb::probe_kind::Kind::Mlp(pb::Mlp {
                hidden: 8,
                alpha: 0.0,
            }),
            "mlp",
        ),
        (
            pb::probe_kind::Kind::Logistic(pb::Logistic {
                cross_validate: vec![0.01, 1.0],
                ..pb::Logistic::default()
            }),
            "logistic",
        ),
    ] {
        let asked = pb::TrainHeader {
            kind: Some(pb::ProbeKind { kind: Some(kind) }),
            pooling: pb::Pooling::Cls.into(),
            hooks: vec!["hidden_states.4".to_owned()],
            ..header(name)
        };
        let trained = train(&d, asked, praise(80)).await.unwrap();
        assert_eq!(trained.result.probe.unwrap().kind, name);
        let says = score(&d, scoring(name, "a wonderful story")).await.unwrap();
        assert_eq!(
            says.scores[0].input.as_ref().unwrap().label,
            "good",
            "{name}"
        );
    }
    let listed = client(&d)
        .await
        .list_probes(pb::ListProbesRequest::default())
        .await;
    let names: Vec<String> = listed
        .unwrap()
        .into_inner()
        .probes
        .into_iter()
        .map(|p| p.name)
        .collect();
    assert_eq!(
        names,
        ["logistic", "mean_difference", "mlp", "pca", "words"]
    );
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_leave_and_come_as_files_and_as_plain_weights() {
    let d = demo().await;
    train(&d, header("praise"), praise(80)).await.unwrap();
    let mut client = client(&d).await;
    let of = |name: &str| (MODEL.to_owned(), name.to_owned());
    let (model, name) = of("praise");
    let files = client
        .export_probe(pb::ExportProbeRequest {
            model,
            name,
            hooks: Vec::new(),
        })
        .await;
    let files = files.unwrap().into_inner().files.unwrap();
    let import = |name: &str, from, replace| pb::ImportProbeRequest {
        model: MODEL.to_owned(),
        name: name.to_owned(),
        from: Some(from),
        replace,
        ..pb::ImportProbeRequest::default()
    };
    let from = pb::import_probe_request::From::Files(files.clone());
    client
        .import_probe(import("copy", from.clone(), false))
        .await
        .unwrap();
    let values = async |name: &str| {
        let found = score(&d, scoring(name, "a terrible song")).await.unwrap();
        found.scores[0].input.clone().unwrap().values[0]
    };
    assert_eq!(values("copy").await, values("praise").await);
    let refused = client
        .import_probe(import("copy", from.clone(), false))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists, "{refused}");
    client
        .import_probe(import("copy", from, true))
        .await
        .unwrap();

    // Those of another model are refused, and taken when forced.
    let mut other: serde_json::Value = serde_json::from_slice(&files.description).unwrap();
    other["fingerprint"] = "ff".repeat(32).into();
    let foreign = pb::import_probe_request::From::Files(pb::ProbeFiles {
        description: serde_json::to_vec(&other).unwrap().into(),
        ..files.clone()
    });
    let refused = client
        .import_probe(import("foreign", foreign.clone(), false))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let forced = pb::ImportProbeRequest {
        force: true,
        ..import("foreign", foreign, false)
    };
    let forced = client.import_probe(forced).await.unwrap().into_inner();
    let notes = &forced.probe.unwrap().reports[0].notes;
    assert!(
        notes.iter().any(|n| n.contains("taken by force")),
        "{notes:?}"
    );

    // As scikit-learn has them: coef_ and intercept_.
    let mut weight = vec![0.0; 128];
    weight[3] = 2.0;
    let linear = pb::LinearProbe {
        hook: "hidden_states.2".to_owned(),
        pooling: pb::Pooling::Mean.into(),
        labels: vec!["no".to_owned(), "yes".to_owned()],
        weight,
        bias: vec![0.5],
    };
    let from = pb::import_probe_request::From::Linear(linear.clone());
    client
        .import_probe(import("plain", from, false))
        .await
        .unwrap();
    let captured = d
        .capture(pb::CaptureRequest {
            model: MODEL.to_owned(),
            input: Some(text("a terrible song")),
            selection: Some(pb::Selection {
                hooks: vec!["hidden_states.2".to_owned()],
                pooling: pb::Pooling::Mean.into(),
                ..pb::Selection::default()
            }),
            intervention: None,
        })
        .await
        .unwrap();
    let name = captured.header.tensors[0].clone();
    let expected = 2.0 * captured.values(&name)[3] + 0.5;
    assert!((values("plain").await - expected).abs() < CLOSE);
    for (broken, field) in [
        (
            pb::LinearProbe {
                weight: vec![1.0; 5],
                ..linear.clone()
            },
            "linear.weight",
        ),
        (
            pb::LinearProbe {
                hook: "pattern".to_owned(),
                ..linear.clone()
            },
            "linear.hook",
        ),
        (
            pb::LinearProbe {
                labels: vec!["no".to_owned(), "no".to_owned()],
                ..linear.clone()
            },
            "linear.labels[1]",
        ),
        (
            pb::LinearProbe {
                labels: vec!["no".to_owned()],
                ..linear.clone()
            },
            "linear.labels",
        ),
        (
            pb::LinearProbe {
                bias: vec![f32::NAN],
                ..linear.clone()
            },
            "linear.bias",
        ),
    ] {
        let from = pb::import_probe_request::From::Linear(broken);
        let refused = client
            .import_probe(import("broken", from, false))
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(field_of(&refused).contains(field), "{refused:?}");
    }
    let (model, name) = of("plain");
    client
        .delete_probe(pb::DeleteProbeRequest { model, name })
        .await
        .unwrap();
    let gone = score(&d, scoring("plain", "x")).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_named_and_nothing_is_stored() {
    let d = demo().await;
    let mut examples = praise(20);
    examples[7].input = Some(text(""));
    examples[7].of = None;
    let nan = vec![number("a", f64::NAN)];
    let mixed = vec![class("a", "x"), number("b", 1.0)];
    let partly = vec![
        pb::Example {
            part: pb::Part::Train.into(),
            ..class("a", "x")
        },
        class("b", "y"),
    ];
    let one_class: Vec<pb::Example> = (0..10)
        .map(|i| class(&format!("text {i}"), "same"))
        .collect();
    let fits = |header: pb::TrainHeader| (header, praise(20));
    let hooks = |name: &str| pb::TrainHeader {
        hooks: vec![name.to_owned()],
        ..header("x")
    };
    for ((header, examples), code, part) in [
        (
            (header("x"), examples),
            Code::InvalidArgument,
            "examples[7].label",
        ),
        (
            (header("x"), nan),
            Code::InvalidArgument,
            "examples[0].number",
        ),
        (
            (header("x"), mixed),
            Code::InvalidArgument,
            "examples[1].label",
        ),
        (
            (header("x"), partly),
            Code::InvalidArgument,
            "examples[1].part",
        ),
        (
            (header("x"), one_class),
            Code::InvalidArgument,
            "examples: have one class",
        ),
        (
            (header("x"), Vec::new()),
            Code::InvalidArgument,
            "examples: there are none",
        ),
        (fits(header("../up")), Code::InvalidArgument, "header.name"),
        (
            fits(header(".hidden")),
            Code::InvalidArgument,
            "header.name",
        ),
        (
            fits(pb::TrainHeader {
                model: String::new(),
                ..header("x")
            }),
            Code::InvalidArgument,
            "header.model",
        ),
        (
            fits(pb::TrainHeader {
                model: "no".to_owned(),
                ..header("x")
            }),
            Code::NotFound,
            "no",
        ),
        (
            fits(hooks("pattern")),
            Code::InvalidArgument,
            "header.hooks",
        ),
        (
            fits(hooks("blocks.9.hook_resid_post")),
            Code::InvalidArgument,
            "header.hooks[0]",
        ),
        (
            fits(pb::TrainHeader {
                test_fraction: 1.5,
                ..header("x")
            }),
            Code::InvalidArgument,
            "header.test_fraction",
        ),
        (
            fits(pb::TrainHeader {
                labels: vec!["good".to_owned()],
                ..header("x")
            }),
            Code::InvalidArgument,
            "label",
        ),
        (
            fits(pb::TrainHeader {
                kind: Some(pb::ProbeKind {
                    kind: Some(pb::probe_kind::Kind::Ridge(pb::Ridge::default())),
                }),
                ..header("x")
            }),
            Code::InvalidArgument,
            "examples[0].label",
        ),
    ] {
        let error = train(&d, header, examples).await.unwrap_err();
        assert_eq!(error.code(), code, "{part}: {error}");
        let told = format!("{} {}", field_of(&error), error.message());
        assert!(told.contains(part), "{part}: {told}");
    }
    assert!(
        !d.repository.path().join(MODEL).join("probes").exists(),
        "nothing was stored"
    );

    train(&d, header("praise"), praise(40)).await.unwrap();
    for (request, code, part) in [
        (
            pb::ScoreRequest {
                probes: Vec::new(),
                ..scoring("praise", "x")
            },
            Code::InvalidArgument,
            "probes",
        ),
        (
            pb::ScoreRequest {
                of: None,
                ..scoring("praise", "x")
            },
            Code::InvalidArgument,
            "input",
        ),
        (
            scoring("../praise", "x"),
            Code::InvalidArgument,
            "probes[0].name",
        ),
        (
            scoring("praise", &"word ".repeat(600)),
            Code::InvalidArgument,
            "input.text.text",
        ),
        (
            pb::ScoreRequest {
                probes: vec![pb::ProbeReference {
                    hook: "hidden_states.77".to_owned(),
                    ..by("praise")
                }],
                ..scoring("praise", "x")
            },
            Code::InvalidArgument,
            "probes[0].hook",
        ),
        (
            pb::ScoreRequest {
                of: Some(pb::score_request::Of::Hidden(pb::Tensor {
                    dtype: pb::DType::F32.into(),
                    shape: vec![3],
                    data: vec![0; 12].into(),
                    ..pb::Tensor::default()
                })),
                ..scoring("praise", "x")
            },
            Code::InvalidArgument,
            "hidden.shape",
        ),
    ] {
        let error = score(&d, request).await.unwrap_err();
        assert_eq!(error.code(), code, "{part}: {error}");
        let told = format!("{} {}", field_of(&error), error.message());
        assert!(told.contains(part), "{part}: {told}");
    }
    d.stop().await;
}

/// With random weights, what the last token is stands in the first position from the first attention on, and nowhere before.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_planted_is_found_where_it_is_planted_and_random_labels_nowhere() {
    let d = TestDaemon::with(&["bert.legacy14"]).await;
    // Draws of a linear congruence: what stands between says nothing of the last.
    let mut state = 7u64;
    let mut drawn = |below: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) % below
    };
    let rows: Vec<(Vec<u32>, bool, bool)> = (0..600)
        .map(|i| {
            let planted = i % 2 == 0;
            let mut ids: Vec<u32> = (0..6)
                .map(|_| 20 + u32::try_from(drawn(8)).unwrap())
                .collect();
            ids[0] = 2;
            ids[5] = if planted { 180 } else { 190 };
            (ids, planted, drawn(2) == 0)
        })
        .collect();
    let examples = |label: fn(&(Vec<u32>, bool, bool)) -> bool| -> Vec<pb::Example> {
        let example = |row: &(Vec<u32>, bool, bool)| pb::Example {
            input: Some(pb::Input {
                kind: Some(pb::input::Kind::Tokens(pb::TokenIds {
                    ids: row.0.clone(),
                    type_ids: Vec::new(),
                })),
            }),
            ..class("", if label(row) { "yes" } else { "no" })
        };
        rows.iter().map(example).collect()
    };
    let asked = pb::TrainHeader {
        model: "bert.legacy14".to_owned(),
        pooling: pb::Pooling::Cls.into(),
        kind: Some(pb::ProbeKind {
            kind: Some(pb::probe_kind::Kind::Logistic(pb::Logistic {
                c: 100.0,
                ..pb::Logistic::default()
            })),
        }),
        ..header("")
    };
    let accuracies = |t: &Trained| -> Vec<f64> {
        let reports = t.result.probe.as_ref().unwrap().reports.iter();
        let of = reports.map(|r| r.classes.as_ref().unwrap().accuracy);
        of.collect()
    };
    let planted = train(&d, asked.clone(), examples(|r| r.1)).await.unwrap();
    let found = accuracies(&planted);
    assert!(
        found[0] <= 0.6,
        "the embedding of [CLS] knows nothing: {found:?}"
    );
    assert!(found[1..].iter().all(|a| *a > 0.9), "{found:?}");
    let random = train(&d, asked, examples(|r| r.2)).await.unwrap();
    for report in &random.result.probe.as_ref().unwrap().reports {
        let m = report.classes.as_ref().unwrap();
        assert!(m.selectivity.unwrap().abs() < 0.25, "{report:?}");
        assert!(m.accuracy_low < 0.6, "{report:?}");
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_files_and_full_disks_cost_nobody_else() {
    let d = demo().await;
    for name in ["kept", "torn", "hostile"] {
        train(&d, header(name), praise(40)).await.unwrap();
    }
    let folder = d.repository.path().join(MODEL).join("probes");
    let weights = |name: &str| {
        let entries = std::fs::read_dir(folder.join(name)).unwrap();
        let mut paths = entries.map(|e| e.unwrap().path());
        paths
            .find(|p| p.extension().is_some_and(|e| e == "safetensors"))
            .unwrap()
    };
    let torn = std::fs::read(weights("torn")).unwrap();
    std::fs::write(weights("torn"), &torn[..torn.len() / 2]).unwrap();
    std::fs::write(folder.join("hostile/probe.json"), "{\"format\": 1").unwrap();
    for name in ["torn", "hostile"] {
        let error = score(&d, scoring(name, "x")).await.unwrap_err();
        assert_eq!(error.code(), Code::DataLoss, "{name}: {error}");
        assert!(error.message().contains(name));
    }
    score(&d, scoring("kept", "x")).await.unwrap();
    let listed = client(&d)
        .await
        .list_probes(pb::ListProbesRequest::default())
        .await;
    let listed = listed.unwrap().into_inner();
    let names = |probes: &[pb::Probe]| probes.iter().map(|p| p.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&listed.probes), ["kept"]);
    let broken: Vec<&str> = listed.broken.iter().map(|b| b.name.as_str()).collect();
    assert_eq!(broken, ["hostile", "torn"]);
    // What cannot be read can be deleted.
    let request = pb::DeleteProbeRequest {
        model: MODEL.to_owned(),
        name: "hostile".to_owned(),
    };
    client(&d).await.delete_probe(request).await.unwrap();

    // A place that cannot be written: no folder where one should be. (Permissions do not stop whoever runs as root.)
    let before = std::fs::read(weights("kept")).unwrap();
    let blocked = folder.join("blocked");
    std::fs::write(&blocked, "a file where a folder should be").unwrap();
    let error = train(&d, header("blocked"), praise(40)).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("could not be stored"), "{error}");
    assert_eq!(error.get_details_error_info().unwrap().reason, "NOT_STORED");
    std::fs::set_permissions(folder.join("kept"), std::fs::Permissions::from_mode(0o555)).unwrap();
    let replaced = train(
        &d,
        pb::TrainHeader {
            replace: true,
            ..header("kept")
        },
        praise(60),
    )
    .await;
    std::fs::set_permissions(folder.join("kept"), std::fs::Permissions::from_mode(0o755)).unwrap();
    match replaced {
        Ok(_) => assert_ne!(
            std::fs::read(weights("kept")).unwrap(),
            before,
            "root may write"
        ),
        Err(error) => {
            assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
            assert_eq!(
                std::fs::read(weights("kept")).unwrap(),
                before,
                "the old one is as it was"
            );
        }
    }
    score(&d, scoring("kept", "x")).await.unwrap();
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_finite_is_said_and_an_empty_text_is_a_text() {
    let d = demo().await;
    let mut examples = praise(40);
    examples[6] = class("", "good");
    let trained = train(&d, header("empty"), examples).await.unwrap();
    let probe = trained.result.probe.unwrap();
    assert_eq!(probe.train_examples + probe.test_examples, 40);
    let said = score(&d, scoring("empty", "")).await.unwrap();
    assert!(said.scores[0].input.as_ref().unwrap().values[0].is_finite());
    d.stop().await;

    let d = TestDaemon::with(&["vit.legacy14"]).await;
    let picture = |value: f32, label: &str| {
        let pixels = pb::Tensor {
            name: "pixel_values".to_owned(),
            dtype: pb::DType::F32.into(),
            shape: vec![1, 3, 32, 32],
            data: value.to_le_bytes().repeat(3 * 32 * 32).into(),
            ..pb::Tensor::default()
        };
        pb::Example {
            input: Some(pb::Input {
                kind: Some(pb::input::Kind::Tensors(pb::NamedTensors {
                    tensors: vec![pixels],
                })),
            }),
            ..class("", label)
        }
    };
    let asked = pb::TrainHeader {
        model: "vit.legacy14".to_owned(),
        ..header("pictures")
    };
    let examples = vec![picture(0.5, "light"), picture(f32::NAN, "dark")];
    let error = train(&d, asked.clone(), examples).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("not finite"), "{error}");
    // The model serves on.
    let examples = (0..20u8).map(|i| {
        let dark = i % 2 == 0;
        let value = f32::from(i) / 40.0 + if dark { -1.0 } else { 1.0 };
        picture(value, if dark { "dark" } else { "light" })
    });
    let trained = train(&d, asked, examples.collect()).await.unwrap();
    assert!(trained.result.stored);
    let scored = |value: f32| pb::ScoreRequest {
        model: "vit.legacy14".to_owned(),
        of: picture(value, "").input.map(pb::score_request::Of::Input),
        ..scoring("pictures", "")
    };
    let says = score(&d, scored(1.2)).await.unwrap();
    assert_eq!(says.scores[0].input.as_ref().unwrap().label, "light");
    let error = score(&d, scored(f32::NAN)).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("not finite"), "{error}");
    d.stop().await;
}
