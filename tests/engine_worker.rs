//! A worker as a real process: its death by signal, exit, silence and stop; loads under a clock; a clean environment.
//!
//! The process is this test's own executable, which plays the worker when [`ROLE`] is set (see [`worker_process`]). What it is told to do
//! stands in the name of the model's folder and in the token ids of a run.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

use std::{
    os::{fd::AsFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use introspectd::{
    engine::{
        Ctx, Engine, EngineConfig, EngineError, Job, Lane, Launcher, LoadError, Loaded,
        ModelHandle, NamedTensor, PickSpec, ProcessLauncher, RowGroup, WorkerCommand,
        backend::{Backend, Launched},
    },
    ipc::{
        spec::{LoadOptions, VariantSpec},
        wire::{self, command, event},
        worker_side,
    },
    model::{ModelSettings, ModelState, Registry, Repository},
    tensor::{DType, Tensor},
};
use rustix::process::{Pid, Signal, kill_process};

mod engine_fake;

/// Set in the environment of a process that is to play the worker.
const ROLE: &str = "TEST_ROLE";

const SEGFAULT: i64 = 1001;
const EXIT: i64 = 1003;
/// Answers nothing, cancelled or not.
const DEAF: i64 = 1004;
/// Waits for its cancellation.
const PATIENT: i64 = 1005;

// ------------------------------------------------------------------------------------------------ the process

/// Not a test of its own: the worker that the others start.
#[test]
fn worker_process() {
    if std::env::var(ROLE).as_deref() == Ok("worker") {
        play();
        std::process::exit(0);
    }
}

fn play() {
    let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let (sender, mut receiver) = worker_side::split(UnixStream::from(socket), 1 << 26).unwrap();
    let mut patient = Vec::new();
    while let Ok(Some((command, inputs))) = receiver.receive() {
        let answer = match command {
            command::Kind::Load(load) => match load_as(&load.folder, &sender) {
                Ok(info) => (load.id, event::Kind::Loaded(wire::Loaded { info })),
                Err(message) => (load.id, failed(wire::Failure::BadModel, message)),
            },
            command::Kind::Build(build) => {
                let built = wire::Built {
                    outputs: serde_json::to_string(&engine_fake::info("").outputs).unwrap(),
                    bytes: 1,
                    build_micros: 1,
                };
                (build.id, event::Kind::Built(built))
            }
            command::Kind::Run(run) => {
                let ids: Vec<i64> = inputs[0]
                    .as_chunks()
                    .0
                    .iter()
                    .map(|b| i64::from_le_bytes(*b))
                    .collect();
                match ids[0] {
                    // Rust's own handler takes the first one for a stack overflow and steps aside.
                    SEGFAULT => loop {
                        kill_process(rustix::process::getpid(), Signal::SEGV).unwrap();
                    },
                    EXIT => std::process::exit(3),
                    DEAF => continue,
                    PATIENT => {
                        patient.push(run.id);
                        continue;
                    }
                    _ => {}
                }
                let rows = run.inputs[0].shape[0] as usize;
                let mut segment = sender.pool().with(|p| p.take(rows * 64)).unwrap();
                let mut tensors = Vec::new();
                for (at, (pick, row)) in run
                    .picks
                    .iter()
                    .zip(ids.chunks(ids.len() / rows))
                    .enumerate()
                {
                    assert_eq!(pick.row as usize, at);
                    let values = [row.iter().sum::<i64>() as f32, row.len() as f32];
                    segment.bytes_mut()[at * 64..at * 64 + 8]
                        .copy_from_slice(bytemuck::cast_slice(&values));
                    tensors.push(wire::TensorRef {
                        name: "logits".into(),
                        dtype: DType::F32 as u32,
                        shape: vec![2],
                        span: Some(segment.span(at * 64, 8)),
                    });
                }
                let ran = wire::Ran {
                    tensors,
                    ..wire::Ran::default()
                };
                sender
                    .send(run.id, event::Kind::Ran(ran), Some(segment))
                    .unwrap();
                continue;
            }
            command::Kind::Cancel(cancel) if patient.contains(&cancel.run) => (
                cancel.run,
                failed(wire::Failure::Cancelled, "terminated".into()),
            ),
            command::Kind::Ping(ping) => {
                let pong = wire::Pong {
                    nonce: ping.nonce,
                    resident_bytes: 42,
                };
                (0, event::Kind::Pong(pong))
            }
            command::Kind::Dump(dump) => {
                let mut text: Vec<String> = std::env::vars()
                    .map(|(name, value)| format!("{name}={value}"))
                    .collect();
                text.sort();
                (
                    dump.id,
                    event::Kind::Dumped(wire::Dumped {
                        text: text.join("\n"),
                    }),
                )
            }
            _ => continue,
        };
        if sender.send(answer.0, answer.1, None).is_err() {
            return;
        }
    }
}

fn failed(failure: wire::Failure, message: String) -> event::Kind {
    event::Kind::Failed(wire::Failed {
        failure: failure.into(),
        message,
        subject: String::new(),
    })
}

/// Loads as the folder's name says.
fn load_as(folder: &str, sender: &worker_side::Sender) -> Result<String, String> {
    let progress = || {
        let progress = wire::Progress {
            stage: "read".into(),
        };
        sender
            .send(0, event::Kind::Progress(progress), None)
            .unwrap();
    };
    progress();
    match Path::new(folder).file_name().and_then(|n| n.to_str()) {
        Some("crashes") => std::process::abort(),
        Some("silent") => loop {
            std::thread::park();
        },
        Some("endless") => loop {
            std::thread::park_timeout(Duration::from_millis(50));
            progress();
        },
        Some("refuses") => Err("the file is\ntruncated".into()),
        _ => Ok(serde_json::to_string(&engine_fake::info("")).unwrap()),
    }
}

// ------------------------------------------------------------------------------------------------ the tests

fn config() -> EngineConfig {
    EngineConfig {
        heartbeat: Duration::from_millis(100),
        heartbeat_limit: Duration::from_millis(1500),
        load_limit: Duration::from_secs(4),
        load_silence: Duration::from_secs(2),
        cancel_grace: Duration::from_millis(200),
        ..EngineConfig::default()
    }
}

fn launcher() -> ProcessLauncher {
    ProcessLauncher {
        command: WorkerCommand {
            program: std::env::current_exe().unwrap(),
            args: vec![
                "--exact".into(),
                "worker_process".into(),
                "--nocapture".into(),
            ],
            env: vec![(ROLE.into(), "worker".into())],
        },
        options: LoadOptions::default(),
        config: config(),
    }
}

async fn launch(folder: &str) -> Result<Launched, LoadError> {
    launcher()
        .launch(&PathBuf::from("/models").join(folder))
        .await
}

async fn serve() -> (Arc<dyn Backend>, ModelHandle) {
    let (backend, mut info) = launch("good").await.unwrap();
    info.name = "good".into();
    let loaded = Loaded {
        number: 1,
        info,
        backend: backend.clone(),
    };
    let generation = Engine::new(config()).adopt(loaded).await.unwrap();
    (backend, ModelHandle::new(generation).0)
}

fn job(id: i64) -> Job {
    let group = RowGroup {
        inputs: vec![NamedTensor {
            name: "input_ids".into(),
            tensor: Tensor::from_i64(vec![1, 3], &[id, 2, 3]).unwrap(),
        }],
        rows: 1,
        length: Some(3),
        picks: vec![PickSpec {
            output: "logits".into(),
            ..PickSpec::default()
        }],
    };
    Job {
        spec: VariantSpec::plain(),
        lane: Lane::Predict,
        groups: vec![group],
    }
}

async fn ask(handle: &ModelHandle, id: i64) -> Result<Vec<f32>, EngineError> {
    let done = handle
        .submit(job(id), &Ctx::default())
        .await?
        .collect()
        .await?;
    Ok(done[0].tensors[0].to_f32().unwrap().into_owned())
}

fn signal(backend: &dyn Backend, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(backend.pid().expect("it lives")).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Fails when the process was not reaped.
fn is_gone(pid: u32) -> bool {
    !Path::new(&format!("/proc/{pid}")).exists()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_cross_and_come_back() {
    let (_backend, handle) = serve().await;
    for id in 1..100 {
        assert_eq!(ask(&handle, id).await.unwrap(), [(id + 5) as f32, 3.0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_death_names_its_signal() {
    for (id, cause) in [(SEGFAULT, "SIGSEGV"), (EXIT, "exit code 3")] {
        let (backend, handle) = serve().await;
        let pid = backend.pid().unwrap();
        match ask(&handle, id).await.unwrap_err() {
            EngineError::WorkerDied {
                model,
                cause: found,
            } => assert_eq!((model.as_str(), found.as_str()), ("good", cause)),
            other => panic!("{other:?}"),
        }
        assert_eq!(backend.died().await, cause);
        assert!(is_gone(pid) && backend.pid().is_none());
        assert!(
            matches!(ask(&handle, 1).await, Err(EngineError::WorkerDied { .. })),
            "and for every later call"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_death_in_idleness_is_noticed_at_once() {
    let (backend, _handle) = serve().await;
    let began = Instant::now();
    signal(&*backend, Signal::KILL);
    assert_eq!(backend.died().await, "SIGKILL");
    assert!(began.elapsed() < Duration::from_secs(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_worker_misses_its_heartbeat_and_is_ended() {
    let (backend, handle) = serve().await;
    let pid = backend.pid().unwrap();
    let began = Instant::now();
    signal(&*backend, Signal::STOP);
    // The signal may take effect after an answer or two.
    let error = loop {
        if let Err(error) = ask(&handle, 1).await {
            break error;
        }
    };
    assert!(
        matches!(&error, EngineError::WorkerDied { cause, .. } if cause.contains("heartbeat")),
        "{error:?}"
    );
    assert!(began.elapsed() < config().heartbeat_limit + Duration::from_secs(1));
    assert!(is_gone(pid));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heartbeat_that_is_answered_goes_on() {
    let (backend, handle) = serve().await;
    // Nothing is to happen here, for longer than the limit: the one place where time must really pass.
    let until = Instant::now() + 2 * config().heartbeat_limit;
    while Instant::now() < until {
        ask(&handle, 1).await.expect("it is left alone");
        tokio::time::sleep(config().heartbeat).await;
    }
    assert_eq!(backend.resident_bytes(), 42, "pongs came");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_is_cancelled_and_one_that_ignores_it_costs_the_worker() {
    let (backend, handle) = serve().await;
    let ctx = Ctx::new("test", Some(Instant::now() + Duration::from_millis(100)));
    let asked = handle
        .submit(job(PATIENT), &ctx)
        .await
        .unwrap()
        .collect()
        .await;
    assert_eq!(asked.unwrap_err(), EngineError::DeadlineExceeded);
    assert_eq!(
        ask(&handle, 1).await.unwrap(),
        [6.0, 3.0],
        "the same worker goes on"
    );
    let ctx = Ctx::new("test", Some(Instant::now() + Duration::from_millis(100)));
    let asked = handle
        .submit(job(DEAF), &ctx)
        .await
        .unwrap()
        .collect()
        .await;
    assert_eq!(asked.unwrap_err(), EngineError::DeadlineExceeded);
    assert!(backend.died().await.contains("cancelled run"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn loads_run_under_a_clock_and_leave_no_process() {
    for (folder, wanted) in [
        ("crashes", "the runtime crashed while loading (SIGABRT)"),
        ("silent", "loading was given up: no progress for 2 s"),
        ("endless", "loading was given up: it took longer than 4 s"),
        ("refuses", "the file is\\ntruncated"),
    ] {
        assert_eq!(launch(folder).await.unwrap_err().to_string(), wanted);
    }
    let absent = ProcessLauncher {
        command: WorkerCommand::of("/nowhere/introspectd"),
        ..launcher()
    };
    let error = absent.launch(Path::new("/models/good")).await.unwrap_err();
    assert!(
        matches!(&error, LoadError::Start(why) if why.starts_with("introspectd:") && !why.contains('/')),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_environment_is_clean_and_telemetry_is_off() {
    let (_backend, handle) = serve().await;
    let environment = handle.dump(&Ctx::default()).await.unwrap();
    assert!(
        environment
            .lines()
            .any(|line| line == "ORT_DISABLE_TELEMETRY=1")
    );
    // cargo sets these for tests; nothing asked that they be kept.
    assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
    assert!(!environment.contains("CARGO_"), "{environment}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_drops_the_worker_ends_it() {
    let (backend, handle) = serve().await;
    let (pid, died) = (backend.pid().unwrap(), backend.died());
    drop((backend, handle));
    died.await;
    assert!(is_gone(pid));
}

/// Loads and unloads of two models from many sides while their workers are killed: the front lives, the books balance, and in the end both serve.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_operations_and_deaths_leaves_order() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["one", "two"] {
        std::fs::create_dir(folder.path().join(name)).unwrap();
        std::fs::write(folder.path().join(name).join("model.onnx"), b"x").unwrap();
    }
    let engine = Engine::new(EngineConfig {
        deaths: usize::MAX,
        ..config()
    });
    let repository = Repository::open(folder.path()).unwrap();
    let pids: Arc<Mutex<Vec<u32>>> = Arc::default();
    let recording = Recording {
        launcher: launcher(),
        pids: pids.clone(),
    };
    let registry = Registry::new(
        engine.clone(),
        repository,
        Arc::new(recording),
        ModelSettings::default(),
    );
    registry.load_all().await.unwrap();
    let tasks: Vec<_> = (0..60)
        .map(|i| {
            let registry = registry.clone();
            tokio::spawn(async move {
                let name = if i % 2 == 0 { "one" } else { "two" };
                match i % 6 {
                    0 => drop(registry.reload(name).await),
                    1 => drop(registry.unload(name).await),
                    2 => drop(registry.load(name).await),
                    _ => {
                        for _ in 0..20 {
                            if let Ok(handle) = registry.get(name) {
                                let id = if i == 3 { SEGFAULT } else { i64::from(i) };
                                let _ = ask(&handle, id).await;
                            }
                        }
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("no panic");
    }
    for name in ["one", "two"] {
        registry.load(name).await.unwrap();
        let mut states = registry.subscribe();
        let ready = states.wait_for(|s| s[name].state == ModelState::Ready);
        tokio::time::timeout(Duration::from_secs(30), ready)
            .await
            .expect("it serves")
            .unwrap();
        assert_eq!(
            ask(&registry.get(name).unwrap(), 1).await.unwrap(),
            [6.0, 3.0]
        );
    }
    registry.shutdown().await;
    assert_eq!(engine.buffers().used(), 0);
    let pids = pids.lock().unwrap();
    assert!(
        pids.len() > 2 && pids.iter().all(|pid| is_gone(*pid)),
        "every worker is gone"
    );
}

/// Remembers the processes that it made.
struct Recording {
    launcher: ProcessLauncher,
    pids: Arc<Mutex<Vec<u32>>>,
}

impl Launcher for Recording {
    fn launch(&self, folder: &Path) -> BoxFuture<'static, Result<Launched, LoadError>> {
        let (launch, pids) = (self.launcher.launch(folder), self.pids.clone());
        Box::pin(async move {
            let (backend, info) = launch.await?;
            pids.lock().unwrap().extend(backend.pid());
            Ok((backend, info))
        })
    }
}
