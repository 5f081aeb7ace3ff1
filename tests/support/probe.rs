//! Probes of the demonstration model: what tests ask for, and what comes back, checked.

#![allow(dead_code)] // every test binary uses a part of it

use introspectd::service::wire::introspect::{
    self as pb, probe_service_client::ProbeServiceClient, train_request::Item as Asked,
    train_response::Item,
};
use tonic::{Status, transport::Channel};
use tonic_types::StatusExt as _;

use crate::daemon::{TestDaemon, demo_model, put};

pub const MODEL: &str = "sentiment";

pub async fn demo() -> TestDaemon {
    let repository = tempfile::tempdir().unwrap();
    put(repository.path(), MODEL, &demo_model());
    let d = TestDaemon::over(repository, |_| {}).await;
    d.daemon.settled().await;
    d
}

pub async fn client(d: &TestDaemon) -> ProbeServiceClient<Channel> {
    ProbeServiceClient::new(d.channel().await).max_decoding_message_size(64 << 20)
}

pub fn text(text: &str) -> pb::Input {
    pb::Input {
        kind: Some(pb::input::Kind::Text(pb::Text {
            text: text.to_owned(),
            ..pb::Text::default()
        })),
    }
}

pub fn header(name: &str) -> pb::TrainHeader {
    pb::TrainHeader {
        model: MODEL.to_owned(),
        name: name.to_owned(),
        ..pb::TrainHeader::default()
    }
}

pub fn class(input: &str, label: &str) -> pb::Example {
    pb::Example {
        input: Some(text(input)),
        of: Some(pb::example::Of::Label(label.to_owned())),
        ..pb::Example::default()
    }
}

pub fn number(input: &str, number: f64) -> pb::Example {
    pb::Example {
        of: Some(pb::example::Of::Number(number)),
        ..class(input, "")
    }
}

/// Texts whose first word tells the class.
pub fn praise(count: usize) -> Vec<pb::Example> {
    let things = [
        "film", "story", "actor", "scene", "song", "ending", "plot", "dialogue",
    ];
    let more = ["and long", "of course", "once more", "for once", "at last"];
    (0..count)
        .map(|i| {
            let (good, word) = if i % 2 == 0 {
                ("good", "wonderful")
            } else {
                ("bad", "terrible")
            };
            let (thing, more) = (things[i / 2 % things.len()], more[i / 16 % more.len()]);
            class(&format!("a {word} {thing} {more} {}", i / 80), good)
        })
        .collect()
}

#[derive(Debug, Default)]
pub struct Trained {
    pub reports: Vec<pb::ProbeReport>,
    pub progress: Vec<pb::TrainProgress>,
    pub result: pb::TrainResult,
    pub summary: Option<pb::Summary>,
}

/// The field that an error names.
pub fn field_of(error: &Status) -> String {
    let found = error.get_details_bad_request();
    found.map_or(String::new(), |b| b.field_violations[0].field.clone())
}

pub async fn train(
    d: &TestDaemon,
    header: pb::TrainHeader,
    examples: Vec<pb::Example>,
) -> Result<Trained, Status> {
    let items =
        std::iter::once(Asked::Header(header)).chain(examples.into_iter().map(Asked::Example));
    let requests: Vec<pb::TrainRequest> = items
        .map(|item| pb::TrainRequest { item: Some(item) })
        .collect();
    let answer = client(d).await.train(tokio_stream::iter(requests)).await?;
    let (mut stream, mut trained) = (answer.into_inner(), Trained::default());
    let mut messages = 0;
    while let Some(message) = stream.message().await? {
        assert!(trained.summary.is_none(), "the summary comes last");
        match message.item.unwrap() {
            Item::Progress(p) => trained.progress.push(p),
            Item::Report(r) => trained.reports.push(r),
            Item::Result(r) => trained.result = r,
            Item::Summary(s) => {
                assert_eq!(s.messages, messages);
                trained.summary = Some(s);
            }
        }
        messages += 1;
    }
    assert!(
        trained.summary.is_some(),
        "a stream without a summary is incomplete"
    );
    Ok(trained)
}

pub fn by(name: &str) -> pb::ProbeReference {
    pb::ProbeReference {
        name: name.to_owned(),
        ..pb::ProbeReference::default()
    }
}

pub fn scoring(name: &str, input: &str) -> pb::ScoreRequest {
    pb::ScoreRequest {
        model: MODEL.to_owned(),
        probes: vec![by(name)],
        of: Some(pb::score_request::Of::Input(text(input))),
        ..pb::ScoreRequest::default()
    }
}

pub async fn score(d: &TestDaemon, request: pb::ScoreRequest) -> Result<pb::ScoreResponse, Status> {
    Ok(client(d).await.score(request).await?.into_inner())
}
