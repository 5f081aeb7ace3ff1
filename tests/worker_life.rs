//! The real worker when things go wrong: cancelled, killed, orphaned, without its library, with broken files.

#[path = "support/worker.rs"]
mod support;

use std::{
    fs,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::Child,
    time::{Duration, Instant},
};

use introspectd::{
    ipc::{
        info::ModelInfo,
        spec::{LoadOptions, Provider, VariantSpec},
        wire::{Cancel, Failure, Pick, Ping, command},
    },
    onnx::{Attribute, Folder, Limits, Model, Patch, Weights},
    tensor::Tensor,
};
use support::{Worker, command, everything, fixture, inputs, kind};

/// Rows of a run that takes seconds; the trials of a load have three.
const MANY: usize = 64;

/// The fixture `bert.legacy14` with an output `slow` beside its own: many small products, each of as many rows as the batch.
fn slow_model(folder: &Path) {
    let side = 128;
    let source = Folder::open(&fixture("bert.legacy14")).unwrap();
    let model = Model::open(&source, "model.onnx", &Limits::default()).unwrap();
    let ids = model.graph.value("input_ids").expect("the fixture's input");
    let mut patch = Patch::new(&model.graph, "slow");
    let floats = patch.op("Cast", &[ids], vec![Attribute::int("to", 1)]);
    let largest = patch.op("ReduceMax", &[floats], vec![Attribute::ints("axes", &[1])]);
    let axis = patch.ints(&[2]);
    let row = patch.op("Unsqueeze", &[largest, axis], Vec::new());
    // Products with the identity keep their values, which denormal numbers would slow down.
    let identity: Vec<f32> = (0..side * side)
        .map(|i| if i % (side + 1) == 0 { 1.0 } else { 0.0 })
        .collect();
    let identity = Tensor::from_f32(vec![side, side], &identity).unwrap();
    let identity = patch.constant("identity", &identity);
    let mut product = patch.op("Add", &[identity, row], Vec::new());
    for _ in 0..1000 {
        product = patch.op("MatMul", &[product, identity], Vec::new());
    }
    patch.tap(product, "slow").unwrap();
    let slow = model.with_graph(patch.apply().unwrap());
    fs::write(folder.join("model.onnx"), slow.encode(Weights::Inline)).unwrap();
}

async fn with_slow_model() -> (Worker, ModelInfo, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    slow_model(folder.path());
    let worker = Worker::start();
    let info = worker
        .load(folder.path(), &LoadOptions::default())
        .await
        .unwrap_or_else(|f| panic!("{}", f.message));
    worker.build(1, &VariantSpec::plain()).await.unwrap();
    (worker, info, folder)
}

fn slow_pick(info: &ModelInfo) -> Vec<Pick> {
    let output = info.outputs.iter().position(|o| o.name == "slow").unwrap();
    vec![Pick {
        output: output as u32,
        rows: 1,
        ..Pick::default()
    }]
}

/// Lets a run begin: the worker has answered a ping that came after it, and is a moment into the products.
async fn begun(worker: &Worker) {
    worker
        .connection
        .send(command::Kind::Ping(Ping { nonce: 77 }), None)
        .await
        .unwrap();
    while worker.connection.last_pong() != 77 {
        assert!(!worker.connection.is_closed(), "the worker is gone");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
}

async fn exit_of(child: &mut Child) -> std::process::ExitStatus {
    for _ in 0..500 {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the worker lives on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_run_ends_between_two_kernels_and_the_variant_serves_on() {
    let (worker, info, _folder) = with_slow_model().await;
    let given = inputs(&info, MANY, 4);
    let (id, done) = worker.start_run(1, &given, slow_pick(&info));
    let running = tokio::spawn(done);
    begun(&worker).await;
    assert!(!running.is_finished(), "the run takes seconds");
    let cancelled = Instant::now();
    worker
        .connection
        .send(command::Kind::Cancel(Cancel { run: id }), None)
        .await
        .unwrap();
    let failed = running.await.unwrap().unwrap().expect_err("cancelled");
    let took = cancelled.elapsed();
    assert_eq!(kind(&failed), Failure::Cancelled, "{}", failed.message);
    assert!(
        took < Duration::from_millis(1500),
        "one kernel takes milliseconds, the end took {took:?}"
    );
    println!("cancelled after {took:?}");

    // One that is cancelled while it waits for another never runs.
    let (first, done) = worker.start_run(1, &given, slow_pick(&info));
    let (second, waiting) = worker.start_run(1, &given, slow_pick(&info));
    let (done, waiting) = (tokio::spawn(done), tokio::spawn(waiting));
    begun(&worker).await;
    for run in [second, first] {
        let cancel = command::Kind::Cancel(Cancel { run });
        worker.connection.send(cancel, None).await.unwrap();
    }
    for ended in [done, waiting] {
        let failed = ended.await.unwrap().unwrap().expect_err("cancelled");
        assert_eq!(kind(&failed), Failure::Cancelled);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_in_mid_run_ends_the_wait_at_once_and_the_signal_is_known() {
    let (mut worker, info, _folder) = with_slow_model().await;
    let (_, done) = worker.start_run(1, &inputs(&info, MANY, 4), slow_pick(&info));
    let running = tokio::spawn(done);
    begun(&worker).await;
    let pid = rustix::process::Pid::from_child(&worker.child);
    rustix::process::kill_process(pid, rustix::process::Signal::SEGV).unwrap();
    let killed = Instant::now();
    let gone = running.await.unwrap().expect_err("no answer can come");
    assert_eq!(gone.to_string(), "the worker is gone");
    assert!(killed.elapsed() < Duration::from_secs(3));
    assert_eq!(exit_of(&mut worker.child).await.signal(), Some(11));
    assert!(worker.connection.is_closed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_front_closes_exits_even_in_mid_run() {
    let (mut worker, info, _folder) = with_slow_model().await;
    let (_, done) = worker.start_run(1, &inputs(&info, MANY, 4), slow_pick(&info));
    let running = tokio::spawn(done);
    begun(&worker).await;
    running.abort();
    let _ = running.await;
    // The last clone of the connection closes the socket.
    let (other, _) = std::os::unix::net::UnixStream::pair().unwrap();
    worker.connection = introspectd::ipc::front::Connection::new(other, 1 << 20).unwrap();
    let closed = Instant::now();
    let status = exit_of(&mut worker.child).await;
    assert!(
        closed.elapsed() < Duration::from_secs(3),
        "{:?}",
        closed.elapsed()
    );
    assert_eq!(status.signal(), None, "it exits by itself: {status}");
}

#[tokio::test]
async fn a_worker_whose_front_is_killed_does_not_outlive_it() {
    // The shell stands for the front: it starts the worker and is killed, while the socket stays open in this process.
    let mut shell = std::process::Command::new("sh");
    shell
        .args(["-c", "exec 3<&0; \"$0\" worker <&3 3<&- & wait"])
        .arg(env!("CARGO_BIN_EXE_introspectd"))
        .env("ORT_DISABLE_TELEMETRY", "1");
    let mut worker = Worker::from(shell);
    begun(&worker).await;
    worker.child.kill().unwrap();
    worker.child.wait().unwrap();
    tokio::time::timeout(Duration::from_secs(5), worker.connection.closed())
        .await
        .expect("the kernel ends the worker");
}

#[tokio::test]
async fn a_worker_without_its_library_says_where_it_looked_and_what_to_do() {
    let home = tempfile::tempdir().unwrap();
    let mut bare = command();
    bare.env("HOME", home.path())
        .env_remove("XDG_CACHE_HOME")
        .env_remove("ORT_DYLIB_PATH");
    let worker = Worker::from(bare);
    let failed = worker
        .load(&fixture("bert.legacy14"), &LoadOptions::default())
        .await
        .unwrap_err();
    assert_eq!(kind(&failed), Failure::Provider);
    let cache = home.path().join(".cache/introspectd/onnxruntime-");
    for wanted in [
        "pip install onnxruntime==",
        "--ort-library",
        cache.to_str().unwrap(),
    ] {
        assert!(
            failed.message.contains(wanted),
            "{wanted}: {}",
            failed.message
        );
    }
    assert!(failed.message.len() < 1024, "{}", failed.message.len());

    let named = LoadOptions {
        library: Some(home.path().join("libonnxruntime.so")),
        ..LoadOptions::default()
    };
    let worker = Worker::start();
    let failed = worker
        .load(&fixture("bert.legacy14"), &named)
        .await
        .unwrap_err();
    assert!(
        failed.message.contains("libonnxruntime.so"),
        "{}",
        failed.message
    );
}

#[tokio::test]
async fn a_provider_that_cannot_load_is_an_error_and_no_fall_back() {
    let worker = Worker::start();
    let options = LoadOptions {
        provider: Provider::Cuda(0),
        ..LoadOptions::default()
    };
    let failed = worker
        .load(&fixture("bert.legacy14"), &options)
        .await
        .unwrap_err();
    assert_eq!(kind(&failed), Failure::Provider);
    assert!(failed.message.contains("cuda:0"), "{}", failed.message);
    println!("{}", failed.message);
}

/// The library that the tests use, found as the worker finds it.
fn library() -> PathBuf {
    introspectd::worker::runtime::cache_folder()
        .unwrap()
        .join(format!("onnxruntime-{}", env!("INTROSPECTD_ORT_VERSION")))
        .join(format!(
            "libonnxruntime.so.{}",
            env!("INTROSPECTD_ORT_VERSION")
        ))
}

fn files_beneath(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_beneath(&path));
        } else {
            found.push(path);
        }
    }
    found
}

#[tokio::test]
async fn a_run_leaves_no_telemetry_behind_even_if_the_front_forgets_to_forbid_it() {
    for forgets in [false, true] {
        let home = tempfile::tempdir().unwrap();
        let mut quiet = command();
        if forgets {
            quiet.env_remove("ORT_DISABLE_TELEMETRY");
        }
        // The library hides its telemetry when it believes to be in a build.
        quiet
            .env_remove("CI")
            .env("HOME", home.path())
            .env("TMPDIR", home.path())
            .env("XDG_CACHE_HOME", home.path().join("cache"))
            .current_dir(home.path());
        let mut worker = Worker::from(quiet);
        let options = LoadOptions {
            library: Some(library()),
            ..LoadOptions::default()
        };
        let info = worker
            .load(&fixture("bert.legacy14"), &options)
            .await
            .unwrap_or_else(|f| panic!("{}", f.message));
        let (outputs, _) = worker.build(1, &VariantSpec::plain()).await.unwrap();
        worker
            .run(1, &inputs(&info, 1, 5), everything(&outputs, 1))
            .await
            .unwrap();
        let (other, _) = std::os::unix::net::UnixStream::pair().unwrap();
        worker.connection = introspectd::ipc::front::Connection::new(other, 1 << 20).unwrap();
        exit_of(&mut worker.child).await;
        assert_eq!(files_beneath(home.path()), Vec::<PathBuf>::new());
    }
}

/// Loads a folder with these files beside the fixture's; the worker must say no and live.
async fn refused(files: &[(&str, &[u8])]) -> String {
    let folder = tempfile::tempdir().unwrap();
    for name in ["model.onnx", "config.json", "tokenizer.json"] {
        fs::copy(
            fixture("bert.legacy14").join(name),
            folder.path().join(name),
        )
        .unwrap();
    }
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    let worker = Worker::start();
    let failed = worker
        .load(folder.path(), &LoadOptions::default())
        .await
        .expect_err("a broken file");
    assert_eq!(kind(&failed), Failure::BadModel, "{}", failed.message);
    assert!(failed.message.len() < 1024, "{}", failed.message);
    assert!(
        !failed.message.contains(folder.path().to_str().unwrap()),
        "{}",
        failed.message
    );
    begun(&worker).await; // still answers
    failed.message
}

#[tokio::test]
async fn broken_models_are_refused_and_the_worker_says_why() {
    let good = fs::read(fixture("bert.legacy14").join("model.onnx")).unwrap();
    refused(&[("model.onnx", b"")]).await;
    refused(&[("model.onnx", b"not a model at all, but text")]).await;
    refused(&[("model.onnx", &good[..good.len() / 2])]).await;
    refused(&[("model.onnx", &[0xff; 4096])]).await;
    // An operator that no runtime knows.
    let at = good
        .windows(9)
        .position(|w| w == b"\x22\x07Softmax")
        .unwrap();
    let mut unknown = good.clone();
    unknown[at + 2..at + 9].copy_from_slice(b"Softmix");
    let why = refused(&[("model.onnx", &unknown)]).await;
    assert!(why.contains("Softmix"), "{why}");
}

#[tokio::test]
async fn hostile_tokenizers_and_configurations_are_refused() {
    let deep = "[".repeat(100_000);
    for (name, text) in [
        ("tokenizer.json", "{"),
        ("tokenizer.json", deep.as_str()),
        (
            "tokenizer.json",
            "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[\"b c\"]}}",
        ),
        ("config.json", "{\"id2label\":{\"0\":\"a\",\"0\":\"b\"}}"),
        ("config.json", deep.as_str()),
        ("introspect.toml", "no such = \"thing\""),
    ] {
        let why = refused(&[(name, text.as_bytes())]).await;
        assert!(why.contains(name), "{why}");
    }
}

#[tokio::test]
async fn a_folder_without_tokenizer_or_configuration_loads() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("onnx")).unwrap();
    fs::copy(
        fixture("bert.legacy14").join("model.onnx"),
        folder.path().join("onnx/model.onnx"),
    )
    .unwrap();
    let worker = Worker::start();
    let info = worker
        .load(folder.path(), &LoadOptions::default())
        .await
        .unwrap_or_else(|f| panic!("{}", f.message));
    assert_eq!((info.tokenizer, info.labels), (None, Vec::new()));
    let failed = worker.tokenize(&["a"], false).await.unwrap_err();
    assert_eq!(kind(&failed), Failure::FailedPrecondition);
    assert!(
        failed.message.contains("tokenizer.json"),
        "{}",
        failed.message
    );
    worker
        .build(1, &VariantSpec::plain())
        .await
        .expect("weights are found beneath onnx/");
    let again = worker
        .load(folder.path(), &LoadOptions::default())
        .await
        .unwrap_err();
    assert!(
        again.message.contains("start another worker"),
        "{}",
        again.message
    );
}

#[tokio::test]
async fn a_run_that_would_bring_back_too_much_is_refused_before_it_runs() {
    let options = LoadOptions {
        max_run_bytes: 4096,
        ..LoadOptions::default()
    };
    let worker = Worker::start();
    let info = worker
        .load(&fixture("bert.legacy14"), &options)
        .await
        .unwrap();
    let hook = info
        .hooks
        .iter()
        .find(|h| h.aliases.iter().any(|a| a == "attentions.0"))
        .unwrap();
    let (outputs, _) = worker
        .build(1, &VariantSpec::exposing([hook.name.clone()]))
        .await
        .unwrap();
    let failed = worker
        .run(1, &inputs(&info, 2, 100), everything(&outputs, 2))
        .await
        .unwrap_err();
    assert_eq!(kind(&failed), Failure::ResourceExhausted);
    assert!(failed.message.contains("4096"), "{}", failed.message);
    worker
        .run(1, &inputs(&info, 1, 3), everything(&outputs, 1))
        .await
        .expect("a small one runs");
}
