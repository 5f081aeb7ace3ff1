//! The real worker with the models of the fixtures: load, plain runs, exposed runs, picks.

#[path = "support/worker.rs"]
mod support;

use introspectd::{
    ipc::{
        info::Axis,
        spec::VariantSpec,
        wire::{Failure, Pick},
    },
    tensor::Tensor,
};
use support::{Worker, everything, fixtures, inputs, kind};

/// Same operators on the same machine, another graph around them: relative to the largest value.
const REWRITTEN: f32 = 1e-4;

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.shape(), b.shape());
    let (a, b) = (a.to_f32().unwrap(), b.to_f32().unwrap());
    let largest = b.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    let worst = a
        .iter()
        .zip(b.iter())
        .fold(0f32, |m, (x, y)| m.max((x - y).abs()));
    worst / largest
}

#[tokio::test]
async fn every_fixture_loads_and_runs_plain_and_exposed_with_equal_outputs() {
    for model in fixtures() {
        let (worker, info) = Worker::with(&model).await;
        assert!(
            !info.runtime.is_empty() && info.fingerprint.len() == 64,
            "{model}"
        );
        let failed: Vec<_> = info
            .certificate
            .checks
            .iter()
            .filter(|c| !c.passed)
            .collect();
        assert!(failed.is_empty(), "{model}: {failed:?}");
        assert!(
            info.hooks.is_empty() || !info.certificate.checks.is_empty(),
            "{model}: what is offered was checked"
        );
        let (rows, length) = (
            info.fixed_batch.unwrap_or(2),
            info.fixed_length.unwrap_or(9),
        );
        let given = inputs(&info, rows, length);

        let (outputs, _) = worker.build(1, &VariantSpec::plain()).await.unwrap();
        assert_eq!(outputs, info.outputs, "{model}");
        let (plain, ran) = worker
            .run(1, &given, everything(&outputs, rows as u32))
            .await
            .unwrap_or_else(|f| panic!("{model}: {}", f.message));
        assert!(
            ran.run_micros > 0 && ran.non_finite_picks.is_empty(),
            "{model}"
        );

        let all = VariantSpec::exposing(info.hooks.iter().map(|h| h.name.clone()));
        let (exposed, _) = worker
            .build(2, &all)
            .await
            .unwrap_or_else(|f| panic!("{model}: {}", f.message));
        assert_eq!(
            exposed.len(),
            info.outputs.len() + info.hooks.len(),
            "{model}"
        );
        let (shown, _) = worker
            .run(2, &given, everything(&exposed, rows as u32))
            .await
            .unwrap_or_else(|f| panic!("{model}: {}", f.message));
        for (output, tensor) in outputs.iter().zip(&plain) {
            let again = exposed.iter().position(|o| o.name == output.name).unwrap();
            assert!(
                distance(&shown[again], tensor) < REWRITTEN,
                "{model}: {}",
                output.name
            );
        }
        for (output, tensor) in exposed.iter().zip(&shown) {
            if output.axes.is_empty() {
                continue;
            }
            assert_eq!(
                output.axes.len(),
                tensor.shape().len(),
                "{model}: {}",
                output.name
            );
            for ((axis, known), extent) in output.axes.iter().zip(&output.dims).zip(tensor.shape())
            {
                // What is made once for all rows counts for each.
                let once = *axis == Axis::Batch && *known == Some(1) && *extent == rows;
                assert!(
                    once || known.is_none_or(|k| k == *extent),
                    "{model}: {} {axis:?}",
                    output.name
                );
            }
        }
    }
}

#[tokio::test]
async fn a_pick_is_the_part_of_the_whole_that_it_names() {
    let (worker, info) = Worker::with("bert.legacy14").await;
    let hook = info
        .hooks
        .iter()
        .find(|h| h.axes == [Axis::Batch, Axis::Head, Axis::Query, Axis::Key])
        .expect("an attention");
    let spec = VariantSpec {
        keep_outputs: false,
        ..VariantSpec::exposing([hook.name.clone()])
    };
    let (outputs, _) = worker.build(1, &spec).await.unwrap();
    assert_eq!(outputs.len(), 1, "early exit keeps what was asked for");
    let given = inputs(&info, 3, 10);
    let (whole, _) = worker
        .run(1, &given, everything(&outputs, 3))
        .await
        .unwrap();
    let pick = Pick {
        row: 2,
        rows: 1,
        length: 7,
        heads: vec![3, 1],
        positions: vec![0, 6],
        ..Pick::default()
    };
    let (part, _) = worker.run(1, &given, vec![pick.clone()]).await.unwrap();
    assert_eq!(part[0].shape(), [2, 2, 7]);
    let (whole, part) = (whole[0].to_f32().unwrap(), part[0].to_f32().unwrap());
    for (i, head) in [3, 1].into_iter().enumerate() {
        for (j, query) in [0, 6].into_iter().enumerate() {
            for key in 0..7 {
                let wanted = whole[((2 * 4 + head) * 10 + query) * 10 + key];
                assert_eq!(
                    part[(i * 2 + j) * 7 + key],
                    wanted,
                    "the same run, bit for bit"
                );
            }
        }
    }
    let outside = Pick {
        heads: vec![4],
        ..pick
    };
    let refused = worker.run(1, &given, vec![outside]).await.unwrap_err();
    assert_eq!(kind(&refused), Failure::InvalidArgument);
    assert!(
        refused.message.contains("head 4 of 4"),
        "{}",
        refused.message
    );
}

#[tokio::test]
async fn wrong_inputs_are_refused_by_name_and_the_variant_serves_on() {
    let (worker, info) = Worker::with("bert.legacy14").await;
    let (outputs, _) = worker.build(1, &VariantSpec::plain()).await.unwrap();
    let good = inputs(&info, 1, 5);
    let picks = everything(&outputs, 1);
    let replaced = |at: usize, tensor: Tensor| {
        let mut all = good.clone();
        all[at].1 = tensor;
        all
    };
    let mut unknown = good.clone();
    unknown[0].0 = "nonsense".to_owned();
    let huge = vec![1 << 40; 5];
    for (given, wanted) in [
        (unknown, "no input \"nonsense\""),
        (good[1..].to_vec(), "missing"),
        ([&good[..], &good[..1]].concat(), "twice"),
        (
            replaced(0, Tensor::from_f32(vec![1, 5], &[0.0; 5]).unwrap()),
            "f32 was given",
        ),
        (
            replaced(0, Tensor::from_i64(vec![5], &[1; 5]).unwrap()),
            "[5] was given",
        ),
        (
            replaced(0, Tensor::from_i64(vec![1, 0], &[]).unwrap()),
            "empty",
        ),
        (
            replaced(0, Tensor::from_i64(vec![1, 5], &huge).unwrap()),
            "",
        ),
        (
            replaced(0, Tensor::from_i64(vec![1, 3], &[7; 3]).unwrap()),
            "",
        ),
    ] {
        let refused = worker.run(1, &given, picks.clone()).await.unwrap_err();
        assert!(
            refused.message.contains(wanted) && refused.message.len() < 1024,
            "{}",
            refused.message
        );
        assert!(
            !refused.message.contains(" /"),
            "no path: {}",
            refused.message
        );
    }
    let nothing = worker.run(1, &good, Vec::new()).await.unwrap_err();
    assert!(nothing.message.contains("nothing is picked"));
    let absent = worker.run(9, &good, picks.clone()).await.unwrap_err();
    assert_eq!(kind(&absent), Failure::NoVariant);
    worker
        .run(1, &good, picks)
        .await
        .expect("the worker serves on");
}

#[tokio::test]
async fn unknown_hook_points_are_refused_with_a_reason() {
    let (worker, _) = Worker::with("bert.legacy14").await;
    let spec = VariantSpec::exposing(["blocks.99.hook_resid_post"]);
    let refused = worker.build(1, &spec).await.unwrap_err();
    assert_eq!(kind(&refused), Failure::FailedPrecondition);
    assert!(refused.message.contains("blocks.99"), "{}", refused.message);
}

#[tokio::test]
async fn text_comes_back_as_tokens_with_byte_offsets_and_ids_come_back_as_text() {
    let (worker, info) = Worker::with("bert.legacy14").await;
    let text = "the café 😀";
    let encoding = worker.tokenize(&[text], false).await.unwrap().remove(0);
    for i in 0..encoding.ids.len() {
        assert!(
            text.get(encoding.starts[i] as usize..encoding.ends[i] as usize)
                .is_some()
        );
    }
    let limit = info.tokenizer.expect("the fixture has one").max_tokens;
    let long = "the ".repeat(limit * 2);
    let refused = worker.tokenize(&["the", &long], false).await.unwrap_err();
    assert_eq!(kind(&refused), Failure::InvalidArgument);
    assert_eq!(refused.subject, "texts[1]");
    let cut = worker.tokenize(&[&long], true).await.unwrap().remove(0);
    assert_eq!(cut.ids.len(), limit);
    assert!(cut.truncated > 0);
}
