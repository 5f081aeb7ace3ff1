//! Explanations of what a probe says: the value is the score, gradients are what differences say, and every mistake is named.
#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/attribution.rs"]
mod attribution;
#[path = "support/daemon.rs"]
mod daemon;

use attribution::{about, explain};
use daemon::TestDaemon;
use introspectd::service::wire::introspect::{
    self as pb, method::Kind, probe_service_client::ProbeServiceClient,
};
use tonic::{Code, transport::Channel};
use tonic_types::StatusExt as _;

/// Same mathematics by other operators.
const REWRITTEN: f64 = 1e-4;
/// Of a path integral that adapts.
const QUADRATURE: f64 = 1e-3;
const IDS: [u32; 9] = [2, 17, 45, 101, 200, 33, 71, 150, 3];
const WIDTH: u16 = 32;
/// The stream between the two blocks, which every fixture has.
const HOOK: &str = "hidden_states.1";

async fn client(d: &TestDaemon) -> ProbeServiceClient<Channel> {
    ProbeServiceClient::new(d.channel().await)
}

/// Stores weights that have no meaning, but are none alike.
async fn bring(d: &TestDaemon, model: &str, name: &str, pooling: pb::Pooling, labels: &[&str]) {
    let rows = if labels.len() > 2 { labels.len() } else { 1 };
    let weight = (0..u16::try_from(rows).unwrap() * WIDTH).map(|i| (f32::from(i) * 1.7).sin());
    let request = pb::ImportProbeRequest {
        model: model.to_owned(),
        name: name.to_owned(),
        from: Some(pb::import_probe_request::From::Linear(pb::LinearProbe {
            hook: HOOK.to_owned(),
            pooling: pooling.into(),
            labels: labels.iter().map(|l| (*l).to_owned()).collect(),
            weight: weight.collect(),
            bias: vec![0.75; rows],
        })),
        ..pb::ImportProbeRequest::default()
    };
    client(d).await.import_probe(request).await.unwrap();
}

fn target(name: &str, label: &str, position: Option<i32>) -> pb::Target {
    pb::Target {
        of: Some(pb::target::Of::Probe(pb::ProbeTarget {
            probe: Some(pb::ProbeReference {
                name: name.to_owned(),
                ..pb::ProbeReference::default()
            }),
            label: label.to_owned(),
            position,
        })),
        ..pb::Target::default()
    }
}

fn of(model: &str, target: pb::Target, kind: Kind) -> pb::AttributeRequest {
    pb::AttributeRequest {
        target: Some(target),
        ..about(model, &IDS, kind)
    }
}

fn saliency(site: &str) -> Kind {
    Kind::Saliency(pb::Saliency {
        site: site.to_owned(),
        ..pb::Saliency::default()
    })
}

async fn scored(d: &TestDaemon, model: &str, name: &str) -> pb::ProbeScores {
    let request = pb::ScoreRequest {
        model: model.to_owned(),
        probes: vec![pb::ProbeReference {
            name: name.to_owned(),
            ..pb::ProbeReference::default()
        }],
        of: about(model, &IDS, saliency(""))
            .input
            .map(pb::score_request::Of::Input),
        ..pb::ScoreRequest::default()
    };
    let mut answer = client(d).await.score(request).await.unwrap().into_inner();
    answer.scores.remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_value_is_the_score_and_what_the_methods_say_of_it_holds_together() {
    let models = [
        "bert.dynamo20",
        "gpt2.legacy14",
        "llama.dynamo20",
        "bert.fused",
    ];
    let d = TestDaemon::with(&models).await;
    for model in models {
        for (name, pooling) in [
            ("mean", pb::Pooling::Mean),
            ("cls", pb::Pooling::Cls),
            ("last", pb::Pooling::Last),
            ("token", pb::Pooling::Unspecified),
        ] {
            bring(&d, model, name, pooling, &["no", "yes"]).await;
            let score = scored(&d, model, name).await;
            let position = score.input.is_none().then_some(-4);
            let value = match &score.input {
                Some(says) => says.values[0],
                None => score.tokens[5].values[0],
            };
            let whole = Kind::IntegratedGradients(pb::IntegratedGradients {
                tolerance: QUADRATURE,
                max_steps: 4096,
                ..pb::IntegratedGradients::default()
            });
            let whole = explain(&d, of(model, target(name, "", position), whole))
                .await
                .unwrap();
            let off = (whole.header.value - f64::from(value)).abs();
            assert!(
                off < REWRITTEN,
                "{model} {name}: {value} {:?}",
                whole.header
            );
            assert_eq!(whole.header.quantity(), pb::Quantity::Readout);
            assert_eq!(whole.header.terms[0].label, "yes");
            assert_eq!(
                whole.header.terms.len(),
                if name == "mean" { IDS.len() } else { 1 }
            );
            // The first token of a causal model sees nothing but itself, and it is the same in the baseline.
            if whole.change().abs() > REWRITTEN {
                assert!(
                    whole.result.residual_ratio.unwrap() <= QUADRATURE,
                    "{model} {name}"
                );
            }

            let exact = explain(
                &d,
                of(
                    model,
                    target(name, "yes", position),
                    Kind::InputXGradient(Default::default()),
                ),
            )
            .await
            .unwrap();
            let against = explain(
                &d,
                of(
                    model,
                    target(name, "no", position),
                    Kind::InputXGradient(Default::default()),
                ),
            )
            .await
            .unwrap();
            for (a, b) in exact.scores().iter().zip(against.scores()) {
                assert!((a + b).abs() < REWRITTEN, "the other class is the negative");
            }
            let numeric = pb::AttributeRequest {
                baseline: Some(pb::Baseline {
                    kind: Some(pb::baseline::Kind::Constant(pb::Constant::Zero.into())),
                    replace_special: true,
                }),
                ..of(
                    model,
                    target(name, "", position),
                    Kind::FiniteDifference(Default::default()),
                )
            };
            let numeric = explain(&d, numeric).await.unwrap();
            let errors = numeric.tensor("error");
            for (i, (a, b)) in exact.scores().iter().zip(numeric.scores()).enumerate() {
                assert!(
                    (a - b).abs() <= errors[i].max(REWRITTEN),
                    "{model} {name} {i}: {a} {b}"
                );
            }

            // Left out one by one: the score without a token, run as such.
            let left = explain(
                &d,
                of(
                    model,
                    target(name, "", position),
                    Kind::Occlusion(Default::default()),
                ),
            )
            .await
            .unwrap();
            assert_eq!(left.scores().len(), IDS.len());
            assert!(left.scores().iter().all(|s| s.is_finite()));
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_hook_point_itself_the_gradient_is_the_weights() {
    let model = "bert.dynamo20";
    let d = TestDaemon::with(&[model]).await;
    bring(&d, model, "three", pb::Pooling::Cls, &["a", "b", "c"]).await;
    let norm = Kind::Saliency(pb::Saliency {
        norm: pb::Norm::L2.into(),
        site: HOOK.to_owned(),
    });
    let found = explain(&d, of(model, target("three", "b", None), norm))
        .await
        .unwrap();
    let weights = (WIDTH..2 * WIDTH).map(|i| (f64::from(i) * 1.7).sin());
    let length = weights.map(|w| w * w).sum::<f64>().sqrt();
    let scores = found.scores();
    assert!(
        (scores[0] - length).abs() < REWRITTEN,
        "{scores:?} {length}"
    );
    assert!(scores[1..].iter().all(|s| *s == 0.0), "{scores:?}");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_named() {
    let model = "bert.dynamo20";
    let d = TestDaemon::with(&[model]).await;
    let two = &["no", "yes"][..];
    bring(&d, model, "mean", pb::Pooling::Mean, two).await;
    bring(&d, model, "max", pb::Pooling::Max, two).await;
    bring(&d, model, "token", pb::Pooling::Unspecified, two).await;
    bring(&d, model, "three", pb::Pooling::Mean, &["a", "b", "c"]).await;
    let unnamed = pb::Target {
        of: Some(pb::target::Of::Probe(pb::ProbeTarget::default())),
        ..pb::Target::default()
    };
    let probability = pb::Target {
        quantity: pb::Quantity::Probability.into(),
        ..target("mean", "", None)
    };
    let readout = pb::Target {
        quantity: pb::Quantity::Readout.into(),
        ..pb::Target::default()
    };
    for (asked, site, code, field) in [
        (unnamed, "", Code::InvalidArgument, "target.probe.probe"),
        (probability, "", Code::InvalidArgument, "target.quantity"),
        (readout, "", Code::InvalidArgument, "target.quantity"),
        (
            target("../x", "", None),
            "",
            Code::InvalidArgument,
            "target.probe.probe.name",
        ),
        (target("none", "", None), "", Code::NotFound, ""),
        (target("max", "", None), "", Code::FailedPrecondition, ""),
        (
            target("token", "", None),
            "",
            Code::InvalidArgument,
            "target.probe.position",
        ),
        (
            target("token", "", Some(9)),
            "",
            Code::InvalidArgument,
            "target.probe.position",
        ),
        (
            target("mean", "", Some(1)),
            "",
            Code::InvalidArgument,
            "target.probe.position",
        ),
        (
            target("mean", "maybe", None),
            "",
            Code::InvalidArgument,
            "target.probe.label",
        ),
        (
            target("three", "", None),
            "",
            Code::InvalidArgument,
            "target.probe.label",
        ),
        // What lies behind the probe's hook point has no part in its score.
        (
            target("mean", "", None),
            "blocks.1.hook_mlp_out",
            Code::FailedPrecondition,
            "",
        ),
    ] {
        let error = explain(&d, of(model, asked.clone(), saliency(site)))
            .await
            .unwrap_err();
        assert_eq!(error.code(), code, "{asked:?}: {error}");
        let found = error.get_details_bad_request();
        let found = found.map_or(String::new(), |b| b.field_violations[0].field.clone());
        assert_eq!(found, field, "{asked:?}: {error}");
    }
    explain(&d, of(model, target("mean", "", None), saliency("")))
        .await
        .unwrap();
    d.stop().await;
}

/// The direction of a probe in the place of the vector of an edit.
fn along(name: &str, label: &str) -> pb::Vector {
    pb::Vector {
        of: Some(pb::vector::Of::Probe(pb::ProbeDirection {
            name: name.to_owned(),
            label: label.to_owned(),
            ..pb::ProbeDirection::default()
        })),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_direction_a_probe_says_its_bias_and_along_it_more() {
    let models = ["bert.dynamo20", "gpt2.legacy14"];
    let d = TestDaemon::with(&models).await;
    for model in models {
        bring(&d, model, "mean", pb::Pooling::Mean, &["no", "yes"]).await;
        let plain = scored(&d, model, "mean").await.input.unwrap().values[0];
        let ask = async |operation| {
            let request = pb::ScoreRequest {
                model: model.to_owned(),
                probes: vec![pb::ProbeReference {
                    name: "mean".to_owned(),
                    ..pb::ProbeReference::default()
                }],
                of: about(model, &IDS, saliency(""))
                    .input
                    .map(pb::score_request::Of::Input),
                intervention: Some(pb::Intervention {
                    edits: vec![pb::Edit {
                        hook: HOOK.to_owned(),
                        operation: Some(operation),
                        ..pb::Edit::default()
                    }],
                    ..pb::Intervention::default()
                }),
                ..pb::ScoreRequest::default()
            };
            client(&d).await.score(request).await
        };
        let value = |answer: tonic::Response<pb::ScoreResponse>| {
            f64::from(answer.into_inner().scores.remove(0).input.unwrap().values[0])
        };
        let without = ask(pb::edit::Operation::ProjectOut(along("mean", ""))).await;
        let without = value(without.unwrap());
        assert!((without - 0.75).abs() < REWRITTEN, "{model}: {without}");
        let add = pb::Add {
            vector: Some(along("mean", "")),
            scale: Some(2.0),
        };
        let more = value(ask(pb::edit::Operation::Add(add)).await.unwrap());
        let square: f64 = (0..WIDTH)
            .map(|i| f64::from((f32::from(i) * 1.7).sin()).powi(2))
            .sum();
        let wanted = f64::from(plain) + 2.0 * square;
        assert!(
            (more - wanted).abs() < REWRITTEN * wanted.abs(),
            "{model}: {more} {wanted}"
        );

        let unknown = ask(pb::edit::Operation::ProjectOut(along("nobody", ""))).await;
        assert_eq!(unknown.unwrap_err().code(), Code::NotFound);
        let label = ask(pb::edit::Operation::ProjectOut(along("mean", "perhaps"))).await;
        let error = label.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        let details = error.get_error_details();
        let field = &details.bad_request().unwrap().field_violations[0].field;
        assert_eq!(field, "intervention.edits[0].project_out.probe.label");
    }
    d.stop().await;
}
