//! Late entry: a run begins at hook points, whose values are inputs.
//!
//! ```text
//!   before ──▶ x                       state:x ──▶ axes of x ──▶ readers
//! ```
//!
//! What only the hook points needed is pruned with the outputs that nobody asked for, so that a row costs what lies behind them and no
//! more: a state through the head of a model, heads through an output projection. Left out: hook points that are an output of the file.
//!
//! What lies behind an entry may read the inputs of the model (a mask, say) but nothing of the stream that came before: then the entry
//! would not say what is computed. [`Entered::check`] refuses such a graph once its outputs are chosen. Shapes do not count: they say nothing
//! of values.

use std::collections::{BTreeSet, HashSet};

use super::{RewriteError, canonical::canonical_like};
use crate::{
    anatomy::Anatomy,
    ipc::spec::state_input,
    onnx::{Dim, Graph, Model, Patch, ValueId},
    tensor::DType,
};

/// Prefix of the names of everything that entering adds.
const PREFIX: &str = "enter";

/// Operators that tell shapes, not values.
const SHAPES: [&str; 2] = ["Shape", "Size"];

/// A hook point at which a run begins.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Name as it was asked for.
    pub name: String,
    /// Name of the input, under the canonical axes of the hook point.
    pub input: String,
    /// Element type.
    pub dtype: DType,
}

/// A model whose runs begin at hook points.
#[derive(Clone, Debug)]
pub struct Entered {
    /// The new model.
    pub model: Model,
    /// Its anatomy: a hook point that is entered at is the value that comes in, which is what its readers read.
    pub anatomy: Anatomy,
    /// Where runs begin, by name.
    pub points: Vec<Entry>,
    /// Hook points that the entries were computed from, themselves included.
    before: Vec<(String, ValueId)>,
}

/// Makes hook points inputs.
///
/// # Errors
/// For a name that is no hook point, for two that are the same value, and for a value that is no float.
pub fn enter(
    model: &Model,
    anatomy: &Anatomy,
    names: &BTreeSet<String>,
) -> Result<Entered, RewriteError> {
    let mut patch = Patch::new(&model.graph, PREFIX);
    let mut points = Vec::new();
    let mut entered: Vec<(ValueId, ValueId)> = Vec::new();
    for name in names {
        let hook = anatomy.resolve(model, name)?;
        if !hook.dtype.is_float() {
            return Err(RewriteError::Graph(format!(
                "\"{name}\" holds {}, and a run begins at floats only",
                hook.dtype
            )));
        }
        if entered.iter().any(|(value, _)| *value == hook.value) {
            return Err(RewriteError::Graph(format!(
                "\"{name}\" is the same value as another point that is entered at"
            )));
        }
        let input = state_input(name);
        let dims = vec![Dim::Unknown; hook.axes.len()];
        let state = patch.input(&input, hook.dtype, dims)?;
        let (mut value, mut failed) = (state, None);
        // The way back may ask the value for its shape: it alone goes on reading what stood there.
        patch.intercept(hook.value, |patch, raw| {
            match canonical_like(patch, (model, anatomy), &hook, raw) {
                Ok(there) => value = there.back(patch, state),
                Err(why) => failed = Some(why),
            }
            value
        });
        if let Some(why) = failed {
            return Err(why);
        }
        entered.push((hook.value, value));
        points.push(Entry {
            name: name.clone(),
            input,
            dtype: hook.dtype,
        });
    }
    let came = behind(&model.graph, entered.iter().map(|(value, _)| *value));
    let floats = anatomy.hooks.iter().filter(|h| h.dtype.is_float());
    let before = floats
        .filter(|h| came.contains(&h.value))
        .map(|h| (h.name.clone(), h.value))
        .collect();
    let mut anatomy = anatomy.clone();
    for hook in &mut anatomy.hooks {
        let new = entered.iter().find(|(value, _)| *value == hook.value);
        hook.value = new.map_or(hook.value, |(_, new)| *new);
    }
    Ok(Entered {
        model: model.with_graph(patch.apply()?),
        anatomy,
        points,
        before,
    })
}

impl Entered {
    /// Whether the outputs of a graph that was made from this one are computed from the entries, and from nothing of the stream before them.
    ///
    /// # Errors
    /// Names the first hook point that is read all the same.
    pub fn check(&self, model: &Model) -> Result<(), RewriteError> {
        let graph = &model.graph;
        let read = behind(graph, graph.outputs().iter().map(|o| o.value));
        let inputs: HashSet<ValueId> = self
            .points
            .iter()
            .filter_map(|p| graph.value(&p.input))
            .collect();
        for (name, value) in self.before.iter().filter(|(_, v)| read.contains(v)) {
            // What is made of an entry lies behind it, whatever else it lies before.
            if behind(graph, [*value]).is_disjoint(&inputs) {
                let entries: Vec<&str> = self.points.iter().map(|p| p.name.as_str()).collect();
                return Err(RewriteError::Graph(format!(
                    "what lies behind \"{}\" reads \"{name}\" too, which comes before it",
                    entries.join("\", \"")
                )));
            }
        }
        Ok(())
    }
}

/// The values that some are made of, themselves included.
fn behind(graph: &Graph, from: impl IntoIterator<Item = ValueId>) -> HashSet<ValueId> {
    let mut open: Vec<ValueId> = from.into_iter().collect();
    let mut found: HashSet<ValueId> = open.iter().copied().collect();
    while let Some(value) = open.pop() {
        let Some(node) = graph.producer(value).map(|n| graph.node(n)) else {
            continue;
        };
        if node.is_any(&SHAPES) {
            continue;
        }
        open.extend(node.reads().filter(|v| found.insert(*v)));
    }
    found
}
