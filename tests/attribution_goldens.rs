//! Every method against the numbers of Captum, `shap`, `lime` and of the papers' formulas, over real gRPC and by the regressions alone.
//! What each array holds is in `tests/fixtures/README.md`.
#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/arrays.rs"]
mod arrays;
#[path = "support/attribution.rs"]
mod attribution;
#[path = "support/daemon.rs"]
mod daemon;

use std::collections::BTreeMap;

use attribution::{Explained, about, against, choice, distance, explain};
use daemon::TestDaemon;
use introspectd::{
    methods::attribute::{
        attention::{Square, flow, rollout},
        evaluate::infidelity,
        kernel_shap, lime,
        regression::Data,
        shapley::shapley_values,
    },
    service::wire::introspect::{self as pb, method::Kind},
};
use ndarray::ArrayD;

/// Gradients against PyTorch.
const GRADIENT: f64 = 1e-4;
/// Same mathematics by other operators, in single precision.
const REWRITTEN: f64 = 1e-4;
/// The same arithmetic on the same numbers.
const CLOSE: f64 = 1e-5;
/// `F(x) - F(x')` of values around one, in single precision: sums of many of them.
const DIFFERENCE: f64 = 1e-3;

/// Arrays by name, as double precision.
struct Golden(BTreeMap<String, ArrayD<f64>>);

impl Golden {
    fn read(name: &str) -> Self {
        Self(arrays::read(&format!("attribution/{name}.npz")))
    }

    fn array(&self, name: &str) -> &ArrayD<f64> {
        self.0.get(name).unwrap_or_else(|| panic!("no {name}"))
    }

    fn values(&self, name: &str) -> Vec<f64> {
        self.array(name).iter().copied().collect()
    }

    fn number(&self, name: &str) -> f64 {
        self.values(name)[0]
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.values(name).iter().map(|v| *v as u32).collect()
    }

    fn rows(&self, name: &str) -> Vec<Vec<f64>> {
        let rows = self.array(name).outer_iter();
        rows.map(|r| r.iter().copied().collect()).collect()
    }

    fn masks(&self, name: &str) -> Vec<Vec<bool>> {
        let rows = self.rows(name).into_iter();
        rows.map(|r| r.iter().map(|v| *v > 0.5).collect()).collect()
    }

    fn target(&self) -> Option<pb::Target> {
        match self.ids("target")[..] {
            [label] => choice(label, None),
            [position, token] => choice(token, i32::try_from(position).ok()),
            _ => panic!("a target is a label, or a position and a token"),
        }
    }

    /// The question of this file, with a method.
    fn ask(&self, model: &str, kind: Kind) -> pb::AttributeRequest {
        pb::AttributeRequest {
            target: self.target(),
            baseline: against(&self.ids("baseline_ids")),
            ..about(model, &self.ids("ids"), kind)
        }
    }

    /// The scores that this array gives, within a tolerance relative to the greatest.
    fn holds(&self, what: &str, found: &Explained, name: &str, tolerance: f64) {
        let off = distance(&found.scores(), &self.values(name));
        println!("{what} {name}: {off:.1e}");
        assert!(off <= tolerance, "{what} {name}: {off}");
    }
}

fn integrated(steps: u32, quadrature: pb::Quadrature, site: &str) -> Kind {
    Kind::IntegratedGradients(pb::IntegratedGradients {
        steps,
        quadrature: quadrature.into(),
        site: site.to_owned(),
        ..pb::IntegratedGradients::default()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn gradients_of_both_exporters_are_those_of_captum() {
    let rules = [
        ("ig_gausslegendre", 50, pb::Quadrature::GaussLegendre),
        ("ig_riemann_left", 20, pb::Quadrature::RiemannLeft),
        ("ig_riemann_middle", 20, pb::Quadrature::RiemannMiddle),
        ("ig_riemann_right", 20, pb::Quadrature::RiemannRight),
        ("ig_riemann_trapezoid", 20, pb::Quadrature::CaptumTrapezoid),
        ("ig_trapezoid", 20, pb::Quadrature::Trapezoid),
    ];
    for architecture in ["bert", "distilbert", "gpt2", "llama"] {
        let golden = Golden::read(architecture);
        let models = ["legacy14", "dynamo20"].map(|e| format!("{architecture}.{e}"));
        let d = TestDaemon::with(&models.each_ref().map(String::as_str)).await;
        for model in &models {
            for (name, steps, rule) in rules {
                let found = explain(&d, golden.ask(model, integrated(steps, rule, "")))
                    .await
                    .unwrap();
                golden.holds(model, &found, name, GRADIENT);
                assert!((found.result.value - golden.number("value")).abs() < REWRITTEN);
                assert!(
                    (found.result.baseline_value.unwrap() - golden.number("baseline_value")).abs()
                        < REWRITTEN
                );
                if name != "ig_trapezoid" {
                    let delta = golden.number(&format!("{name}_delta"));
                    assert!(
                        (found.result.delta.unwrap() - delta).abs() < DIFFERENCE,
                        "{model} {name}"
                    );
                }
            }
            let saliency = golden.ask(model, Kind::Saliency(pb::Saliency::default()));
            let found = explain(&d, saliency).await.unwrap();
            golden.holds(model, &found, "saliency_tokens", GRADIENT);
            let times = golden.ask(model, Kind::InputXGradient(pb::InputXGradient::default()));
            let found = explain(&d, times).await.unwrap();
            golden.holds(model, &found, "input_x_gradient", GRADIENT);
            let relevance = golden.ask(model, Kind::AttnLrp(pb::AttnLrp::default()));
            let found = explain(&d, relevance).await.unwrap();
            golden.holds(model, &found, "attn_lrp", GRADIENT);
        }
        d.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn attention_is_followed_as_the_papers_say() {
    for architecture in ["bert", "distilbert", "gpt2", "llama"] {
        let golden = Golden::read(architecture);
        let model = format!("{architecture}.legacy14");
        let d = TestDaemon::with(&[&model]).await;
        for (kind, row, whole) in [
            (
                Kind::AttentionRollout(pb::AttentionRollout::default()),
                "rollout_tokens",
                Some(("rollout", "rollout")),
            ),
            (
                Kind::AttentionFlow(pb::AttentionFlow::default()),
                "flow",
                None,
            ),
            (
                Kind::GradientAttention(pb::GradientAttention::default()),
                "chefer_tokens",
                Some(("relevance", "chefer")),
            ),
            (
                Kind::ValueZeroing(pb::ValueZeroing::default()),
                "value_zeroing_tokens",
                None,
            ),
        ] {
            let found = explain(&d, golden.ask(&model, kind)).await.unwrap();
            golden.holds(&model, &found, row, REWRITTEN);
            if let Some((ours, theirs)) = whole {
                assert!(distance(&found.tensor(ours), &golden.values(theirs)) <= REWRITTEN);
            }
            if row == "value_zeroing_tokens" {
                let layers: Vec<f64> = (0..3)
                    .flat_map(|l| golden.values(&format!("value_zeroing_raw_{l}")))
                    .collect();
                assert!(distance(&found.tensor("value_zeroing"), &layers) <= REWRITTEN);
            }
        }
        d.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_neurons_and_conductance_are_those_of_captum() {
    let golden = Golden::read("bert");
    let model = "bert.dynamo20";
    let d = TestDaemon::with(&[model]).await;
    for layer in 0..3 {
        // What leaves the layer, its norm included.
        let site = format!("hidden_states.{}", layer + 1);
        let kind = integrated(20, pb::Quadrature::GaussLegendre, &site);
        let found = explain(&d, golden.ask(model, kind)).await.unwrap();
        golden.holds(model, &found, &format!("layer_ig_{layer}"), GRADIENT);
        for (rule, quadrature) in [
            ("gausslegendre", pb::Quadrature::GaussLegendre),
            ("riemann_trapezoid", pb::Quadrature::Trapezoid),
            ("riemann_right", pb::Quadrature::RiemannRight),
        ] {
            let kind = Kind::Conductance(pb::Conductance {
                layer: site.clone(),
                steps: 20,
                quadrature: quadrature.into(),
            });
            let found = explain(&d, golden.ask(model, kind)).await.unwrap();
            golden.holds(
                model,
                &found,
                &format!("conductance_{rule}_{layer}"),
                GRADIENT,
            );
        }
    }
    let kind = integrated(20, pb::Quadrature::GaussLegendre, "hook_embed_out");
    let found = explain(&d, golden.ask(model, kind)).await.unwrap();
    golden.holds(model, &found, "ig_embedding_block", GRADIENT);

    let neuron = golden.ids("neuron");
    let request = pb::AttributeRequest {
        target: Some(pb::Target {
            of: Some(pb::target::Of::Unit(pb::Unit {
                hook: format!("blocks.{}.mlp.hook_post", neuron[0]),
                position: i32::try_from(neuron[1]).unwrap(),
                index: neuron[2],
            })),
            ..pb::Target::default()
        }),
        ..golden.ask(model, Kind::InputXGradient(pb::InputXGradient::default()))
    };
    let found = explain(&d, request).await.unwrap();
    golden.holds(model, &found, "neuron_gradient", GRADIENT);
    assert!((found.result.value - golden.number("neuron_value")).abs() < REWRITTEN);
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn perturbations_are_those_of_captum() {
    let golden = Golden::read("bert");
    let model = "bert.legacy14";
    let d = TestDaemon::with(&[model]).await;
    let occlusion = |window, stride| Kind::Occlusion(pb::Occlusion { window, stride });
    for (kind, name) in [
        (Kind::Ablation(pb::Ablation {}), "ablation"),
        (Kind::LeaveOneOut(pb::LeaveOneOut {}), "leave_one_out"),
        (occlusion(3, 1), "occlusion_3_1"),
        (occlusion(4, 2), "occlusion_4_2"),
    ] {
        let found = explain(&d, golden.ask(model, kind)).await.unwrap();
        golden.holds(model, &found, name, DIFFERENCE);
    }
    // All coalitions of the six free tokens.
    let short = |kind| pb::AttributeRequest {
        target: golden.target(),
        baseline: against(&golden.ids("short_baseline_ids")),
        ..about(model, &golden.ids("short_ids"), kind)
    };
    let shapley = Kind::ShapleySampling(pb::ShapleySampling {
        permutations: 40,
        ..pb::ShapleySampling::default()
    });
    for (kind, name) in [
        (shapley, "shapley_exact"),
        (
            Kind::KernelShap(pb::KernelShap::default()),
            "kernel_shap_shap",
        ),
    ] {
        let found = explain(&d, short(kind)).await.unwrap();
        assert!(found.result.exact);
        let scores = found.scores();
        assert!(
            scores[0].abs() < DIFFERENCE && scores[7].abs() < DIFFERENCE,
            "special tokens"
        );
        let off = distance(&scores[1..7], &golden.values(name));
        assert!(off < DIFFERENCE, "{name}: {off}");
    }
    d.stop().await;
}

#[test]
fn shapley_values_and_regressions_are_those_of_the_packages() {
    let golden = Golden::read("bert");
    let near = |found: &[f64], name: &str| {
        let off = distance(found, &golden.values(name));
        assert!(off < CLOSE, "{name}: {off}");
    };
    near(
        &shapley_values(&golden.values("short_values"), 6),
        "shapley_exact",
    );
    near(
        &shapley_values(&golden.values("full_values"), 10),
        "shapley_full",
    );

    // The shap package's regression, given what it drew.
    let values = golden.values("full_values");
    let (nobody, everybody) = (values[0], values[1023]);
    let outputs: Vec<f64> = golden
        .values("shap_sampled_outputs")
        .iter()
        .map(|v| v - nobody)
        .collect();
    let rows = golden.rows("shap_sampled_masks");
    let weights = golden.values("shap_sampled_weights");
    let data = Data {
        rows: &rows,
        targets: &outputs,
        weights: &weights,
    };
    near(&data.summing_to(everybody - nobody), "shap_sampled");

    near(
        &kernel_shap::captum_fit(
            &golden.masks("kernel_shap_captum_masks"),
            &golden.values("kernel_shap_captum_outputs"),
        ),
        "kernel_shap_captum",
    );

    // Captum's weights tell the distances of the inputs.
    let distances: Vec<f64> = golden
        .values("lime_captum_weights")
        .iter()
        .map(|w| (-2.0 * w.ln()).max(0.0).sqrt())
        .collect();
    let fitted = lime::captum_fit(
        &golden.masks("lime_captum_masks"),
        &golden.values("lime_captum_outputs"),
        &distances,
        1.0,
        0.01,
    );
    near(&fitted.coefficients, "lime_captum");
    assert!((fitted.intercept - golden.number("lime_captum_intercept")).abs() < CLOSE);

    let fitted = lime::text_fit(
        &golden.masks("lime_text_masks"),
        &golden.values("lime_text_outputs"),
        25.0,
        1.0,
    );
    near(&fitted.coefficients, "lime_text");
    assert!((fitted.intercept - golden.number("lime_text_intercept")).abs() < CLOSE);
}

#[test]
fn infidelity_is_that_of_captum() {
    let golden = Golden::read("bert");
    for of in ["gradient", "features"] {
        let name = |part: &str| format!("infidelity_{of}{part}");
        let (raw, scaled) = infidelity(
            &golden.values(&name("_expected")),
            &golden.values(&name("_changes")),
        );
        assert!(
            (raw - golden.number(&name(""))).abs() < CLOSE,
            "{of}: {raw}"
        );
        assert!(
            (scaled - golden.number(&name("_scaled"))).abs() < CLOSE,
            "{of}: {scaled}"
        );
    }
}

#[test]
fn the_sampled_permutations_of_captum_give_its_values() {
    let golden = Golden::read("bert");
    let values = golden.values("full_values");
    let mut sums = vec![0.0; 10];
    let orders = golden.rows("permutations");
    for order in &orders {
        let mut there = 0usize;
        for player in order {
            let with = there | 1 << *player as usize;
            sums[*player as usize] += (values[with] - values[there]) / orders.len() as f64;
            there = with;
        }
    }
    assert!(distance(&sums, &golden.values("shapley_sampled")) < CLOSE);
}

#[test]
fn a_rollout_and_a_flow_of_one_head_are_what_the_definition_says() {
    let uniform = Square {
        n: 3,
        values: vec![1.0 / 3.0; 9],
    };
    let rolled = rollout(&[uniform.clone(), uniform.clone()]).unwrap();
    for row in 0..3 {
        assert!(
            (rolled.row(row).iter().sum::<f64>() - 1.0).abs() < CLOSE,
            "rows sum to one"
        );
    }
    assert_eq!(flow(&[uniform], 0).len(), 3);
}
