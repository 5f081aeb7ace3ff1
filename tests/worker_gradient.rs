//! The real worker differentiates the models of the fixtures: against PyTorch, against differences that it makes by moving the
//! embedding, and with every reduction.

#[path = "support/worker.rs"]
mod support;

use std::collections::BTreeMap;

use introspectd::{
    anatomy::certificate::{GRADIENT as DIFFERENCE, NULL},
    ipc::{
        info::{InputRole, ModelInfo, Task},
        spec::{
            GradientSpec, OBJECTIVE, Quantity, Reduction, Rules, TARGET_LABEL, TARGET_POSITION,
            TARGET_WEIGHT, VariantSpec,
        },
        wire::Failure,
    },
    tensor::Tensor,
};
use support::{Worker, everything, fixtures, inputs, kind};

const EMBED: &str = "hook_embed";
/// Against a central difference, relative.
const GRADIENT: f64 = 1e-3;
/// Same mathematics by other operators.
const REWRITTEN: f64 = 1e-4;

const ROWS: usize = 2;
const LENGTH: usize = 9;

/// The gradient of a quantity with respect to the embedding, which can be moved.
fn spec(of: Quantity, reduction: Reduction) -> VariantSpec {
    VariantSpec {
        intervene: [EMBED.to_owned()].into(),
        gradient: Some(GradientSpec {
            rules: Rules::Gradient,
            at: None,
            of,
            points: BTreeMap::from([(EMBED.to_owned(), reduction)]),
        }),
        keep_outputs: false,
        ..VariantSpec::rewritten()
    }
}

/// Two terms for each row: label 1 counts fully, label 2 against it by a half; of a text at the positions 5 and 3.
fn target(has_positions: bool) -> Vec<(String, Tensor)> {
    let longs =
        |values: [i64; 2]| Tensor::from_i64(vec![ROWS, 2], &[values, values].concat()).unwrap();
    let weights = Tensor::from_f32(vec![ROWS, 2], &[1.0, -0.5, 1.0, -0.5]).unwrap();
    let mut target = vec![
        (TARGET_LABEL.to_owned(), longs([1, 2])),
        (TARGET_WEIGHT.to_owned(), weights),
    ];
    if has_positions {
        target.push((TARGET_POSITION.to_owned(), longs([5, 3])));
    }
    target
}

fn width(info: &ModelInfo) -> usize {
    info.dims.d_model.unwrap()
}

/// Inputs that move the embedding by `by` times a direction, the same for every row.
fn moved(info: &ModelInfo, direction: &[f32], by: f32) -> Vec<(String, Tensor)> {
    let shift: Vec<f32> = direction.iter().map(|d| by * d).collect();
    vec![
        (
            format!("scale:{EMBED}"),
            Tensor::from_f32(vec![1, 1, 1], &[1.0]).unwrap(),
        ),
        (
            format!("shift:{EMBED}"),
            Tensor::from_f32(vec![1, LENGTH, width(info)], &shift).unwrap(),
        ),
    ]
}

/// A direction that looks random.
fn direction(info: &ModelInfo) -> Vec<f32> {
    let mut state = 7u32;
    (0..LENGTH * width(info))
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

struct Differentiable {
    worker: Worker,
    info: ModelInfo,
    name: &'static str,
    has_positions: bool,
    built: u32,
}

impl Differentiable {
    async fn load(name: &'static str, has_positions: bool) -> Self {
        let (worker, info) = Worker::with(name).await;
        Self {
            worker,
            info,
            name,
            has_positions,
            built: 0,
        }
    }

    /// What the variant gives, by name.
    async fn run(
        &mut self,
        spec: &VariantSpec,
        extra: Vec<Vec<(String, Tensor)>>,
    ) -> Vec<BTreeMap<String, Tensor>> {
        self.built += 1;
        let (outputs, _) = self
            .worker
            .build(self.built, spec)
            .await
            .unwrap_or_else(|f| panic!("{}: {}", self.name, f.message));
        let mut answers = Vec::new();
        for extra in extra {
            let mut given = inputs(&self.info, ROWS, LENGTH);
            given.extend(extra);
            given.extend(target(self.has_positions));
            let (tensors, _) = self
                .worker
                .run(self.built, &given, everything(&outputs, ROWS as u32))
                .await
                .unwrap_or_else(|f| panic!("{}: {}", self.name, f.message));
            let names = outputs.iter().map(|o| o.name.clone());
            answers.push(names.zip(tensors).collect());
        }
        answers
    }
}

fn floats(tensor: &Tensor) -> Vec<f64> {
    tensor
        .to_f32()
        .unwrap()
        .iter()
        .map(|v| f64::from(*v))
        .collect()
}

/// One of each form: encoder, decoder, rotary positions with grouped queries, unfused attention.
const MODELS: [(&str, bool); 5] = [
    ("bert.legacy14", false),
    ("bert.fused", false),
    ("gpt2.dynamo20", true),
    ("llama.attention23", true),
    ("distilbert.dynamo20", false),
];

#[tokio::test]
async fn a_gradient_along_a_direction_is_the_difference_of_objectives() {
    const STEP: f32 = 4e-3;
    for (name, has_positions) in MODELS {
        let mut model = Differentiable::load(name, has_positions).await;
        let along = direction(&model.info);
        for of in [
            Quantity::Logit,
            Quantity::LogProbability,
            Quantity::Probability,
        ] {
            let at = |by| moved(&model.info, &along, by);
            let runs = [STEP, -STEP, STEP / 2.0, -STEP / 2.0, 0.0].map(at).to_vec();
            let answers = model.run(&spec(of, Reduction::Whole), runs).await;
            let [up, down, half_up, half_down, rest] = &answers[..] else {
                panic!()
            };
            let gradient = floats(&rest["gradient:hook_embed"]);
            let row = gradient.len() / ROWS;
            for r in 0..ROWS {
                let exact: f64 = gradient[r * row..][..row]
                    .iter()
                    .zip(&along)
                    .map(|(g, d)| g * f64::from(*d))
                    .sum();
                let objective = |answer: &BTreeMap<String, Tensor>| floats(&answer[OBJECTIVE])[r];
                let central =
                    |up, down, step: f32| (objective(up) - objective(down)) / f64::from(2.0 * step);
                let (wide, narrow) = (
                    central(up, down, STEP),
                    central(half_up, half_down, STEP / 2.0),
                );
                // Richardson's extrapolation.
                let difference = (4.0 * narrow - wide) / 3.0;
                let size = difference.abs().max(1e-2);
                assert!(
                    (exact - difference).abs() / size < 10.0 * GRADIENT,
                    "{name} {of:?} row {r}: {exact} by rule, {difference} by difference"
                );
            }
        }
    }
}

#[tokio::test]
async fn reductions_are_sums_of_the_whole() {
    for (name, has_positions) in MODELS {
        let mut model = Differentiable::load(name, has_positions).await;
        let (along, wide) = (direction(&model.info), width(&model.info));
        let at_rest = moved(&model.info, &along, 0.0);
        let shown = VariantSpec {
            expose: [EMBED.to_owned()].into(),
            ..spec(Quantity::Logit, Reduction::Whole)
        };
        let whole = model.run(&shown, vec![at_rest.clone()]).await;
        let (gradient, value) = (
            floats(&whole[0]["gradient:hook_embed"]),
            floats(&whole[0][EMBED]),
        );
        let by_token = |f: &dyn Fn(usize) -> f64| -> Vec<f64> {
            (0..ROWS * LENGTH)
                .map(|t| (0..wide).map(|d| f(t * wide + d)).sum())
                .collect()
        };
        let g = |i: usize| gradient[i];
        let expected: [(Reduction, Vec<f64>); 5] = [
            (Reduction::Sum, by_token(&g)),
            (Reduction::AbsoluteSum, by_token(&|i| g(i).abs())),
            (
                Reduction::L2,
                by_token(&|i| g(i) * g(i))
                    .iter()
                    .map(|s| s.sqrt())
                    .collect(),
            ),
            (Reduction::TimesValue, by_token(&|i| g(i) * value[i])),
            (
                Reduction::Dot,
                by_token(&|i| g(i) * f64::from(along[i % (LENGTH * wide)])),
            ),
        ];
        for (reduction, expected) in expected {
            let mut given = at_rest.clone();
            if reduction == Reduction::Dot {
                let direction = Tensor::from_f32(vec![1, LENGTH, wide], &along).unwrap();
                given.push((format!("direction:{EMBED}"), direction));
            }
            let answer = model
                .run(&spec(Quantity::Logit, reduction), vec![given])
                .await;
            let found = &answer[0]["gradient:hook_embed"];
            assert_eq!(found.shape(), [ROWS, LENGTH], "{name} {reduction:?}");
            // A norm behind the embedding lets some sums vanish.
            let largest = expected
                .iter()
                .chain(&gradient)
                .fold(0f64, |m, v| m.max(v.abs()));
            for (a, b) in floats(found).iter().zip(&expected) {
                assert!(
                    (a - b).abs() / largest < REWRITTEN,
                    "{name} {reduction:?}: {a} and {b}"
                );
            }
        }
    }
}

#[tokio::test]
async fn what_cannot_be_differentiated_is_refused_with_the_operator() {
    let (worker, info) = Worker::with("bert.int8").await;
    assert!(info.inputs.iter().any(|i| i.role == InputRole::TokenIds));
    let refused = worker
        .build(1, &spec(Quantity::Logit, Reduction::Whole))
        .await
        .unwrap_err();
    assert_eq!(kind(&refused), Failure::FailedPrecondition);
    assert!(
        refused.message.contains("DynamicQuantizeLinear"),
        "{}",
        refused.message
    );
    assert!(
        refused.message.contains("finite differences"),
        "{}",
        refused.message
    );
    let (outputs, _) = worker.build(2, &VariantSpec::plain()).await.unwrap();
    let given = inputs(&info, ROWS, LENGTH);
    let served = worker
        .run(2, &given, everything(&outputs, ROWS as u32))
        .await;
    assert!(served.is_ok(), "the worker serves on");
}

#[tokio::test]
async fn the_certificate_holds_moves_and_gradients_against_the_model() {
    let mut held = 0;
    for name in fixtures() {
        let (_worker, info) = Worker::with(&name).await;
        let checks = &info.certificate.checks;
        let named = |name: &str| checks.iter().filter(|c| c.name == name).collect::<Vec<_>>();
        let (null, gradient) = (named(NULL), named(DIFFERENCE));
        let note = info
            .notes
            .iter()
            .find(|n| n.contains("no gradient through"));
        for check in null.iter().chain(&gradient) {
            println!(
                "{name}: {} {:.1e} of {:.0e}",
                check.name, check.measured, check.tolerance
            );
            assert!(check.passed, "{name}: {check:?}");
        }
        if name == "bert.int8" {
            let note = note.unwrap_or_else(|| panic!("{:?}", info.notes));
            assert!(note.contains("DynamicQuantizeLinear"), "{note}");
            assert!(gradient.is_empty() && !null.is_empty(), "{name}");
            continue;
        }
        assert_eq!(note, None, "{name}");
        let explained = matches!(
            info.task,
            Task::SequenceClassification
                | Task::CausalLm
                | Task::MaskedLm
                | Task::TokenClassification
        );
        if explained && info.hooks.iter().any(|h| h.name == EMBED) {
            assert_eq!(gradient.len(), 1, "{name}");
            assert!(!null.is_empty(), "{name}");
            held += 1;
        }
    }
    assert!(
        held > 15,
        "the fixtures are classifiers and language models: {held}"
    );
}
