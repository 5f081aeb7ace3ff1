//! The life of the daemon: health, readiness, workers that die, reloads, broken models, draining, readers that stall.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/slow.rs"]
mod slow;

use std::time::{Duration, Instant};

use daemon::{Answer, TestDaemon, fixture, hooks, ids, page, put};
use introspectd::{
    model::ModelState,
    service::wire::introspect::{self as pb, capture_stream_response as bulk},
};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

const BERT: &str = "bert.legacy14";
const GPT2: &str = "gpt2.legacy14";
const SERVICES: [&str; 8] = [
    "",
    "introspect.v1.CaptureService",
    "introspect.v1.AttributionService",
    "introspect.v1.ProbeService",
    "introspect.v1.InterventionService",
    "introspect.v1.AnalysisService",
    "introspect.v1.ModelService",
    "inference.GRPCInferenceService",
];

async fn until(what: &str, limit: Duration, mut holds: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < limit, "{what}: not within {limit:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn health(d: &TestDaemon, service: &str) -> ServingStatus {
    let request = HealthCheckRequest {
        service: service.into(),
    };
    let mut client = HealthClient::new(d.channel().await);
    client.check(request).await.unwrap().into_inner().status()
}

fn small(model: &str) -> pb::CaptureRequest {
    ids(model, &[2, 11, 3], hooks(&["pattern"]))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_model_is_reported_and_the_others_serve() {
    let repository = tempfile::tempdir().unwrap();
    put(repository.path(), "good", &fixture(BERT));
    put(repository.path(), "truncated", &fixture(BERT));
    let file = repository.path().join("truncated/model.onnx");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    put(repository.path(), "garbled-tokenizer", &fixture(BERT));
    std::fs::write(
        repository.path().join("garbled-tokenizer/tokenizer.json"),
        "{",
    )
    .unwrap();
    std::fs::create_dir(repository.path().join("empty")).unwrap();
    std::fs::write(repository.path().join("a file"), "x").unwrap();

    let d = TestDaemon::over(repository, |_| {}).await;
    d.daemon.settled().await;
    let list = d.daemon.registry().list();
    assert_eq!(list["good"].state, ModelState::Ready);
    for broken in ["truncated", "garbled-tokenizer"] {
        let ModelState::Failed { reason } = &list[broken].state else {
            panic!("{broken}: {:?}", list[broken].state);
        };
        assert!(!reason.is_empty() && !reason.contains("/tmp"), "{reason}");
        let status = d.capture(small(broken)).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(
            status.message().contains("could not be loaded"),
            "{status:?}"
        );
    }
    let skipped = d
        .models()
        .await
        .list_models(pb::ListModelsRequest { rescan: true })
        .await
        .unwrap()
        .into_inner()
        .skipped;
    assert!(
        skipped
            .iter()
            .any(|s| s.name == "empty" && !s.reason.is_empty()),
        "{skipped:?}"
    );
    assert!(d.capture(small("good")).await.is_ok());
    for service in SERVICES {
        assert_eq!(
            health(&d, service).await,
            ServingStatus::Serving,
            "{service:?}"
        );
    }
    let (line, _) = page(&d.daemon, "/readyz").await;
    assert!(line.contains("200"), "{line}");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_in_a_capture_costs_that_stream_only_and_is_back_soon() {
    let repository = tempfile::tempdir().unwrap();
    put(repository.path(), GPT2, &fixture(GPT2));
    slow::put(repository.path(), "slow");
    let d = TestDaemon::over(repository, |_| {}).await;
    d.daemon.settled().await;
    let load: f64 = d
        .model("slow")
        .await
        .load_stages
        .iter()
        .map(|s| s.seconds)
        .sum();
    let handle = d.daemon.registry().get("slow").unwrap();
    let (pid, generation) = (handle.pid().unwrap(), handle.generation());
    drop(handle);

    let mut client = d.captures().await;
    let request = ids("slow", &[2, 11, 3], hooks(&[slow::VALUE]));
    let mut stream = client.capture(request).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap();
    assert!(matches!(
        first.item,
        Some(pb::capture_response::Item::Header(_))
    ));
    tokio::time::sleep(Duration::from_millis(50)).await; // into the run
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::SEGV).unwrap();
    let killed = Instant::now();

    let status = stream.message().await.unwrap_err();
    assert_eq!(status.code(), Code::Internal, "{status:?}");
    assert!(
        status.message().contains("died") && status.message().contains("SIGSEGV"),
        "{status:?}"
    );
    assert!(
        killed.elapsed() < Duration::from_secs(3),
        "told by its socket, not by its heartbeats"
    );
    assert!(
        d.capture(small(GPT2)).await.is_ok(),
        "the other model serves on"
    );
    assert_eq!(health(&d, "").await, ServingStatus::Serving);

    // A second and the time of a load, which on a busy machine is not the same twice.
    let limit = Duration::from_secs(3) + Duration::from_secs_f64(1.5 * load);
    until("the model is back", limit, async || {
        let registry = d.daemon.registry();
        registry
            .get("slow")
            .is_ok_and(|h| h.generation() > generation)
    })
    .await;
    let answer = d
        .capture(ids("slow", &[2, 11, 3], hooks(&["hook_embed"])))
        .await
        .unwrap();
    assert!(answer.header.generation > generation);
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reloads_under_load_fail_no_request() {
    let d = TestDaemon::with(&[BERT]).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let mut callers = Vec::new();
    for _ in 0..4 {
        let (mut client, stop) = (d.captures().await, stop.clone());
        callers.push(tokio::spawn(async move {
            let mut generations = std::collections::BTreeSet::new();
            while !stop.is_cancelled() {
                let stream = client.capture(small(BERT)).await.unwrap().into_inner();
                let answer = Answer::read(stream).await.unwrap();
                generations.insert(answer.header.generation);
            }
            generations
        }));
    }
    for wanted in 2..=4u64 {
        let request = pb::ReloadModelRequest { model: BERT.into() };
        let answer = d
            .models()
            .await
            .reload_model(request)
            .await
            .unwrap()
            .into_inner();
        assert_eq!(answer.status.unwrap().generation, wanted);
    }
    // One that fails leaves the old one.
    let file = d.repository.path().join(BERT).join("model.onnx");
    let good = std::fs::read(&file).unwrap();
    // As files are to be replaced under a running daemon: by another, not in place, since the worker has it mapped.
    let swap = |bytes: &[u8]| {
        let staged = d.repository.path().join("staged");
        std::fs::write(&staged, bytes).unwrap();
        std::fs::rename(&staged, &file).unwrap();
    };
    swap(b"nothing of a model");
    let request = pb::ReloadModelRequest { model: BERT.into() };
    let status = d.models().await.reload_model(request).await.unwrap_err();
    assert_ne!(status.code(), Code::Internal, "{status:?}");
    let after = d.model(BERT).await.status.unwrap();
    assert_eq!(
        (after.state(), after.generation),
        (pb::ModelState::Ready, 4)
    );
    assert!(!after.last_error.is_empty());
    swap(&good);
    stop.cancel();
    let mut seen = std::collections::BTreeSet::new();
    for caller in callers {
        seen.extend(caller.await.unwrap());
    }
    assert!(
        seen.len() > 1 && seen.iter().all(|g| (1..=4).contains(g)),
        "{seen:?}"
    );
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn load_and_unload_by_name() {
    let d = TestDaemon::with(&[BERT]).await;
    let mut models = d.models().await;
    let unload = pb::UnloadModelRequest { model: BERT.into() };
    let status = models
        .unload_model(unload.clone())
        .await
        .unwrap()
        .into_inner()
        .status
        .unwrap();
    assert_eq!(status.state(), pb::ModelState::Unloaded);
    assert_eq!(
        d.capture(small(BERT)).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    models.unload_model(unload).await.unwrap(); // nothing to do
    put(d.repository.path(), "new", &fixture(GPT2));
    let load = |name: &str| pb::LoadModelRequest { model: name.into() };
    models.load_model(load("new")).await.unwrap();
    assert!(
        d.capture(small("new")).await.is_ok(),
        "a folder that appeared is found"
    );
    models.load_model(load(BERT)).await.unwrap();
    assert!(d.capture(small(BERT)).await.is_ok());
    for bad in ["nobody", "..", "a/b", "\n", &"x".repeat(500)] {
        let status = models.load_model(load(bad)).await.unwrap_err();
        let told = [
            Code::NotFound,
            Code::FailedPrecondition,
            Code::InvalidArgument,
        ];
        assert!(told.contains(&status.code()), "{bad:?}: {status:?}");
    }
    assert_eq!(
        models.load_model(load("")).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_turns_health_finishes_what_is_open_and_takes_nothing_new() {
    let repository = tempfile::tempdir().unwrap();
    slow::put(repository.path(), "slow");
    let d = TestDaemon::over(repository, |_| {}).await;
    d.daemon.settled().await;
    let mut watch = HealthClient::new(d.channel().await)
        .watch(HealthCheckRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        watch.message().await.unwrap().unwrap().status(),
        ServingStatus::Serving
    );

    let mut client = d.captures().await;
    let request = ids("slow", &[2, 11, 3], hooks(&[slow::VALUE]));
    let mut stream = client.capture(request).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    d.shutdown.drain.cancel();
    assert_eq!(
        watch.message().await.unwrap().unwrap().status(),
        ServingStatus::NotServing
    );
    drop(watch); // it would never end by itself
    let address = d.daemon.address();
    until(
        "nothing is accepted any more",
        Duration::from_secs(2),
        async || tokio::net::TcpStream::connect(address).await.is_err(),
    )
    .await;
    let mut last = None;
    while let Some(message) = stream.message().await.unwrap() {
        last = message.item;
    }
    assert!(
        matches!(last, Some(pb::capture_response::Item::Summary(_))),
        "an accepted request finishes"
    );
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_grace_ends_what_would_never_end() {
    let d = TestDaemon::tuned(&[BERT], |c| c.grace = Duration::from_millis(300)).await;
    let silent = futures::stream::pending::<pb::CaptureStreamRequest>();
    let mut stream = d
        .captures()
        .await
        .capture_stream(silent)
        .await
        .unwrap()
        .into_inner();
    let _half_open = tokio::net::TcpStream::connect(d.daemon.address())
        .await
        .unwrap();
    let begun = Instant::now();
    d.stop().await;
    assert!(
        begun.elapsed() < Duration::from_secs(4),
        "{:?}",
        begun.elapsed()
    );
    assert!(stream.message().await.is_err(), "never an OK");
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_leave_free_the_engine() {
    let repository = tempfile::tempdir().unwrap();
    slow::put(repository.path(), "slow");
    let d = TestDaemon::over(repository, |_| {}).await;
    d.daemon.settled().await;
    let handle = d.daemon.registry().get("slow").unwrap();
    for _ in 0..20 {
        let mut client = d.captures().await;
        let request = ids("slow", &[2, 11, 3], hooks(&[slow::VALUE]));
        let mut stream = client.capture(request).await.unwrap().into_inner();
        assert!(stream.message().await.unwrap().is_some());
    }
    until("no request is open", Duration::from_secs(5), async || {
        handle.counts().open() == 0
    })
    .await;
    let begun = Instant::now();
    d.capture(ids("slow", &[2, 3], hooks(&["hook_embed"])))
        .await
        .unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5));
    drop(handle);
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_takes_nothing_is_given_up_and_others_are_served() {
    let d = TestDaemon::tuned(&[BERT], |c| c.stall_limit = Duration::from_millis(400)).await;
    let many = futures::stream::repeat_with(|| pb::CaptureStreamRequest {
        id: "x".into(),
        request: Some(ids(BERT, &[5; 100], hooks(&["*"]))),
    });
    let mut client = d.captures().await;
    let mut stream = client.capture_stream(many).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    let handle = d.daemon.registry().get(BERT).unwrap();
    until(
        "its work is given up",
        Duration::from_secs(20),
        async || {
            tokio::time::sleep(Duration::from_millis(50)).await;
            handle.counts().open() == 0
        },
    )
    .await;
    drop(handle);
    assert!(d.capture(small(BERT)).await.is_ok());
    // Should it read on, it is told.
    let status = loop {
        match stream.message().await {
            Ok(Some(message)) => assert!(!matches!(message.answer, Some(bulk::Answer::Summary(_)))),
            Ok(None) => panic!("a stream that was given up ended well"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Aborted, "{status:?}");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_port_harms_nobody() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let d = TestDaemon::with(&[BERT]).await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let cases: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        &[0xff; 1000],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r",
        preface,
        &[&preface[..], &[0xff; 100]].concat(),
    ];
    for bytes in cases {
        let mut stream = tokio::net::TcpStream::connect(d.daemon.address())
            .await
            .unwrap();
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        let mut rest = Vec::new();
        let read =
            tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await;
        assert!(read.is_ok(), "the connection is closed: {bytes:?}");
        assert!(d.capture(small(BERT)).await.is_ok());
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_and_a_missing_folder_are_told() {
    use introspectd::{
        service::{Daemon, Setup},
        shutdown::Shutdown,
    };
    let d = TestDaemon::with(&[BERT]).await;
    let mut config = daemon::config(d.repository.path());
    config.listen = d.daemon.address();
    let error = Daemon::start(Setup::new(config), Shutdown::default())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("listen"), "{error}");
    let mut config = daemon::config(d.repository.path());
    config.models = d.repository.path().join("nowhere");
    let error = Daemon::start(Setup::new(config), Shutdown::default())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("models"), "{error}");
    d.stop().await;
}
