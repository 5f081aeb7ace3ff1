//! Sweeps over real gRPC with real workers: each row is an edit by itself, estimates are what small changes do, every error.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/edits.rs"]
mod edits_support;
#[path = "support/sweep.rs"]
mod sweep_support;

use daemon::{TestDaemon, hooks, ids};
use edits_support::{
    IDS, MODELS, OTHER, REWRITTEN, all, ask, edit, edits, field, from, interchange, request,
    tokens, vector,
};
use introspectd::service::wire::introspect::{self as pb, edit::Operation as Op};
use sweep_support::swept;
use tonic::Code;

fn chosen(index: u32) -> Option<pb::Target> {
    let choice = pb::Choice {
        what: Some(pb::choice::What::Index(index)),
        position: None,
    };
    Some(pb::Target {
        of: Some(pb::target::Of::Choice(choice)),
        ..pb::Target::default()
    })
}

fn sweep(
    model: &str,
    hook: &str,
    by: &[pb::SweepAxis],
    change: pb::sweep_request::Change,
) -> pb::SweepRequest {
    pb::SweepRequest {
        model: model.to_owned(),
        input: Some(tokens(&IDS)),
        target: chosen(1),
        hooks: vec![hook.to_owned()],
        by: by.iter().map(|b| (*b).into()).collect(),
        change: Some(change),
        ..pb::SweepRequest::default()
    }
}

fn zeroed() -> pb::sweep_request::Change {
    pb::sweep_request::Change::Zero(pb::Zero {})
}

fn patched(ids: &[u32]) -> pb::sweep_request::Change {
    pb::sweep_request::Change::Patch(tokens(ids))
}

/// The score of a label at the last place, of the changed model.
async fn one_score(d: &TestDaemon, model: &str, intervention: pb::Intervention) -> f64 {
    let info = d.model(model).await;
    let width = match info.labels.len() {
        0 => usize::try_from(info.dims.unwrap().vocab.unwrap()).unwrap(),
        n => n,
    };
    let mut request = ids(model, &IDS, all(&[]));
    request.intervention = Some(intervention);
    let values = d.capture(request).await.unwrap().values(&info.main_output);
    f64::from(values[values.len() - width + 1])
}

fn close(found: f32, wanted: f64, what: &str) {
    let off = (f64::from(found) - wanted).abs();
    assert!(off < f64::from(REWRITTEN), "{what}: {found} for {wanted}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_is_every_edit_by_itself() {
    use pb::SweepAxis::{Dim, Head, Position};
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        // Heads, zeroed.
        let found = swept(&d, sweep(model, "attn.hook_z", &[Head], zeroed()));
        let found = found.await.unwrap();
        let hooks = &found.header.hooks;
        assert_eq!(found.header.rows, 4 * hooks.len() as u64);
        assert_eq!(found.summary.rows, found.header.rows + 1);
        assert_eq!(found.result, pb::SweepResult::default());
        for (layer, hook) in (0u32..).zip(hooks) {
            for head in [0u32, 3] {
                let alone = pb::Edit {
                    layers: vec![layer],
                    heads: vec![head],
                    ..edit("attn.hook_z", Op::Zero(pb::Zero {}))
                };
                let wanted = one_score(&d, model, edits(vec![alone])).await - found.header.value;
                let effect = found.of("effects", hook)[head as usize];
                close(effect, wanted, &format!("{model} {hook} {head}"));
            }
        }

        // Positions of the stream, patched from another run.
        let found = swept(
            &d,
            sweep(model, "hook_resid_post", &[Position], patched(&OTHER)),
        );
        let found = found.await.unwrap();
        let restored = found.header.source_value.unwrap() - found.header.value;
        let hook = &found.header.hooks[0];
        assert_eq!(found.of("effects", hook).len(), IDS.len());
        for position in [1i32, 5] {
            let alone = pb::Edit {
                positions: vec![position],
                ..edit(hook, interchange())
            };
            let wanted = one_score(&d, model, from(&OTHER, vec![alone])).await - found.header.value;
            let at = usize::try_from(position).unwrap();
            close(found.of("effects", hook)[at], wanted, hook);
            close(found.of("normalized", hook)[at], wanted / restored, hook);
        }
        // Everything at one layer restores everything.
        let whole = swept(&d, sweep(model, "hook_resid_post", &[], patched(&OTHER)));
        let whole = whole.await.unwrap();
        for hook in &whole.header.hooks {
            let all = whole.of("normalized", hook);
            assert_eq!(all.len(), 1);
            close(all[0], 1.0, hook);
        }

        // Heads at positions.
        let both = swept(&d, {
            let asked = sweep(model, "attn.hook_z", &[Head, Position], patched(&OTHER));
            pb::SweepRequest {
                layers: vec![1],
                ..asked
            }
        });
        let both = both.await.unwrap();
        let hook = &both.header.hooks[0];
        let (axes, shape) = &both.shapes[&format!("effects:{hook}")];
        assert_eq!((&axes[0][..], &axes[1][..]), ("pos", "head"));
        assert_eq!(shape, &[IDS.len() as u64, 4]);
        let alone = pb::Edit {
            positions: vec![5],
            heads: vec![2],
            ..edit(hook, interchange())
        };
        let wanted = one_score(&d, model, from(&OTHER, vec![alone])).await - both.header.value;
        close(both.of("effects", hook)[5 * 4 + 2], wanted, hook);

        // So many rows of later layers begin in the middle of the model, after one that tells that nothing is lost by it.
        let last = u32::try_from(found.header.hooks.len() - 1).unwrap();
        let neurons = pb::SweepRequest {
            layers: vec![last],
            ..sweep(model, "mlp.hook_post", &[Dim, Position], patched(&OTHER))
        };
        let all = swept(&d, neurons.clone()).await.unwrap();
        // The source, the input, the input from the middle on.
        assert_eq!(all.summary.rows, all.header.rows + 3, "{model}");
        let few = pb::SweepRequest {
            method: pb::SweepMethod::Both.into(),
            most: 9,
            ..neurons
        };
        let few = swept(&d, few).await.unwrap();
        assert_eq!(few.summary.rows, 2 + 1 + 9, "{model}");
        let hook = &few.header.hooks[0];
        let whole = few.of("effects", hook).iter().enumerate();
        let run: Vec<_> = whole.filter(|(_, e)| e.is_finite()).collect();
        assert_eq!(run.len(), 9);
        for (part, effect) in run {
            close(
                all.of("effects", hook)[part],
                f64::from(*effect),
                &format!("{model} {hook} {part}"),
            );
        }

        // Neurons, put to their mean.
        let mean = || pb::Mean {
            inputs: vec![tokens(&OTHER)],
        };
        let change = pb::sweep_request::Change::Mean(mean());
        let neurons = pb::SweepRequest {
            layers: vec![1],
            ..sweep(model, "mlp.hook_post", &[Dim], change)
        };
        let found = swept(&d, neurons).await.unwrap();
        let hook = &found.header.hooks[0];
        assert_eq!(found.of("effects", hook).len(), 64);
        let alone = pb::Edit {
            dims: vec![17],
            ..edit(hook, Op::Mean(mean()))
        };
        let wanted = one_score(&d, model, edits(vec![alone])).await - found.header.value;
        close(found.of("effects", hook)[17], wanted, hook);
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn estimates_are_what_small_changes_do() {
    use pb::SweepAxis::{Head, Position};
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        let both = |most| pb::SweepRequest {
            method: pb::SweepMethod::Both.into(),
            most,
            ..sweep(model, "attn.hook_z", &[Head], patched(&OTHER))
        };
        let found = swept(&d, both(0)).await.unwrap();
        let parts = 4 * found.header.hooks.len();
        assert_eq!(found.result.compared, parts as u64);
        assert!(found.result.correlation.unwrap() > 0.0, "{model}");

        // An estimate is the derivative along the change: a small part of it, forth and back.
        let hook = &found.header.hooks[1];
        let ours = d.capture(ids(model, &IDS, hooks(&[hook]))).await.unwrap();
        let theirs = d.capture(ids(model, &OTHER, hooks(&[hook]))).await.unwrap();
        let change = theirs.values(hook).into_iter().zip(ours.values(hook));
        let change: Vec<f32> = change.map(|(b, a)| b - a).collect();
        let width = change.len() / IDS.len() / 4;
        let of_head = |head: usize| {
            let places = change.chunks_exact(width).skip(head).step_by(4);
            places.flatten().copied().collect::<Vec<f32>>()
        };
        let moved = async |scale: f32| {
            let values = pb::Tensor {
                shape: vec![IDS.len() as u64, 1, width as u64],
                ..vector(&of_head(2))
            };
            let add = Op::Add(pb::Add {
                vector: Some(pb::Vector {
                    of: Some(pb::vector::Of::Values(values)),
                }),
                scale: Some(scale),
            });
            let alone = pb::Edit {
                heads: vec![2],
                ..edit(hook, add)
            };
            one_score(&d, model, edits(vec![alone])).await
        };
        const STEP: f32 = 0.05;
        let slope = (moved(STEP).await - moved(-STEP).await) / f64::from(2.0 * STEP);
        let estimate = f64::from(found.of("estimates", hook)[2]);
        let size = slope.abs().max(0.1);
        assert!(
            (estimate - slope).abs() / size < 1e2 * f64::from(REWRITTEN),
            "{model}: {estimate} by gradient, {slope} by difference"
        );

        // The parts of the greatest estimates are run, and no others.
        let some = swept(&d, both(3)).await.unwrap();
        assert_eq!(some.result.compared, 3);
        let mut ran: Vec<(f32, bool)> = Vec::new();
        for hook in &some.header.hooks {
            let estimates = some.of("estimates", hook);
            for (at, effect) in some.of("effects", hook).iter().enumerate() {
                if !effect.is_nan() {
                    close(*effect, f64::from(found.of("effects", hook)[at]), hook);
                }
                ran.push((estimates[at].abs(), !effect.is_nan()));
            }
        }
        ran.sort_by(|a, b| b.0.total_cmp(&a.0));
        assert!(ran[..3].iter().all(|r| r.1) && ran[3..].iter().all(|r| !r.1));

        // Of a stream that is a sum, the estimates of what is written into it add up: all heads of a layer are their sum.
        let estimate = |hook: &str, by: &[pb::SweepAxis]| pb::SweepRequest {
            method: pb::SweepMethod::Estimate.into(),
            ..sweep(model, hook, by, patched(&OTHER))
        };
        let by_place = swept(&d, estimate("attn.hook_z", &[Head, Position])).await;
        let (by_place, whole) = (
            by_place.unwrap(),
            swept(&d, estimate("attn.hook_z", &[])).await.unwrap(),
        );
        for hook in &whole.header.hooks {
            assert!(!whole.tensors.contains_key(&format!("effects:{hook}")));
            let sum: f32 = by_place.of("estimates", hook).iter().sum();
            close(sum, f64::from(whole.of("estimates", hook)[0]), hook);
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_divergence_is_that_of_the_predictions() {
    let d = TestDaemon::with(&MODELS).await;
    let target = Some(pb::Target {
        of: Some(pb::target::Of::Divergence(pb::Divergence::default())),
        ..pb::Target::default()
    });
    for model in MODELS {
        let asked = pb::SweepRequest {
            target: target.clone(),
            ..sweep(model, "attn.hook_z", &[pb::SweepAxis::Head], zeroed())
        };
        let found = swept(&d, asked.clone()).await.unwrap();
        assert_eq!(found.header.quantity(), pb::Quantity::Divergence);
        assert!(found.header.value.abs() < 1e-6, "{}", found.header.value);
        let hook = &found.header.hooks[1];
        let alone = pb::Edit {
            heads: vec![2],
            ..edit(hook, Op::Zero(pb::Zero {}))
        };
        let answer = ask(&d, request(model, edits(vec![alone]), all(&[])));
        let effect = answer.await.unwrap().effect.unwrap();
        close(
            found.of("effects", hook)[2],
            effect.at.last().unwrap().kl,
            hook,
        );

        // Of a patching it is the distance from the source, which is none where everything is restored.
        let patching = pb::SweepRequest {
            target: target.clone(),
            ..sweep(model, "hook_resid_post", &[], patched(&OTHER))
        };
        let found = swept(&d, patching).await.unwrap();
        assert!(found.header.source_value.unwrap().abs() < 1e-5);
        assert!(found.header.value > 0.0);
        for hook in &found.header.hooks {
            close(found.of("normalized", hook)[0], 1.0, hook);
        }

        let refused = pb::SweepRequest {
            method: pb::SweepMethod::Estimate.into(),
            ..asked
        };
        assert_eq!(field(&swept(&d, refused).await.err().unwrap()), "method");
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_is_patched_as_nested_sources_patch_it() {
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        let layers = u32::try_from(d.model(model).await.dims.unwrap().layers).unwrap();
        let last = layers - 1;
        let receivers = [
            pb::Receiver {
                hook: "attn.hook_q".to_owned(),
                layers: vec![last],
                heads: vec![1],
                ..pb::Receiver::default()
            },
            pb::Receiver {
                hook: "hook_resid_post".to_owned(),
                layers: vec![last],
                ..pb::Receiver::default()
            },
        ];
        for receiver in receivers {
            let asked = |change| pb::SweepRequest {
                path: Some(pb::PathPatch {
                    receivers: vec![receiver.clone()],
                    freeze_mlps: false,
                }),
                ..sweep(model, "attn.hook_z", &[pb::SweepAxis::Head], change)
            };
            let found = swept(&d, asked(patched(&OTHER))).await.unwrap();
            // By hand: a source in which one head is the other run's, and all others are held.
            let hook = "blocks.0.attn.hook_z";
            let interchanged = |hook: &str, source: &str| {
                edit(
                    hook,
                    Op::Interchange(pb::Interchange {
                        source: source.to_owned(),
                        positions: Vec::new(),
                    }),
                )
            };
            let sender = 2u32;
            let others = (0..4).filter(|h| *h != sender).collect();
            let mut held = vec![
                pb::Edit {
                    heads: others,
                    ..interchanged(hook, "input")
                },
                pb::Edit {
                    heads: vec![sender],
                    ..interchanged(hook, "other")
                },
            ];
            held.extend(
                (1..layers).map(|l| interchanged(&format!("blocks.{l}.attn.hook_z"), "input")),
            );
            let source = |ids: &[u32], edits| pb::InterventionSource {
                input: Some(tokens(ids)),
                edits,
            };
            let by_hand = pb::Intervention {
                edits: vec![pb::Edit {
                    layers: receiver.layers.clone(),
                    heads: receiver.heads.clone(),
                    ..interchanged(&receiver.hook, "path")
                }],
                sources: [
                    ("input".to_owned(), source(&IDS, Vec::new())),
                    ("other".to_owned(), source(&OTHER, Vec::new())),
                    ("path".to_owned(), source(&IDS, held)),
                ]
                .into(),
            };
            let wanted = one_score(&d, model, by_hand).await - found.header.value;
            assert!(wanted.abs() > 1e-6, "{model}: the path does something");
            close(found.of("effects", hook)[sender as usize], wanted, hook);
            // From the input itself nothing comes.
            let nothing = swept(&d, asked(patched(&IDS))).await.unwrap();
            for hook in &nothing.header.hooks {
                for effect in nothing.of("effects", hook) {
                    close(*effect, 0.0, hook);
                }
            }
        }
    }
    d.stop().await;
}

/// What leaves a layer enters the next one: the value has two names, and is told by the one that was asked for.
#[tokio::test(flavor = "multi_thread")]
async fn hook_points_come_under_the_names_that_were_asked_for() {
    let model = "gpt2.legacy14";
    let d = TestDaemon::with(&[model]).await;
    for kind in ["hook_resid_pre", "hook_resid_post"] {
        let asked = sweep(model, kind, &[pb::SweepAxis::Position], patched(&OTHER));
        let found = swept(&d, asked.clone()).await.unwrap();
        let names = [0, 1, 2].map(|layer| format!("blocks.{layer}.{kind}"));
        assert_eq!(found.header.hooks, names);
        assert!(found.tensors.contains_key(&format!("effects:{}", names[1])));
        let of_one = pb::SweepRequest {
            layers: vec![1],
            ..asked
        };
        let of_one = swept(&d, of_one).await.unwrap();
        assert_eq!(of_one.header.hooks, names[1..2]);
        assert_eq!(of_one.of("effects", &names[1]).len(), IDS.len());
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_sweeps_name_their_field() {
    use pb::sweep_request::Change;
    let d = TestDaemon::with(&["bert.legacy14"]).await;
    let head = pb::SweepAxis::Head;
    let good = || sweep("bert.legacy14", "attn.hook_z", &[head], zeroed());
    let path = |receivers: &[(&str, u32)]| {
        let receiver = |(hook, head): &(&str, u32)| pb::Receiver {
            hook: (*hook).to_owned(),
            heads: vec![*head],
            ..pb::Receiver::default()
        };
        pb::SweepRequest {
            change: Some(patched(&OTHER)),
            path: Some(pb::PathPatch {
                receivers: receivers.iter().map(receiver).collect(),
                freeze_mlps: true,
            }),
            ..good()
        }
    };
    swept(&d, good()).await.unwrap();
    let with = |change: &dyn Fn(&mut pb::SweepRequest)| {
        let mut request = good();
        change(&mut request);
        request
    };
    let cases = [
        (with(&|r| r.hooks = vec!["nothing".to_owned()]), "hooks[0]"),
        (with(&|r| r.hooks.push("logits".to_owned())), "hooks[1]"),
        (with(&|r| r.hooks = Vec::new()), "hooks"),
        (with(&|r| r.hooks = vec!["z".to_owned(); 65]), "hooks"),
        (with(&|r| r.layers = vec![9]), "layers[0]"),
        (with(&|r| r.by = vec![77]), "by[0]"),
        (with(&|r| r.by = vec![0]), "by[0]"),
        (with(&|r| r.by = vec![head.into(), head.into()]), "by[1]"),
        (
            with(&|r| r.hooks = vec!["hook_resid_pre".to_owned()]),
            "by[0]",
        ),
        (with(&|r| r.change = None), "change"),
        (
            with(&|r| r.change = Some(Change::Mean(pb::Mean::default()))),
            "mean.inputs",
        ),
        (with(&|r| r.change = Some(patched(&[2, 5, 3]))), "patch"),
        (with(&|r| r.target = chosen(99)), "target.choice.index"),
        (with(&|r| r.input = None), "input"),
        (with(&|r| r.method = 9), "method"),
        (with(&|r| r.most = 3), "most"),
        (path(&[]), "path.receivers"),
        (path(&[("attn.hook_q", 9)]), "path.receivers[0].heads"),
        (path(&[("nothing", 0)]), "path.receivers[0].hook"),
        (path(&[("attn.hook_q", 0), ("q.1", 1)]), "path.receivers[1]"),
        (
            pb::SweepRequest {
                change: Some(zeroed()),
                ..path(&[("attn.hook_q", 0)])
            },
            "path",
        ),
        (
            pb::SweepRequest {
                method: pb::SweepMethod::Estimate.into(),
                ..path(&[("attn.hook_q", 0)])
            },
            "method",
        ),
    ];
    for (request, wanted) in cases {
        let error = swept(&d, request.clone()).await.err().unwrap();
        assert_eq!(field(&error), wanted, "{request:?}: {error}");
    }
    let short = TestDaemon::tuned(&["bert.legacy14"], |c| c.max_rows = 11).await;
    let error = swept(&short, good()).await.err().unwrap();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    let estimate = with(&|r| r.method = pb::SweepMethod::Estimate.into());
    swept(&short, estimate).await.unwrap();
    short.stop().await;
    d.stop().await;
}
