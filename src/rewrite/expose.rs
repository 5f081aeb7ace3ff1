//! Values become outputs.

use std::collections::BTreeSet;

use super::{canonical::canonical, gradient::NoGradient};
use crate::{
    anatomy::{Anatomy, HookError},
    ipc::info::Axis,
    onnx::{Model, OnnxError, Patch, ValueId},
    tensor::DType,
};

/// Prefix of the names of everything that exposing adds.
const PREFIX: &str = "introspectd";

/// What to show.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Exposure {
    /// Names, aliases, short forms, or `value:NAME`.
    pub hooks: BTreeSet<String>,
    /// Whether the outputs of the file stay outputs; otherwise all that the hooks do not need is pruned.
    pub keep_outputs: bool,
}

/// An output of a rewritten model.
#[derive(Clone, Debug, PartialEq)]
pub struct ExposedOutput {
    /// Name of the output: what was asked for.
    pub name: String,
    /// Canonical name of the hook point.
    pub hook: String,
    /// Element type.
    pub dtype: DType,
    /// Axes; empty for `value:NAME`, whose axes nobody has read.
    pub axes: Vec<Axis>,
    /// Extents that do not vary.
    pub dims: Vec<Option<usize>>,
}

/// A model that shows what was asked.
#[derive(Clone, Debug)]
pub struct Rewritten {
    /// The new model.
    pub model: Model,
    /// What was added, in the order of the graph's outputs.
    pub outputs: Vec<ExposedOutput>,
}

/// A model that shows raw values.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The new model; its outputs are the values alone.
    pub model: Model,
    /// Output name and the value of the original graph behind it.
    pub outputs: Vec<(String, ValueId)>,
}

/// Why a variant cannot be made.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RewriteError {
    /// A name is no hook point here.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// An operator on the way cannot be differentiated.
    #[error(transparent)]
    NoGradient(#[from] NoGradient),
    /// Nothing was asked for.
    #[error("a variant without its own outputs must expose at least one hook point")]
    Empty,
    /// A folded axis needs the batch, and no input carries it.
    #[error("\"{0}\" is folded with the batch, and no input of the model tells the batch")]
    NoBatch(String),
    /// The graph refused the edit.
    #[error("the graph cannot be rewritten: {0}")]
    Graph(String),
}

impl From<OnnxError> for RewriteError {
    fn from(e: OnnxError) -> Self {
        RewriteError::Graph(e.to_string())
    }
}

/// Makes hook points outputs under canonical axes, each under the name that was asked for.
pub fn expose(
    model: &Model,
    anatomy: &Anatomy,
    what: &Exposure,
) -> Result<Rewritten, RewriteError> {
    let mut patch = Patch::new(&model.graph, PREFIX);
    let mut outputs = Vec::new();
    let mut kept = Vec::new();
    for name in &what.hooks {
        let hook = anatomy.resolve(model, name)?;
        let value = canonical(&mut patch, model, anatomy, &hook)?.value();
        let existing = patch.draft().value(name);
        match existing {
            // The file names this very value so.
            Some(own) if own == hook.value && hook.layout.is_identity() => {
                patch.output(own);
                kept.push(own);
            }
            Some(_) => {
                return Err(RewriteError::Graph(format!(
                    "the file has another value called \"{name}\"; ask for \"{}\"",
                    hook.name
                )));
            }
            None => {
                patch.tap(value, name)?;
                kept.extend(patch.draft().value(name));
            }
        }
        outputs.push(ExposedOutput {
            name: name.clone(),
            hook: hook.name,
            dtype: hook.dtype,
            axes: hook.axes,
            dims: hook.dims,
        });
    }
    if !what.keep_outputs {
        if kept.is_empty() {
            return Err(RewriteError::Empty);
        }
        patch.keep_outputs(&kept);
    }
    Ok(Rewritten {
        model: model.with_graph(patch.apply()?),
        outputs,
    })
}

/// Makes raw values the outputs of a model, all else pruned.
pub fn observe(model: &Model, values: &[ValueId]) -> Result<Observed, RewriteError> {
    let mut patch = Patch::new(&model.graph, PREFIX);
    for value in values {
        patch.output(*value);
    }
    patch.keep_outputs(values);
    Ok(Observed {
        model: model.with_graph(patch.apply()?),
        outputs: values
            .iter()
            .map(|v| (model.graph.name(*v).to_owned(), *v))
            .collect(),
    })
}
