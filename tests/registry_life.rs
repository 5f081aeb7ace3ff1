//! The life of a model in the registry, with workers that the test holds in its hand. Paused time.

use std::{
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use introspectd::{
    engine::{Ctx, Engine, EngineConfig, EngineError, Job, Lane, NamedTensor, PickSpec, RowGroup},
    ipc::spec::VariantSpec,
    model::{ModelSettings, ModelState, Registry, Repository},
    tensor::Tensor,
};
use proptest::prelude::*;

mod engine_fake;
use engine_fake::{FakeLauncher, Next};

const LOAD: Duration = Duration::from_secs(2);

struct Scene {
    folder: tempfile::TempDir,
    launcher: Arc<FakeLauncher>,
    registry: Registry,
}

fn put(folder: &Path, name: &str, bytes: &[u8]) {
    std::fs::create_dir_all(folder.join(name)).unwrap();
    std::fs::write(folder.join(name).join("model.onnx"), bytes).unwrap();
}

fn scene(names: &[&str]) -> Scene {
    let folder = tempfile::tempdir().unwrap();
    for name in names {
        put(folder.path(), name, b"model");
    }
    let launcher = FakeLauncher::new(LOAD);
    let repository = Repository::open(folder.path()).unwrap();
    let engine = Engine::new(EngineConfig::default());
    let registry = Registry::new(
        engine,
        repository,
        launcher.clone(),
        ModelSettings::default(),
    );
    Scene {
        folder,
        launcher,
        registry,
    }
}

impl Scene {
    fn state(&self, name: &str) -> ModelState {
        self.registry.list()[name].state.clone()
    }

    async fn becomes(&self, name: &str, wanted: impl Fn(&ModelState) -> bool) {
        let mut states = self.registry.subscribe();
        let seen = states.wait_for(|s| s.get(name).is_some_and(|s| wanted(&s.state)));
        if tokio::time::timeout(Duration::from_secs(3600), seen)
            .await
            .is_err()
        {
            panic!("\"{name}\" stays {:?}", self.state(name));
        }
    }
}

async fn ask(registry: &Registry, name: &str) -> Result<u64, EngineError> {
    let handle = registry.get(name)?;
    let group = RowGroup {
        inputs: vec![NamedTensor {
            name: "input_ids".into(),
            tensor: Tensor::from_i64(vec![1, 2], &[3, 4]).unwrap(),
        }],
        rows: 1,
        length: Some(2),
        picks: vec![PickSpec {
            output: "logits".into(),
            ..PickSpec::default()
        }],
    };
    let job = Job {
        spec: VariantSpec::plain(),
        lane: Lane::Predict,
        groups: vec![group],
    };
    let done = handle.submit(job, &Ctx::default()).await?.collect().await?;
    assert_eq!(done[0].tensors[0].to_f32().unwrap()[..], [7.0, 2.0]);
    Ok(handle.generation())
}

#[tokio::test(start_paused = true)]
async fn a_broken_model_says_why_and_the_others_serve() {
    let scene = scene(&["good", "other"]);
    std::fs::create_dir(scene.folder.path().join("empty")).unwrap();
    scene.registry.rescan().await.unwrap();
    assert_eq!(scene.state("good"), ModelState::Unloaded);
    scene.registry.load("good").await.unwrap();
    scene.launcher.set(Next::Refuse("the file is truncated"));
    let error = scene.registry.load("other").await.unwrap_err();
    assert!(
        matches!(&error, EngineError::InvalidArgument { message, .. } if message.contains("truncated"))
    );
    assert!(
        matches!(scene.state("other"), ModelState::Failed { reason } if reason.contains("truncated"))
    );
    assert!(matches!(
        ask(&scene.registry, "other").await,
        Err(EngineError::FailedPrecondition { .. })
    ));
    assert_eq!(ask(&scene.registry, "good").await, Ok(1));
    assert!(matches!(
        scene.registry.get("nobody"),
        Err(EngineError::NotFound { .. })
    ));
    assert!(matches!(
        scene.registry.load("../good").await,
        Err(EngineError::NotFound { .. })
    ));
    assert!(matches!(
        scene.registry.load("empty").await,
        Err(EngineError::FailedPrecondition { .. })
    ));
    assert_eq!(scene.registry.skipped()[0].name, "empty");
    assert_eq!(
        scene.registry.list().len(),
        2,
        "names that do not exist leave nothing behind"
    );
}

#[tokio::test(start_paused = true)]
async fn everything_is_loaded_at_start() {
    let scene = scene(&["a", "b", "c"]);
    scene.registry.load_all().await.unwrap();
    for name in ["a", "b", "c"] {
        assert_eq!(ask(&scene.registry, name).await, Ok(1));
        assert!(scene.registry.get_version(name, "1").is_ok());
        assert!(matches!(
            scene.registry.get_version(name, "2"),
            Err(EngineError::NotFound { .. })
        ));
    }
}

#[tokio::test(start_paused = true)]
async fn a_reload_under_load_fails_no_request() {
    let scene = scene(&["m"]);
    scene.registry.load("m").await.unwrap();
    let asking = {
        let registry = scene.registry.clone();
        tokio::spawn(async move {
            let mut generations = Vec::new();
            for _ in 0..600 {
                generations.push(ask(&registry, "m").await.expect("no request fails"));
            }
            generations
        })
    };
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(scene.registry.reload("m").await.unwrap().generation(), 2);
    let generations = asking.await.unwrap();
    assert!(generations.is_sorted() && generations.contains(&1) && generations.contains(&2));
    assert_eq!(scene.launcher.alive(), 1, "the old worker is gone");
}

#[tokio::test(start_paused = true)]
async fn a_failed_reload_leaves_the_old_generation() {
    let scene = scene(&["m"]);
    scene.registry.load("m").await.unwrap();
    scene.launcher.set(Next::Refuse("the new file is broken"));
    scene.registry.reload("m").await.unwrap_err();
    let status = scene.registry.list()["m"].clone();
    assert_eq!((status.state, status.generation), (ModelState::Ready, 1));
    assert!(status.last_error.unwrap().contains("broken"));
    assert_eq!(ask(&scene.registry, "m").await, Ok(1));
    scene.launcher.set(Next::Work);
    scene.registry.reload("m").await.unwrap();
    assert_eq!(scene.registry.list()["m"].last_error, None);
}

#[tokio::test(start_paused = true)]
async fn an_unload_lets_what_is_open_finish() {
    let scene = scene(&["m"]);
    let handle = scene.registry.load("m").await.unwrap();
    let unloading = {
        let registry = scene.registry.clone();
        tokio::spawn(async move { registry.unload("m").await })
    };
    scene.becomes("m", |s| *s == ModelState::Draining).await;
    assert!(matches!(
        scene.registry.get("m"),
        Err(EngineError::Unavailable { .. })
    ));
    assert_eq!(scene.launcher.alive(), 1, "a handle is still out");
    drop(handle);
    unloading.await.unwrap().unwrap();
    assert_eq!(scene.launcher.alive(), 0);
    assert_eq!(scene.state("m"), ModelState::Unloaded);
    assert!(matches!(
        scene.registry.get("m"),
        Err(EngineError::FailedPrecondition { .. })
    ));
}

#[tokio::test(start_paused = true)]
async fn a_handle_that_is_never_dropped_holds_up_an_unload_for_the_grace_only() {
    let scene = scene(&["m"]);
    let handle = scene.registry.load("m").await.unwrap();
    let began = tokio::time::Instant::now();
    scene.registry.unload("m").await.unwrap();
    assert!(began.elapsed() <= EngineConfig::default().drain_grace + Duration::from_secs(1));
    assert_eq!(scene.launcher.alive(), 0);
    let error = handle.dump(&Ctx::default()).await.unwrap_err();
    assert!(
        matches!(error, EngineError::Unavailable { .. }),
        "{error:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_dead_worker_is_back_within_a_second_plus_load_and_the_other_model_does_not_notice() {
    let scene = scene(&["m", "other"]);
    scene.registry.load("m").await.unwrap();
    let worker = scene.launcher.last();
    scene.registry.load("other").await.unwrap();
    let died = tokio::time::Instant::now();
    worker.die("SIGSEGV");
    scene.becomes("m", |s| *s == ModelState::Loading).await;
    assert!(matches!(
        scene.registry.get("m"),
        Err(EngineError::Unavailable {
            retry_after: Some(_),
            ..
        })
    ));
    assert_eq!(ask(&scene.registry, "other").await, Ok(1));
    scene.becomes("m", |s| *s == ModelState::Ready).await;
    assert!(
        died.elapsed() <= LOAD + Duration::from_secs(1),
        "{:?}",
        died.elapsed()
    );
    assert_eq!(ask(&scene.registry, "m").await, Ok(2));
    assert_eq!(ask(&scene.registry, "other").await, Ok(1));
}

#[tokio::test(start_paused = true)]
async fn a_model_that_keeps_dying_is_withdrawn_until_an_operator_loads_it() {
    let scene = scene(&["m"]);
    scene.registry.load("m").await.unwrap();
    for _ in 0..2 {
        scene.launcher.last().die("SIGABRT");
        scene.becomes("m", |s| *s == ModelState::Loading).await;
        scene.becomes("m", |s| *s == ModelState::Ready).await;
    }
    scene.launcher.last().die("SIGABRT");
    scene
        .becomes(
            "m",
            |s| matches!(s, ModelState::Withdrawn { reason } if reason == "SIGABRT"),
        )
        .await;
    let launches = scene.launcher.launches.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(
        scene.launcher.launches.load(Ordering::Relaxed),
        launches,
        "no further try"
    );
    assert!(matches!(
        scene.registry.get("m"),
        Err(EngineError::FailedPrecondition { .. })
    ));
    scene.registry.load("m").await.unwrap();
    assert_eq!(ask(&scene.registry, "m").await, Ok(4));
}

#[tokio::test(start_paused = true)]
async fn deaths_far_apart_do_not_add_up() {
    let scene = scene(&["m"]);
    scene.registry.load("m").await.unwrap();
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_secs(400)).await;
        scene.launcher.last().die("SIGSEGV");
        scene.becomes("m", |s| *s == ModelState::Loading).await;
        scene.becomes("m", |s| *s == ModelState::Ready).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_file_that_crashes_the_runtime_is_not_tried_twice() {
    let scene = scene(&["m"]);
    scene.launcher.set(Next::Crash("SIGSEGV"));
    let error = scene.registry.load("m").await.unwrap_err();
    assert!(
        matches!(&error, EngineError::FailedPrecondition { message } if message.contains("SIGSEGV")),
        "{error:?}"
    );
    let launches = || scene.launcher.launches.load(Ordering::Relaxed);
    assert_eq!(launches(), 1);
    let error = scene.registry.load("m").await.unwrap_err();
    assert!(
        matches!(&error, EngineError::FailedPrecondition { message } if message.contains("not changed")),
        "{error:?}"
    );
    assert_eq!(launches(), 1, "remembered");
    put(scene.folder.path(), "m", b"another model");
    scene.launcher.set(Next::Work);
    scene.registry.load("m").await.unwrap();
    assert_eq!(launches(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_worker_killed_from_outside_while_loading_is_not_held_against_the_file() {
    let scene = scene(&["m"]);
    scene.launcher.set(Next::Crash("SIGKILL"));
    assert!(matches!(
        scene.registry.load("m").await,
        Err(EngineError::Unavailable { .. })
    ));
    scene.launcher.set(Next::Work);
    scene.registry.load("m").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_restart_that_crashes_at_load_ends_in_failed_without_a_loop() {
    let scene = scene(&["m"]);
    scene.registry.load("m").await.unwrap();
    scene.launcher.set(Next::Crash("SIGSEGV"));
    scene.launcher.last().die("SIGSEGV");
    scene
        .becomes("m", |s| matches!(s, ModelState::Failed { .. }))
        .await;
    let launches = scene.launcher.launches.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(scene.launcher.launches.load(Ordering::Relaxed), launches);
}

#[tokio::test(start_paused = true)]
async fn an_unload_ends_a_load_that_hangs() {
    let scene = scene(&["m"]);
    scene.launcher.set(Next::Hang);
    let loading = {
        let registry = scene.registry.clone();
        tokio::spawn(async move { registry.load("m").await.map(drop) })
    };
    scene.becomes("m", |s| *s == ModelState::Loading).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    scene.registry.unload("m").await.unwrap();
    assert!(matches!(
        loading.await.unwrap(),
        Err(EngineError::Unavailable { .. })
    ));
    assert_eq!(
        (scene.state("m"), scene.launcher.alive()),
        (ModelState::Unloaded, 0)
    );
}

#[tokio::test(start_paused = true)]
async fn a_hundred_reloads_at_once_are_a_few_loads() {
    let scene = scene(&["m"]);
    scene.registry.load("m").await.unwrap();
    let reloads = (0..100).map(|_| scene.registry.reload("m"));
    let generations: Vec<u64> = futures::future::join_all(reloads)
        .await
        .into_iter()
        .map(|r| r.unwrap().generation())
        .collect();
    let launches = scene.launcher.launches.load(Ordering::Relaxed);
    assert!(launches <= 4, "{launches} loads");
    assert_eq!(
        scene.registry.get("m").unwrap().generation(),
        *generations.iter().max().unwrap()
    );
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_leaves_no_worker() {
    let scene = scene(&["a", "b"]);
    scene.registry.load_all().await.unwrap();
    scene.registry.shutdown().await;
    assert_eq!(scene.launcher.alive(), 0);
    assert!(matches!(
        scene.registry.load("a").await,
        Err(EngineError::Unavailable { .. })
    ));
}

#[tokio::test(start_paused = true)]
async fn a_rescan_forgets_what_is_gone_and_keeps_what_serves() {
    let scene = scene(&["gone", "serves"]);
    scene.registry.rescan().await.unwrap();
    scene.registry.load("serves").await.unwrap();
    for name in ["gone", "serves"] {
        std::fs::remove_dir_all(scene.folder.path().join(name)).unwrap();
    }
    put(scene.folder.path(), "new", b"x");
    scene.registry.rescan().await.unwrap();
    assert_eq!(
        scene.registry.list().keys().collect::<Vec<_>>(),
        ["new", "serves"]
    );
    assert_eq!(ask(&scene.registry, "serves").await, Ok(1));
    let error = scene.registry.reload("serves").await.unwrap_err();
    assert!(matches!(error, EngineError::NotFound { .. }), "{error:?}");
    assert_eq!(
        ask(&scene.registry, "serves").await,
        Ok(1),
        "its worker has the files"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// A hundred operations in the order of their acceptance, some while others are under way, workers dying in between: in the end the model is as the last one wants it.
    #[test]
    fn a_storm_ends_in_the_last_accepted_state(ops in prop::collection::vec((0u8..4, 0u64..3000), 1..100)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let scene = scene(&["m"]);
            scene.registry.rescan().await.unwrap();
            let mut tasks = Vec::new();
            let mut last = None;
            for (op, wait) in ops {
                let registry = scene.registry.clone();
                tasks.push(match op {
                    0 | 1 => {
                        last = Some(op != 0);
                        tokio::spawn(async move { if op == 0 { registry.unload("m").await } else { registry.load("m").await.map(drop) } })
                    }
                    2 => {
                        last = Some(true);
                        tokio::spawn(async move { registry.reload("m").await.map(drop) })
                    }
                    _ => {
                        if let Some(worker) = scene.launcher.launched.lock().unwrap().last() {
                            worker.die("SIGKILL");
                        }
                        continue;
                    }
                });
                tokio::task::yield_now().await; // accepted in this order
                if wait > 1500 {
                    tokio::time::sleep(Duration::from_millis(wait)).await;
                }
            }
            for task in tasks {
                let result = task.await.unwrap();
                prop_assert!(matches!(result, Ok(()) | Err(EngineError::Unavailable { .. })), "{:?}", result);
            }
            scene.becomes("m", |s| *s != ModelState::Draining).await;
            match last {
                Some(true) => {
                    // It serves, or kept dying under our hands.
                    scene.becomes("m", |s| matches!(s, ModelState::Ready | ModelState::Withdrawn { .. } | ModelState::Failed { .. })).await;
                    prop_assert!(scene.launcher.alive() <= 1);
                }
                _ => {
                    prop_assert_eq!(scene.state("m"), ModelState::Unloaded);
                    prop_assert_eq!(scene.launcher.alive(), 0);
                }
            }
            Ok(())
        })?;
    }
}
