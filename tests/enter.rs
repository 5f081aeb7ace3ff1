//! Late entry into every committed model: what comes in is what readers read, and nothing before it is run.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

mod support;

use std::{collections::BTreeSet, path::PathBuf};

use introspectd::{
    anatomy::Anatomy,
    ipc::spec::VariantSpec,
    onnx::Model,
    rewrite::{RewriteError, Variant, variant},
    tensor::Tensor,
};
use support::{dissect, distance, fixtures, open, reference, reference_inputs, run, unfused};

/// Same mathematics by other operators.
const REWRITTEN: f64 = 1e-4;
/// The same in half precision.
const HALF: f64 = 2e-2;

fn made(model: &Model, anatomy: &Anatomy, spec: &VariantSpec) -> Result<Variant, RewriteError> {
    variant(model, anatomy, spec, |_, _| Err("no gradient".to_owned()))
}

fn fixture(name: &str) -> PathBuf {
    let mut all = fixtures().into_iter();
    all.find(|f| f.ends_with(name)).unwrap()
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|n| (*n).to_owned()).collect()
}

/// Begins at some hook points and shows others.
fn from(entries: &[&str], shown: &[&str]) -> VariantSpec {
    VariantSpec {
        enter: names(entries),
        keep_outputs: false,
        ..VariantSpec::exposing(shown.iter().copied())
    }
}

#[test]
fn a_run_that_begins_at_the_end_of_the_stream_gives_the_answer() {
    let mut entered = 0;
    for folder in fixtures() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let model = unfused(&open(&folder).unwrap());
        let anatomy = dissect(&model).unwrap();
        let inputs = reference_inputs(&model, &reference(&folder));
        let last = anatomy.dims.layers - 1;
        let ends = [
            format!("blocks.{last}.hook_normalized_resid_post"),
            format!("blocks.{last}.hook_resid_post"),
        ];
        let end = ends.iter().find(|e| anatomy.hook(e).is_some()).unwrap();
        if anatomy.hook("logits").is_none() {
            continue;
        }
        let whole = made(&model, &anatomy, &from(&[], &[end, "logits"])).unwrap();
        let whole = run(&whole.model, &inputs).unwrap();
        let late = made(&model, &anatomy, &from(&[end], &["logits"])).unwrap();
        assert_eq!(late.inputs.len(), 1, "{name}");
        assert!(
            late.model.graph.node_count() * 2 < model.graph.node_count(),
            "{name}: {} of {} operators",
            late.model.graph.node_count(),
            model.graph.node_count()
        );
        let mut inputs = inputs;
        inputs.push((format!("state:{end}"), whole[end].clone()));
        let answer = run(&late.model, &inputs).unwrap();
        let allowed = if name == "bert.half" { HALF } else { REWRITTEN };
        let off = distance(&answer["logits"], &whole["logits"]);
        assert!(off < allowed, "{name}: {off}");
        entered += 1;
    }
    assert!(entered > 20, "{entered}");
}

#[test]
fn heads_go_through_the_output_projection_alone() {
    for name in ["gpt2.legacy14", "llama.attention23", "bert.legacy14"] {
        let folder = fixture(name);
        let model = unfused(&open(&folder).unwrap());
        let anatomy = dissect(&model).unwrap();
        let mut inputs = reference_inputs(&model, &reference(&folder));
        let (z, out) = ("blocks.1.attn.hook_z", "blocks.1.hook_attn_out");
        let whole = made(&model, &anatomy, &from(&[], &[z, out])).unwrap();
        let whole = run(&whole.model, &inputs).unwrap();
        let late = made(&model, &anatomy, &from(&[z], &[out])).unwrap();
        inputs.push((format!("state:{z}"), whole[z].clone()));
        let answer = run(&late.model, &inputs).unwrap();
        assert!(distance(&answer[out], &whole[out]) < REWRITTEN, "{name}");
    }
}

#[test]
fn what_comes_in_is_shown_as_what_readers_read() {
    let folder = fixture("gpt2.legacy14");
    let model = unfused(&open(&folder).unwrap());
    let anatomy = dissect(&model).unwrap();
    let mut inputs = reference_inputs(&model, &reference(&folder));
    let hook = "blocks.1.hook_resid_post";
    let late = made(&model, &anatomy, &from(&[hook], &[hook, "logits"])).unwrap();
    let quarter = Tensor::from_f32(vec![2, 12, 32], &[0.25; 2 * 12 * 32]).unwrap();
    inputs.push((format!("state:{hook}"), quarter.clone()));
    let answer = run(&late.model, &inputs).unwrap();
    assert_eq!(answer[hook].bytes(), quarter.bytes());
}

#[test]
fn an_entry_that_something_goes_around_is_refused() {
    let folder = fixture("gpt2.legacy14");
    let model = unfused(&open(&folder).unwrap());
    let anatomy = dissect(&model).unwrap();
    for (entries, shown) in [
        // The skip goes around the perceptron, and around the attention.
        (&["blocks.1.hook_mlp_out"][..], "logits"),
        (&["blocks.1.attn.hook_z"][..], "blocks.1.hook_resid_mid"),
        // What is shown comes before.
        (&["blocks.2.hook_resid_pre"][..], "blocks.0.hook_mlp_out"),
    ] {
        let error = made(&model, &anatomy, &from(entries, &[shown])).unwrap_err();
        assert!(error.to_string().contains("comes before it"), "{error}");
    }
    let error = made(&model, &anatomy, &from(&["nothing"], &["logits"])).unwrap_err();
    assert!(matches!(error, RewriteError::Hook(_)), "{error}");
    // Two names of one value.
    let twice = from(
        &["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"],
        &["logits"],
    );
    let error = made(&model, &anatomy, &twice).unwrap_err();
    assert!(error.to_string().contains("same value"), "{error}");
}
