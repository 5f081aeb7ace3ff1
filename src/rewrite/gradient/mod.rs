//! Reverse mode: appends the gradient of a sum to a graph, in standard operators that stock ONNX Runtime runs.
//!
//! ```text
//!   point ──▶ f ──▶ g ──▶ of          forward, as the file has it
//!     │       │     │      │
//!   dpoint ◀─ f' ◀─ g' ◀─ seed        backward: one rule per operator, in reverse order
//! ```
//!
//! What it promises:
//! - [`backward`] gives `d sum(seed * of) / d point` for every point, each of the shape of its point. Rows of a batch do not meet in a
//!   transformer, so that with one objective per row the gradients of all rows come from one run.
//! - Only what depends on a point through floats is differentiated: no weight gets a gradient, nothing goes through shapes, integers or
//!   comparisons. Gradients of a value that is read more than once are added up.
//! - Weights are not copied to transpose them: a product with a weight is differentiated by a `Gemm` with the other flag.
//! - An operator without a rule, or in a form that its rule does not know, is an error that names it. Nothing is left out in silence.
//!
//! With [`Rules::AttnLrp`] some operators hand on relevance instead, by rules of their own.
//!
//! Left out: control flow, second derivatives, gradients with respect to weights. Where a function has a kink, the derivative is the one
//! that PyTorch takes.
//!
//! Each rule is the vector-Jacobian product of its operator; `tests/gradient_rules.rs` holds every one against differences of the
//! operator itself.

mod rules;
mod shapes;
mod tape;

pub use shapes::Shapes;

use crate::{
    ipc::spec::Rules,
    onnx::{Node, ValueId, Writer},
};
use tape::Tape;

/// Operators whose outputs are constant wherever they have a derivative, or are no floats: nothing flows back through them.
const FLAT: [&str; 10] = [
    "Ceil", "Floor", "IsInf", "IsNaN", "NonZero", "Not", "Round", "Shape", "Sign", "Size",
];

/// An operator on the way that cannot be differentiated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no gradient through {operator} \"{node}\": {reason}; finite differences need none")]
pub struct NoGradient {
    /// Operator type, with its domain where that is not the standard one.
    pub operator: String,
    /// Name of the node.
    pub node: String,
    /// Why.
    pub reason: String,
}

/// Appends the gradient of `sum(seed * of)` with respect to each point, or what other `rules` put in its place; `None` for a point that `of`
/// does not depend on.
///
/// `seed` has the shape and type of `of`. Points may depend on each other. Reroutes of the writer's patch are not seen: apply
/// interventions first.
///
/// # Errors
/// [`NoGradient`] for the first operator, from the end, that has no rule or does not fit it.
pub fn backward(
    writer: &mut Writer,
    shapes: &Shapes,
    (of, seed): (ValueId, ValueId),
    points: &[ValueId],
    rules: Rules,
) -> Result<Vec<Option<ValueId>>, NoGradient> {
    let nodes: Vec<Node> = writer
        .patch
        .draft()
        .nodes()
        .map(|(_, n)| n.clone())
        .collect();
    let mut tape = Tape::new(writer, shapes, points, rules);
    for node in &nodes {
        let flat = node.domain.is_empty() && FLAT.contains(&node.op.as_str());
        if !flat && node.reads().any(|v| tape.wants(v)) {
            tape.want_outputs(node);
        }
    }
    if tape.wants(of) {
        tape.give(of, seed);
    }
    for node in nodes.iter().rev() {
        let given: Vec<Option<ValueId>> =
            node.outputs.iter().map(|v| tape.gradient((*v)?)).collect();
        let goes_on = node.reads().any(|v| tape.wants(v));
        if !goes_on || given.iter().all(Option::is_none) {
            continue;
        }
        let refuse = |reason: String| NoGradient {
            operator: if node.domain.is_empty() {
                node.op.clone()
            } else {
                format!("{}.{}", node.domain, node.op)
            },
            node: node.name.clone(),
            reason,
        };
        let rule = rules::of(node, rules).ok_or_else(|| refuse("it has no rule".to_owned()))?;
        rule(&mut tape, node, &given).map_err(refuse)?;
    }
    Ok(points.iter().map(|p| tape.gradient(*p)).collect())
}
