//! Interventions over real gRPC with real workers: what every edit does, how edits compose, where they ride, every error.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/edits.rs"]
mod edits_support;

use daemon::{TestDaemon, hooks, ids, text};
use edits_support::{
    IDS, MODELS, OTHER, REWRITTEN, all, ask, edit, edits, far, field, from, interchange, request,
    tokens, vector,
};
use introspectd::service::wire::introspect::{self as pb, edit::Operation as Op};

/// Same operators, other batch or place in the graph.
const CLOSE: f32 = 1e-5;
/// Half precision.
const HALF: f32 = 2e-2;

fn given(values: &[f32]) -> Option<pb::Vector> {
    Some(pb::Vector {
        of: Some(pb::vector::Of::Values(vector(values))),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_that_changes_nothing_changes_no_bit() {
    let fused = [
        "bert.dynamo20",
        "bert.fused",
        "bert.half",
        "gpt2.fused",
        "llama.fused",
    ];
    let models = [&MODELS[..], &fused[..]].concat();
    let d = TestDaemon::with(&models).await;
    for model in models {
        let info = d.model(model).await;
        let plain = d.capture(ids(model, &IDS, all(&[]))).await.unwrap();
        let kinds = [
            "hook_embed",
            "blocks.0.hook_resid_post",
            "blocks.1.attn.hook_q",
            "attn.hook_z",
            "attn.hook_pattern",
            "blocks.1.hook_attn_out",
            "blocks.0.hook_mlp_out",
            "mlp.hook_post",
        ];
        for hook in kinds {
            let nothing = || edit(hook, Op::Scale(1.0));
            let answer = ask(&d, request(model, edits(vec![nothing()]), all(&[])));
            let answer = answer
                .await
                .unwrap_or_else(|e| panic!("{model} {hook}: {e:?}"));
            for run in [&answer.original, &answer.modified] {
                assert_eq!(
                    run.values(&info.main_output),
                    plain.values(&info.main_output),
                    "{model} {hook}"
                );
            }
            if let Some(effect) = &answer.effect {
                assert!(effect.at.iter().all(|e| e.kl < 1e-9 && !e.flipped));
            }
            let mut captured = ids(model, &IDS, all(&[]));
            captured.intervention = Some(edits(vec![nothing()]));
            let captured = d.capture(captured).await.unwrap();
            assert_eq!(
                captured.values(&info.main_output),
                plain.values(&info.main_output),
                "{model} {hook}"
            );

            // What stands there anyway: the source runs by the graph that its values go to.
            let same = from(&IDS, vec![edit(hook, interchange())]);
            let answer = ask(&d, request(model, same, all(&[]))).await.unwrap();
            let runs = [&answer.original, &answer.modified];
            let [before, after] = runs.map(|run| run.values(&info.main_output));
            if model == "bert.half" {
                // A runtime without arithmetic in half precision keeps more bits inside than it shows.
                assert!(far(after, before) <= HALF, "{model} {hook}");
            } else {
                assert_eq!(before, after, "{model} {hook}");
            }

            // Beside one that does change something, and which nobody reads before it: what comes before is the same in both runs, whatever
            // the runtime fuses in a graph without edits.
            let last = pb::Edit {
                layers: vec![1],
                ..edit("mlp.hook_post", Op::Scale(0.5))
            };
            let seen = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"];
            let answer = ask(&d, request(model, edits(vec![nothing(), last]), all(&seen)))
                .await
                .unwrap();
            for seen in seen {
                assert_eq!(
                    answer.original.values(seen),
                    answer.modified.values(seen),
                    "{model} {hook} {seen}"
                );
            }
            assert_ne!(
                answer.original.values(&info.main_output),
                answer.modified.values(&info.main_output)
            );
        }
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_layer_of_another_run_gives_its_answer() {
    let d = TestDaemon::with(&MODELS).await;
    for model in MODELS {
        let info = d.model(model).await;
        let other = d.capture(ids(model, &OTHER, all(&[]))).await.unwrap();
        let wanted = other.values(&info.main_output);
        for hook in ["hidden_states.0", "hidden_states.1"] {
            let patch = from(&OTHER, vec![edit(hook, interchange())]);
            let answer = ask(&d, request(model, patch, all(&[]))).await.unwrap();
            let got = answer.modified.values(&info.main_output);
            assert!(far(got, &wanted) <= CLOSE, "{model} {hook}");
            assert!(far(answer.original.values(&info.main_output), &wanted) > CLOSE);
        }
        // The last position of the last layer alone: that of the other run, and all others as they were.
        let hook = "hidden_states.1";
        let patch = pb::Edit {
            positions: vec![-1],
            ..edit(hook, interchange())
        };
        let shown = all(&[hook]);
        let answer = ask(&d, request(model, from(&OTHER, vec![patch]), shown))
            .await
            .unwrap();
        let name = info
            .hooks
            .iter()
            .find(|h| h.aliases.iter().any(|a| a == hook))
            .unwrap();
        let theirs = d.capture(ids(model, &OTHER, hooks(&[hook]))).await.unwrap();
        let (ours, edited) = (
            answer.original.values(&name.name),
            answer.modified.values(&name.name),
        );
        let cut = ours.len() / IDS.len() * (IDS.len() - 1);
        assert!(far(&edited[..cut], &ours[..cut]) <= CLOSE, "{model}");
        assert_eq!(
            edited[cut..],
            theirs.values(&name.name)[cut..],
            "{model} {hook}"
        );
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_does_what_it_says_where_it_says() {
    let d = TestDaemon::with(&["bert.legacy14"]).await;
    let model = "bert.legacy14";
    let z = "blocks.1.attn.hook_z";
    let post = "blocks.1.mlp.hook_post";
    let stream = "blocks.0.hook_resid_post";
    let show = |hook: &str| all(&[hook]);
    let run = async |hook: &str, given: Vec<pb::Edit>| {
        let answer = ask(&d, request(model, edits(given), show(hook)))
            .await
            .unwrap_or_else(|e| panic!("{hook}: {e:?}"));
        let (shape, before) = answer.original.tensors[hook].clone();
        (shape, before, answer.modified.values(hook).to_vec())
    };

    // A head at two positions.
    let head = pb::Edit {
        heads: vec![1],
        positions: vec![0, -2],
        ..edit(z, Op::Zero(pb::Zero {}))
    };
    let (shape, before, after) = run(z, vec![head]).await;
    let [length, count, width] = shape[..] else {
        panic!("{shape:?}")
    };
    for (at, (a, b)) in before.iter().zip(&after).enumerate() {
        let (pos, head) = (at / (count * width), at / width % count);
        let gone = head == 1 && (pos == 0 || pos == length - 2);
        assert_eq!(*b, if gone { 0.0 } else { *a }, "{pos} {head}");
    }

    // Neurons of all positions: set, scaled, clamped, one after the other.
    let neurons = |operation| pb::Edit {
        dims: vec![3, 5],
        ..edit(post, operation)
    };
    let (shape, before, after) = run(
        post,
        vec![
            neurons(Op::Set(vector(&[2.0, -4.0]))),
            neurons(Op::Scale(0.5)),
            neurons(Op::Clamp(pb::Clamp {
                low: Some(-1.5),
                high: None,
            })),
        ],
    )
    .await;
    let width = shape[1];
    for (at, (a, b)) in before.iter().zip(&after).enumerate() {
        let wanted = match at % width {
            3 => 1.0,
            5 => -1.5,
            _ => *a,
        };
        assert_eq!(*b, wanted);
    }

    // The order of edits matters.
    let width = 32;
    let ones = vec![1.0; width];
    let add = || {
        edit(
            stream,
            Op::Add(pb::Add {
                vector: given(&ones),
                scale: Some(3.0),
            }),
        )
    };
    let twice = || edit(stream, Op::Scale(2.0));
    let (_, before, after) = run(stream, vec![add(), twice()]).await;
    let wanted: Vec<f32> = before.iter().map(|v| (v + 3.0) * 2.0).collect();
    assert!(far(&after, &wanted) <= CLOSE);
    let (_, before, after) = run(stream, vec![twice(), add()]).await;
    let wanted: Vec<f32> = before.iter().map(|v| v * 2.0 + 3.0).collect();
    assert!(far(&after, &wanted) <= CLOSE);

    // What points along a direction goes, and nothing else.
    let direction: Vec<f32> = (0..width).map(|i| (i as f32 - 7.0) / 5.0).collect();
    let project = edit(stream, Op::ProjectOut(given(&direction).unwrap()));
    let (_, before, after) = run(stream, vec![project]).await;
    let square: f32 = direction.iter().map(|v| v * v).sum();
    for (a, b) in before.chunks(width).zip(after.chunks(width)) {
        let along: f32 = a.iter().zip(&direction).map(|(x, d)| x * d).sum::<f32>() / square;
        let wanted: Vec<f32> = a
            .iter()
            .zip(&direction)
            .map(|(x, d)| x - along * d)
            .collect();
        assert!(far(b, &wanted) <= REWRITTEN);
    }

    // The mean over two texts and all their positions.
    let texts = [tokens(&OTHER), tokens(&OTHER[..4])];
    let mean = edit(
        stream,
        Op::Mean(pb::Mean {
            inputs: texts.to_vec(),
        }),
    );
    let (_, _, after) = run(stream, vec![mean]).await;
    let mut sum = vec![0.0f64; width];
    for input in [&OTHER[..], &OTHER[..4]] {
        let values = d.capture(ids(model, input, hooks(&[stream]))).await;
        for row in values.unwrap().values(stream).chunks(width) {
            for (s, v) in sum.iter_mut().zip(row) {
                *s += f64::from(*v);
            }
        }
    }
    #[allow(clippy::cast_possible_truncation)]
    let wanted: Vec<f32> = sum.iter().map(|s| (s / 10.0) as f32).collect();
    for row in after.chunks(width) {
        assert!(far(row, &wanted) <= CLOSE);
    }

    // Noise is drawn from its seed.
    let noise = |seed| {
        let noise = pb::Noise {
            deviation: 0.5,
            seed,
        };
        vec![edit(stream, Op::Noise(noise))]
    };
    let (_, before, one) = run(stream, noise(1)).await;
    let (_, _, same) = run(stream, noise(1)).await;
    let (_, _, other) = run(stream, noise(2)).await;
    assert_eq!(one, same);
    assert_ne!(one, other);
    let squares: f32 = one
        .iter()
        .zip(&before)
        .map(|(b, a)| (b - a) * (b - a))
        .sum();
    let deviation = (squares / before.len() as f32).sqrt();
    // Of 192 draws, three standard errors.
    assert!((deviation - 0.5).abs() < 0.5 * 3.0 / (2.0f32 * 192.0).sqrt());

    // One query of one head looks nowhere.
    let pattern = "blocks.0.attn.hook_pattern";
    let blind = pb::Edit {
        heads: vec![0],
        positions: vec![2],
        keys: vec![1, 3],
        ..edit(pattern, Op::Zero(pb::Zero {}))
    };
    let (shape, before, after) = run(pattern, vec![blind]).await;
    let n = shape[2];
    for (at, (a, b)) in before.iter().zip(&after).enumerate() {
        let (head, query, key) = (at / (n * n), at / n % n, at % n);
        let gone = head == 0 && query == 2 && (key == 1 || key == 3);
        assert_eq!(*b, if gone { 0.0 } else { *a });
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_reaches_a_receiver_by_one_path() {
    let d = TestDaemon::with(&["gpt2.legacy14"]).await;
    let model = "gpt2.legacy14";
    let info = d.model(model).await;
    // The receiver, the last MLP, takes what it would be if the first attention were that of another run; everything else is as it is.
    let sender = edit("blocks.0.hook_attn_out", interchange());
    let mut path = from(
        &OTHER,
        vec![edit(
            "blocks.1.hook_mlp_out",
            Op::Interchange(pb::Interchange {
                source: "sent".to_owned(),
                positions: Vec::new(),
            }),
        )],
    );
    path.sources.insert(
        "sent".to_owned(),
        pb::InterventionSource {
            input: Some(tokens(&IDS)),
            edits: vec![sender.clone()],
        },
    );
    let out = "blocks.1.hook_mlp_out";
    let by_path = ask(&d, request(model, path.clone(), all(&[out])))
        .await
        .unwrap();
    let whole = ask(&d, request(model, from(&OTHER, vec![sender]), all(&[out])))
        .await
        .unwrap();
    assert_eq!(by_path.modified.values(out), whole.modified.values(out));
    let logits = &info.main_output;
    assert!(
        far(
            by_path.modified.values(logits),
            whole.modified.values(logits)
        ) > CLOSE
    );
    assert!(
        far(
            by_path.modified.values(logits),
            by_path.original.values(logits)
        ) > CLOSE
    );

    // A source that is made from itself is refused.
    let circle = pb::Edit {
        operation: Some(Op::Interchange(pb::Interchange {
            source: "sent".to_owned(),
            positions: Vec::new(),
        })),
        ..path.sources["sent"].edits[0].clone()
    };
    path.sources.get_mut("sent").unwrap().edits = vec![circle];
    let error = ask(&d, request(model, path, all(&[]))).await.unwrap_err();
    let field = field(&error);
    assert_eq!(
        field,
        "intervention.sources[\"sent\"].edits[0].interchange.source"
    );
    assert!(error.message().contains("sent from sent"), "{error}");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn interventions_ride_on_other_calls() {
    let d = TestDaemon::with(&["bert.legacy14"]).await;
    let model = "bert.legacy14";
    let info = d.model(model).await;
    let zero = || {
        edits(vec![pb::Edit {
            layers: vec![1],
            heads: vec![0, 2],
            ..edit("attn.hook_z", Op::Zero(pb::Zero {}))
        }])
    };
    let answer = ask(&d, request(model, zero(), all(&[]))).await.unwrap();
    let modified = answer.modified.values(&info.main_output);
    let effect = answer.effect();
    assert!(effect.kl > 0.0 && effect.total_variation > 0.0);
    assert!(!effect.changes[0].label.is_empty());

    // A capture.
    let mut capture = ids(model, &IDS, all(&[]));
    capture.intervention = Some(zero());
    let captured = d.capture(capture).await.unwrap();
    assert_eq!(captured.values(&info.main_output), modified);

    // An attribution: the number that it explains is that of the edited model.
    let mut client =
        pb::attribution_service_client::AttributionServiceClient::new(d.channel().await);
    let label = effect.changes[0].index;
    let choice = pb::Choice {
        what: Some(pb::choice::What::Index(label)),
        position: None,
    };
    let question = pb::AttributeRequest {
        model: model.to_owned(),
        input: Some(tokens(&IDS)),
        target: Some(pb::Target {
            of: Some(pb::target::Of::Choice(choice)),
            ..pb::Target::default()
        }),
        intervention: Some(zero()),
        ..pb::AttributeRequest::default()
    };
    let mut stream = client.attribute(question).await.unwrap().into_inner();
    let mut explained = None;
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(pb::attribute_response::Item::Result(result)) = message.item {
            explained = Some(result);
        }
    }
    let explained = explained.unwrap();
    let logit = f64::from(effect.changes[0].logit_after);
    assert!((explained.value - logit).abs() < f64::from(REWRITTEN));
    assert!(explained.residual_ratio.unwrap() < 0.05, "{explained:?}");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tensors_are_edited_as_tokens_are() {
    let model = "gpt2.dynamo20";
    let d = TestDaemon::with(&[model]).await;
    let info = d.model(model).await;
    let asked = || {
        let part = pb::Edit {
            heads: vec![1],
            positions: vec![-2],
            ..edit("blocks.0.attn.hook_z", Op::Zero(pb::Zero {}))
        };
        request(model, edits(vec![part]), all(&[]))
    };
    let by_tokens = ask(&d, asked()).await.unwrap();
    let tensor = |name: &str, values: &[i64]| pb::Tensor {
        name: name.to_owned(),
        dtype: pb::DType::I64.into(),
        shape: vec![1, values.len() as u64],
        data: values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>()
            .into(),
        ..pb::Tensor::default()
    };
    let tensors = pb::NamedTensors {
        tensors: vec![
            tensor("input_ids", &IDS.map(i64::from)),
            tensor("attention_mask", &[1; IDS.len()]),
        ],
    };
    let by_tensors = pb::InterveneRequest {
        input: Some(pb::Input {
            kind: Some(pb::input::Kind::Tensors(tensors)),
        }),
        ..asked()
    };
    let by_tensors = ask(&d, by_tensors).await.unwrap();
    for (a, b) in [
        (&by_tensors.original, &by_tokens.original),
        (&by_tensors.modified, &by_tokens.modified),
    ] {
        assert_eq!(a.values(&info.main_output), b.values(&info.main_output));
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_edits_name_their_field() {
    let d = TestDaemon::with(&["bert.legacy14"]).await;
    let model = "bert.legacy14";
    let zero = || Op::Zero(pb::Zero {});
    let stream = "blocks.0.hook_resid_post";
    let cases: Vec<(pb::Intervention, &str)> = vec![
        (edits(vec![]), "intervention.edits"),
        (
            edits(vec![
                edit(stream, Op::Scale(1.0)),
                edit("hook_nonsense", zero()),
            ]),
            "intervention.edits[1].hook",
        ),
        (
            edits(vec![edit("logits", zero())]),
            "intervention.edits[0].hook",
        ),
        (
            edits(vec![pb::Edit {
                heads: vec![99],
                ..edit("attn.hook_z", zero())
            }]),
            "intervention.edits[0].heads",
        ),
        (
            edits(vec![pb::Edit {
                heads: vec![0],
                ..edit(stream, zero())
            }]),
            "intervention.edits[0].heads",
        ),
        (
            edits(vec![pb::Edit {
                layers: vec![7],
                ..edit("attn.hook_z", zero())
            }]),
            "intervention.edits[0].layers[0]",
        ),
        (
            edits(vec![pb::Edit {
                positions: vec![0, 6],
                ..edit(stream, zero())
            }]),
            "intervention.edits[0].positions[1]",
        ),
        (
            edits(vec![pb::Edit {
                dims: vec![32],
                ..edit(stream, zero())
            }]),
            "intervention.edits[0].dims",
        ),
        (
            edits(vec![pb::Edit {
                dims: vec![1, 1],
                ..edit(stream, zero())
            }]),
            "intervention.edits[0].dims",
        ),
        (
            edits(vec![edit(stream, Op::Set(vector(&[1.0; 31])))]),
            "intervention.edits[0].set",
        ),
        (
            edits(vec![edit(stream, Op::Set(vector(&[f32::NAN; 32])))]),
            "intervention.edits[0].set",
        ),
        (
            edits(vec![edit(
                stream,
                Op::ProjectOut(given(&[0.0; 32]).unwrap()),
            )]),
            "intervention.edits[0].project_out",
        ),
        (
            edits(vec![edit(
                stream,
                Op::ProjectOut(pb::Vector {
                    of: Some(pb::vector::Of::Probe(pb::ProbeDirection {
                        name: "../mood".to_owned(),
                        ..pb::ProbeDirection::default()
                    })),
                }),
            )]),
            "intervention.edits[0].project_out.probe.name",
        ),
        (
            edits(vec![edit(stream, Op::Scale(f32::INFINITY))]),
            "intervention.edits[0].scale",
        ),
        (
            edits(vec![edit(
                stream,
                Op::Clamp(pb::Clamp {
                    low: Some(1.0),
                    high: Some(0.0),
                }),
            )]),
            "intervention.edits[0].clamp",
        ),
        (
            edits(vec![edit(stream, Op::Clamp(pb::Clamp::default()))]),
            "intervention.edits[0].clamp",
        ),
        (
            edits(vec![edit(
                stream,
                Op::Noise(pb::Noise {
                    deviation: -1.0,
                    seed: 1,
                }),
            )]),
            "intervention.edits[0].noise.deviation",
        ),
        (
            edits(vec![edit(stream, Op::Mean(pb::Mean::default()))]),
            "intervention.edits[0].mean.inputs",
        ),
        (
            edits(vec![edit(stream, interchange())]),
            "intervention.edits[0].interchange.source",
        ),
        (
            from(&[2, 5, 3], vec![edit(stream, interchange())]),
            "intervention.edits[0].interchange.positions",
        ),
        (
            edits(vec![pb::Edit {
                operation: None,
                ..edit(stream, zero())
            }]),
            "intervention.edits[0].operation",
        ),
    ];
    for (intervention, wanted) in cases {
        let error = ask(&d, request(model, intervention.clone(), all(&[])))
            .await
            .unwrap_err();
        assert_eq!(field(&error), wanted, "{intervention:?}: {error}");
    }
    // A source of another length, mapped.
    let mapped = pb::Edit {
        positions: vec![1, 4],
        ..edit(
            stream,
            Op::Interchange(pb::Interchange {
                source: "other".to_owned(),
                positions: vec![1, -1],
            }),
        )
    };
    let answer = ask(
        &d,
        request(model, from(&[2, 5, 3], vec![mapped]), all(&[stream])),
    )
    .await
    .unwrap();
    let theirs = d.capture(ids(model, &[2, 5, 3], hooks(&[stream]))).await;
    let theirs = theirs.unwrap().values(stream);
    let edited = answer.modified.values(stream);
    assert_eq!(edited[32..64], theirs[32..64]);
    assert_eq!(edited[4 * 32..5 * 32], theirs[64..96]);

    // The process is alive, and answers.
    d.capture(text(model, "the film", hooks(&[])))
        .await
        .unwrap();
    d.stop().await;
}
