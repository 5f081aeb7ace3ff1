//! What methods draw, given: gradients of the real worker at noisy points against Captum's SmoothGrad, GradientSHAP and sensitivity.

#[path = "support/arrays.rs"]
mod arrays;
#[path = "support/worker.rs"]
mod support;

use std::collections::BTreeMap;

use introspectd::{
    ipc::{
        info::InputRole,
        spec::{
            GradientSpec, Quantity, Reduction, Rules, TARGET_LABEL, TARGET_WEIGHT, VariantSpec,
        },
    },
    methods::attribute::evaluate::sensitivity_of,
    tensor::Tensor,
};
use support::{Worker, everything};

const EMBED: &str = "hook_embed";
/// Against PyTorch, relative to the greatest.
const GRADIENT: f64 = 1e-4;
const TOKENS: usize = 12;
const WIDTH: usize = 32;

/// A row: `scale x + shift`, and a direction for what is taken along one.
struct Row {
    scale: f64,
    shift: Vec<f64>,
    direction: Vec<f64>,
}

/// Reduced gradients `[row][token]` of the logit of label 1.
async fn gradients(worker: &Worker, variant: u32, how: Reduction, rows: &[Row]) -> Vec<Vec<f64>> {
    let spec = VariantSpec {
        intervene: [EMBED.to_owned()].into(),
        gradient: Some(GradientSpec {
            of: Quantity::Logit,
            at: None,
            rules: Rules::Gradient,
            points: BTreeMap::from([(EMBED.to_owned(), how)]),
        }),
        keep_outputs: false,
        ..VariantSpec::rewritten()
    };
    let (outputs, _) = worker.build(variant, &spec).await.unwrap();
    let golden = arrays::read("attribution/bert.npz");
    let n = rows.len();
    let ids: Vec<i64> = golden["ids"].iter().map(|v| *v as i64).collect();
    let floats = |shape: Vec<usize>, values: Vec<f64>| {
        let values: Vec<f32> = values.into_iter().map(|v| v as f32).collect();
        Tensor::from_f32(shape, &values).unwrap()
    };
    let longs = |value: i64| Tensor::from_i64(vec![n, TOKENS], &vec![value; n * TOKENS]).unwrap();
    let all =
        |of: fn(&Row) -> &Vec<f64>| -> Vec<f64> { rows.iter().flat_map(of).copied().collect() };
    let mut given = vec![
        (
            "input_ids".to_owned(),
            Tensor::from_i64(vec![n, TOKENS], &ids.repeat(n)).unwrap(),
        ),
        ("attention_mask".to_owned(), longs(1)),
        (
            format!("scale:{EMBED}"),
            floats(vec![n, 1, 1], rows.iter().map(|r| r.scale).collect()),
        ),
        (
            format!("shift:{EMBED}"),
            floats(vec![n, TOKENS, WIDTH], all(|r| &r.shift)),
        ),
        (
            TARGET_LABEL.to_owned(),
            Tensor::from_i64(vec![n, 1], &vec![1; n]).unwrap(),
        ),
        (TARGET_WEIGHT.to_owned(), floats(vec![n, 1], vec![1.0; n])),
    ];
    if how == Reduction::Dot {
        let direction = floats(vec![n, TOKENS, WIDTH], all(|r| &r.direction));
        given.push((format!("direction:{EMBED}"), direction));
    }
    let picks = everything(&outputs, n as u32);
    let (tensors, _) = worker.run(variant, &given, picks).await.unwrap();
    let at = outputs
        .iter()
        .position(|o| o.name == format!("gradient:{EMBED}"))
        .unwrap();
    let values = tensors[at].to_f32().unwrap();
    let rows = values.chunks(TOKENS);
    rows.map(|r| r.iter().map(|v| f64::from(*v)).collect())
        .collect()
}

fn mean(rows: &[Vec<f64>]) -> Vec<f64> {
    let n = rows.len() as f64;
    (0..TOKENS)
        .map(|t| rows.iter().map(|r| r[t]).sum::<f64>() / n)
        .collect()
}

fn assert_close(what: &str, found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let greatest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    let off = apart.fold(0.0, f64::max) / greatest;
    println!("{what}: {off:.1e}");
    assert!(off < GRADIENT, "{what}: {off}");
}

#[tokio::test]
async fn noisy_gradients_and_their_sensitivity_are_those_of_captum() {
    let golden = arrays::read("attribution/bert.npz");
    let values = |name: &str| -> Vec<f64> { golden[name].iter().copied().collect() };
    let (worker, info) = Worker::with("bert.legacy14").await;
    assert!(info.input(InputRole::TokenIds).is_some());
    let size = TOKENS * WIDTH;
    let (x, base) = (values("x"), values("x_baseline"));
    let shifted = |shift: &[f64]| Row {
        scale: 1.0,
        shift: shift.to_vec(),
        direction: Vec::new(),
    };
    let noisy: Vec<Row> = values("noise").chunks(size).map(shifted).collect();
    let found = gradients(&worker, 1, Reduction::AbsoluteSum, &noisy).await;
    assert_close("smoothgrad", &mean(&found), &values("smoothgrad"));
    let found = gradients(&worker, 2, Reduction::TimesValue, &noisy).await;
    let name = "smoothgrad_input_x_gradient";
    assert_close(name, &mean(&found), &values(name));

    // x' + alpha (x + noise - x'): the row is scaled, and shifted by the rest.
    let path = |noise: &[f64], alpha: f64| Row {
        scale: alpha,
        shift: (0..size)
            .map(|i| (1.0 - alpha) * base[i] + alpha * noise[i])
            .collect(),
        direction: (0..size).map(|i| x[i] + noise[i] - base[i]).collect(),
    };
    let still = vec![0.0; size];
    let alphas = values("alphas");
    let plain: Vec<Row> = alphas.iter().map(|a| path(&still, *a)).collect();
    let found = gradients(&worker, 3, Reduction::Dot, &plain).await;
    assert_close("gradient_shap", &mean(&found), &values("gradient_shap"));
    let noise = values("noise");
    let noisy: Vec<Row> = noise
        .chunks(size)
        .zip(&alphas)
        .map(|(n, a)| path(n, *a))
        .collect();
    let found = gradients(&worker, 4, Reduction::Dot, &noisy).await;
    assert_close(
        "gradient_shap_noisy",
        &mean(&found),
        &values("gradient_shap_noisy"),
    );

    let own = gradients(&worker, 5, Reduction::AbsoluteSum, &[shifted(&still)]).await;
    let inputs = values("sensitivity_inputs");
    let moved: Vec<Row> = inputs
        .chunks(size)
        .map(|at| shifted(&at.iter().zip(&x).map(|(a, b)| a - b).collect::<Vec<f64>>()))
        .collect();
    let moved = gradients(&worker, 6, Reduction::AbsoluteSum, &moved).await;
    let found: Vec<f64> = moved.iter().map(|m| sensitivity_of(&own[0], m)).collect();
    let expected = values("sensitivity_saliency_tokens");
    let most = found.iter().copied().fold(0.0, f64::max);
    // The difference of two explanations that are close has fewer digits than each.
    for (a, b) in found
        .iter()
        .zip(&expected)
        .chain([(&most, &values("sensitivity_max_saliency_tokens")[0])])
    {
        assert!((a - b).abs() < 1e-2 * b, "{a} {b}");
    }
}
