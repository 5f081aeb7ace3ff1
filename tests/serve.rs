//! The binary as an operator runs it: settings, signals, the log, the metrics page, and nothing left behind by the runtime.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use introspectd::{
    service::wire::introspect::{self as pb, capture_service_client::CaptureServiceClient},
    telemetry::names,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tonic::transport::Channel;

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/models")
        .join(name)
}

/// A daemon that runs in a process of its own, logging JSON.
struct Serve {
    child: Child,
    lines: mpsc::Receiver<String>,
    seen: Vec<Value>,
    grpc: String,
    admin: SocketAddr,
    _home: tempfile::TempDir,
}

fn repository() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("bert");
    std::fs::create_dir(&to).unwrap();
    for entry in std::fs::read_dir(model("bert.legacy14")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    folder
}

/// The command with nothing of this process's environment but what it needs, and a home of its own.
fn command(home: &Path) -> Command {
    // The library stays where the build put it.
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))
        .unwrap();
    let library = cache.join(concat!(
        "introspectd/onnxruntime-",
        env!("INTROSPECTD_ORT_VERSION")
    ));
    let library = library.join(concat!(
        "libonnxruntime.so.",
        env!("INTROSPECTD_ORT_VERSION")
    ));
    let mut command = Command::new(env!("CARGO_BIN_EXE_introspectd"));
    command
        .env_clear()
        .env("HOME", home)
        .env("TMPDIR", home)
        .env("INTROSPECTD_ORT_LIBRARY", library)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

impl Serve {
    fn start(repository: &Path) -> Self {
        let home = tempfile::tempdir().unwrap();
        let mut child = command(home.path())
            .args([
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--admin-listen",
                "127.0.0.1:0",
            ])
            .args(["--log-format", "json", "--models"])
            .arg(repository)
            .spawn()
            .unwrap();
        let (sender, lines) = mpsc::channel();
        let errors = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            errors
                .lines()
                .map_while(Result::ok)
                .all(|line| sender.send(line).is_ok())
        });
        let mut this = Self {
            child,
            lines,
            seen: Vec::new(),
            grpc: String::new(),
            admin: ([127, 0, 0, 1], 0).into(),
            _home: home,
        };
        let addresses = this.line("introspectd serves");
        this.grpc = format!("http://{}", addresses["grpc"].as_str().unwrap());
        this.admin = addresses["admin"].as_str().unwrap().parse().unwrap();
        this.line("ready");
        this
    }

    /// The next line of the log with this message. Every line is one JSON object.
    fn line(&mut self, message: &str) -> Value {
        loop {
            let line = self
                .lines
                .recv_timeout(Duration::from_secs(60))
                .unwrap_or_else(|e| panic!("no line {message:?}: {e}; {:?}", self.seen));
            let value: Value =
                serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}"));
            self.seen.push(value.clone());
            if value["message"] == message {
                return value;
            }
        }
    }

    fn page(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.admin).unwrap();
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    fn metrics(&self) -> String {
        self.page("/metrics")
            .split_once("\r\n\r\n")
            .unwrap()
            .1
            .to_owned()
    }

    fn signal(&self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
    }

    fn ends(&mut self, limit: Duration) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < limit, "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn client(&self) -> CaptureServiceClient<Channel> {
        let channel = Channel::from_shared(self.grpc.clone())
            .unwrap()
            .connect_lazy();
        CaptureServiceClient::new(channel)
    }

    async fn capture(&self, model: &str) -> Result<(), tonic::Status> {
        let mut client = self.client();
        let request = pb::CaptureRequest {
            model: model.to_owned(),
            input: Some(pb::Input {
                kind: Some(pb::input::Kind::Text(pb::Text {
                    text: "good movie".into(),
                    ..pb::Text::default()
                })),
            }),
            selection: Some(pb::Selection {
                hooks: vec!["pattern".into()],
                ..pb::Selection::default()
            }),
            intervention: None,
        };
        let mut stream = client.capture(request).await?.into_inner();
        while stream.message().await?.is_some() {}
        Ok(())
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        // One that ended already cannot be killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_operator_scrapes() {
    let repository = repository();
    let mut serve = Serve::start(repository.path());
    serve.capture("bert").await.unwrap();
    assert!(serve.page("/livez").starts_with("HTTP/1.1 200"));
    assert!(serve.page("/readyz").starts_with("HTTP/1.1 200"));
    assert!(serve.page("/nothing").starts_with("HTTP/1.1 404"));

    let text = serve.metrics();
    for series in [
        "introspectd_explanation_duration_seconds_count{model=\"bert\",method=\"capture\",code=\"OK\"} 1",
        "introspectd_requests_total{method=\"introspect.v1.CaptureService/Capture\",code=\"OK\"} 1",
        "introspectd_inflight_requests{method=\"introspect.v1.CaptureService/Capture\"} 0",
        "introspectd_model_ready{model=\"bert\"} 1",
        "introspectd_rows_total{model=\"bert\",lane=\"interactive\"} 1",
        "request_explain_seconds_count{model_name=\"bert\"} 1",
        "introspectd_variants{model=\"bert\"}",
        "introspectd_variant_builds_total{model=\"bert\",outcome=\"ok\"}",
        "introspectd_batch_tokens_count{model=\"bert\"} 1",
        "introspectd_queue_rows{lane=\"interactive\"} 0",
        "introspectd_stream_bytes_total{method=\"introspect.v1.CaptureService/Capture\"}",
        "introspectd_connections",
        "introspectd_build_info{version=\"",
    ] {
        assert!(text.contains(series), "{series} is not in:\n{text}");
    }
    for stage in ["tokenize", "queue", "build", "run", "encode"] {
        let series = format!(
            "introspectd_stage_duration_seconds_count{{model=\"bert\",method=\"capture\",stage=\"{stage}\"}} 1"
        );
        assert!(text.contains(&series), "{series} is not in:\n{text}");
    }
    // Every series is described, and known to the table.
    for line in text
        .lines()
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
    {
        let name = line.split(['{', ' ']).next().unwrap();
        let known = names::ALL.iter().any(|m| {
            let rest = name.strip_prefix(m.name);
            rest.is_some_and(|r| ["", "_bucket", "_sum", "_count"].contains(&r))
                && text.contains(&format!("# HELP {} ", m.name))
                && text.contains(&format!("# TYPE {} ", m.name))
        });
        assert!(known, "{line}");
    }

    // One line for each call that did not end well, under the caller's id.
    let mut request = tonic::Request::new(pb::CaptureRequest::default());
    request
        .metadata_mut()
        .insert("x-request-id", "mine-17".parse().unwrap());
    assert!(serve.client().capture(request).await.is_err());
    let line = serve.line("a call ended");
    assert_eq!(
        (line["request_id"].as_str(), line["code"].as_str()),
        (Some("mine-17"), Some("INVALID_ARGUMENT"))
    );

    // Names that callers make up add no series.
    let series = |text: &str| -> BTreeSet<String> {
        text.lines()
            .filter(|l| !l.starts_with('#'))
            .map(|l| l.rsplit_once(' ').map_or(l, |(s, _)| s).to_owned())
            .collect()
    };
    assert!(serve.capture("made-up").await.is_err());
    let before = series(&serve.metrics());
    for n in 0..50 {
        assert!(serve.capture(&format!("made-up-{n}\"\n}}")).await.is_err());
    }
    assert_eq!(series(&serve.metrics()), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_signal_drains_and_two_end_at_once() {
    let repository = repository();
    let mut serve = Serve::start(repository.path());
    serve.capture("bert").await.unwrap();
    serve.signal();
    assert_eq!(serve.ends(Duration::from_secs(10)).code(), Some(0));
    serve.line("draining");
    serve.line("stopped");

    let mut serve = Serve::start(repository.path());
    // A call that never ends keeps it from ending within its grace of 30 s.
    let mut client = serve.client();
    let silent = futures::stream::pending::<pb::CaptureStreamRequest>();
    let stream = client.capture_stream(silent).await.unwrap().into_inner();
    serve.signal();
    serve.line("draining");
    serve.signal();
    assert_eq!(serve.ends(Duration::from_secs(2)).code(), Some(0));
    drop(stream);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_runtime_leaves_nothing_behind_and_sends_nothing() {
    // It hides its telemetry when CI is set, so the environment here has no CI.
    let repository = repository();
    let mut serve = Serve::start(repository.path());
    serve.capture("bert").await.unwrap();
    serve.signal();
    assert_eq!(serve.ends(Duration::from_secs(10)).code(), Some(0));
    let mut left = Vec::new();
    let mut folders = vec![serve._home.path().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path.clone());
            }
            left.push(path);
        }
    }
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn all_mistakes_of_the_settings_are_told_together() {
    let home = tempfile::tempdir().unwrap();
    let output = command(home.path())
        .args([
            "serve",
            "--models",
            "/nonexistent",
            "--listen",
            "here",
            "--provider",
            "rocm",
        ])
        .env("INTROSPECTD_GRACE", "soon")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    for part in ["models", "listen", "provider", "grace", "INTROSPECTD_GRACE"] {
        assert!(said.contains(part), "{part} is not in:\n{said}");
    }
}
