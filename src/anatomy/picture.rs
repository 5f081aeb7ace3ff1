//! The anatomy as a picture in text, for `inspect`.

use std::fmt::Write as _;

use super::{hooks::Anatomy, trace::Trace};
use crate::{ipc::info::Axis, onnx::Model};

/// One line per part of the model, values by their names in the file.
pub(super) fn picture(model: &Model, trace: &Trace, anatomy: &Anatomy) -> String {
    let mut text = String::new();
    let graph = &model.graph;
    let shape = |name: &str| {
        anatomy
            .hook(name)
            .map(|h| {
                let axes: Vec<String> = h
                    .axes
                    .iter()
                    .zip(&h.dims)
                    .map(|(axis, dim)| match dim {
                        Some(n) if *axis != Axis::Batch => format!("{}={n}", axis.name()),
                        _ => axis.name().to_owned(),
                    })
                    .collect();
                format!("[{}]  {}", axes.join(", "), graph.name(h.value))
            })
            .unwrap_or_else(|| "not found".to_owned())
    };
    for input in &anatomy.inputs {
        let _ = writeln!(text, "input {} ({:?})", input.name, input.role);
    }
    let mut line = |depth: usize, label: &str, hook: &str| {
        if anatomy.hook(hook).is_some() {
            let _ = writeln!(text, "{}{label:<22} {}", "  ".repeat(depth), shape(hook));
        }
    };
    line(0, "embed", "hook_embed");
    line(1, "+ positions", "hook_pos_embed");
    for l in 0..trace.layers.len() {
        let name = |inside: &str| format!("blocks.{l}.{inside}");
        line(0, &format!("block {l}"), &name("hook_resid_pre"));
        let inner = ["q", "k", "v", "attn_scores", "pattern", "z"];
        for inside in inner {
            line(2, inside, &name(&format!("attn.hook_{inside}")));
        }
        line(1, "+ attention", &name("hook_attn_out"));
        line(1, "= resid_mid", &name("hook_resid_mid"));
        for inside in inner {
            line(2, inside, &name(&format!("cross_attn.hook_{inside}")));
        }
        line(1, "+ cross-attention", &name("hook_cross_attn_out"));
        line(1, "= resid_mid_cross", &name("hook_resid_mid_cross"));
        for inside in ["pre", "pre_linear", "post"] {
            line(2, inside, &name(&format!("mlp.hook_{inside}")));
        }
        line(1, "+ mlp", &name("hook_mlp_out"));
        line(1, "= resid_post", &name("hook_resid_post"));
        line(1, "  normalized", &name("hook_normalized_resid_post"));
    }
    line(0, "final norm", "ln_final.hook_normalized");
    line(0, "logits", "logits");
    for m in &anatomy.missing {
        let _ = writeln!(text, "missing {}: {}", m.hook, m.reason);
    }
    text
}
