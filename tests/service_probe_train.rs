//! Trainings of probes over real gRPC with a real worker: what examples may be, what is told of them, and what ends a training.
#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/probe.rs"]
mod probe_support;

use std::time::Duration;

use daemon::{TestDaemon, demo_model, put};
use introspectd::service::wire::introspect::{
    self as pb, train_request::Item as Asked, train_response::Item,
};
use probe_support::{
    MODEL, Trained, class, client, demo, field_of, header, praise, score, scoring, train,
};
use tonic::Code;
use tonic_types::StatusExt as _;

/// An example whose bytes have these classes.
fn labelled(input: &str, spans: &[(u32, u32, &str)]) -> pb::Example {
    let spans = spans.iter().map(|(start, end, label)| pb::SpanLabel {
        start: *start,
        end: *end,
        label: (*label).to_owned(),
    });
    pb::Example {
        of: Some(pb::example::Of::Tokens(pb::TokenLabels {
            spans: spans.collect(),
            ..pb::TokenLabels::default()
        })),
        ..class(input, "")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_examples_lack_is_told_in_notes() {
    let d = demo().await;
    let quick = || pb::TrainHeader {
        hooks: vec!["hidden_states.1".to_owned()],
        skip_control: true,
        ..header("")
    };
    let notes = async |header, examples| {
        let trained = train(&d, header, examples).await.unwrap();
        trained.summary.unwrap().notes.join("; ")
    };
    assert_eq!(notes(quick(), praise(40)).await, "");
    let twice = [praise(40), praise(40)].concat();
    let told = notes(quick(), twice.clone()).await;
    assert!(told.contains("40 examples repeat others"), "{told}");

    // On both sides, because the caller says so.
    let sides = twice.into_iter().enumerate().map(|(at, example)| {
        let part = if at < 40 {
            pb::Part::Train
        } else {
            pb::Part::Test
        };
        pb::Example {
            part: part.into(),
            ..example
        }
    });
    let told = notes(quick(), sides.collect()).await;
    assert!(
        told.contains("40 of the examples that judge are trained on"),
        "{told}"
    );

    let unknown = pb::TrainHeader {
        labels: ["good", "bad", "mixed"].map(str::to_owned).to_vec(),
        ..quick()
    };
    let told = notes(unknown, praise(40)).await;
    assert!(
        told.contains("no example of \"mixed\" was trained on"),
        "{told}"
    );

    let words = (0..20).map(|_| labelled("a film", &[(0, 1, "other"), (2, 6, "noun")]));
    let examples = words.chain([labelled("nothing here", &[])]).collect();
    let told = notes(quick(), examples).await;
    assert!(
        told.contains("1 examples have no token that is labelled"),
        "{told}"
    );

    let overlapping = labelled("a film", &[(2, 6, "noun"), (0, 3, "other")]);
    let beyond = labelled("a film", &[(2, 7, "noun")]);
    for (example, field) in [
        (overlapping, "examples[0].tokens.spans[1]"),
        (beyond, "examples[0].tokens.spans[0].end"),
    ] {
        let error = train(&d, quick(), vec![example]).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert_eq!(field_of(&error), field, "{error}");
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_whose_examples_do_not_come_gives_its_place_up() {
    let repository = tempfile::tempdir().unwrap();
    put(repository.path(), MODEL, &demo_model());
    let d = TestDaemon::over(repository, |c| c.stall_limit = Duration::from_millis(500)).await;
    d.daemon.settled().await;
    let (sender, requests) = tokio::sync::mpsc::channel(1);
    let item = pb::TrainRequest {
        item: Some(Asked::Header(header(""))),
    };
    sender.send(item).await.unwrap();
    let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
    let mut stream = client(&d).await.train(requests).await.unwrap().into_inner();
    let error = loop {
        match stream.message().await {
            Ok(message) => assert!(message.is_some(), "it ended well"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    assert!(error.message().contains("no example came"), "{error}");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_trainings_than_there_is_room_for_are_told_to_come_back() {
    let d = demo().await;
    let mut client = client(&d).await;
    let mut open = Vec::new();
    for at in 0..5 {
        let (sender, requests) = tokio::sync::mpsc::channel(1);
        let item = pb::TrainRequest {
            item: Some(Asked::Header(header(""))),
        };
        sender.send(item).await.unwrap();
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        match client.train(requests).await {
            Ok(stream) => open.push((sender, stream)),
            Err(refused) => {
                assert_eq!(
                    (at, refused.code()),
                    (4, Code::ResourceExhausted),
                    "{refused}"
                );
                assert!(refused.get_details_retry_info().is_some());
            }
        }
    }
    assert_eq!(open.len(), 4);
    drop(open);
    // Those who left make room.
    let begun = std::time::Instant::now();
    while let Err(refused) = train(&d, header(""), praise(40)).await {
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{refused}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_ids_are_labelled_by_position_and_examples_stay_whole() {
    let d = TestDaemon::with(&["bert.legacy14"]).await;
    let example = |i: u32, positions: &[(i32, &str)]| pb::Example {
        input: Some(pb::Input {
            kind: Some(pb::input::Kind::Tokens(pb::TokenIds {
                ids: vec![2, 20 + i % 40, 100 + i % 40, 3],
                type_ids: Vec::new(),
            })),
        }),
        of: Some(pb::example::Of::Tokens(pb::TokenLabels {
            positions: positions
                .iter()
                .map(|(position, label)| pb::PositionLabel {
                    position: *position,
                    label: (*label).to_owned(),
                })
                .collect(),
            ..pb::TokenLabels::default()
        })),
        ..class("", "")
    };
    let asked = pb::TrainHeader {
        model: "bert.legacy14".to_owned(),
        ..header("low-or-high")
    };
    let examples = (0..60).map(|i| example(i, &[(1, "low"), (-2, "high")]));
    let trained = train(&d, asked.clone(), examples.collect()).await.unwrap();
    let probe = trained.result.probe.unwrap();
    assert_eq!((probe.train_examples, probe.test_examples), (96, 24));
    let timings = trained.summary.unwrap().timings.unwrap();
    assert!(
        timings.run_seconds > 0.0 && timings.reduce_seconds > 0.0,
        "{timings:?}"
    );
    for (positions, field) in [
        (
            &[(4, "low")][..],
            "examples[0].tokens.positions[0].position",
        ),
        (
            &[(1, "low"), (-3, "high")],
            "examples[0].tokens.positions[1].position",
        ),
        (&[(1, "")], "examples[0].tokens.positions[0].label"),
    ] {
        let unnamed = pb::TrainHeader {
            name: String::new(),
            ..asked.clone()
        };
        let error = train(&d, unnamed, vec![example(0, positions)])
            .await
            .unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert_eq!(field_of(&error), field);
    }

    // Some of its hook points leave, and come back as a probe.
    let export = |hooks: &[&str]| pb::ExportProbeRequest {
        model: "bert.legacy14".to_owned(),
        name: "low-or-high".to_owned(),
        hooks: hooks.iter().map(|h| (*h).to_owned()).collect(),
    };
    let mut client = client(&d).await;
    let files = client
        .export_probe(export(&["hidden_states.1"]))
        .await
        .unwrap();
    let import = pb::ImportProbeRequest {
        model: "bert.legacy14".to_owned(),
        name: "one".to_owned(),
        from: files
            .into_inner()
            .files
            .map(pb::import_probe_request::From::Files),
        ..pb::ImportProbeRequest::default()
    };
    let one = client
        .import_probe(import)
        .await
        .unwrap()
        .into_inner()
        .probe
        .unwrap();
    assert_eq!(one.reports.len(), 1);
    assert_eq!(one.best, one.reports[0].hook);
    let error = client
        .export_probe(export(&["hidden_states.1", "nothing"]))
        .await;
    assert_eq!(field_of(&error.unwrap_err()), "hooks[1]");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_leaves_ends_a_training_and_leaves_nothing() {
    let d = demo().await;
    let (sender, requests) = tokio::sync::mpsc::channel(4);
    let feed = tokio::spawn(async move {
        let header = pb::TrainRequest {
            item: Some(Asked::Header(header("left"))),
        };
        let _ = sender.send(header).await;
        for example in praise(100_000) {
            let item = pb::TrainRequest {
                item: Some(Asked::Example(example)),
            };
            if sender.send(item).await.is_err() {
                return;
            }
        }
    });
    let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
    let mut stream = client(&d).await.train(requests).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap();
    assert!(
        matches!(first.item, Some(Item::Progress(p)) if p.hooks == 5),
        "progress before the end"
    );
    drop(stream);
    feed.abort();
    let handle = d.daemon.registry().get(MODEL).unwrap();
    let left = std::time::Instant::now();
    while handle.counts().open() > 0 {
        assert!(
            left.elapsed() < Duration::from_secs(5),
            "examples of nobody are not run"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(!d.repository.path().join(MODEL).join("probes").exists());
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_memory_does_not_hold_goes_to_the_disk_and_what_fits_cannot_hold_is_refused() {
    let d = demo().await;
    let asked = |name: &str| pb::TrainHeader {
        seed: 3,
        ..header(name)
    };
    let whole = train(&d, asked(""), praise(120)).await.unwrap();
    d.stop().await;
    // 120 rows of 128 numbers: 61 kB for each of five hook points as they come, 123 kB and the curvature's 393 kB for a fit.
    let with = |memory: usize| async move {
        let repository = tempfile::tempdir().unwrap();
        put(repository.path(), MODEL, &demo_model());
        let d = TestDaemon::over(repository, |config| config.probe_memory = memory).await;
        d.daemon.settled().await;
        d
    };
    let d = with(540_000).await;
    let spilled = train(&d, asked(""), praise(120)).await.unwrap();
    let accuracies = |t: &Trained| -> Vec<f64> {
        let reports = &t.result.probe.as_ref().unwrap().reports;
        reports
            .iter()
            .map(|r| r.classes.as_ref().unwrap().accuracy)
            .collect()
    };
    assert_eq!(accuracies(&spilled), accuracies(&whole));
    d.stop().await;
    let d = with(100_000).await;
    let error = train(&d, asked("large"), praise(120)).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    assert!(error.message().contains("--probe-memory"), "{error}");
    let found = score(&d, scoring("large", "x")).await.unwrap_err();
    assert_eq!(found.code(), Code::NotFound, "nothing is stored");
    d.stop().await;
}
