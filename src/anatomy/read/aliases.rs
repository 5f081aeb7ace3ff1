//! Other names of hook points: TransformerLens's short forms, and Hugging Face's `hidden_states.{i}` and `attentions.{i}`.
//!
//! `hidden_states.0` is what enters the first layer, `hidden_states.{i + 1}` what leaves layer `i`. The last one is taken
//! behind the final norm in models of tokens and of sequences of features, and before it in models of pictures and waves: what
//! the library does in most of each kind. Where there is a final norm a note says which it is, and both are hook points.
//! Models whose attentions run in windows and whose stream changes width (Swin and its kin) are numbered by stage: the state is
//! that behind the stage, the attention that of its last layer. Other models whose stream changes width have no
//! common numbering, and get none.

use super::{AttentionRead, Found, lab::Lab, leaves};
use crate::{
    anatomy::{hooks::HookPoint, inputs::InputTrace, layers::LayerTrace},
    ipc::info::InputRole,
};

/// TransformerLens's short forms: `resid_post.10`, `pattern.3`, and `mlp_pre.2` for what is called just `pre` in the block.
pub(super) fn short_forms(found: &mut Found) {
    for hook in &mut found.hooks {
        let Some(layer) = hook.layer else { continue };
        let Some(inside) = hook.name.strip_prefix(&format!("blocks.{layer}.")) else {
            continue;
        };
        let short = match inside.split_once("hook_") {
            Some(("" | "attn.", short)) => format!("{short}.{layer}"),
            Some(("mlp.", short)) => format!("mlp_{short}.{layer}"),
            _ => continue,
        };
        hook.aliases.push(short);
    }
}

pub(super) fn hugging_face(
    lab: &Lab<'_>,
    found: &mut Found,
    attentions: &[Result<AttentionRead, String>],
) {
    let layers = &lab.trace.layers;
    let Some(last) = layers.len().checked_sub(1) else {
        return;
    };
    let windowed = layers
        .iter()
        .filter_map(|l| attentions[l.attention?].as_ref().ok())
        .any(|a| a.windowed);
    let stages = stages(lab, layers);
    if stages.len() > 1 {
        if windowed {
            by_stage(found, &stages, last);
        } else {
            found.notes.push(
                "the width of the stream changes between layers; such models have no common numbering of hidden \
                 states: ask for blocks.{l}.hook_resid_pre and hook_resid_post"
                    .to_owned(),
            );
            found.lack(
                "hidden_states.0",
                "the width of the stream changes between layers; ask for blocks.{l}.hook_resid_pre and hook_resid_post",
            );
            number_attentions(found, layers);
        }
        return;
    }
    number_attentions(found, layers);
    found.alias("blocks.0.hook_resid_pre", "hidden_states.0".to_owned());
    for at in 0..last {
        let left = leaves(lab.trace, at);
        let hook = if left == Some(layers[at + 1].start) {
            format!("blocks.{}.hook_resid_pre", at + 1)
        } else {
            format!("blocks.{at}.hook_resid_post")
        };
        found.alias(&hook, format!("hidden_states.{}", at + 1));
    }
    let normalised = format!("blocks.{last}.hook_normalized_resid_post");
    let sum = format!("blocks.{last}.hook_resid_post");
    let behind = "ln_final.hook_normalized".to_owned();
    let has = |name: &str| found.hooks.iter().any(|h| h.name == name);
    let end = format!("hidden_states.{}", last + 1);
    let hook = if has(&normalised) {
        normalised
    } else if has(&behind) {
        let (hook, place, other) = if ends_normalised(lab) {
            (behind, "behind", sum)
        } else {
            (sum, "before", behind)
        };
        found.notes.push(format!(
            "\"{end}\" is {place} the final norm, as in most models of this kind; what is on its other side is \"{other}\""
        ));
        hook
    } else {
        sum
    };
    let elsewhere = |h: &HookPoint| h.name == hook && Some(h.value) != leaves(lab.trace, last);
    if hook.ends_with("hook_resid_post") && found.hooks.iter().any(elsewhere) {
        found.lack(
            &end,
            "the layer ends behind its sum in something whose axes cannot be told apart",
        );
        return;
    }
    found.alias(&hook, end);
}

/// Whether models of this kind count the last hidden state behind the final norm: those of tokens, and those of sequences of
/// features that are not cut out of a picture.
fn ends_normalised(lab: &Lab<'_>) -> bool {
    let graph = &lab.model.graph;
    let inputs = &lab.trace.inputs;
    let cuts_patches = graph.nodes().any(|(_, node)| {
        let kernel = node.inputs.get(1).copied().flatten();
        node.is("Conv")
            && kernel
                .and_then(|k| graph.initializer(k))
                .is_some_and(|k| k.dims().len() > 3)
    });
    let features = |i: &InputTrace| i.role == InputRole::Pixels && i.dims.len() == 3;
    inputs.iter().any(|i| i.role == InputRole::TokenIds)
        || (inputs.iter().any(features) && !cuts_patches)
}

/// Attentions are counted: layers without one do not count.
fn number_attentions(found: &mut Found, layers: &[LayerTrace]) {
    let with = layers
        .iter()
        .enumerate()
        .filter(|(_, l)| l.attention.is_some());
    for (number, (at, _)) in with.enumerate() {
        found.alias(
            &format!("blocks.{at}.attn.hook_pattern"),
            format!("attentions.{number}"),
        );
    }
}

/// First layers of the stages: runs of layers between which the stream keeps its width.
fn stages(lab: &Lab<'_>, layers: &[LayerTrace]) -> Vec<usize> {
    let size = |value| {
        let shapes = lab.shapes(value)?;
        Some(shapes[0].iter().product::<usize>())
    };
    let mut firsts = vec![0];
    for at in 1..layers.len() {
        if size(layers[at].start) != size(layers[at - 1].end) {
            firsts.push(at);
        }
    }
    firsts
}

fn by_stage(found: &mut Found, firsts: &[usize], last: usize) {
    found.alias("blocks.0.hook_resid_pre", "hidden_states.0".to_owned());
    for (stage, first) in firsts.iter().enumerate() {
        let next = firsts.get(stage + 1);
        let (end, hook) = match next {
            Some(next) => (next - 1, format!("blocks.{next}.hook_resid_pre")),
            None => (last, format!("blocks.{last}.hook_resid_post")),
        };
        let _ = first;
        found.alias(&hook, format!("hidden_states.{}", stage + 1));
        found.alias(
            &format!("blocks.{end}.attn.hook_pattern"),
            format!("attentions.{stage}"),
        );
    }
}
