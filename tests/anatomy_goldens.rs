//! Every committed model against PyTorch's own numbers: hidden states and attentions by their aliases, the certificate,
//! rows of a batch, padding, early exit.

#![allow(clippy::wildcard_enum_match_arm)] // a test names what it expects; anything else is a failure

mod support;

use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

use introspectd::{
    anatomy::Anatomy,
    ipc::info::{Axis, InputRole, Task},
    onnx::Model,
    tensor::Tensor,
};
use support::{
    Named, captured, dissect, distance, fixtures, open, reference, reference_inputs, unfused,
};

/// Same mathematics by other operators.
const REWRITTEN: f64 = 1e-4;
/// Same operators in another batch.
const CLOSE: f64 = 1e-5;

/// Half precision, as the fixture's derivation allows it.
const HALF: f64 = 2e-2;
/// Eight bits, likewise.
const INT8: f64 = 0.3;

struct Case {
    folder: PathBuf,
    model: Model,
    anatomy: Anatomy,
    reference: Named,
}

/// Every fixture, dissected once.
fn cases() -> &'static [Case] {
    static CASES: OnceLock<Vec<Case>> = OnceLock::new();
    CASES.get_or_init(all)
}

fn all() -> Vec<Case> {
    fixtures()
        .into_iter()
        .map(|folder| {
            let model = open(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
            let model = unfused(&model);
            let anatomy = dissect(&model).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
            Case {
                reference: reference(&folder),
                folder,
                model,
                anatomy,
            }
        })
        .collect()
}

fn case(name: &str) -> Case {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/models")
        .join(name);
    let model = unfused(&open(&folder).unwrap());
    Case {
        anatomy: dissect(&model).unwrap(),
        reference: reference(&folder),
        folder,
        model,
    }
}

impl Case {
    fn name(&self) -> String {
        self.folder
            .file_name()
            .unwrap()
            .to_string_lossy()
            .into_owned()
    }

    /// How far from PyTorch's float32 numbers it may be.
    fn tolerance(&self) -> f64 {
        match self.name().as_str() {
            "bert.int8" => INT8,
            "bert.half" => HALF,
            _ => REWRITTEN,
        }
    }

    /// As [`distance`], over the positions that hold tokens: of padded ones fused operators make what they like.
    fn real_distance(&self, made: &Tensor, expected: &Tensor) -> f64 {
        let Some(mask) = self.reference.get("in_attention_mask") else {
            return distance(made, expected);
        };
        let tokens: Vec<bool> = mask.bytes().chunks(8).map(|b| b[0] == 1).collect();
        let length = mask.shape()[1];
        let queries = match expected.shape() {
            [_, n, _] if *n == length => 1,
            [_, _, n, _] if *n == length => 2,
            _ => return distance(made, expected),
        };
        let kept = |t: &Tensor| {
            let mut a = support::array(t);
            for (at, x) in a.indexed_iter_mut() {
                if !tokens[at[0] * length + at[queries]] {
                    *x = 0.0;
                }
            }
            let values: Vec<f32> = a.iter().copied().collect();
            Tensor::from_f32(t.shape().to_vec(), &values).unwrap()
        };
        distance(&kept(made), &kept(expected))
    }

    fn inputs(&self) -> Vec<(String, Tensor)> {
        reference_inputs(&self.model, &self.reference)
    }

    fn captured(&self, hooks: &[&str], keep_outputs: bool) -> Named {
        captured(
            &self.model,
            &self.anatomy,
            hooks,
            keep_outputs,
            &self.inputs(),
        )
        .unwrap_or_else(|e| panic!("{}: {e}", self.name()))
    }

    /// Aliases that the reference knows, with the array each must equal.
    fn wanted(&self) -> Vec<(String, &Tensor)> {
        self.reference
            .iter()
            .filter_map(|(key, tensor)| {
                let (kind, number) = key.split_once('_')?;
                number.parse::<usize>().ok()?;
                match kind {
                    "hidden" => Some((format!("hidden_states.{number}"), tensor)),
                    "attn" => Some((format!("attentions.{number}"), tensor)),
                    _ => None,
                }
            })
            .collect()
    }
}

/// Row `row` of a tensor, its batch axis kept.
fn row(tensor: &Tensor, row: usize) -> Tensor {
    let mut shape = tensor.shape().to_vec();
    let size = tensor.bytes().len() / shape[0];
    shape[0] = 1;
    let bytes = tensor.bytes().slice(row * size..(row + 1) * size);
    Tensor::new(tensor.dtype(), shape, bytes).unwrap()
}

#[test]
fn every_hidden_state_and_attention_equals_pytorch() {
    for case in cases() {
        let wanted = case.wanted();
        assert!(wanted.len() > 4, "{}", case.name());
        let hooks: Vec<&str> = wanted.iter().map(|(h, _)| h.as_str()).collect();
        let made = case.captured(&hooks, true);
        for (hook, expected) in wanted {
            let off = case.real_distance(&made[&hook], expected);
            assert!(
                off <= case.tolerance(),
                "{} {hook}: off by {off:.1e}",
                case.name()
            );
        }
        let logits = case.real_distance(&made["logits"], &case.reference["logits"]);
        assert!(
            logits <= case.tolerance(),
            "{} logits: off by {logits:.1e}",
            case.name()
        );
    }
}

#[test]
fn every_layer_has_every_hook_point_and_every_check_passes() {
    for case in cases() {
        let layers = case.anatomy.dims.layers;
        assert!(layers >= 2, "{}", case.name());
        for l in 0..layers {
            for inside in [
                "hook_resid_pre",
                "attn.hook_q",
                "attn.hook_k",
                "attn.hook_v",
                "attn.hook_attn_scores",
                "attn.hook_pattern",
                "attn.hook_z",
                "hook_attn_out",
                "hook_resid_mid",
                "mlp.hook_pre",
                "mlp.hook_post",
                "hook_mlp_out",
                "hook_resid_post",
            ] {
                let name = format!("blocks.{l}.{inside}");
                assert!(
                    case.anatomy.hook(&name).is_some(),
                    "{} lacks {name}: {:?}",
                    case.name(),
                    case.anatomy.missing
                );
            }
        }
        // Rows, mixing, two residual sums for every layer.
        assert!(case.anatomy.checks.len() >= 4 * layers, "{}", case.name());
        for check in &case.anatomy.checks {
            assert!(check.passed, "{}: {check:?}", case.name());
        }
    }
}

#[test]
fn positions_that_are_added_are_found_and_others_are_not() {
    for case in cases() {
        let name = case.name();
        let Some(hook) = case.anatomy.hook("hook_pos_embed") else {
            assert!(
                ["llama", "encoder_layer", "t5"]
                    .iter()
                    .any(|m| name.starts_with(m)),
                "{name}: {:?}",
                case.anatomy.missing
            );
            continue;
        };
        assert!(
            !name.starts_with("llama"),
            "{name} turns its queries and keys"
        );
        assert_eq!(hook.axes, [Axis::Batch, Axis::Pos, Axis::DModel], "{name}");
        assert_eq!(hook.dims[2], case.anatomy.dims.d_model, "{name}");
        let inputs = reference_inputs(&case.model, &case.reference);
        let shown = captured(
            &case.model,
            &case.anatomy,
            &["hook_pos_embed"],
            false,
            &inputs,
        );
        let shown = &shown.unwrap()["hook_pos_embed"];
        assert_eq!(shown.shape().len(), 3, "{name}");
    }
}

#[test]
fn every_hook_point_comes_out_under_its_axes() {
    for case in cases() {
        let names: Vec<&str> = case.anatomy.hooks.iter().map(|h| h.name.as_str()).collect();
        let made = case.captured(&names, false);
        for hook in &case.anatomy.hooks {
            let shape = made[&hook.name].shape();
            assert_eq!(
                shape.len(),
                hook.axes.len(),
                "{} {}",
                case.name(),
                hook.name
            );
            for ((extent, axis), dim) in shape.iter().zip(&hook.axes).zip(&hook.dims) {
                // What is made once for all rows has one.
                let once = *axis == Axis::Batch && *dim == Some(1);
                if *axis == Axis::Batch && !once {
                    assert_eq!(*extent, 2, "{} {}", case.name(), hook.name);
                } else if let Some(dim) = dim {
                    assert_eq!(extent, dim, "{} {} {axis:?}", case.name(), hook.name);
                }
            }
        }
    }
}

#[test]
fn queries_times_keys_are_the_scores_up_to_scale_and_mask() {
    // No rotation and no further terms in this one, and its first row is not masked.
    let case = case("bert.legacy14");
    let made = case.captured(&["q.1", "k.1", "attn_scores.1"], false);
    let (q, k, s) = (
        support::array(&made["q.1"]),
        support::array(&made["k.1"]),
        support::array(&made["attn_scores.1"]),
    );
    let (heads, width) = (q.shape()[2], q.shape()[3]);
    let scale = 1.0 / (width as f32).sqrt();
    for h in 0..heads {
        for (a, b) in [(0, 3), (5, 2), (7, 7)] {
            let dot: f32 = (0..width).map(|d| q[[0, a, h, d]] * k[[0, b, h, d]]).sum();
            assert!((dot * scale - s[[0, h, a, b]]).abs() < 1e-4);
        }
    }
}

#[test]
fn early_exit_gives_the_same_numbers_and_no_others() {
    for case in cases() {
        let hooks = ["hidden_states.1", "attentions.0"];
        let (whole, early) = (case.captured(&hooks, true), case.captured(&hooks, false));
        assert_eq!(early.len(), 2, "{}", case.name());
        for hook in hooks {
            assert_eq!(whole[hook], early[hook], "{} {hook}", case.name());
        }
    }
}

#[test]
fn a_row_of_a_batch_is_what_it_is_alone() {
    for case in cases() {
        let hooks = ["hidden_states.2", "attentions.1", "z.0", "mlp_post.1"];
        let made = case.captured(&hooks, true);
        let alone: Vec<(String, Tensor)> = case
            .inputs()
            .into_iter()
            .map(|(n, t)| (n, row(&t, 1)))
            .collect();
        if case.anatomy.rows_interact {
            assert_eq!(case.name(), "bert.int8", "nobody else shares a range");
            continue;
        }
        let single = captured(&case.model, &case.anatomy, &hooks, true, &alone)
            .unwrap_or_else(|e| panic!("{}: {e}", case.name()));
        for (name, whole) in &made {
            let off = distance(&single[name], &row(whole, 1));
            let close = if case.name() == "bert.half" {
                HALF
            } else {
                CLOSE
            };
            assert!(off <= close, "{} {name}: off by {off:.1e}", case.name());
        }
    }
}

#[test]
fn padding_is_seen_to_be_invisible_where_a_mask_hides_it() {
    for case in cases() {
        let masked = case
            .anatomy
            .inputs
            .iter()
            .any(|i| i.role == InputRole::AttentionMask);
        // A decoder that looks back alone hides them too.
        let hidden = masked || case.name() == "t5.legacy17";
        let pads = hidden && !case.anatomy.rows_interact;
        assert_eq!(case.anatomy.pads, pads, "{}", case.name());
    }
}

#[test]
fn inputs_sizes_and_tasks_are_read_off_the_graph() {
    for (name, task, kv_heads) in [
        ("bert.dynamo20", Task::SequenceClassification, 4),
        ("distilbert.legacy14", Task::SequenceClassification, 4),
        ("gpt2.legacy14", Task::CausalLm, 4),
        ("llama.dynamo20", Task::CausalLm, 2),
        ("vit.legacy14", Task::ImageClassification, 4),
    ] {
        let anatomy = case(name).anatomy;
        assert_eq!(anatomy.task, task, "{name}");
        let dims = anatomy.dims;
        assert_eq!(
            (
                dims.heads,
                dims.kv_heads,
                dims.d_model,
                dims.d_head,
                dims.d_mlp
            ),
            (Some(4), Some(kv_heads), Some(32), Some(8), dims.d_mlp),
            "{name}"
        );
        assert!(dims.d_mlp >= Some(64), "{name}");
        let first = if task == Task::ImageClassification {
            InputRole::Pixels
        } else {
            InputRole::TokenIds
        };
        assert_eq!(anatomy.inputs[0].role, first, "{name}");
    }
}

#[test]
fn fewer_key_heads_are_reported_as_they_are_and_rotation_on_both_sides() {
    let case = case("llama.legacy14");
    let made = case.captured(&["q.0", "rot_q.0", "k.0", "rot_k.0", "v.0"], false);
    let shape = |name: &str| made[name].shape().to_vec();
    assert_eq!(shape("q.0"), [2, 12, 4, 8]);
    assert_eq!(shape("rot_q.0"), [2, 12, 4, 8]);
    assert_eq!(shape("k.0"), [2, 12, 2, 8]);
    assert_eq!(shape("rot_k.0"), [2, 12, 2, 8]);
    assert_eq!(shape("v.0"), [2, 12, 2, 8]);
    // At position 0 nothing is rotated; later positions are, and keep their length.
    let (q, r) = (
        support::array(&made["q.0"]),
        support::array(&made["rot_q.0"]),
    );
    let at = |a: &ndarray::ArrayD<f32>, p: usize| -> Vec<f32> {
        (0..8).map(|d| a[[0, p, 1, d]]).collect()
    };
    let norm = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>().sqrt();
    assert!(
        at(&q, 0)
            .iter()
            .zip(at(&r, 0))
            .all(|(a, b)| (a - b).abs() < 1e-4)
    );
    assert!(
        at(&q, 5)
            .iter()
            .zip(at(&r, 5))
            .any(|(a, b)| (a - b).abs() > 1e-2)
    );
    assert!((norm(&at(&q, 5)) / norm(&at(&r, 5)) - 1.0).abs() < 1e-3);
}

#[test]
fn a_model_that_runs_at_one_length_only_is_measured_at_it() {
    let anatomy = case("encoder_layer.legacy17").anatomy;
    assert_eq!(anatomy.fixed_length, Some(12), "the exporter wrote it down");
    assert_eq!(anatomy.fixed_batch, None);
}

#[test]
fn a_name_that_is_no_hook_point_is_refused_with_the_reason() {
    let case = case("bert.legacy14");
    let ask = |name: &str| {
        captured(&case.model, &case.anatomy, &[name], false, &case.inputs()).unwrap_err()
    };
    assert!(ask("blocks.9.hook_resid_pre").contains("no hook point"));
    assert!(ask("value:not_there").contains("no hook point"));
    let reason = ask("ln_final.hook_normalized");
    assert!(reason.contains("normalises its own output"), "{reason}");
}

#[test]
fn any_value_of_the_file_can_be_asked_for() {
    let case = case("gpt2.dynamo20");
    let hook = case.anatomy.hook("blocks.1.mlp.hook_post").unwrap();
    let raw = format!("value:{}", case.model.graph.name(hook.value));
    let made = case.captured(&[&raw, "blocks.1.mlp.hook_post"], false);
    assert_eq!(made[&raw].bytes(), made["blocks.1.mlp.hook_post"].bytes());
}

#[test]
fn reading_twice_gives_the_same() {
    let (a, b) = (case("bert.sdpa17"), case("bert.sdpa17"));
    assert_eq!(a.anatomy.hooks, b.anatomy.hooks);
    assert_eq!(a.anatomy.checks, b.anatomy.checks);
}
