//! Explanations over real gRPC with real workers: the relations that every method must satisfy, every error, streams that are left.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/attribution.rs"]
mod attribution;
#[path = "support/daemon.rs"]
mod daemon;

use std::time::{Duration, Instant};

use attribution::{about, against, choice, client, distance, explain};
use daemon::TestDaemon;
use introspectd::service::wire::introspect::{
    self as pb, attribute_response::Item, attribute_stream_response as bulk,
    evaluate_response::Item as Judged, method::Kind,
};
use tonic::Code;
use tonic_types::StatusExt as _;

/// Same mathematics by other operators.
const REWRITTEN: f64 = 1e-4;
/// Of a rule of 50 points along a path of these models.
const QUADRATURE: f64 = 1e-3;

const IDS: [u32; 9] = [2, 17, 45, 101, 200, 33, 71, 150, 3];

/// Every fixture of text in single precision that takes rows of nine tokens.
const DIFFERENTIABLE: [&str; 22] = [
    "bert.attention23",
    "bert.dynamo20",
    "bert.external",
    "bert.fused",
    "bert.legacy14",
    "bert.multihead",
    "bert.named",
    "bert.sdpa17",
    "distilbert.dynamo20",
    "distilbert.fused",
    "distilbert.legacy14",
    "encoder_layer.dynamo20",
    "gpt2.attention23",
    "gpt2.dynamo20",
    "gpt2.fused",
    "gpt2.legacy14",
    "gpt2.unidirectional",
    "llama.attention23",
    "llama.dynamo20",
    "llama.fused",
    "llama.legacy14",
    "llama_wide.genai",
];

fn integrated() -> Kind {
    Kind::IntegratedGradients(pb::IntegratedGradients::default())
}

/// Enough points for paths that bend sharply, as those of random weights do.
fn finely_integrated() -> Kind {
    Kind::IntegratedGradients(pb::IntegratedGradients {
        tolerance: QUADRATURE,
        max_steps: 4096,
        ..pb::IntegratedGradients::default()
    })
}

fn differences(path_steps: u32) -> Kind {
    Kind::FiniteDifference(pb::FiniteDifference {
        path_steps,
        ..pb::FiniteDifference::default()
    })
}

fn is_text(model: &str) -> bool {
    ["gpt2", "llama", "encoder_layer"]
        .iter()
        .any(|m| model.starts_with(m))
}

fn target(model: &str) -> Option<pb::Target> {
    if is_text(model) {
        choice(7, Some(5))
    } else {
        choice(1, None)
    }
}

fn zero() -> Option<pb::Baseline> {
    Some(pb::Baseline {
        kind: Some(pb::baseline::Kind::Constant(pb::Constant::Zero.into())),
        replace_special: true,
    })
}

fn of(model: &str, kind: Kind) -> pb::AttributeRequest {
    pb::AttributeRequest {
        target: target(model),
        ..about(model, &IDS, kind)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn integrated_gradients_are_complete_and_differences_agree_with_gradients() {
    let d = TestDaemon::with(&DIFFERENTIABLE).await;
    for model in DIFFERENTIABLE {
        let whole = explain(&d, of(model, finely_integrated())).await.unwrap();
        let ratio = whole.result.residual_ratio.unwrap();
        assert!(ratio <= QUADRATURE, "{model}: {:?}", whole.result);
        assert!((whole.sum() - whole.change() - whole.result.delta.unwrap()).abs() < REWRITTEN);
        assert_eq!(whole.header.value, whole.result.value);

        // The derivative along (x - x') is that of input x gradient where x' is zero.
        let exact = pb::AttributeRequest {
            baseline: zero(),
            ..of(model, Kind::InputXGradient(pb::InputXGradient::default()))
        };
        // Where ReLUs bend every few hundredths of the way, a step must be shorter than that.
        let step = if model.starts_with("encoder_layer") {
            0.001
        } else {
            0.0
        };
        let numeric = pb::AttributeRequest {
            baseline: zero(),
            ..of(
                model,
                Kind::FiniteDifference(pb::FiniteDifference {
                    step,
                    ..pb::FiniteDifference::default()
                }),
            )
        };
        let exact = explain(&d, exact).await.unwrap();
        let numeric = explain(&d, numeric).await.unwrap();
        let errors = numeric.tensor("error");
        for (i, (a, b)) in exact.scores().iter().zip(numeric.scores()).enumerate() {
            assert!(
                (a - b).abs() <= errors[i],
                "{model} token {i}: {a} {b} +- {}",
                errors[i]
            );
        }
        let largest = exact.scores().iter().fold(0.0f64, |m, s| m.max(s.abs()));
        assert!(
            numeric.result.error.unwrap() < 0.05 * largest,
            "{model}: the estimate says something"
        );

        if !["bert.dynamo20", "gpt2.legacy14", "llama.dynamo20"].contains(&model) {
            continue;
        }
        // And integrated over the path, integrated gradients.
        let same = Kind::IntegratedGradients(pb::IntegratedGradients {
            steps: 12,
            ..pb::IntegratedGradients::default()
        });
        let same = explain(&d, of(model, same)).await.unwrap();
        let path = explain(&d, of(model, differences(12))).await.unwrap();
        let off = distance(&path.scores(), &same.scores());
        assert!(off < 0.01, "{model}: {off}");
    }
    d.stop().await;
}

/// Without position embeddings what enters the first block is the token embedding, so that both sites give the same.
#[tokio::test(flavor = "multi_thread")]
async fn sites_that_are_the_same_place_give_the_same() {
    let models = [
        "llama.legacy14",
        "llama.dynamo20",
        "llama.attention23",
        "llama.fused",
    ];
    let d = TestDaemon::with(&models).await;
    for model in models {
        let at = async |site: &str| {
            let kind = Kind::IntegratedGradients(pb::IntegratedGradients {
                steps: 16,
                site: site.to_owned(),
                ..pb::IntegratedGradients::default()
            });
            explain(&d, of(model, kind)).await.unwrap()
        };
        let (embed, entering) = (at("hook_embed").await, at("hook_embed_out").await);
        assert!(
            (embed.change() - entering.change()).abs() < REWRITTEN,
            "{model}"
        );
        let off = distance(&entering.scores(), &embed.scores());
        assert!(off < REWRITTEN, "{model}: {off}");
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn adapting_reaches_its_tolerance_and_says_what_it_took() {
    let d = TestDaemon::with(&["bert.dynamo20"]).await;
    let adaptive = |tolerance| {
        of(
            "bert.dynamo20",
            Kind::IntegratedGradients(pb::IntegratedGradients {
                tolerance,
                ..pb::IntegratedGradients::default()
            }),
        )
    };
    let fixed = explain(&d, of("bert.dynamo20", integrated()))
        .await
        .unwrap();
    for tolerance in [0.05, 0.001] {
        let found = explain(&d, adaptive(tolerance)).await.unwrap();
        assert!(found.result.residual_ratio.unwrap() <= tolerance);
        let cost = found.result.cost.unwrap();
        assert_eq!(
            cost.gradient_rows,
            u64::from(found.result.steps.unwrap()),
            "every point once"
        );
        assert!(found.header.cost.unwrap().at_most);
        assert!(distance(&found.scores(), &fixed.scores()) < 10.0 * tolerance);
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn perturbation_methods_satisfy_their_axioms() {
    let model = "distilbert.legacy14";
    let d = TestDaemon::with(&[model]).await;
    let ask = async |kind| explain(&d, of(model, kind)).await.unwrap();

    let shapley = ask(Kind::ShapleySampling(pb::ShapleySampling {
        permutations: 20,
        ..pb::ShapleySampling::default()
    }))
    .await;
    assert!(shapley.result.exact, "2^7 coalitions are fewer than 20 x 7");
    assert!((shapley.sum() - shapley.change()).abs() < REWRITTEN);
    let kernel = ask(Kind::KernelShap(pb::KernelShap::default())).await;
    assert!(kernel.result.exact);
    assert!(
        distance(&kernel.scores(), &shapley.scores()) < REWRITTEN,
        "both are the Shapley values"
    );

    // Sampled ones lie within three standard errors of the exact ones, and sum up exactly.
    for antithetic in [false, true] {
        let sampled = ask(Kind::ShapleySampling(pb::ShapleySampling {
            permutations: 16,
            antithetic,
        }))
        .await;
        assert!(!sampled.result.exact && sampled.result.seed == Some(0));
        assert!((sampled.sum() - sampled.change()).abs() < REWRITTEN);
        let errors = sampled.tensor("error");
        let scores = sampled.scores();
        let close = scores.iter().zip(shapley.scores()).zip(&errors);
        let outside = close
            .filter(|((a, b), e)| (**a - b).abs() > 3.0 * *e + 1e-6)
            .count();
        assert!(
            outside <= 1,
            "{outside} scores outside of three standard errors"
        );
    }

    // Who is replaced by itself changes nothing.
    let mut same = IDS.map(|_| 0);
    (same[0], same[3], same[8]) = (IDS[0], IDS[3], IDS[8]);
    for kind in [
        Kind::Ablation(pb::Ablation {}),
        Kind::KernelShap(pb::KernelShap::default()),
        Kind::ShapleySampling(pb::ShapleySampling {
            permutations: 60,
            ..pb::ShapleySampling::default()
        }),
        integrated(),
        differences(0),
    ] {
        let request = pb::AttributeRequest {
            baseline: against(&same),
            ..of(model, kind)
        };
        let found = explain(&d, request).await.unwrap();
        for at in [0, 3, 8] {
            assert!(
                found.scores()[at].abs() < 1e-5,
                "{}: {:?}",
                found.result.method,
                found.scores()
            );
        }
        assert!(found.scores()[1].abs() > 1e-4);
    }

    // An ablation is what F changes by: by hand, for one token.
    let ablation = ask(Kind::Ablation(pb::Ablation {})).await;
    let mut without = IDS;
    without[4] = 0;
    let by_hand = explain(
        &d,
        pb::AttributeRequest {
            target: target(model),
            ..about(model, &without, Kind::Saliency(pb::Saliency::default()))
        },
    )
    .await
    .unwrap();
    let expected = ablation.result.value - by_hand.header.value;
    assert!((ablation.scores()[4] - expected).abs() < REWRITTEN);
    // A window of one is an ablation.
    let window = ask(Kind::Occlusion(pb::Occlusion {
        window: 1,
        stride: 1,
    }))
    .await;
    assert!(distance(&window.scores(), &ablation.scores()) < REWRITTEN);
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn targets_are_linear_and_named_in_many_ways() {
    let model = "bert.legacy14";
    let d = TestDaemon::with(&[model, "gpt2.legacy14"]).await;
    let with = async |target: Option<pb::Target>| {
        let request = pb::AttributeRequest {
            target,
            ..about(model, &IDS, integrated())
        };
        explain(&d, request).await.unwrap()
    };
    let one = |index| pb::Choice {
        what: Some(pb::choice::What::Index(index)),
        position: None,
    };
    let (first, second) = (with(choice(0, None)).await, with(choice(1, None)).await);
    let contrast = with(Some(pb::Target {
        of: Some(pb::target::Of::Contrast(pb::Contrast {
            choice: Some(one(0)),
            against: Some(one(1)),
        })),
        ..pb::Target::default()
    }))
    .await;
    let difference: Vec<f64> = first
        .scores()
        .iter()
        .zip(second.scores())
        .map(|(a, b)| a - b)
        .collect();
    assert!(
        distance(&contrast.scores(), &difference) < REWRITTEN,
        "linearity"
    );
    assert_eq!(contrast.header.terms.len(), 2);

    // The predicted class is the one of the greatest score.
    let predicted = with(None).await;
    let best = predicted.header.terms[0].index;
    let named = with(choice(best, None)).await;
    assert_eq!(predicted.scores(), named.scores());
    for other in [&first, &second] {
        assert!(predicted.result.value >= other.result.value);
    }

    // The log-probability is a change of sign away from log(1 + exp).
    let log = with(Some(pb::Target {
        quantity: pb::Quantity::LogProbability.into(),
        ..pb::Target::default()
    }))
    .await;
    let probability = with(Some(pb::Target {
        quantity: pb::Quantity::Probability.into(),
        ..pb::Target::default()
    }))
    .await;
    assert!((log.result.value.exp() - probability.result.value).abs() < 1e-5);
    assert!(probability.result.residual_ratio.unwrap() < QUADRATURE);

    // A continuation is the sum of what foretells each of its tokens.
    let prompt = [5, 9, 12, 40];
    let continued = explain(
        &d,
        pb::AttributeRequest {
            target: Some(pb::Target {
                of: Some(pb::target::Of::Continuation(pb::Continuation {
                    what: Some(pb::continuation::What::Tokens(pb::TokenIds {
                        ids: vec![50, 61],
                        type_ids: Vec::new(),
                    })),
                })),
                ..pb::Target::default()
            }),
            ..about("gpt2.legacy14", &prompt, Kind::Ablation(pb::Ablation {}))
        },
    )
    .await
    .unwrap();
    let mut sum = 0.0;
    for (index, position) in [(50, 3), (61, 4)] {
        let mut target = choice(index, Some(position)).unwrap();
        target.quantity = pb::Quantity::LogProbability.into();
        let request = pb::AttributeRequest {
            target: Some(target),
            ..about(
                "gpt2.legacy14",
                &[5, 9, 12, 40, 50, 61],
                Kind::Saliency(pb::Saliency::default()),
            )
        };
        sum += explain(&d, request).await.unwrap().header.value;
    }
    assert!((continued.header.value - sum).abs() < REWRITTEN);
    let scores = continued.scores();
    assert_eq!(
        (scores[4], scores[5]),
        (0.0, 0.0),
        "what is asked is not replaced"
    );

    // A neuron is a target like any other.
    let neuron = with(Some(pb::Target {
        of: Some(pb::target::Of::Unit(pb::Unit {
            hook: "blocks.1.mlp.hook_post".to_owned(),
            position: 4,
            index: 10,
        })),
        ..pb::Target::default()
    }))
    .await;
    assert!(
        neuron.result.residual_ratio.unwrap() < 0.05,
        "{:?}",
        neuron.result
    );
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_method_answers_for_text_and_the_same_seed_gives_the_same() {
    let model = "bert.legacy14";
    let d = TestDaemon::with(&[model, "llama.legacy14"]).await;
    let all = |layer: &str| {
        vec![
            integrated(),
            differences(0),
            Kind::FiniteDifference(pb::FiniteDifference {
                directions: pb::Directions::Random.into(),
                samples: 8,
                ..pb::FiniteDifference::default()
            }),
            Kind::FiniteDifference(pb::FiniteDifference {
                directions: pb::Directions::Dimensions.into(),
                ..pb::FiniteDifference::default()
            }),
            Kind::Saliency(pb::Saliency::default()),
            Kind::InputXGradient(pb::InputXGradient::default()),
            Kind::AttnLrp(pb::AttnLrp::default()),
            Kind::SmoothGrad(pb::SmoothGrad::default()),
            Kind::GradientShap(pb::GradientShap {
                noise: 0.01,
                ..pb::GradientShap::default()
            }),
            Kind::Conductance(pb::Conductance {
                layer: layer.to_owned(),
                ..pb::Conductance::default()
            }),
            Kind::Ablation(pb::Ablation {}),
            Kind::LeaveOneOut(pb::LeaveOneOut {}),
            Kind::Occlusion(pb::Occlusion::default()),
            Kind::ShapleySampling(pb::ShapleySampling {
                permutations: 5,
                antithetic: true,
            }),
            Kind::KernelShap(pb::KernelShap {
                samples: 40,
                ..pb::KernelShap::default()
            }),
            Kind::KernelShap(pb::KernelShap {
                samples: 60,
                variant: pb::KernelShapVariant::Captum.into(),
            }),
            Kind::Lime(pb::Lime {
                samples: 100,
                ..pb::Lime::default()
            }),
            Kind::Lime(pb::Lime {
                samples: 100,
                variant: pb::LimeVariant::Captum.into(),
                ..pb::Lime::default()
            }),
            Kind::AttentionRollout(pb::AttentionRollout::default()),
            Kind::AttentionFlow(pb::AttentionFlow::default()),
            Kind::GradientAttention(pb::GradientAttention::default()),
            Kind::ValueZeroing(pb::ValueZeroing::default()),
        ]
    };
    for model in [model, "llama.legacy14"] {
        for kind in all("blocks.1.hook_resid_post") {
            let name = format!("{model} {kind:?}");
            let request = pb::AttributeRequest {
                seed: 11,
                ..of(model, kind)
            };
            let found = explain(&d, request.clone())
                .await
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(found.scores().len(), IDS.len(), "{name}");
            assert!(
                found.scores().iter().any(|s| s.abs() > 1e-6),
                "{name}: {:?}",
                found.scores()
            );
            assert_eq!(found.header.method, found.result.method, "{name}");
            assert_eq!(found.result.precision, "f32");
            assert!(!found.result.convention.is_empty() && !found.header.site.is_empty());
            let (planned, spent) = (found.header.cost.unwrap(), found.result.cost.unwrap());
            // Beside what was planned: the row itself, the baseline, the site, the ends of a path.
            let extra = spent.forward_rows + spent.gradient_rows;
            let plan = planned.forward_rows + planned.gradient_rows;
            assert!(extra <= plan + 6, "{name}: {extra} rows, {plan} planned");
            assert!(
                planned.at_most || extra >= plan,
                "{name}: {extra} rows, {plan} planned"
            );
            assert_eq!(found.summary.rows, extra);
            let again = explain(&d, request).await.unwrap();
            assert!(
                distance(&again.scores(), &found.scores()) < REWRITTEN,
                "{name}: the same seed"
            );
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn quantised_models_are_explained_by_differences_and_gradients_are_refused() {
    let model = "bert.int8";
    let d = TestDaemon::with(&[model]).await;
    let refused = explain(&d, of(model, integrated())).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    for part in ["DynamicQuantizeLinear", "finite differences"] {
        assert!(refused.message().contains(part), "{refused}");
    }
    for kind in [differences(0), Kind::Ablation(pb::Ablation {})] {
        let found = explain(&d, of(model, kind)).await.unwrap();
        assert!(found.scores().iter().any(|s| s.abs() > 1e-3));
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_explained_by_their_pixels() {
    let model = "vit.legacy14";
    let d = TestDaemon::with(&[model]).await;
    let pixels: Vec<f32> = (0..3 * 32 * 32).map(|i| (i as f32 * 0.37).sin()).collect();
    let tensor = |values: &[f32], name: &str, shape: Vec<u64>| pb::Tensor {
        name: name.to_owned(),
        dtype: pb::DType::F32.into(),
        shape,
        data: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        ..pb::Tensor::default()
    };
    let ask = |kind| pb::AttributeRequest {
        model: model.to_owned(),
        input: Some(pb::Input {
            kind: Some(pb::input::Kind::Tensors(pb::NamedTensors {
                tensors: vec![tensor(&pixels, "pixel_values", vec![1, 3, 32, 32])],
            })),
        }),
        target: choice(1, None),
        method: Some(pb::Method { kind: Some(kind) }),
        ..pb::AttributeRequest::default()
    };
    let whole = explain(&d, ask(finely_integrated())).await.unwrap();
    assert_eq!(whole.tensors["attributions"].0, [3, 32, 32]);
    assert!(
        whole.result.residual_ratio.unwrap() <= QUADRATURE,
        "{:?}",
        whole.result
    );
    let saliency = explain(&d, ask(Kind::Saliency(pb::Saliency::default())))
        .await
        .unwrap();
    assert!(saliency.scores().iter().all(|s| *s >= 0.0));

    // A window as large as the image is the whole change.
    let all = Kind::Occlusion(pb::Occlusion {
        window: 32,
        stride: 32,
    });
    let occluded = explain(&d, ask(all)).await.unwrap();
    assert_eq!(occluded.header.cost.unwrap().forward_rows, 1);
    for score in occluded.scores() {
        assert!((score - whole.change()).abs() < REWRITTEN * whole.change().abs().max(1.0));
    }
    let windows = explain(&d, ask(Kind::Occlusion(pb::Occlusion::default())))
        .await
        .unwrap();
    assert_eq!(windows.header.cost.unwrap().forward_rows, 49);

    // Inside, positions get the scores: 16 patches and the class.
    for kind in [
        Kind::IntegratedGradients(pb::IntegratedGradients {
            site: "hook_embed_out".to_owned(),
            ..pb::IntegratedGradients::default()
        }),
        Kind::Conductance(pb::Conductance {
            layer: "blocks.0.hook_resid_post".to_owned(),
            ..pb::Conductance::default()
        }),
        Kind::AttentionRollout(pb::AttentionRollout::default()),
        Kind::GradientAttention(pb::GradientAttention::default()),
        Kind::ValueZeroing(pb::ValueZeroing::default()),
    ] {
        let found = explain(&d, ask(kind)).await.unwrap();
        assert_eq!(
            found.tensors["attributions"].0,
            [17],
            "{}",
            found.result.method
        );
    }

    // The gradient is the derivative: a step along it changes F by its length.
    let exact = explain(&d, ask(Kind::InputXGradient(pb::InputXGradient::default())))
        .await
        .unwrap();
    let up: Vec<f32> = pixels.iter().map(|p| p * 1.01).collect();
    let mut more = ask(Kind::Saliency(pb::Saliency::default()));
    more.input = Some(pb::Input {
        kind: Some(pb::input::Kind::Tensors(pb::NamedTensors {
            tensors: vec![tensor(&up, "pixel_values", vec![1, 3, 32, 32])],
        })),
    });
    let more = explain(&d, more).await.unwrap();
    let slope = (more.header.value - exact.header.value) / 0.01;
    assert!(
        (slope - exact.sum()).abs() < 0.05 * exact.sum().abs().max(0.1),
        "{slope} {}",
        exact.sum()
    );
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn words_and_spans_are_the_sums_of_their_tokens() {
    let model = "bert.legacy14";
    let d = TestDaemon::with(&[model]).await;
    let text = "a very unlikely story";
    let ask = |kind, features| pb::AttributeRequest {
        model: model.to_owned(),
        input: Some(pb::Input {
            kind: Some(pb::input::Kind::Text(pb::Text {
                text: text.to_owned(),
                ..pb::Text::default()
            })),
        }),
        target: choice(1, None),
        method: Some(pb::Method { kind: Some(kind) }),
        features,
        ..pb::AttributeRequest::default()
    };
    let words = Some(pb::Features {
        grouping: pb::Grouping::Words.into(),
        ..pb::Features::default()
    });
    let spans = Some(pb::Features {
        grouping: pb::Grouping::Spans.into(),
        spans: vec![pb::Span {
            start: 7,
            end: 21,
            sequence: 0,
        }],
    });
    let tokens = explain(&d, ask(integrated(), None)).await.unwrap();
    let by_word = explain(&d, ask(integrated(), words.clone())).await.unwrap();
    let names: Vec<&str> = by_word
        .header
        .features
        .iter()
        .map(|f| f.text.as_str())
        .collect();
    assert_eq!(names, ["a", "very", "unlikely", "story"]);
    for (feature, score) in by_word.header.features.iter().zip(by_word.scores()) {
        let sum: f64 = feature
            .tokens
            .iter()
            .map(|t| tokens.scores()[*t as usize])
            .sum();
        assert!((sum - score).abs() < REWRITTEN);
    }
    assert!(
        (by_word.sum() - by_word.change()).abs() < QUADRATURE * by_word.change().abs().max(1.0)
    );
    let by_span = explain(&d, ask(integrated(), spans.clone())).await.unwrap();
    assert_eq!(by_span.header.features[0].text, "unlikely story");
    assert!((by_span.scores()[0] - by_word.scores()[2] - by_word.scores()[3]).abs() < REWRITTEN);

    // Methods that replace features replace them whole: one span is all that F changes by.
    let shapley = Kind::KernelShap(pb::KernelShap::default());
    let exact = explain(&d, ask(shapley, spans)).await.unwrap();
    assert!((exact.scores()[0] - exact.change()).abs() < REWRITTEN);
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn evaluations_compare_methods() {
    let model = "distilbert.legacy14";
    let d = TestDaemon::with(&[model]).await;
    let request = pb::EvaluateRequest {
        request: Some(of(model, integrated())),
        methods: [
            integrated(),
            Kind::KernelShap(pb::KernelShap::default()),
            Kind::AttentionRollout(pb::AttentionRollout::default()),
        ]
        .map(|kind| pb::Method { kind: Some(kind) })
        .to_vec(),
        sensitivity_samples: 2,
        ..pb::EvaluateRequest::default()
    };
    let mut stream = client(&d)
        .await
        .evaluate(request)
        .await
        .unwrap()
        .into_inner();
    let (mut judged, mut comparison, mut summary) = (Vec::new(), None, None);
    while let Some(message) = stream.message().await.unwrap() {
        match message.item.unwrap() {
            Judged::Header(h) => assert_eq!(h.model, model),
            Judged::Evaluation(e) => judged.push(e),
            Judged::Comparison(c) => comparison = Some(c),
            Judged::Summary(s) => summary = Some(s),
        }
    }
    assert_eq!(judged.len(), 3);
    assert!(summary.unwrap().rows > 0);
    for e in &judged {
        assert!(
            e.infidelity_scaled <= e.infidelity + 1e-12,
            "the best factor is no worse"
        );
        assert_eq!(e.fractions.len(), 5);
    }
    assert!(judged[0].sensitivity_max.unwrap() > 0.0);
    assert!(
        judged[2].sensitivity_max.is_none(),
        "a rollout does not look at embeddings"
    );
    // Shapley values foretell changes better than a rollout, which has not seen the target.
    assert!(judged[1].infidelity_scaled < judged[2].infidelity_scaled);
    let comparison = comparison.unwrap();
    assert_eq!(comparison.methods[0], "integrated_gradients");
    for t in [comparison.spearman.unwrap(), comparison.kendall.unwrap()] {
        assert_eq!(t.shape, [3, 3]);
        let values: Vec<f32> = t
            .data
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        for i in 0..3 {
            assert!((values[i * 4] - 1.0).abs() < 1e-6);
            for j in 0..3 {
                assert_eq!(values[i * 3 + j], values[j * 3 + i]);
            }
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bulk_answers_in_order_and_goes_on_after_failures() {
    let model = "bert.legacy14";
    let d = TestDaemon::with(&[model]).await;
    let good = of(model, Kind::Ablation(pb::Ablation {}));
    let bad = pb::AttributeRequest {
        target: choice(99, None),
        ..good.clone()
    };
    let requests: Vec<pb::AttributeStreamRequest> =
        [("a", good.clone()), ("b", bad), ("c", good.clone())]
            .into_iter()
            .map(|(id, request)| pb::AttributeStreamRequest {
                id: id.to_owned(),
                request: Some(request),
            })
            .collect();
    let stream = client(&d)
        .await
        .attribute_stream(futures::stream::iter(requests))
        .await;
    let mut stream = stream.unwrap().into_inner();
    let single = explain(&d, good).await.unwrap();
    let mut order = Vec::new();
    let mut reader = attribution::Reader::default();
    while let Some(message) = stream.message().await.unwrap() {
        match message.answer.unwrap() {
            bulk::Answer::Attribution(m) => {
                if let Some(found) = reader.take(m.item.unwrap()) {
                    assert!(distance(&found.scores(), &single.scores()) < REWRITTEN);
                    order.push(message.id);
                    reader = attribution::Reader::default();
                }
            }
            bulk::Answer::Failure(f) => {
                assert_eq!(f.code, Code::InvalidArgument as i32);
                assert_eq!(f.field, "target.choice.index");
                order.push(message.id);
            }
            bulk::Answer::Summary(s) => {
                assert_eq!((s.answered, s.failed), (2, 1));
                order.push("end".to_owned());
            }
        }
    }
    assert_eq!(order, ["a", "b", "c", "end"]);
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn costs_are_told_before_anything_expensive_runs() {
    let model = "bert.legacy14";
    let d = TestDaemon::tuned(&[model], |c| c.max_rows = 400).await;
    let estimate = async |kind| {
        let request = pb::EstimateCostRequest {
            request: Some(of(model, kind)),
        };
        client(&d)
            .await
            .estimate_cost(request)
            .await
            .map(tonic::Response::into_inner)
    };
    let cost = estimate(integrated()).await.unwrap();
    assert_eq!(cost.cost.unwrap().gradient_rows, 50);
    assert_eq!(cost.features, 9);
    assert!(cost.estimated_seconds > 0.0);
    let refused = estimate(Kind::Lime(pb::Lime::default())).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("5000 rows"), "{refused}");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_named() {
    let model = "bert.legacy14";
    let d = TestDaemon::with(&[model, "gpt2.legacy14", "vit.legacy14"]).await;
    let base = || of(model, integrated());
    let steps = |steps| {
        Kind::IntegratedGradients(pb::IntegratedGradients {
            steps,
            ..pb::IntegratedGradients::default()
        })
    };
    let site = |site: &str| {
        Kind::Saliency(pb::Saliency {
            site: site.to_owned(),
            ..pb::Saliency::default()
        })
    };
    let cases: Vec<(pb::AttributeRequest, Code, &str)> = vec![
        (
            pb::AttributeRequest {
                model: String::new(),
                ..base()
            },
            Code::InvalidArgument,
            "model",
        ),
        (
            pb::AttributeRequest {
                model: "none".to_owned(),
                ..base()
            },
            Code::NotFound,
            "",
        ),
        (
            pb::AttributeRequest {
                input: None,
                ..base()
            },
            Code::InvalidArgument,
            "input",
        ),
        (
            pb::AttributeRequest {
                target: choice(7, None),
                ..base()
            },
            Code::InvalidArgument,
            "target.choice.index",
        ),
        (
            pb::AttributeRequest {
                target: choice(0, Some(1)),
                ..base()
            },
            Code::InvalidArgument,
            "target.choice.position",
        ),
        (
            pb::AttributeRequest {
                target: choice(0, Some(40)),
                ..of("gpt2.legacy14", integrated())
            },
            Code::InvalidArgument,
            "target.choice.position",
        ),
        (
            pb::AttributeRequest {
                target: Some(pb::Target {
                    of: Some(pb::target::Of::Choice(pb::Choice {
                        what: Some(pb::choice::What::Label("none".to_owned())),
                        position: None,
                    })),
                    ..pb::Target::default()
                }),
                ..base()
            },
            Code::InvalidArgument,
            "target.choice.label",
        ),
        (
            pb::AttributeRequest {
                target: Some(pb::Target {
                    quantity: 77,
                    ..pb::Target::default()
                }),
                ..base()
            },
            Code::InvalidArgument,
            "target.quantity",
        ),
        (
            pb::AttributeRequest {
                baseline: against(&[1, 2]),
                ..base()
            },
            Code::InvalidArgument,
            "baseline.tokens.ids",
        ),
        (
            pb::AttributeRequest {
                baseline: against(&[9999; 9]),
                ..base()
            },
            Code::InvalidArgument,
            "baseline.tokens.ids[0]",
        ),
        (
            of(model, steps(5000)),
            Code::InvalidArgument,
            "method.integrated_gradients.steps",
        ),
        (
            of(model, site("blocks.9.hook_resid_post")),
            Code::FailedPrecondition,
            "",
        ),
        (
            of(model, site("blocks.0.attn.hook_pattern")),
            Code::InvalidArgument,
            "method.saliency.site",
        ),
        (
            of(model, Kind::Conductance(pb::Conductance::default())),
            Code::InvalidArgument,
            "method.conductance.layer",
        ),
        (
            of(
                model,
                Kind::Occlusion(pb::Occlusion {
                    window: 2,
                    stride: 3,
                }),
            ),
            Code::InvalidArgument,
            "method.occlusion.stride",
        ),
        (
            of(
                model,
                Kind::AttentionRollout(pb::AttentionRollout { position: Some(30) }),
            ),
            Code::InvalidArgument,
            "method.attention_rollout.position",
        ),
        (
            pb::AttributeRequest {
                features: Some(pb::Features {
                    grouping: pb::Grouping::Words.into(),
                    ..pb::Features::default()
                }),
                ..base()
            },
            Code::InvalidArgument,
            "features.grouping",
        ),
    ];
    for (request, code, field) in cases {
        let what = format!("{field}: {request:?}");
        let error = explain(&d, request).await.unwrap_err();
        assert_eq!(error.code(), code, "{what}: {error}");
        if !field.is_empty() {
            let details = error
                .get_details_bad_request()
                .unwrap_or_else(|| panic!("{what}: {error}"));
            assert_eq!(details.field_violations[0].field, field, "{error}");
        }
    }
    // The daemon is none the worse for it.
    explain(&d, base()).await.unwrap();
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn long_work_tells_how_far_it_is_and_ends_when_it_is_left() {
    let model = "bert.legacy14";
    let d = TestDaemon::with(&[model]).await;
    let long: Vec<u32> = (0..100).map(|i| 4 + i * 3).collect();
    let request = pb::AttributeRequest {
        target: choice(1, None),
        ..about(model, &long, differences(40))
    };
    let mut stream = client(&d)
        .await
        .attribute(request.clone())
        .await
        .unwrap()
        .into_inner();
    let (mut told, mut planned) = (Vec::<pb::AttributionProgress>::new(), 0);
    let begun = Instant::now();
    // On a busy machine the first of them come before anything can be said.
    while told.len() < 2 || told.last().is_some_and(|p| p.partial.is_none()) {
        let message = stream.message().await.unwrap().expect("work for minutes");
        match message.item.unwrap() {
            Item::Header(h) => planned = h.cost.unwrap().forward_rows,
            Item::Progress(p) => told.push(p),
            other => panic!("{other:?}"),
        }
        assert!(begun.elapsed() < Duration::from_secs(30));
    }
    let last = told.pop().unwrap();
    assert!(last.rows_done > told[0].rows_done);
    assert!(
        planned > 15_000 && last.rows_planned > planned,
        "the row itself, too"
    );
    let partial = last.partial.unwrap();
    assert_eq!(partial.shape, [100], "the attribution as it looks now");
    drop(stream);

    // Nothing of it keeps the engine: another call is answered, and the rows that waited are gone.
    let counts = d.daemon.registry().get(model).unwrap();
    let left = Instant::now();
    while counts.counts().open() > 0 {
        assert!(
            left.elapsed() < Duration::from_secs(5),
            "a call that was left is over"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    // A deadline ends it too.
    let mut request = tonic::Request::new(request);
    request.set_timeout(Duration::from_millis(700));
    let begun = Instant::now();
    let mut stream = client(&d)
        .await
        .attribute(request)
        .await
        .unwrap()
        .into_inner();
    let status = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it cannot be done"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(
        begun.elapsed() < Duration::from_secs(4),
        "{:?}",
        begun.elapsed()
    );
    d.stop().await;
}

/// A sweep of hours fills the engine; predicts go first, and none waits for more than the run that is under way.
#[tokio::test(flavor = "multi_thread")]
async fn predicts_are_not_delayed_by_a_sweep() {
    let model = "bert.legacy14";
    let d = TestDaemon::with(&[model]).await;
    let predict = async || {
        let selection = pb::Selection::default();
        let begun = Instant::now();
        let answer = d
            .capture(daemon::ids(model, &IDS, selection))
            .await
            .unwrap();
        assert!(answer.prediction.is_some());
        begun.elapsed()
    };
    predict().await;
    let long: Vec<u32> = (0..100).map(|i| 4 + i * 3).collect();
    let sweep = pb::AttributeRequest {
        target: choice(1, None),
        ..about(model, &long, differences(40))
    };
    let mut stream = client(&d)
        .await
        .attribute(sweep)
        .await
        .unwrap()
        .into_inner();
    let mut rows = 0;
    while rows == 0 {
        if let Some(Item::Progress(p)) = stream.message().await.unwrap().unwrap().item {
            rows = p.rows_done;
        }
    }
    // What a run of the sweep takes: 2048 padded tokens are 20 rows of it.
    let reader = tokio::spawn(async move {
        let (mut first, mut last) = (None, (Instant::now(), 0));
        while let Ok(Some(message)) = stream.message().await {
            if let Some(Item::Progress(p)) = message.item {
                last = (Instant::now(), p.rows_done);
                first.get_or_insert(last);
                if first.is_some_and(|f| f.0.elapsed() > Duration::from_secs(2)) {
                    break;
                }
            }
        }
        let first = first.unwrap();
        (last.0 - first.0).div_f64((last.1 - first.1).max(1) as f64)
    });
    let mut took = Vec::new();
    while !reader.is_finished() {
        took.push(predict().await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let run = reader.await.unwrap() * 20;
    took.sort();
    let median = took[took.len() / 2];
    // The run under way, its own, and as much again for a busy machine.
    let allowed = 4 * run + Duration::from_millis(50);
    assert!(
        median < allowed,
        "{median:?} of {} predicts, a run takes {run:?}",
        took.len()
    );
    d.stop().await;
}
