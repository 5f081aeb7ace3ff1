//! Few wide variants instead of many narrow ones.
//!
//! The policy. Exposing more of the same kind costs nothing measurable in a run (only what a run's picks name crosses
//! to the front), while each variant costs memory, time to build, and batches that cannot be shared. So:
//!
//! - a plain predict (nothing exposed, plan `Plain`) keeps the plain graph, untouched;
//! - an exposed hook point is widened to its *kind*: the same point of every layer
//!   (`blocks.3.hook_resid_post` exposes `blocks.*.hook_resid_post`);
//! - the kinds that almost every capture asks for (the residual stream and the patterns) come together: who asks for one of them
//!   gets them all; the inside kinds (q, k, v, z, scores, pre, post) join only when asked, because showing them may undo fusions;
//! - with early exit (`keep_outputs` false) only layers up to the deepest one asked for are shown, so that the
//!   rest of the graph is still pruned;
//! - `value:NAME` is exposed as asked;
//! - a run that begins at a hook point shows what was asked: the same point of an earlier layer may stand before where it begins.

use std::collections::BTreeSet;

use crate::ipc::{
    info::{HookInfo, ModelInfo},
    spec::{Plan, VariantSpec},
};

/// Kinds that come together.
const COMMON: [&str; 6] = [
    "hook_embed_out",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_mid_cross",
    "hook_resid_post",
    "attn.hook_pattern",
];

/// The variant that a request for `spec` runs on: shows everything that `spec` does.
pub fn widen(spec: &VariantSpec, info: &ModelInfo) -> VariantSpec {
    if spec.plan == Plan::Plain || spec.expose.is_empty() || !spec.enter.is_empty() {
        return spec.clone();
    }
    let asked: Vec<&HookInfo> = info
        .hooks
        .iter()
        .filter(|h| spec.expose.contains(&h.name))
        .collect();
    let mut kinds: BTreeSet<&str> = asked.iter().map(|h| kind(&h.name)).collect();
    if kinds.iter().any(|k| COMMON.contains(k)) {
        kinds.extend(COMMON);
    }
    let deepest = asked.iter().filter_map(|h| h.layer).max();
    // A point without a layer stands before the first block or after the last; only the former is known to cost no depth.
    let beyond = asked.iter().any(|h| h.layer.is_none() && !before_layers(h));
    let within = |h: &HookInfo| {
        if spec.keep_outputs || beyond {
            return true;
        }
        match h.layer {
            Some(layer) => deepest.is_some_and(|deepest| layer <= deepest),
            None => before_layers(h),
        }
    };
    let mut expose = spec.expose.clone();
    expose.extend(
        info.hooks
            .iter()
            .filter(|h| kinds.contains(kind(&h.name)) && within(h))
            // In the deepest layer of an early exit, what comes after the point asked for would cost the rest of that layer.
            .filter(|h| {
                spec.keep_outputs
                    || beyond
                    || h.layer.is_none()
                    || h.layer < deepest
                    || spec.expose.contains(&h.name)
            })
            .map(|h| h.name.clone()),
    );
    VariantSpec {
        expose,
        ..spec.clone()
    }
}

/// Whether a hook point without a layer stands before the first one.
fn before_layers(hook: &HookInfo) -> bool {
    hook.name.starts_with("hook_embed") || hook.name == "hook_pos_embed"
}

/// A hook point's name without its layer: `blocks.3.attn.hook_q` is of the kind `attn.hook_q`.
pub(super) fn kind(name: &str) -> &str {
    name.strip_prefix("blocks.")
        .and_then(|rest| rest.split_once('.'))
        .map_or(name, |(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::testing;

    fn spec(expose: &[&str], keep_outputs: bool) -> VariantSpec {
        VariantSpec {
            keep_outputs,
            ..VariantSpec::exposing(expose.iter().copied())
        }
    }

    #[test]
    fn attentions_and_hidden_states_share_one_variant() {
        let info = testing::info();
        let attention = widen(&spec(&["blocks.1.attn.hook_pattern"], true), &info);
        let hidden = widen(
            &spec(
                &["blocks.0.hook_resid_post", "blocks.2.hook_resid_pre"],
                true,
            ),
            &info,
        );
        assert_eq!(attention, hidden);
        assert!(attention.expose.contains("blocks.2.attn.hook_pattern"));
        assert!(!attention.expose.contains("blocks.2.attn.hook_q"));
    }

    #[test]
    fn inside_kinds_join_when_asked_in_every_layer() {
        let wide = widen(&spec(&["blocks.1.attn.hook_q"], true), &testing::info());
        let expected: Vec<String> = (0..3).map(|l| format!("blocks.{l}.attn.hook_q")).collect();
        assert_eq!(wide.expose.into_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn an_early_exit_shows_nothing_deeper_than_asked() {
        let wide = widen(&spec(&["blocks.1.hook_resid_pre"], false), &testing::info());
        assert!(wide.expose.contains("blocks.0.hook_resid_post"));
        assert!(wide.expose.contains("hook_embed_out"));
        assert!(
            !wide.expose.contains("blocks.1.hook_resid_post"),
            "it would cost block 1"
        );
        assert!(!wide.keep_outputs);
        let embedding = widen(&spec(&["hook_embed_out"], false), &testing::info());
        assert_eq!(embedding.expose.len(), 1);
    }

    #[test]
    fn plain_predicts_and_values_by_name_are_left_alone() {
        let info = testing::info();
        let plain = VariantSpec {
            plan: Plan::Plain,
            ..spec(&[], true)
        };
        assert_eq!(widen(&plain, &info), plain);
        let value = spec(&["value:/encoder/Add_output_0"], true);
        assert_eq!(widen(&value, &info), value);
        let late = VariantSpec {
            enter: ["blocks.1.hook_resid_pre".to_owned()].into(),
            ..spec(&["blocks.1.attn.hook_z"], false)
        };
        assert_eq!(widen(&late, &info), late);
    }

    #[test]
    fn widening_shows_what_was_asked_and_is_idempotent() {
        let info = testing::info();
        for hook in &info.hooks {
            for keep in [true, false] {
                let asked = spec(&[hook.name.as_str()], keep);
                let wide = widen(&asked, &info);
                assert!(wide.expose.is_superset(&asked.expose));
                assert_eq!(widen(&wide, &info), wide);
            }
        }
    }
}
