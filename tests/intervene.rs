//! Moving hook points of every committed model: nothing moved changes no bit, what is moved is what readers read, and a row moves alone.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

mod support;

use std::collections::{BTreeMap, BTreeSet};

use introspectd::{
    anatomy::Anatomy,
    onnx::{Model, ValueId},
    rewrite::{Exposure, Intervened, Moved, expose, intervene},
    tensor::Tensor,
};
use support::{
    Named, Runner, dissect, distance, fixtures, open, reference, reference_inputs, run, unfused,
};

/// Same mathematics by other operators.
const REWRITTEN: f64 = 1e-4;

/// The same in half precision.
const HALF: f64 = 2e-2;

struct Case {
    name: String,
    model: Model,
    anatomy: Anatomy,
    inputs: Vec<(String, Tensor)>,
}

fn cases() -> Vec<Case> {
    let folders = fixtures();
    assert!(folders.len() > 10);
    folders
        .into_iter()
        .map(|folder| {
            let model = unfused(&open(&folder).unwrap());
            Case {
                name: folder.file_name().unwrap().to_string_lossy().into_owned(),
                anatomy: dissect(&model).unwrap(),
                inputs: reference_inputs(&model, &reference(&folder)),
                model,
            }
        })
        .collect()
}

impl Case {
    /// One hook point for each float value of the graph that has one; the outputs of the file stay as they are.
    fn movable(&self) -> BTreeSet<String> {
        let mut seen: BTreeMap<ValueId, String> = BTreeMap::new();
        let hooks = self.anatomy.hooks.iter().filter(|h| h.dtype.is_float());
        for hook in hooks.filter(|h| !self.model.graph.is_output(h.value)) {
            seen.entry(hook.value).or_insert_with(|| hook.name.clone());
        }
        seen.into_values().collect()
    }

    fn intervened(&self, hooks: &BTreeSet<String>) -> Intervened {
        intervene(&self.model, &self.anatomy, &BTreeMap::new(), hooks)
            .unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    fn main_output(&self) -> &str {
        self.model.graph.name(self.model.graph.outputs()[0].value)
    }

    /// What the model itself gives.
    fn plain(&self) -> Tensor {
        run(&self.model, &self.inputs).unwrap()[self.main_output()].clone()
    }
}

fn filled(point: &Moved, value: f32) -> Tensor {
    Tensor::from_f32(vec![1; point.axes.len()], &[value])
        .and_then(|t| t.cast_float(point.dtype))
        .unwrap()
}

/// Inputs with each point multiplied and shifted by a number.
fn moved(
    inputs: &[(String, Tensor)],
    points: &[Moved],
    [scale, shift]: [f32; 2],
) -> Vec<(String, Tensor)> {
    let mut inputs = inputs.to_vec();
    for point in points {
        inputs.push((point.scale.clone(), filled(point, scale)));
        inputs.push((point.shift.clone(), filled(point, shift)));
    }
    inputs
}

/// The hook points of an intervened model, as it shows them, with its own outputs.
fn shown(made: &Intervened, hooks: &BTreeSet<String>, inputs: &[(String, Tensor)]) -> Named {
    let what = Exposure {
        hooks: hooks.clone(),
        keep_outputs: true,
    };
    let exposed = expose(&made.model, &made.anatomy, &what).unwrap();
    run(&exposed.model, inputs).unwrap()
}

#[test]
fn nothing_moved_changes_no_bit() {
    for case in cases() {
        let made = case.intervened(&case.movable());
        assert!(!made.points.is_empty(), "{}", case.name);
        let inputs = moved(&case.inputs, &made.points, [1.0, 0.0]);
        let answer = run(&made.model, &inputs).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let (plain, answer) = (case.plain(), &answer[case.main_output()]);
        if case.name == "bert.half" {
            // The runtime computes halves in single precision, and one node more among them rounds once more.
            assert!(distance(answer, &plain) < HALF);
            continue;
        }
        let same = plain.to_f32().unwrap() == answer.to_f32().unwrap();
        assert!(same, "{}", case.name);
    }
}

#[test]
fn readers_read_what_was_moved() {
    for case in cases() {
        // One layer stands for all.
        let layers = |hook: &String| !hook.starts_with("blocks.") || hook.starts_with("blocks.1.");
        for hook in case.movable().into_iter().filter(layers) {
            let hooks = BTreeSet::from([hook.clone()]);
            let made = case.intervened(&hooks);
            let what = format!("{} {hook}", case.name);
            // Everything is 0.25.
            let answer = shown(
                &made,
                &hooks,
                &moved(&case.inputs, &made.points, [0.0, 0.25]),
            );
            let values = answer[&hook].to_f32().unwrap().into_owned();
            assert!(values.iter().all(|v| *v == 0.25), "{what}");
            let changed = distance(&answer[case.main_output()], &case.plain());
            let last = answer[&hook].shape().len();
            assert!(changed > 0.0 || last == 0, "{what} changes nothing");
        }
    }
}

#[test]
fn a_row_moves_alone_and_by_its_own_tensor() {
    for case in cases().into_iter().filter(|c| !c.anatomy.rows_interact) {
        let hooks: BTreeSet<String> = ["blocks.1.attn.hook_z", "blocks.1.hook_resid_pre"]
            .map(str::to_owned)
            .into();
        let plain = shown(
            &Intervened {
                model: case.model.clone(),
                anatomy: case.anatomy.clone(),
                points: Vec::new(),
                edits: Vec::new(),
            },
            &hooks,
            &case.inputs,
        );
        let made = case.intervened(&hooks);
        let mut inputs = moved(&case.inputs, &made.points, [1.0, 0.0]);
        // Row 0 of one point becomes that of row 1; row 1 stays.
        let (own, point) = (&plain["blocks.1.hook_resid_pre"], &made.points[1]);
        let rows = own.shape()[0];
        assert_eq!(
            (rows, &*point.name),
            (2, "blocks.1.hook_resid_pre"),
            "{}",
            case.name
        );
        let row: usize = own.shape()[1..].iter().product();
        let values = own.to_f32().unwrap().into_owned();
        let shift: Vec<f32> = [&values[row..], &vec![0.0; row][..]].concat();
        let mut shape = vec![1; own.shape().len()];
        shape[0] = 2;
        for (name, tensor) in &mut inputs {
            let float = |shape: Vec<usize>, values: &[f32]| {
                Tensor::from_f32(shape, values)
                    .unwrap()
                    .cast_float(point.dtype)
                    .unwrap()
            };
            if *name == point.scale {
                *tensor = float(shape.clone(), &[0.0, 1.0]);
            } else if *name == point.shift {
                *tensor = float(own.shape().to_vec(), &shift);
            }
        }
        let answer = shown(&made, &hooks, &inputs);
        let found = answer["blocks.1.hook_resid_pre"]
            .to_f32()
            .unwrap()
            .into_owned();
        assert_eq!(found[..row], values[row..], "{}", case.name);
        assert_eq!(found[row..], values[row..], "{}", case.name);
        let half = |t: &Tensor| {
            let values = t.to_f32().unwrap().into_owned();
            let half = values.len() / 2;
            Tensor::from_f32(vec![half], &values[half..]).unwrap()
        };
        let output = case.main_output();
        let off = distance(&half(&answer[output]), &half(&plain[output]));
        assert!(off < REWRITTEN, "{}: {off}", case.name);
    }
}

#[test]
fn what_cannot_be_moved_is_refused() {
    let case = cases().into_iter().find(|c| c.name == "gpt2.legacy14");
    let case = case.unwrap();
    let refused = |hooks: &[&str]| {
        let hooks = hooks.iter().map(|h| (*h).to_owned()).collect();
        let made = intervene(&case.model, &case.anatomy, &BTreeMap::new(), &hooks);
        made.map(|_| ()).unwrap_err().to_string()
    };
    assert!(refused(&["blocks.9.hook_resid_pre"]).contains("no hook point"));
    assert!(refused(&["value:input_ids"]).contains("no hook point"));
    let same = refused(&["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]);
    assert!(same.contains("same value"), "{same}");
    let made = case.intervened(&BTreeSet::from(["hook_embed".to_owned()]));
    let missing = Runner::new(&made.model)
        .unwrap()
        .run(&case.inputs)
        .unwrap_err();
    assert!(missing.contains("scale:hook_embed"), "{missing}");
}
