//! Sweeps against PyTorch (`tests/fixtures/make/analysis_sweeps.py`, `analysis_paths.py`): activation patching and its estimate at every
//! kind of hook point, ablations, path patching; and two models whose circuits are known, one set by hand and one trained.

#[path = "support/arrays.rs"]
mod arrays;
#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/sweep.rs"]
mod sweep_support;

use std::collections::BTreeMap;

use daemon::{TestDaemon, fixture};
use introspectd::service::wire::introspect::{
    self as pb,
    SweepAxis::{self, Dim, Head, Position},
    edit, input,
    sweep_request::Change,
    target,
};
use ndarray::{ArrayD, ArrayViewD, Axis, IxDyn, Slice};
use sweep_support::{Swept, swept};

/// Same mathematics by other operators, relative to the greatest magnitude of the array.
const REWRITTEN: f64 = 1e-4;
/// Scores are of single precision, and an effect is the difference of two: it is off by some units in their last place, however small
/// it is. Relative to the number that is watched.
const ROUNDED: f64 = 4.0 * f32::EPSILON as f64;

/// Models, and whose numbers they must have.
const CASES: [(&str, &str); 10] = [
    ("bert.legacy14", "bert"),
    ("bert.dynamo20", "bert"),
    ("distilbert.legacy14", "distilbert"),
    ("distilbert.dynamo20", "distilbert"),
    ("gpt2.legacy14", "gpt2"),
    ("gpt2.dynamo20", "gpt2"),
    ("llama.legacy14", "llama"),
    ("llama.dynamo20", "llama"),
    (INDUCTION, "induction"),
    (CIRCUIT, "circuit"),
];
const INDUCTION: &str = "induction.legacy17";
const CIRCUIT: &str = "circuit.legacy17";

const Z: &str = "attn.hook_z";
/// Grids of the script: a kind of hook point, and the axes of a part in the script's order, by our names.
const GRIDS: [(&str, &str, &[SweepAxis], &[&str]); 6] = [
    ("resid_pre", "hook_resid_pre", &[Position], &["pos"]),
    ("attn_out", "hook_attn_out", &[Position], &["pos"]),
    ("mlp_out", "hook_mlp_out", &[Position], &["pos"]),
    ("z.head", Z, &[Head], &["head"]),
    ("z.head_pos", Z, &[Head, Position], &["head", "pos"]),
    ("mlp_post", "mlp.hook_post", &[Dim], &["d_mlp"]),
];

/// The heads that do the work of `circuit`, by layer.
const PREVIOUS_HEAD: (usize, usize) = (0, 1);
const INDUCTION_HEAD: (usize, usize) = (1, 2);

/// First position of the texts of `judge/ids` whose next token is in the text: 8 tokens and then 24.
const KNOWN_FROM: usize = 32;
/// Predictions that may fall to the other side of a tie.
const TIES: f64 = 2.0;

type Golden = BTreeMap<String, ArrayD<f64>>;

fn golden(name: &str) -> Golden {
    arrays::read(&format!("analysis/{name}.npz"))
}

fn real(row: &ArrayViewD<'_, f64>) -> Vec<u32> {
    let ids = row.iter().filter(|id| **id >= 0.0);
    ids.map(|id| *id as u32).collect()
}

fn input(ids: &[u32]) -> pb::Input {
    pb::Input {
        kind: Some(input::Kind::Tokens(pb::TokenIds {
            ids: ids.to_vec(),
            type_ids: Vec::new(),
        })),
    }
}

/// One score less another, of language models at the last position.
fn contrast(golden: &Golden) -> pb::Target {
    let choice = |which: usize| pb::Choice {
        what: Some(pb::choice::What::Index(golden["target"][which] as u32)),
        position: None,
    };
    pb::Target {
        of: Some(target::Of::Contrast(pb::Contrast {
            choice: Some(choice(0)),
            against: Some(choice(1)),
        })),
        ..pb::Target::default()
    }
}

fn patch(golden: &Golden) -> Change {
    Change::Patch(input(&real(&golden["source"].view())))
}

/// Of the input of the golden numbers.
fn sweep(
    model: &str,
    golden: &Golden,
    (hook, by): (&str, &[SweepAxis]),
    change: Change,
) -> pb::SweepRequest {
    pb::SweepRequest {
        model: model.to_owned(),
        input: Some(input(&real(&golden["ids"].view()))),
        target: Some(contrast(golden)),
        hooks: vec![hook.to_owned()],
        by: by.iter().map(|b| (*b).into()).collect(),
        change: Some(change),
        ..pb::SweepRequest::default()
    }
}

async fn ask(d: &TestDaemon, request: pb::SweepRequest, what: &str) -> Swept {
    let found = swept(d, request).await;
    found.unwrap_or_else(|e| panic!("{what}: {e:?}"))
}

/// All hook points of a sweep, one behind the other, with the axes in this order.
fn layers(found: &Swept, what: &str, order: &[&str]) -> ArrayD<f64> {
    let of_layer = |hook: &String| {
        let (axes, shape) = &found.shapes[&format!("{what}:{hook}")];
        let shape: Vec<usize> = shape.iter().map(|n| *n as usize).collect();
        let values = found.of(what, hook).iter().map(|v| f64::from(*v));
        let values = ArrayD::from_shape_vec(IxDyn(&shape), values.collect()).unwrap();
        let place = |name: &&str| {
            let at = axes.iter().position(|axis| axis == name);
            at.unwrap_or_else(|| panic!("{name} is not among {axes:?}"))
        };
        values.permuted_axes(order.iter().map(place).collect::<Vec<_>>())
    };
    let all: Vec<ArrayD<f64>> = found.header.hooks.iter().map(of_layer).collect();
    let views: Vec<ArrayViewD<'_, f64>> = all.iter().map(|a| a.view()).collect();
    ndarray::stack(Axis(0), &views).unwrap()
}

fn within(tolerance: f64, found: &ArrayD<f64>, wanted: &ArrayD<f64>, what: &str) {
    assert_eq!(found.shape(), wanted.shape(), "{what}");
    for (at, wanted) in wanted.indexed_iter() {
        let found = found[&at];
        assert!(
            (found - wanted).abs() <= tolerance,
            "{what} at {at:?}: {found} for {wanted}"
        );
    }
}

fn rewritten(wanted: &ArrayD<f64>) -> f64 {
    REWRITTEN * wanted.iter().fold(0.0f64, |most, v| most.max(v.abs()))
}

fn same(found: &ArrayD<f64>, wanted: &ArrayD<f64>, what: &str) {
    within(rewritten(wanted), found, wanted, what);
}

fn near(found: f64, wanted: f64, what: &str) {
    let off = (found - wanted).abs();
    assert!(
        off <= REWRITTEN * wanted.abs(),
        "{what}: {found} for {wanted}"
    );
}

/// Pearson's correlation; none where one of both does not vary.
fn pearson(a: &ArrayD<f64>, b: &ArrayD<f64>) -> Option<f64> {
    let (a, b) = (a - a.mean().unwrap(), b - b.mean().unwrap());
    let sizes = (&a * &a).sum() * (&b * &b).sum();
    (sizes > 0.0).then(|| (&a * &b).sum() / sizes.sqrt())
}

#[tokio::test(flavor = "multi_thread")]
async fn patchings_and_their_estimates_are_those_of_pytorch() {
    let models = CASES.map(|(model, _)| model);
    let d = TestDaemon::with(&models).await;
    for (model, name) in CASES {
        let golden = golden(name);
        for (grid, hook, by, order) in GRIDS {
            let what = format!("{model} {grid}");
            let request = pb::SweepRequest {
                method: pb::SweepMethod::Both.into(),
                ..sweep(model, &golden, (hook, by), patch(&golden))
            };
            let found = ask(&d, request, &what).await;
            let (value, source) = (&golden["sweep/value"], &golden["sweep/source_value"]);
            let header = &found.header;
            near(header.value, value[0], &what);
            near(header.source_value.unwrap(), source[0], &what);

            let effects = &golden[&format!("sweep/{grid}/patch")];
            let estimates = &golden[&format!("sweep/{grid}/attribution")];
            same(
                &layers(&found, "effects", order),
                effects,
                &format!("{what} effects"),
            );
            let restored = effects / (source[0] - value[0]);
            same(
                &layers(&found, "normalized", order),
                &restored,
                &format!("{what} normalized"),
            );
            same(
                &layers(&found, "estimates", order),
                estimates,
                &format!("{what} estimates"),
            );

            // The effects and estimates of all layers together.
            assert_eq!(found.result.compared, effects.len() as u64, "{what}");
            let wanted = pearson(effects, estimates);
            assert_eq!(
                found.result.correlation.is_some(),
                wanted.is_some(),
                "{what}"
            );
            if let (Some(found), Some(wanted)) = (found.result.correlation, wanted) {
                near(found, wanted, &format!("{what} correlation"));
            }
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ablations_are_those_of_pytorch() {
    let models = CASES.map(|(model, _)| model);
    let d = TestDaemon::with(&models).await;
    for (model, name) in CASES {
        let golden = golden(name);
        let texts = golden["texts/ids"].outer_iter();
        let mean = Change::Mean(pb::Mean {
            inputs: texts.map(|row| input(&real(&row))).collect(),
        });
        let zero = || Change::Zero(pb::Zero {});
        let divergence = pb::Target {
            of: Some(target::Of::Divergence(pb::Divergence::default())),
            ..pb::Target::default()
        };
        for (kind, change, target) in [
            ("zero", zero(), contrast(&golden)),
            ("mean", mean, contrast(&golden)),
            ("kl", zero(), divergence),
        ] {
            let what = format!("{model} {kind}");
            let request = pb::SweepRequest {
                target: Some(target),
                ..sweep(model, &golden, (Z, &[Head]), change)
            };
            let found = ask(&d, request, &what).await;
            let wanted = &golden[&format!("ablate/{kind}")];
            same(&layers(&found, "effects", &["head"]), wanted, &what);
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_are_those_of_pytorch() {
    let d = TestDaemon::with(&[INDUCTION, CIRCUIT]).await;
    for (model, name) in [(INDUCTION, "induction"), (CIRCUIT, "circuit")] {
        let golden = golden(name);
        let [count, heads] = golden["path/final"].shape() else {
            panic!("by layer and head");
        };
        for (kind, freeze_mlps) in [("path", false), ("path_direct", true)] {
            let to = |receiver: pb::Receiver| pb::SweepRequest {
                path: Some(pb::PathPatch {
                    receivers: vec![receiver],
                    freeze_mlps,
                }),
                ..sweep(model, &golden, (Z, &[Head]), patch(&golden))
            };
            let what = format!("{model} {kind}/final");
            let last = pb::Receiver {
                hook: format!("blocks.{}.hook_resid_post", count - 1),
                ..pb::Receiver::default()
            };
            let found = ask(&d, to(last), &what).await;
            let wanted = &golden[&format!("{kind}/final")];
            same(&layers(&found, "effects", &["head"]), wanted, &what);

            for part in ["q", "k", "v"] {
                let what = format!("{model} {kind}/{part}");
                let wanted = &golden[&format!("{kind}/{part}")];
                let mut found = ArrayD::zeros(wanted.raw_dim());
                // No head is ahead of the first layer's.
                for (layer, head) in (1..*count).flat_map(|l| (0..*heads).map(move |h| (l, h))) {
                    let receiver = pb::Receiver {
                        hook: format!("attn.hook_{part}"),
                        layers: vec![layer as u32],
                        heads: vec![head as u32],
                        ..pb::Receiver::default()
                    };
                    let swept = ask(&d, to(receiver), &what).await;
                    let effects = layers(&swept, "effects", &["head"]);
                    let mut of_receiver = found.view_mut();
                    of_receiver.slice_axis_inplace(Axis(2), Slice::from(layer..=layer));
                    of_receiver.slice_axis_inplace(Axis(3), Slice::from(head..=head));
                    let shape = of_receiver.raw_dim();
                    of_receiver.assign(&effects.into_shape_with_order(shape).unwrap());
                }
                // Queries of `induction` matter so little that rounding shows.
                let rounded = ROUNDED * golden["sweep/value"][0].abs();
                within(rewritten(wanted).max(rounded), &found, wanted, &what);
            }
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_circuit_that_was_set_by_hand_is_found_and_nothing_else() {
    let d = TestDaemon::with(&[CIRCUIT]).await;
    let golden = golden("circuit");
    let request = sweep(CIRCUIT, &golden, (Z, &[Head]), patch(&golden));
    let found = layers(&ask(&d, request, CIRCUIT).await, "effects", &["head"]);
    let active = found.indexed_iter().filter(|(_, effect)| **effect != 0.0);
    let active: Vec<(usize, usize)> = active.map(|(at, _)| (at[0], at[1])).collect();
    assert_eq!(active, [PREVIOUS_HEAD, INDUCTION_HEAD], "{found}");
    d.stop().await;
}

/// How many of the second half's tokens are predicted, and of how many.
async fn foretold(d: &TestDaemon, texts: &ArrayD<f64>, edits: &[pb::Edit]) -> (usize, usize) {
    let output = d.model(INDUCTION).await.main_output;
    let selection = pb::Selection {
        logits: pb::Logits::All.into(),
        ..pb::Selection::default()
    };
    let (mut right, mut asked) = (0, 0);
    for text in texts.outer_iter() {
        let text = real(&text);
        let mut request = daemon::ids(INDUCTION, &text, selection.clone());
        request.intervention = Some(pb::Intervention {
            edits: edits.to_vec(),
            ..pb::Intervention::default()
        });
        let answer = d.capture(request).await.unwrap();
        let (shape, logits) = (answer.shape(&output), answer.values(&output));
        let vocabulary = shape[shape.len() - 1];
        let predictions = logits.chunks_exact(vocabulary).zip(&text[1..]);
        for (scores, next) in predictions.skip(KNOWN_FROM) {
            let best = (0..vocabulary).max_by(|a, b| scores[*a].total_cmp(&scores[*b]));
            right += usize::from(best == Some(*next as usize));
            asked += 1;
        }
    }
    (right, asked)
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_induction_heads_a_model_cannot_go_on_with_a_repetition() {
    let d = TestDaemon::with(&[INDUCTION]).await;
    let told = std::fs::read(fixture("../analysis/induction.json")).unwrap();
    let told: serde_json::Value = serde_json::from_slice(&told).unwrap();
    let texts = &golden("induction")["judge/ids"];
    let heads = told["induction_heads"].as_array().unwrap();
    assert!(!heads.is_empty());
    let number = |of: &serde_json::Value| u32::try_from(of.as_u64().unwrap()).unwrap();
    let without = heads.iter().map(|head| pb::Edit {
        hook: Z.to_owned(),
        layers: vec![number(&head[0])],
        heads: vec![number(&head[1])],
        operation: Some(edit::Operation::Zero(pb::Zero {})),
        ..pb::Edit::default()
    });
    let without: Vec<pb::Edit> = without.collect();
    for (edits, accuracy) in [(&[][..], "accuracy"), (&without, "accuracy_without")] {
        let (right, asked) = foretold(&d, texts, edits).await;
        let wanted = told[accuracy].as_f64().unwrap() * asked as f64;
        assert!(
            (right as f64 - wanted).abs() <= TIES,
            "{accuracy}: {right} of {asked}, not {wanted}"
        );
    }
    d.stop().await;
}
