//! A decoder that attends to an encoder (T5) against PyTorch (`reference.npz` of `t5.legacy17`): what is inside that attention, edits of it,
//! what it writes of a logit, and what such models are refused.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/edits.rs"]
mod edits_support;
#[path = "support/lens.rs"]
mod lens_support;
mod support;

use daemon::{TestDaemon, fixture, hooks, request};
use edits_support::{REWRITTEN, all, ask, edit, edits, far, interchange};
use introspectd::service::wire::introspect::{
    self as pb, analysis_service_client::AnalysisServiceClient, edit::Operation as Op,
    find_circuit_response::Item, heads_response,
    intervention_service_client::InterventionServiceClient,
};
use support::{Named, array, reference};
use tonic::{Code, Status};

const MODEL: &str = "t5.legacy17";
const LAYERS: usize = 3;
/// The row of the reference whose encoder has no padding.
const ROW: usize = 0;
const TARGET: u32 = 7;

async fn opened() -> (Named, TestDaemon) {
    let d = TestDaemon::with(&[MODEL]).await;
    (reference(&fixture(MODEL)), d)
}

/// A row of the reference.
fn row(reference: &Named, name: &str) -> Vec<f32> {
    let all = array(&reference[name]);
    all.index_axis(ndarray::Axis(0), ROW)
        .iter()
        .copied()
        .collect()
}

/// A row of its inputs, the encoder's from another one.
fn input(reference: &Named, encoded: usize) -> pb::Input {
    let of_row = |name: &str, row: usize| {
        let given = &reference[&format!("in_{name}")];
        let size = given.bytes().len() / given.shape()[0];
        pb::Tensor {
            name: name.to_owned(),
            dtype: pb::DType::I64.into(),
            shape: vec![1, given.shape()[1] as u64],
            data: given.bytes().slice(row * size..(row + 1) * size),
            ..pb::Tensor::default()
        }
    };
    let tensors = vec![
        of_row("input_ids", encoded),
        of_row("attention_mask", encoded),
        of_row("decoder_input_ids", ROW),
    ];
    pb::Input {
        kind: Some(pb::input::Kind::Tensors(pb::NamedTensors { tensors })),
    }
}

fn changed(reference: &Named, intervention: pb::Intervention) -> pb::InterveneRequest {
    pb::InterveneRequest {
        model: MODEL.to_owned(),
        input: Some(input(reference, ROW)),
        intervention: Some(intervention),
        selection: Some(all(&[])),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_inside_of_the_attention_to_the_encoder_is_pytorchs() {
    let (reference, d) = opened().await;
    let kind = input(&reference, ROW).kind.unwrap();
    let asked = hooks(&[
        "blocks.*.cross_attn.*",
        "hook_cross_attn_out",
        "resid_mid_cross",
    ]);
    let answer = d.capture(request(MODEL, kind, asked)).await.unwrap();
    for l in 0..LAYERS {
        for (hook, array) in [
            ("cross_attn.hook_q", "cross_q"),
            ("cross_attn.hook_k", "cross_k"),
            ("cross_attn.hook_v", "cross_v"),
            ("cross_attn.hook_z", "cross_z"),
            ("cross_attn.hook_pattern", "cross_attn"),
            ("hook_cross_attn_out", "cross_attn_out"),
        ] {
            let name = format!("blocks.{l}.{hook}");
            let off = far(
                &answer.values(&name),
                &row(&reference, &format!("{array}_{l}")),
            );
            assert!(off <= REWRITTEN, "{name}: {off}");
        }
        // What enters the layer, and what both attentions add to it.
        let parts = ["hidden", "attn_out", "cross_attn_out"];
        let parts = parts.map(|p| row(&reference, &format!("{p}_{l}")));
        let sum: Vec<f32> = (0..parts[0].len())
            .map(|at| parts.iter().map(|p| p[at]).sum())
            .collect();
        let name = format!("blocks.{l}.hook_resid_mid_cross");
        assert!(far(&answer.values(&name), &sum) <= REWRITTEN, "{name}");
    }
    let shape = answer.shape("blocks.0.cross_attn.hook_k");
    assert_eq!(shape, [12, 4, 8], "positions of the encoder");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_attention_to_the_encoder_is_edited() {
    let (reference, d) = opened().await;
    let silent = pb::Edit {
        layers: vec![1],
        heads: vec![2],
        ..edit("cross_attn.hook_z", Op::Zero(pb::Zero {}))
    };
    let answer = ask(&d, changed(&reference, edits(vec![silent])))
        .await
        .unwrap();
    for (run, wanted) in [
        (&answer.original, "logits"),
        (&answer.modified, "without_head"),
    ] {
        let off = far(run.values("logits"), &row(&reference, wanted));
        assert!(off <= REWRITTEN, "{wanted}: {off}");
    }
    assert_ne!(
        answer.original.values("logits"),
        answer.modified.values("logits")
    );

    // What all layers write of another text is what the decoder is told of it; what they write of the same one changes no bit.
    for (encoded, same) in [(ROW, true), (1, false)] {
        let source = pb::InterventionSource {
            input: Some(input(&reference, encoded)),
            edits: Vec::new(),
        };
        let patch = pb::Intervention {
            edits: vec![edit("hook_cross_attn_out", interchange())],
            sources: [("other".to_owned(), source)].into(),
        };
        let answer = ask(&d, changed(&reference, patch)).await.unwrap();
        let (before, after) = (
            answer.original.values("logits"),
            answer.modified.values("logits"),
        );
        if same {
            assert_eq!(before, after);
            continue;
        }
        let kind = input(&reference, encoded).kind.unwrap();
        let plain = d.capture(request(MODEL, kind, all(&[]))).await.unwrap();
        assert!(far(after, &plain.values("logits")) <= REWRITTEN);
        assert!(far(before, after) > REWRITTEN);
    }
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_it_writes_is_a_component_of_the_logit() {
    let (reference, d) = opened().await;
    let choice = pb::Choice {
        what: Some(pb::choice::What::Index(TARGET)),
        position: None,
    };
    let request = pb::LensRequest {
        model: MODEL.to_owned(),
        input: Some(input(&reference, ROW)),
        parts: vec![pb::LensPart::Attribution.into()],
        target: Some(pb::Target {
            of: Some(pb::target::Of::Choice(choice)),
            ..pb::Target::default()
        }),
        ..pb::LensRequest::default()
    };
    let answer = lens_support::ask(&d, request).await.unwrap();
    let told = answer.attribution.as_ref().unwrap();
    assert_eq!(
        told.components.len(),
        1 + 3 * LAYERS,
        "{:?}",
        told.components
    );
    assert_eq!(told.components[2], "blocks.0.hook_cross_attn_out");
    assert!(told.affine);
    let logits = row(&reference, "logits");
    let last = logits.len() - 320;
    let wanted = f64::from(logits[last + TARGET as usize]);
    let all: Vec<f64> = answer.values("contributions").to_vec();
    let sum = all.iter().sum::<f64>() + told.bias;
    assert!(
        (sum - wanted).abs() <= 1e-4 * wanted.abs(),
        "{sum} {wanted}"
    );
    assert!(told.bias.abs() <= 1e-5, "nothing of T5's head is a bias");
    let positions = all.len() / told.components.len();
    let cross = told.components.iter().enumerate();
    let cross = cross.filter(|(_, c)| c.ends_with("hook_cross_attn_out"));
    let cross: f64 = cross
        .map(|(at, _)| {
            all[at * positions..][..positions]
                .iter()
                .map(|c| c.abs())
                .sum::<f64>()
        })
        .sum();
    assert!(cross > 1e-2, "the encoder says something");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn its_heads_are_measured_but_for_what_repeated_tokens_would_show() {
    let (reference, d) = opened().await;
    let mut client = AnalysisServiceClient::new(d.channel().await);
    let asked = pb::HeadsRequest {
        model: MODEL.to_owned(),
        inputs: vec![input(&reference, ROW)],
        ..pb::HeadsRequest::default()
    };
    let mut stream = client.heads(asked).await.unwrap().into_inner();
    let (mut tensors, mut notes) = (0, Vec::new());
    while let Some(message) = stream.message().await.unwrap() {
        match message.item.unwrap() {
            heads_response::Item::Tensor(_) => tensors += 1,
            heads_response::Item::Summary(summary) => notes = summary.notes,
            _ => {}
        }
    }
    assert!(tensors > 0);
    let said = |n: &String| n.contains("induction") && n.contains("\"input_ids\"");
    assert!(notes.iter().any(said), "{notes:?}");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_such_models_are_refused_says_why() {
    let (reference, d) = opened().await;
    let along = pb::Edit {
        positions: vec![0],
        ..edit("cross_attn.hook_k", Op::Zero(pb::Zero {}))
    };
    let refused = ask(&d, changed(&reference, edits(vec![along]))).await;
    let refused = refused.unwrap_err();
    assert!(
        refused.message().contains("cross_attn.hook_k"),
        "{refused:?}"
    );

    let asked = pb::FindCircuitRequest {
        model: MODEL.to_owned(),
        input: Some(input(&reference, ROW)),
        source: Some(input(&reference, 1)),
        ..pb::FindCircuitRequest::default()
    };
    let mut client = InterventionServiceClient::new(d.channel().await);
    let read = async {
        let mut stream = client.find_circuit(asked).await?.into_inner();
        while let Some(message) = stream.message().await? {
            assert!(!matches!(message.item, Some(Item::Circuit(_))));
        }
        Ok::<(), Status>(())
    };
    let refused = read.await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert!(
        refused.message().contains("hook_cross_attn_out"),
        "{refused:?}"
    );
    d.stop().await;
}
