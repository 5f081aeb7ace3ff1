//! What a graph variant shows, as a value: the key under which it is built once.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// Which graph a variant starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Plan {
    /// The model file as it is, fused operators and all; its own outputs and nothing else.
    Plain,
    /// The normalised graph, with what is exposed.
    Rewritten,
}

/// A variant of a model. Equal values share one session.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VariantSpec {
    /// Where it starts.
    pub plan: Plan,
    /// Canonical hook points (`blocks.0.attn.hook_pattern`), or `value:NAME` for any value of the graph, that become
    /// outputs. Empty for [`Plan::Plain`].
    pub expose: BTreeSet<String>,
    /// Keep the model's own outputs. `false` exits early: only what the exposed values need is run.
    pub keep_outputs: bool,
}

impl VariantSpec {
    /// The untouched model.
    pub fn plain() -> Self {
        Self {
            plan: Plan::Plain,
            expose: BTreeSet::new(),
            keep_outputs: true,
        }
    }

    /// Hook points beside the model's own outputs.
    pub fn exposing<S: Into<String>>(hooks: impl IntoIterator<Item = S>) -> Self {
        Self {
            plan: Plan::Rewritten,
            expose: hooks.into_iter().map(Into::into).collect(),
            keep_outputs: true,
        }
    }
}
