//! The engine around a worker that the test holds in its hand: batching, lanes, cancellation, deadlines, faults. Paused time.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

use std::{sync::atomic::Ordering, time::Duration};

use introspectd::{
    engine::{
        Ctx, Engine, EngineConfig, EngineError, Job, Lane, ModelHandle, NamedTensor, Outcome,
        PickSpec, RowGroup, RowsDone,
    },
    ipc::spec::VariantSpec,
    tensor::Tensor,
};
use proptest::prelude::*;

mod engine_fake;
use engine_fake::{FakeWorker, PANIC, POISON, STUBBORN, adopt, generation, serve};

const RUN: Duration = Duration::from_millis(10);

fn picks() -> Vec<PickSpec> {
    vec![PickSpec {
        output: "logits".into(),
        ..PickSpec::default()
    }]
}

/// A row of these tokens.
fn row(ids: &[i64]) -> RowGroup {
    rows(&[ids])
}

/// A group of rows of one length.
fn rows(rows: &[&[i64]]) -> RowGroup {
    let flat: Vec<i64> = rows.concat();
    RowGroup {
        inputs: vec![NamedTensor {
            name: "input_ids".into(),
            tensor: Tensor::from_i64(vec![rows.len(), rows[0].len()], &flat).unwrap(),
        }],
        rows: rows.len(),
        length: Some(rows[0].len()),
        picks: picks(),
    }
}

fn job(lane: Lane, groups: Vec<RowGroup>) -> Job {
    Job {
        spec: VariantSpec::plain(),
        lane,
        groups,
    }
}

/// Submits one row and waits for its `[sum, length]`.
async fn ask(
    handle: &ModelHandle,
    lane: Lane,
    ids: &[i64],
    ctx: &Ctx,
) -> Result<Vec<f32>, EngineError> {
    let done = handle
        .submit(job(lane, vec![row(ids)]), ctx)
        .await?
        .collect()
        .await?;
    Ok(values(&done[0]))
}

fn values(done: &RowsDone) -> Vec<f32> {
    done.tensors[0].to_f32().unwrap().into_owned()
}

fn expected(ids: &[i64]) -> Vec<f32> {
    vec![ids.iter().sum::<i64>() as f32, ids.len() as f32]
}

fn ctx() -> Ctx {
    Ctx::new("test", None)
}

fn within(time: Duration) -> Ctx {
    Ctx::new(
        "test",
        Some((tokio::time::Instant::now() + time).into_std()),
    )
}

/// Waits on the paused clock until it holds.
async fn eventually(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..10_000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("never came true: {what}");
}

#[tokio::test(start_paused = true)]
async fn each_answer_is_its_own_and_padding_never_shows() {
    let worker = FakeWorker::new(RUN);
    let (engine, handle) = serve(EngineConfig::default(), &worker).await;
    let asked: Vec<Vec<i64>> = (0..200)
        .map(|i| (0..=(i * 7) % 50).map(|t| i + t + 1).collect())
        .collect();
    let ctx = ctx();
    let answers = futures::future::join_all(
        asked
            .iter()
            .map(|ids| ask(&handle, Lane::Predict, ids, &ctx)),
    )
    .await;
    for (ids, answer) in asked.iter().zip(answers) {
        assert_eq!(answer.unwrap(), expected(ids));
    }
    let runs = worker.seen();
    assert!(runs.len() < 40, "{} runs for 200 requests", runs.len());
    assert!(
        runs.iter().all(|r| r.shape[0] * r.shape[1] <= 2048),
        "padded tokens"
    );
    assert_eq!(engine.buffers().used(), 0);
    assert_eq!(
        (handle.counts().open(), handle.counts().ended(Outcome::Done)),
        (0, 200)
    );
}

#[tokio::test(start_paused = true)]
async fn a_group_larger_than_a_run_comes_in_parts_that_cover_it() {
    let worker = FakeWorker::new(RUN);
    let (_engine, handle) = serve(EngineConfig::default(), &worker).await;
    let all: Vec<Vec<i64>> = (0..100).map(|i| vec![i + 1; 100]).collect();
    let group = rows(&all.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let done = handle
        .submit(job(Lane::Bulk, vec![group]), &ctx())
        .await
        .unwrap()
        .collect()
        .await
        .unwrap();
    assert!(done.len() >= 5, "2048 tokens hold 20 rows of 100");
    let mut next = 0;
    for part in &done {
        assert_eq!(part.rows.start, next);
        next = part.rows.end;
        let found = values(part);
        for (at, row) in part.rows.clone().enumerate() {
            assert_eq!(found[2 * at..2 * at + 2], expected(&all[row]));
        }
        assert_eq!(
            part.tensors[0].shape(),
            [part.rows.len(), 2],
            "the batch axis stays in every part"
        );
    }
    assert_eq!(next, 100);
}

#[tokio::test(start_paused = true)]
async fn runs_of_heavy_graphs_are_cut_to_the_time_that_others_wait() {
    // 512 tokens, the first run, take a second: 204 of them would take 400 ms.
    let worker = FakeWorker::new(Duration::from_secs(1));
    let (_engine, handle) = serve(EngineConfig::default(), &worker).await;
    let all = vec![vec![1; 32]; 64];
    let group = rows(&all.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let sweep = handle.submit(job(Lane::Bulk, vec![group]), &ctx()).await;
    sweep.unwrap().collect().await.unwrap();
    let sizes: Vec<usize> = worker.seen().iter().map(|run| run.rows.len()).collect();
    assert_eq!((sizes[0], sizes[1]), (512 / 32, 204 / 32), "{sizes:?}");
    let least = EngineConfig::default().batch_tokens / 16 / 32;
    let mut later = sizes[..sizes.len() - 1].iter();
    assert!(later.all(|rows| *rows >= least), "{sizes:?}");
}

#[tokio::test(start_paused = true)]
async fn a_predict_waits_for_at_most_one_bulk_run() {
    let worker = FakeWorker::new(RUN);
    let (_engine, handle) = serve(EngineConfig::default(), &worker).await;
    let sweep: Vec<RowGroup> = (0..100).map(|_| row(&[7; 2048])).collect();
    let mut bulk = handle.submit(job(Lane::Bulk, sweep), &ctx()).await.unwrap();
    bulk.next().await.unwrap().unwrap();
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(3)).await;
        let asked = tokio::time::Instant::now();
        ask(&handle, Lane::Predict, &[1, 2, 3], &ctx())
            .await
            .unwrap();
        assert!(
            asked.elapsed() <= 2 * RUN + Duration::from_millis(2),
            "{:?}",
            asked.elapsed()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn models_share_the_slots_of_a_device() {
    let (one, two) = (FakeWorker::new(RUN), FakeWorker::new(RUN));
    let (engine, first) = serve(EngineConfig::default(), &one).await;
    let second = adopt(&engine, &two, "second").await;
    let ctx = ctx();
    let asks = (0..10)
        .flat_map(|_| [&first, &second])
        .map(|handle| ask(handle, Lane::Predict, &[1; 2048], &ctx));
    futures::future::join_all(asks).await;
    let mut starts: Vec<_> = one
        .seen()
        .into_iter()
        .chain(two.seen())
        .map(|r| r.at)
        .collect();
    starts.sort();
    assert_eq!(starts.len(), 20);
    assert!(
        starts.windows(2).all(|w| w[1] - w[0] >= RUN),
        "one run at a time"
    );
}

#[tokio::test(start_paused = true)]
async fn a_deadline_in_the_queue_is_kept_and_the_row_never_runs() {
    let worker = FakeWorker::new(Duration::from_secs(1));
    let (_engine, handle) = serve(EngineConfig::default(), &worker).await;
    let ctx = ctx();
    let running = ask(&handle, Lane::Predict, &[1], &ctx);
    let waiting = async {
        let asked = tokio::time::Instant::now();
        let short = within(Duration::from_millis(100));
        let error = ask(&handle, Lane::Predict, &[42], &short)
            .await
            .unwrap_err();
        (error, asked.elapsed())
    };
    let (first, (error, took)) = tokio::join!(running, waiting);
    first.unwrap();
    assert_eq!(error, EngineError::DeadlineExceeded);
    assert!(took < Duration::from_millis(150), "{took:?}");
    ask(&handle, Lane::Predict, &[2], &ctx).await.unwrap();
    assert!(!worker.ran(42));
    assert_eq!(handle.counts().ended(Outcome::Expired), 1);
}

#[tokio::test(start_paused = true)]
async fn a_deadline_in_a_run_terminates_it_and_frees_the_slot() {
    let worker = FakeWorker::new(Duration::from_secs(60));
    let (_engine, handle) = serve(EngineConfig::default(), &worker).await;
    let asked = tokio::time::Instant::now();
    let error = ask(
        &handle,
        Lane::Predict,
        &[1],
        &within(Duration::from_millis(500)),
    )
    .await
    .unwrap_err();
    assert_eq!(error, EngineError::DeadlineExceeded);
    assert!(
        asked.elapsed() < Duration::from_millis(550),
        "{:?}",
        asked.elapsed()
    );
    eventually("the run is cancelled", || {
        worker.cancels.load(Ordering::Relaxed) == 1
    })
    .await;
    let error = ask(
        &handle,
        Lane::Predict,
        &[2],
        &within(Duration::from_millis(500)),
    )
    .await
    .unwrap_err();
    assert_eq!(error, EngineError::DeadlineExceeded);
    assert!(worker.ran(2), "the slot is free again");
}

#[tokio::test(start_paused = true)]
async fn one_of_eight_cancelled_leaves_seven_right_answers() {
    let worker = FakeWorker::new(RUN);
    let (_engine, handle) = serve(EngineConfig::default(), &worker).await;
    let contexts: Vec<Ctx> = (0..9).map(|_| ctx()).collect();
    let asks = (0..9).map(|i| {
        let (handle, ctx) = (handle.clone(), contexts[i].clone());
        tokio::spawn(async move { ask(&handle, Lane::Predict, &[i as i64 + 1; 5], &ctx).await })
    });
    let asks: Vec<_> = asks.collect();
    eventually("the second run is under way", || worker.seen().len() == 2).await;
    contexts[4].cancel.cancel();
    for (i, asked) in asks.into_iter().enumerate() {
        let answer = asked.await.unwrap();
        if i == 4 {
            assert_eq!(answer.unwrap_err(), EngineError::Cancelled);
        } else {
            assert_eq!(answer.unwrap(), expected(&[i as i64 + 1; 5]));
        }
    }
    assert_eq!(
        worker.cancels.load(Ordering::Relaxed),
        0,
        "the run had others in it"
    );
    assert_eq!(worker.seen().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_run_that_nobody_wants_is_cancelled() {
    let worker = FakeWorker::new(Duration::from_secs(60));
    let (engine, handle) = serve(EngineConfig::default(), &worker).await;
    let stream = handle
        .submit(job(Lane::Bulk, vec![row(&[1])]), &ctx())
        .await
        .unwrap();
    eventually("it runs", || worker.seen().len() == 1).await;
    drop(stream);
    eventually("it is cancelled", || {
        worker.cancels.load(Ordering::Relaxed) == 1
    })
    .await;
    eventually("everything is given back", || {
        engine.buffers().used() == 0 && handle.counts().open() == 0
    })
    .await;
    assert_eq!(handle.counts().ended(Outcome::Cancelled), 1);
}

#[tokio::test(start_paused = true)]
async fn a_run_that_ignores_its_cancellation_costs_the_worker() {
    let worker = FakeWorker::new(RUN);
    let (_engine, handle) = serve(EngineConfig::default(), &worker).await;
    let stream = handle
        .submit(job(Lane::Bulk, vec![row(&[STUBBORN])]), &ctx())
        .await
        .unwrap();
    eventually("it runs", || worker.seen().len() == 1).await;
    let began = tokio::time::Instant::now();
    drop(stream);
    use introspectd::engine::backend::Backend as _;
    let cause = worker.died().await;
    assert!(cause.contains("2000 ms"), "{cause}");
    assert!(began.elapsed() < Duration::from_millis(2100));
}

#[tokio::test(start_paused = true)]
async fn a_row_that_the_model_refuses_fails_alone() {
    let worker = FakeWorker::new(RUN);
    let (_engine, handle) = serve(EngineConfig::default(), &worker).await;
    let ctx = ctx();
    let mut asked: Vec<Vec<i64>> = (0..12).map(|i| vec![i + 1; 5]).collect();
    asked[7] = vec![POISON; 5];
    let answers = futures::future::join_all(
        asked
            .iter()
            .map(|ids| ask(&handle, Lane::Predict, ids, &ctx)),
    )
    .await;
    for (i, answer) in answers.into_iter().enumerate() {
        if i == 7 {
            assert!(
                matches!(answer, Err(EngineError::InvalidArgument { .. })),
                "{answer:?}"
            );
        } else {
            assert_eq!(answer.unwrap(), expected(&asked[i]));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_run_fails_that_run_only() {
    let worker = FakeWorker::new(RUN);
    let (_engine, handle) = serve(EngineConfig::default(), &worker).await;
    let error = ask(&handle, Lane::Predict, &[PANIC], &ctx())
        .await
        .unwrap_err();
    assert!(matches!(error, EngineError::Internal { .. }));
    assert_eq!(
        ask(&handle, Lane::Predict, &[5], &ctx()).await.unwrap(),
        expected(&[5]),
        "the slot is free again"
    );
}

#[tokio::test(start_paused = true)]
async fn a_death_fails_what_ran_and_tells_the_rest_to_come_back() {
    let worker = FakeWorker::new(Duration::from_secs(1));
    let engine = Engine::new(EngineConfig::default());
    let generation = generation(&engine, &worker, "fake").await;
    let (handle, _drained) = ModelHandle::new(generation.clone());
    let other_worker = FakeWorker::new(RUN);
    let other = adopt(&engine, &other_worker, "other").await;
    let ctx = ctx();
    let scene = async {
        eventually("it runs", || worker.seen().len() == 1).await;
        worker.die("SIGSEGV");
        generation.died("SIGSEGV");
    };
    let (ran, queued, elsewhere, ()) = tokio::join!(
        ask(&handle, Lane::Predict, &[1], &ctx),
        ask(&handle, Lane::Predict, &[2], &ctx),
        ask(&other, Lane::Predict, &[3], &ctx),
        scene
    );
    match ran.unwrap_err() {
        EngineError::WorkerDied { model, cause } => {
            assert_eq!((model.as_str(), cause.as_str()), ("fake", "SIGSEGV"))
        }
        other => panic!("{other:?}"),
    }
    assert!(
        matches!(
            queued,
            Err(EngineError::Unavailable {
                retry_after: Some(_),
                ..
            })
        ),
        "{queued:?}"
    );
    assert_eq!(elsewhere.unwrap(), expected(&[3]));
    assert!(matches!(
        ask(&handle, Lane::Predict, &[4], &ctx).await,
        Err(EngineError::Unavailable { .. })
    ));
    assert_eq!(handle.counts().open(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_refuses_at_once_with_advice() {
    let worker = FakeWorker::new(Duration::from_secs(1));
    let config = EngineConfig {
        queue_rows: 10,
        ..EngineConfig::default()
    };
    let (_engine, handle) = serve(config, &worker).await;
    let mut streams = Vec::new();
    for _ in 0..11 {
        streams.push(
            handle
                .submit(job(Lane::Bulk, vec![row(&[1])]), &ctx())
                .await
                .unwrap(),
        );
        eventually("the first one runs", || !worker.seen().is_empty()).await;
    }
    let asked = tokio::time::Instant::now();
    let refused = handle
        .submit(job(Lane::Bulk, vec![row(&[1])]), &ctx())
        .await
        .unwrap_err();
    assert!(
        matches!(
            refused,
            EngineError::ResourceExhausted {
                retry_after: Some(_),
                ..
            }
        ),
        "{refused:?}"
    );
    assert!(asked.elapsed() < Duration::from_millis(10));
    let never = handle
        .submit(
            job(Lane::Bulk, (0..11).map(|_| row(&[1])).collect()),
            &ctx(),
        )
        .await
        .unwrap_err();
    assert!(
        matches!(
            never,
            EngineError::ResourceExhausted {
                retry_after: None,
                ..
            }
        ),
        "{never:?}"
    );
    assert_eq!(handle.counts().ended(Outcome::Shed), 2);
    drop(streams.split_off(5));
    handle
        .submit(job(Lane::Bulk, vec![row(&[1])]), &ctx())
        .await
        .expect("those who left made room");
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_stops_holds_up_itself_only() {
    let worker = FakeWorker::new(RUN);
    let config = EngineConfig {
        window_bytes: 100,
        ..EngineConfig::default()
    };
    let (_engine, handle) = serve(config, &worker).await;
    let many = (0..100).map(|_| row(&[9; 1500])).collect();
    let mut stalled = handle.submit(job(Lane::Bulk, many), &ctx()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let before = worker.seen().iter().filter(|r| r.rows[0][0] == 9).count();
    assert!(
        (1..=100 / 8 + 1).contains(&before),
        "{before} runs of 8 bytes each for a window of 100"
    );
    ask(&handle, Lane::Bulk, &[1; 5], &ctx()).await.unwrap();
    let mut rows = 0;
    while let Some(done) = stalled.next().await {
        rows += done.unwrap().rows.len();
    }
    assert_eq!(rows, 100, "it goes on when it is read");
}

#[tokio::test(start_paused = true)]
async fn an_answer_too_large_to_keep_is_refused_before_it_runs() {
    let worker = FakeWorker::new(RUN);
    let config = EngineConfig {
        buffer_bytes: 4000,
        ..EngineConfig::default()
    };
    let (engine, handle) = serve(config, &worker).await;
    let mut wide = row(&[1; 2000]);
    wide.picks = vec![PickSpec {
        output: "value:x".into(),
        ..PickSpec::default()
    }];
    let job = Job {
        spec: VariantSpec::exposing(["value:x"]),
        lane: Lane::Interactive,
        groups: vec![wide],
    };
    let error = handle.submit(job, &ctx()).await.unwrap_err();
    assert!(
        matches!(&error, EngineError::ResourceExhausted { retry_after: None, message } if message.contains("8000")),
        "{error:?}"
    );
    assert!(worker.seen().is_empty());
    assert_eq!(engine.buffers().used(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_variant_is_built_once_for_all_who_ask_and_outlives_its_first_caller() {
    let worker = FakeWorker::new(RUN);
    let (_engine, handle) = serve(EngineConfig::default(), &worker).await;
    assert_eq!(worker.builds.load(Ordering::Relaxed), 1, "the plain graph");
    let exposing = || {
        let mut group = row(&[1, 2, 3]);
        group.picks[0].output = "value:x".into();
        Job {
            spec: VariantSpec::exposing(["value:x"]),
            lane: Lane::Interactive,
            groups: vec![group],
        }
    };
    let impatient = within(Duration::from_millis(20));
    let ctx = ctx();
    let patient = (0..20).map(|_| async { handle.submit(exposing(), &ctx).await?.collect().await });
    let (gave_up, answers) = tokio::join!(
        handle.submit(exposing(), &impatient),
        futures::future::join_all(patient)
    );
    assert_eq!(gave_up.unwrap_err(), EngineError::DeadlineExceeded);
    for answer in answers {
        let answer = answer.unwrap();
        assert_eq!(values(&answer[0]), [1.0, 2.0, 3.0]);
        assert!(answer[0].timings.build >= Duration::from_millis(100));
    }
    assert_eq!(worker.builds.load(Ordering::Relaxed), 2);
}

#[tokio::test(start_paused = true)]
async fn a_build_that_fails_says_so_to_all_and_is_tried_again() {
    let worker = FakeWorker::new(RUN);
    let (_engine, handle) = serve(EngineConfig::default(), &worker).await;
    worker.fail_builds.store(true, Ordering::Relaxed);
    let exposing = || Job {
        spec: VariantSpec::exposing(["value:x"]),
        lane: Lane::Interactive,
        groups: vec![row(&[1])],
    };
    let ctx = ctx();
    let answers = futures::future::join_all((0..3).map(|_| handle.submit(exposing(), &ctx))).await;
    assert!(
        answers
            .iter()
            .all(|a| matches!(a, Err(EngineError::FailedPrecondition { .. })))
    );
    worker.fail_builds.store(false, Ordering::Relaxed);
    handle
        .submit(exposing(), &ctx)
        .await
        .unwrap()
        .collect()
        .await
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn wrong_requests_name_their_field_and_cost_nothing() {
    let worker = FakeWorker::new(RUN);
    let (engine, handle) = serve(EngineConfig::default(), &worker).await;
    let wrong: Vec<(&str, Vec<RowGroup>)> = vec![
        ("groups", vec![]),
        (
            "groups[0].inputs",
            vec![RowGroup {
                rows: 0,
                ..row(&[1])
            }],
        ),
        (
            "groups[1].inputs.input_ids",
            vec![row(&[1]), row(&[100_000])],
        ),
        ("groups[0].inputs.input_ids", vec![row(&[-1])]),
        ("groups[0].inputs.length", vec![row(&[1; 5000])]),
        (
            "groups[0].inputs.input_ids",
            vec![RowGroup {
                rows: 2,
                ..row(&[1])
            }],
        ),
        (
            "groups[0].inputs.input_ids",
            vec![RowGroup {
                inputs: vec![],
                ..row(&[1])
            }],
        ),
        (
            "groups[0].picks[0]",
            vec![RowGroup {
                picks: vec![],
                ..row(&[1])
            }],
        ),
        (
            "groups[0].picks[0]",
            vec![RowGroup {
                picks: vec![PickSpec {
                    output: "nothing".into(),
                    ..PickSpec::default()
                }],
                ..row(&[1])
            }],
        ),
        (
            "groups[0].picks[0]",
            vec![RowGroup {
                picks: vec![PickSpec {
                    heads: vec![1],
                    ..picks()[0].clone()
                }],
                ..row(&[1])
            }],
        ),
    ];
    for (path, groups) in wrong {
        match handle
            .submit(job(Lane::Predict, groups), &ctx())
            .await
            .unwrap_err()
        {
            EngineError::InvalidArgument { field, message } => {
                assert_eq!(field, path, "{message}");
                assert!(message.len() < 1024);
            }
            other => panic!("{path}: {other:?}"),
        }
    }
    assert!(worker.seen().is_empty());
    assert_eq!((engine.buffers().used(), handle.counts().open()), (0, 0));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Requests that end at random moments in every way there is: each reaches exactly one end, every answer is right, and nothing stays behind.
    #[test]
    fn every_request_ends_once(fates in prop::collection::vec((0u8..5, 1usize..60, 0u64..120, 1usize..4), 1..400)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let worker = FakeWorker::new(RUN);
            let (engine, handle) = serve(EngineConfig::default(), &worker).await;
            let count = fates.len();
            let tasks: Vec<_> = fates.into_iter().enumerate().map(|(i, (fate, length, millis, groups))| {
                let handle = handle.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(millis / 2)).await;
                    let ids = vec![i as i64 + 1; length];
                    let lane = Lane::ALL[i % 3];
                    let wanted = Duration::from_millis(millis);
                    let ctx = if fate == 1 { within(wanted) } else { ctx() };
                    let Ok(mut stream) = handle.submit(job(lane, vec![row(&ids); groups]), &ctx).await else {
                        return;
                    };
                    match fate {
                        2 => {
                            let cancel = ctx.cancel.clone();
                            tokio::spawn(async move { tokio::time::sleep(wanted).await; cancel.cancel() });
                        }
                        3 => {
                            let _ = tokio::time::timeout(wanted, stream.next()).await;
                            return; // dropped
                        }
                        _ => {}
                    }
                    let mut done = 0;
                    while let Some(answer) = stream.next().await {
                        match answer {
                            Ok(answer) => {
                                assert_eq!(values(&answer)[..2], expected(&ids)[..]);
                                done += 1;
                            }
                            Err(error) => {
                                assert_eq!(fate, if error == EngineError::DeadlineExceeded { 1 } else { 2 });
                                assert!(stream.next().await.is_none(), "an error is the end");
                                return;
                            }
                        }
                    }
                    assert_eq!(done, groups);
                })
            }).collect();
            for task in tasks {
                task.await.unwrap();
            }
            eventually("everything is given back", || engine.buffers().used() == 0 && handle.counts().open() == 0).await;
            let ended: u64 = [Outcome::Done, Outcome::Failed, Outcome::Cancelled, Outcome::Expired, Outcome::Shed]
                .into_iter().map(|o| handle.counts().ended(o)).sum();
            assert_eq!(ended, count as u64);
            assert_eq!(handle.counts().ended(Outcome::Failed), 0);
            assert_eq!(ask(&handle, Lane::Predict, &[5], &ctx()).await.unwrap(), expected(&[5]), "the slot is free");
        });
    }
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_cancels_leave_nothing_behind() {
    let worker = FakeWorker::new(RUN);
    let (engine, handle) = serve(EngineConfig::default(), &worker).await;
    let tasks: Vec<_> = (0..10_000u64)
        .map(|i| {
            let handle = handle.clone();
            tokio::spawn(async move {
                let asked = ask(
                    &handle,
                    Lane::ALL[(i % 3) as usize],
                    &[i as i64 % 1000 + 1; 3],
                    &ctx(),
                )
                .await;
                asked.is_ok()
            })
        })
        .collect();
    tokio::task::yield_now().await;
    for (i, task) in tasks.iter().enumerate() {
        if i % 7 == 0 {
            tokio::time::sleep(Duration::from_micros(100)).await;
        }
        if i % 2 == 0 {
            task.abort();
        }
    }
    futures::future::join_all(tasks).await;
    eventually("everything is given back", || {
        engine.buffers().used() == 0 && handle.counts().open() == 0
    })
    .await;
    let ended: u64 = [
        Outcome::Done,
        Outcome::Failed,
        Outcome::Cancelled,
        Outcome::Expired,
        Outcome::Shed,
    ]
    .into_iter()
    .map(|o| handle.counts().ended(o))
    .sum();
    assert_eq!(ended, 10_000);
}
