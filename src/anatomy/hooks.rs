//! Hook points: the names by which values inside a model are asked for.
//!
//! Names and meaning are TransformerLens's; Hugging Face's `hidden_states.{i}` and `attentions.{i}` are aliases, and so are
//! TransformerLens's short forms (`resid_post.10`, `pattern.3`). `value:NAME` is any value of the file.

use super::{inputs::InputTrace, layout::Layout};
use crate::{
    ipc::info::{Axis, Check, Dims, Missing, Task},
    onnx::{Model, ValueId},
    tensor::DType,
};

/// Prefix of names that address a value of the file as it is.
pub const VALUE_PREFIX: &str = "value:";

/// A place in the model that can be shown, under canonical axes.
#[derive(Clone, Debug, PartialEq)]
pub struct HookPoint {
    /// Canonical name, as in `blocks.0.attn.hook_pattern`.
    pub name: String,
    /// Other names of the same thing.
    pub aliases: Vec<String>,
    /// Layer, for those that belong to one.
    pub layer: Option<usize>,
    /// The value in the graph.
    pub value: ValueId,
    /// How the raw value becomes the canonical axes.
    pub layout: Layout,
    /// Canonical axes.
    pub axes: Vec<Axis>,
    /// Extents of the axes that do not vary.
    pub dims: Vec<Option<usize>>,
    /// Element type.
    pub dtype: DType,
}

/// An output of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputFact {
    /// Name in the graph.
    pub name: String,
    /// Axes as measured.
    pub axes: Vec<Axis>,
    /// Extents that do not vary.
    pub dims: Vec<Option<usize>>,
    /// Element type.
    pub dtype: DType,
}

/// What was found in a model.
#[derive(Clone, Debug)]
pub struct Anatomy {
    /// What the model is for.
    pub task: Task,
    /// Inputs and their roles.
    pub inputs: Vec<InputTrace>,
    /// Outputs of the file.
    pub outputs: Vec<OutputFact>,
    /// The output that everything leads to.
    pub main_output: Option<ValueId>,
    /// Sizes.
    pub dims: Dims,
    /// Every hook point, verified.
    pub hooks: Vec<HookPoint>,
    /// What the model lacks or could not be verified, and why.
    pub missing: Vec<Missing>,
    /// What was checked on the trials.
    pub checks: Vec<Check>,
    /// Rows of different length may share a batch: a padded row gave what it gave alone.
    pub pads: bool,
    /// Rows that a run must have, when the model runs with no other number.
    pub fixed_batch: Option<usize>,
    /// Whether rows of a run change each other's answers.
    pub rows_interact: bool,
    /// Tokens that a row must have, when the model runs with no other number.
    pub fixed_length: Option<usize>,
    /// Remarks for people.
    pub notes: Vec<String>,
    /// The model as a picture in text.
    pub picture: String,
}

/// Why a name is no hook point of a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HookError {
    /// The model lacks the part.
    #[error("the model has no \"{name}\": {reason}")]
    Missing {
        /// Canonical name.
        name: String,
        /// Why.
        reason: String,
    },
    /// The name means nothing.
    #[error("\"{0}\" is no hook point of this model; list them with `introspectd inspect`")]
    Unknown(String),
}

impl Anatomy {
    /// The hook point of this name, alias or short form.
    pub fn hook(&self, name: &str) -> Option<&HookPoint> {
        let full = expand(name);
        self.hooks.iter().find(|h| {
            h.name == name
                || full.as_deref() == Some(h.name.as_str())
                || h.aliases.iter().any(|a| a == name)
        })
    }

    /// The hook point of this name, alias or short form, or `value:NAME` of the model's file.
    pub fn resolve(&self, model: &Model, name: &str) -> Result<HookPoint, HookError> {
        if let Some(hook) = self.hook(name) {
            return Ok(hook.clone());
        }
        if let Some(value) = name.strip_prefix(VALUE_PREFIX) {
            let id = model
                .graph
                .value(value)
                .filter(|v| model.graph.producer(*v).is_some())
                .ok_or_else(|| HookError::Unknown(name.to_owned()))?;
            return Ok(HookPoint {
                name: name.to_owned(),
                aliases: Vec::new(),
                layer: None,
                value: id,
                layout: Layout::identity(),
                axes: Vec::new(),
                dims: Vec::new(),
                dtype: model
                    .graph
                    .declared(id)
                    .and_then(|f| f.dtype)
                    .unwrap_or(DType::F32),
            });
        }
        let full = expand(name).unwrap_or_else(|| name.to_owned());
        match self
            .missing
            .iter()
            .find(|m| m.hook == full || m.hook == name)
        {
            Some(m) => Err(HookError::Missing {
                name: full,
                reason: m.reason.clone(),
            }),
            None => Err(HookError::Unknown(name.to_owned())),
        }
    }
}

/// The canonical name behind a short form such as `resid_post.10`.
pub(super) fn expand(name: &str) -> Option<String> {
    let (short, layer) = name.rsplit_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let short = short.strip_prefix("hook_").unwrap_or(short);
    let inside = match short {
        "resid_pre"
        | "resid_mid"
        | "resid_post"
        | "normalized_resid_post"
        | "resid_mid_cross"
        | "attn_out"
        | "cross_attn_out"
        | "mlp_out" => format!("hook_{short}"),
        "q" | "k" | "v" | "z" | "rot_q" | "rot_k" | "attn_scores" | "pattern" => {
            format!("attn.hook_{short}")
        }
        "query" => "attn.hook_q".to_owned(),
        "key" => "attn.hook_k".to_owned(),
        "value" => "attn.hook_v".to_owned(),
        "attn" => "attn.hook_pattern".to_owned(),
        "attn_logits" => "attn.hook_attn_scores".to_owned(),
        "pre" | "post" | "pre_linear" => format!("mlp.hook_{short}"),
        "mlp_pre" => "mlp.hook_pre".to_owned(),
        "mlp_post" => "mlp.hook_post".to_owned(),
        _ => return None,
    };
    Some(format!("blocks.{layer}.{inside}"))
}

#[cfg(test)]
mod tests {
    use super::expand;

    #[test]
    fn short_forms_are_spelled_out() {
        for (short, full) in [
            ("resid_post.10", "blocks.10.hook_resid_post"),
            ("hook_resid_pre.0", "blocks.0.hook_resid_pre"),
            ("pattern.3", "blocks.3.attn.hook_pattern"),
            ("attn.3", "blocks.3.attn.hook_pattern"),
            ("mlp_post.1", "blocks.1.mlp.hook_post"),
        ] {
            assert_eq!(expand(short).as_deref(), Some(full));
        }
    }

    #[test]
    fn other_names_have_no_short_form() {
        for name in [
            "logits",
            "resid_post",
            "resid_post.x",
            "hidden_states.3",
            "nonsense.1",
        ] {
            assert_eq!(expand(name), None, "{name}");
        }
    }
}
