//! Interventions against PyTorch with hooks (`tests/fixtures/make/interventions.py`): every operation, at every kind of hook point, by
//! head, neuron and position, alone and together, on the four development architectures by several exporters.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

#[path = "support/daemon.rs"]
mod daemon;

use std::{collections::HashMap, fs::File, path::Path};

use daemon::{TestDaemon, ids};
use introspectd::service::wire::introspect::{self as pb, edit::Operation as Op};
use ndarray::Array1;
use ndarray_npy::NpzReader;

/// Same mathematics by other operators.
const REWRITTEN: f64 = 1e-4;

const Z: &str = "blocks.1.attn.hook_z";
const POST: &str = "blocks.0.mlp.hook_post";
const STREAM: &str = "hidden_states.2";
const ATTENTION: &str = "blocks.2.hook_attn_out";
const MLP: &str = "blocks.2.hook_mlp_out";

fn edit(hook: &str, operation: Op) -> pb::Edit {
    pb::Edit {
        hook: hook.to_owned(),
        operation: Some(operation),
        ..pb::Edit::default()
    }
}

fn at(positions: &[i32], edit: pb::Edit) -> pb::Edit {
    pb::Edit {
        positions: positions.to_vec(),
        ..edit
    }
}

fn head(head: u32, edit: pb::Edit) -> pb::Edit {
    pb::Edit {
        heads: vec![head],
        ..edit
    }
}

fn zero() -> Op {
    Op::Zero(pb::Zero {})
}

fn interchange(positions: &[i32]) -> Op {
    Op::Interchange(pb::Interchange {
        source: "other".to_owned(),
        positions: positions.to_vec(),
    })
}

fn tensor(values: &[f32]) -> pb::Tensor {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    pb::Tensor {
        dtype: pb::DType::F32.into(),
        shape: vec![values.len() as u64],
        data: bytes.into(),
        ..pb::Tensor::default()
    }
}

/// The interventions of the script, by its names.
fn cases(vector: &[f32], other: &pb::Input) -> Vec<(&'static str, Vec<pb::Edit>)> {
    let direction = || pb::Vector {
        of: Some(pb::vector::Of::Values(tensor(vector))),
    };
    let steer = || {
        edit(
            STREAM,
            Op::Add(pb::Add {
                vector: Some(direction()),
                scale: Some(1.5),
            }),
        )
    };
    let neurons = || pb::Edit {
        dims: vec![3, 5],
        ..edit(POST, Op::Set(tensor(&[2.0])))
    };
    let clamp = Op::Clamp(pb::Clamp {
        low: Some(-0.2),
        high: Some(0.3),
    });
    let mean = Op::Mean(pb::Mean {
        inputs: vec![other.clone()],
    });
    vec![
        ("zero_head", vec![head(2, edit(Z, zero()))]),
        (
            "scale_head_at",
            vec![at(&[1, -1], head(0, edit(Z, Op::Scale(1.5))))],
        ),
        ("set_neurons", vec![neurons()]),
        ("clamp_neurons", vec![edit(POST, clamp)]),
        ("add_stream", vec![steer()]),
        (
            "project_stream",
            vec![edit(STREAM, Op::ProjectOut(direction()))],
        ),
        ("mean_stream", vec![at(&[4], edit(STREAM, mean))]),
        (
            "interchange_stream",
            vec![at(&[2, 11], edit(STREAM, interchange(&[])))],
        ),
        (
            "interchange_moved",
            vec![at(&[2, 3], edit(STREAM, interchange(&[9, 0])))],
        ),
        (
            "interchange_attention",
            vec![edit(ATTENTION, interchange(&[]))],
        ),
        ("scale_mlp", vec![edit(MLP, Op::Scale(0.25))]),
        (
            "together",
            vec![
                neurons(),
                steer(),
                edit(STREAM, Op::Scale(0.5)),
                head(2, edit("blocks.2.attn.hook_z", zero())),
                edit(MLP, interchange(&[])),
            ],
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_edit_gives_what_pytorch_gives_with_hooks() {
    let models = ["bert", "distilbert", "gpt2", "llama"]
        .iter()
        .flat_map(|name| {
            ["legacy14", "dynamo20", "fused"].map(|by| (*name, format!("{name}.{by}")))
        })
        .collect::<Vec<_>>();
    let names: Vec<&str> = models.iter().map(|(_, model)| model.as_str()).collect();
    let d = TestDaemon::with(&names).await;
    for (architecture, model) in &models {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/interventions")
            .join(format!("{architecture}.npz"));
        let mut golden = NpzReader::new(File::open(path).unwrap()).unwrap();
        let mut row = |name: &str| {
            let row: Array1<i64> = golden.by_name(name).unwrap();
            let row = row.iter().map(|id| u32::try_from(*id).unwrap());
            row.collect::<Vec<u32>>()
        };
        let (tokens, other) = (row("ids"), row("other"));
        let vector: Array1<f32> = golden.by_name("vector").unwrap();
        let selection = pb::Selection {
            logits: pb::Logits::All.into(),
            ..pb::Selection::default()
        };
        let other = ids(model, &other, selection.clone()).input.unwrap();
        let output = d.model(model).await.main_output;
        let all = cases(vector.as_slice().unwrap(), &other);
        for (case, edits) in [("logits", Vec::new())].into_iter().chain(all) {
            let wanted: Array1<f64> = golden.by_name(case).unwrap();
            let mut request = ids(model, &tokens, selection.clone());
            let source = pb::InterventionSource {
                input: Some(other.clone()),
                edits: Vec::new(),
            };
            request.intervention = Some(pb::Intervention {
                edits,
                sources: HashMap::from([("other".to_owned(), source)]),
            });
            let answer = d.capture(request).await;
            let answer = answer.unwrap_or_else(|e| panic!("{model} {case}: {e:?}"));
            let all = answer.values(&output);
            let last = &all[all.len() - wanted.len()..];
            let largest = wanted.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            let off = last.iter().zip(&wanted);
            let off = off.map(|(a, b)| (f64::from(*a) - b).abs());
            let off = off.fold(0.0, f64::max) / largest;
            assert!(off <= REWRITTEN, "{model} {case}: {off}");
        }
    }
    d.stop().await;
}
