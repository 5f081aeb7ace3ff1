//! The engine with the real worker and the fixture models: rows share runs and stay what they are, captures, early exit, death in mid-run.

#![allow(clippy::wildcard_enum_match_arm)] // a test panics on what it does not expect

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use introspectd::{
    engine::{
        Ctx, Engine, EngineConfig, EngineError, Job, Lane, ModelHandle, NamedTensor, PickSpec,
        ProcessLauncher, RowGroup, RowsDone, WorkerCommand,
    },
    ipc::{
        info::InputRole,
        spec::{LoadOptions, VariantSpec},
    },
    model::{ModelSettings, ModelState, Registry, Repository},
    tensor::Tensor,
};
use rustix::process::{Pid, Signal, kill_process};

/// Largest deviation of the same operators on another batch, relative to the largest value (`Close` of the conventions).
const CLOSE: f32 = 1e-5;
/// As above, for other operators of the same mathematics (`Rewritten`).
const REWRITTEN: f32 = 1e-4;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models")
}

fn registry(config: EngineConfig) -> Registry {
    let launcher = ProcessLauncher {
        command: WorkerCommand::of(env!("CARGO_BIN_EXE_introspectd")),
        options: LoadOptions {
            intra_threads: 1,
            ..LoadOptions::default()
        },
        config: config.clone(),
    };
    let repository = Repository::open(fixtures()).unwrap();
    Registry::new(
        Engine::new(config),
        repository,
        Arc::new(launcher),
        ModelSettings::default(),
    )
}

async fn load(name: &str) -> (Registry, ModelHandle) {
    let registry = registry(EngineConfig::default());
    let handle = registry
        .load(name)
        .await
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    (registry, handle)
}

/// Some tokens of a length, never special ones.
fn ids(handle: &ModelHandle, length: usize) -> Vec<i64> {
    let vocab = handle.info().dims.vocab.expect("a text model") as i64;
    (0..length as i64)
        .map(|i| 5 + (i * 7 + length as i64 * 3) % (vocab - 5))
        .collect()
}

fn group(handle: &ModelHandle, length: usize, outputs: &[&str]) -> RowGroup {
    let input = handle.info().input(InputRole::TokenIds).expect("token ids");
    RowGroup {
        inputs: vec![NamedTensor {
            name: input.name.clone(),
            tensor: Tensor::from_i64(vec![1, length], &ids(handle, length)).unwrap(),
        }],
        rows: 1,
        length: Some(length),
        picks: outputs
            .iter()
            .map(|output| PickSpec {
                output: (*output).to_owned(),
                ..PickSpec::default()
            })
            .collect(),
    }
}

async fn run(
    handle: &ModelHandle,
    spec: VariantSpec,
    groups: Vec<RowGroup>,
) -> Result<Vec<RowsDone>, EngineError> {
    let job = Job {
        spec,
        lane: Lane::Interactive,
        groups,
    };
    handle.submit(job, &Ctx::default()).await?.collect().await
}

/// Largest difference over the largest value.
fn deviation(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.shape(), b.shape());
    let (a, b) = (a.to_f32().unwrap(), b.to_f32().unwrap());
    let largest = a.iter().fold(f32::MIN_POSITIVE, |m, v| m.max(v.abs()));
    a.iter()
        .zip(b.iter())
        .fold(0.0f32, |m, (a, b)| m.max((a - b).abs()))
        / largest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_in_a_batch_gives_what_it_gives_alone() {
    for name in [
        "bert.legacy14",
        "gpt2.dynamo20",
        "distilbert.dynamo20",
        "encoder_layer.dynamo20",
    ] {
        let (_registry, handle) = load(name).await;
        let main = handle.info().main_output.clone();
        let lengths = [3, 9, 5, 12, 3, 7, 1, 9];
        let mut alone = Vec::new();
        for length in lengths {
            alone.extend(
                run(
                    &handle,
                    VariantSpec::plain(),
                    vec![group(&handle, length, &[&main])],
                )
                .await
                .unwrap(),
            );
        }
        let groups = lengths
            .iter()
            .map(|length| group(&handle, *length, &[&main]))
            .collect();
        let together = run(&handle, VariantSpec::plain(), groups).await.unwrap();
        assert_eq!(together.len(), lengths.len());
        for (alone, together) in alone.iter().zip(&together) {
            let found = deviation(&alone.tensors[0], &together.tensors[0]);
            assert!(found <= CLOSE, "{name}: {found}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn captures_share_a_variant_and_agree_with_the_plain_graph() {
    let (_registry, handle) = load("bert.legacy14").await;
    let main = handle.info().main_output.clone();
    let plain = run(
        &handle,
        VariantSpec::plain(),
        vec![group(&handle, 7, &[&main])],
    )
    .await
    .unwrap();
    for hook in ["blocks.0.attn.hook_pattern", "blocks.1.hook_resid_post"] {
        let done = run(
            &handle,
            VariantSpec::exposing([hook]),
            vec![group(&handle, 7, &[hook, &main])],
        )
        .await
        .unwrap();
        let found = deviation(&plain[0].tensors[0], &done[0].tensors[1]);
        assert!(found <= REWRITTEN, "{found}");
        if hook.ends_with("pattern") {
            let pattern = &done[0].tensors[0];
            assert_eq!(pattern.shape()[1..], [7, 7]);
            for row in pattern.to_f32().unwrap().chunks(7) {
                assert!((row.iter().sum::<f32>() - 1.0).abs() <= REWRITTEN);
            }
        }
    }
    let again = run(
        &handle,
        VariantSpec::exposing(["blocks.1.attn.hook_pattern"]),
        vec![group(&handle, 7, &["blocks.1.attn.hook_pattern"])],
    )
    .await
    .unwrap();
    assert_eq!(
        again[0].timings.build.as_millis(),
        0,
        "the variant was there"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_exit_gives_the_same_and_lacks_the_rest() {
    let (_registry, handle) = load("gpt2.legacy14").await;
    let hook = "blocks.0.hook_resid_post";
    let whole = run(
        &handle,
        VariantSpec::exposing([hook]),
        vec![group(&handle, 6, &[hook])],
    )
    .await
    .unwrap();
    let early = VariantSpec {
        keep_outputs: false,
        ..VariantSpec::exposing([hook])
    };
    let cut = run(&handle, early.clone(), vec![group(&handle, 6, &[hook])])
        .await
        .unwrap();
    assert!(deviation(&whole[0].tensors[0], &cut[0].tensors[0]) <= CLOSE);
    let main = handle.info().main_output.clone();
    let error = run(&handle, early, vec![group(&handle, 6, &[&main])])
        .await
        .unwrap_err();
    assert!(
        matches!(error, EngineError::InvalidArgument { .. }),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hook_point_that_is_not_there_is_refused_and_the_worker_lives() {
    let (_registry, handle) = load("bert.legacy14").await;
    for hook in ["blocks.99.hook_resid_post", "value:/nothing"] {
        let error = run(
            &handle,
            VariantSpec::exposing([hook]),
            vec![group(&handle, 3, &[hook])],
        )
        .await
        .unwrap_err();
        assert!(
            matches!(
                error,
                EngineError::InvalidArgument { .. } | EngineError::FailedPrecondition { .. }
            ),
            "{error:?}"
        );
    }
    let main = handle.info().main_output.clone();
    run(
        &handle,
        VariantSpec::plain(),
        vec![group(&handle, 3, &[&main])],
    )
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_killed_in_mid_run_is_back_and_the_other_model_does_not_notice() {
    let registry = registry(EngineConfig::default());
    let (bert, gpt2) = tokio::join!(
        registry.load("bert.legacy14"),
        registry.load("gpt2.legacy14")
    );
    let (bert, gpt2) = (bert.unwrap(), gpt2.unwrap());
    let asking = |handle: ModelHandle| {
        tokio::spawn(async move {
            let main = handle.info().main_output.clone();
            loop {
                let groups = (0..64)
                    .map(|i| group(&handle, 4 + i % 9, &[&main]))
                    .collect();
                run(&handle, VariantSpec::plain(), groups).await?;
            }
        })
    };
    let victim: tokio::task::JoinHandle<Result<(), EngineError>> = asking(bert.clone());
    let witness: tokio::task::JoinHandle<Result<(), EngineError>> = asking(gpt2);
    let pid = Pid::from_raw(i32::try_from(bert.pid().expect("it lives")).unwrap()).unwrap();
    let killed = Instant::now();
    kill_process(pid, Signal::SEGV).unwrap();
    let error = victim.await.unwrap().unwrap_err();
    // By its socket, not by its heartbeats.
    assert!(killed.elapsed() < Duration::from_secs(3));
    match &error {
        EngineError::WorkerDied { model, cause } => assert_eq!(
            (model.as_str(), cause.as_str()),
            ("bert.legacy14", "SIGSEGV")
        ),
        // The moment was between two runs.
        EngineError::Unavailable { message, .. } => {
            assert!(message.contains("SIGSEGV"), "{message}")
        }
        other => panic!("{other:?}"),
    }
    let mut states = registry.subscribe();
    let back = states.wait_for(|s| {
        s["bert.legacy14"].state == ModelState::Ready && s["bert.legacy14"].generation == 2
    });
    tokio::time::timeout(Duration::from_secs(60), back)
        .await
        .expect("it comes back")
        .unwrap();
    let again = registry.get("bert.legacy14").unwrap();
    let main = again.info().main_output.clone();
    run(
        &again,
        VariantSpec::plain(),
        vec![group(&again, 5, &[&main])],
    )
    .await
    .unwrap();
    assert!(!witness.is_finished(), "the other model serves on");
    witness.abort();
    assert_eq!(registry.list()["gpt2.legacy14"].generation, 1);
    drop((bert, again));
    registry.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_model_takes_raw_tensors() {
    let (_registry, handle) = load("vit.legacy14").await;
    let input = &handle.info().inputs[0];
    let shape: Vec<usize> = input.dims.iter().map(|d| d.unwrap_or(1)).collect();
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|i| (i % 17) as f32 / 17.0 - 0.5)
        .collect();
    let main = handle.info().main_output.clone();
    let image = || RowGroup {
        inputs: vec![NamedTensor {
            name: input.name.clone(),
            tensor: Tensor::from_f32(shape.clone(), &values).unwrap(),
        }],
        rows: 1,
        length: None,
        picks: vec![PickSpec {
            output: main.clone(),
            ..PickSpec::default()
        }],
    };
    let alone = run(&handle, VariantSpec::plain(), vec![image()])
        .await
        .unwrap();
    let together = run(
        &handle,
        VariantSpec::plain(),
        vec![image(), image(), image()],
    )
    .await
    .unwrap();
    for done in &together {
        assert!(deviation(&alone[0].tensors[0], &done.tensors[0]) <= CLOSE);
    }
}
