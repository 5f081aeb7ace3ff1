//! The multi-layer perceptron of a branch: up, bend, down.
//!
//! ```text
//!   x ─▶ up ─▶ pre ─▶ activation ─▶ post ─▶ down ─▶ out
//!   x ─▶ gate ─▶ pre ─▶ activation ─┐
//!   x ─▶ up ─▶ pre_linear ──────────× ─▶ post ─▶ down ─▶ out
//! ```
//!
//! `post` is what the last product of the branch reads; `pre` are the nearest outputs of products (bias included)
//! that it is made of. Exactly one of two must pass an activation that the other does not: that one is the gate.
//! Routed experts have more, and are reported as such.

use std::collections::HashSet;

use super::{
    attention::{between, origins},
    flow::Flow,
    ops::{dequantises, is_activation, is_layout, is_projection, is_shift, only_source, walk_back},
};
use crate::onnx::{Node, NodeId, ValueId};

/// A perceptron found in a branch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MlpTrace {
    /// Enters the activation.
    pub pre: ValueId,
    /// The other factor of a gated one.
    pub pre_linear: Option<ValueId>,
    /// Enters the last product; candidates under different axes, nearest to the product first.
    pub post: Vec<ValueId>,
    /// What is added to the stream.
    pub out: ValueId,
}

/// The perceptron between `start` and the branch that ends in `out`.
pub(super) fn mlp(flow: &Flow<'_>, start: ValueId, out: ValueId) -> Result<MlpTrace, String> {
    let down = down(flow, out)?;
    let input = data_input(flow, down).ok_or("its last product reads no data")?;
    let post = walk_back(flow, input, is_layout);
    let made = *post.last().expect("a walk begins with its value");
    let sources = linear_sources(flow, start, made)?;
    let (pre, pre_linear) = match sources[..] {
        [one] if bends(flow, one, made, None) => (one, None),
        [_] => return Err("no activation lies between its products".to_owned()),
        [a, b] => match (bends(flow, a, made, Some(b)), bends(flow, b, made, Some(a))) {
            (true, false) => (a, Some(b)),
            (false, true) => (b, Some(a)),
            _ => return Err("neither or both of its two factors pass an activation".to_owned()),
        },
        _ => {
            return Err(format!(
                "its last product depends on {} products",
                sources.len()
            ));
        }
    };
    Ok(MlpTrace {
        pre,
        pre_linear,
        post,
        out,
    })
}

/// The last product with weights before `out`, if there is just one.
fn down(flow: &Flow<'_>, out: ValueId) -> Result<NodeId, String> {
    let last = *origins(flow, out)
        .last()
        .expect("origins begin with their value");
    let up = flow
        .dominator(last)
        .ok_or("no product with weights lies on the branch")?;
    let products: Vec<NodeId> = between(flow, up, last)
        .into_iter()
        .filter(|id| is_projection(flow, flow.graph().node(*id)))
        .collect();
    match products[..] {
        [one] => Ok(one),
        [] => Err("no product with weights lies on the branch".to_owned()),
        _ => Err(format!(
            "the branch ends in {} products side by side, as routed experts do",
            products.len()
        )),
    }
}

/// The live input of a product.
fn data_input(flow: &Flow<'_>, product: NodeId) -> Option<ValueId> {
    let node = flow.graph().node(product);
    node.inputs
        .iter()
        .flatten()
        .copied()
        .find(|v| flow.live(*v))
}

/// Outputs of products that `value` is made of, nothing but axes and halves between them and the bend.
fn linear_sources(flow: &Flow<'_>, start: ValueId, value: ValueId) -> Result<Vec<ValueId>, String> {
    let mut found = Vec::new();
    let mut seen = HashSet::from([value]);
    let mut open = vec![value];
    while let Some(v) = open.pop() {
        if is_linear(flow, v) {
            found.push(v);
            continue;
        }
        if v == start {
            return Err("its last product also reads what enters the branch".to_owned());
        }
        if let Some((_, node)) = flow.maker(v) {
            open.extend(flow.sources(node).into_iter().filter(|s| seen.insert(*s)));
        }
    }
    // The same product seen under other axes is one source, the nearest to the bend.
    let all = found.clone();
    found.retain(|v| {
        !all.iter()
            .any(|other| other != v && walk_back(flow, *other, is_layout).contains(v))
    });
    found.sort_by_key(|v| flow.order(*v));
    Ok(found)
}

/// Whether a value is the output of a product with weights, bias included, possibly a part of it.
fn is_linear(flow: &Flow<'_>, value: ValueId) -> bool {
    let mut at = value;
    loop {
        let Some((_, node)) = flow.maker(at) else {
            return false;
        };
        if is_projection(flow, node) || dequantises(flow, node) {
            return true;
        }
        let passes =
            is_layout(node) || node.is_any(&["Split", "Slice", "Gather"]) || adds_bias(flow, node);
        match only_source(flow, node) {
            Some(source) if passes => at = source,
            _ => return false,
        }
    }
}

/// `x + b` with a vector `b`: a bias, not part of an activation's formula.
fn adds_bias(flow: &Flow<'_>, node: &Node) -> bool {
    is_shift(flow, node)
        && node.inputs.iter().flatten().any(|v| {
            flow.graph()
                .initializer(*v)
                .is_some_and(|i| i.dims().iter().product::<usize>() > 1)
        })
}

/// Whether an activation lies between `from` and `to` that data of `other` does not pass.
fn bends(flow: &Flow<'_>, from: ValueId, to: ValueId, other: Option<ValueId>) -> bool {
    reached_nodes(flow, from, to).into_iter().any(|id| {
        let node = flow.graph().node(id);
        let squares = node.is_any(&["Pow", "Mul"]) && flow.sources(node) == [from];
        (is_activation(node) || squares && other.is_none())
            && !other.is_some_and(|o| node.output(0).is_some_and(|out| flow.reaches(o, out)))
    })
}

/// Nodes on ways from `from` to `to`.
pub(super) fn reached_nodes(flow: &Flow<'_>, from: ValueId, to: ValueId) -> Vec<NodeId> {
    let mut open = vec![to];
    let mut seen = HashSet::from([to]);
    let mut nodes = Vec::new();
    while let Some(v) = open.pop() {
        if v == from || flow.order(v) < flow.order(from) {
            continue;
        }
        if let Some((id, node)) = flow.maker(v) {
            if node.output(0).is_some_and(|o| flow.reaches(from, o)) {
                nodes.push(id);
            }
            open.extend(flow.sources(node).into_iter().filter(|s| seen.insert(*s)));
        }
    }
    nodes
}
