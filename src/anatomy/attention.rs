//! Attention in the graph, before anything is measured.
//!
//! ```text
//!   query   key                      An attention is a Softmax (or its three-step spelling) whose output meets,
//!      \    /                        with only casts, guards, masks and reshapes between, another value of the
//!     product       mask, bias       stream in a product. Above it, through scales, masks, added terms and caps,
//!        \          /                lies the product of queries and keys.
//!     scale, add, cap, where
//!            |                       A Softmax over the vocabulary, over experts or over tokens to be pooled meets
//!         scores                     no such product; it is not attention, and is listed with the reason.
//!            |
//!         softmax
//!            |        value
//!         pattern      /
//!             \       /
//!              product
//!                 |
//!                 z
//! ```

use std::collections::{HashMap, VecDeque};

use super::{
    flow::Flow,
    ops::{
        cross_product, dequantises, is_copy, is_layout, is_projection, is_scale, is_shift,
        live_product, only_source, walk_back,
    },
};
use crate::onnx::{Node, NodeId, ValueId};

/// Steps that may lie between a Softmax and its product; exporters need at most half of it.
const MAX_STEPS: usize = 16;

/// A softmax, whatever it is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Softmax {
    /// The node that makes the probabilities.
    pub node: NodeId,
    /// What it normalises.
    pub scores: ValueId,
    /// The probabilities.
    pub output: ValueId,
}

/// One attention. Where several values could be the hook point, all are listed, and contents decide.
#[derive(Clone, Debug)]
pub struct AttentionTrace {
    /// The normalisation.
    pub softmax: Softmax,
    /// From the softmax's output to the operand of the product with the values.
    pub pattern: Vec<ValueId>,
    /// The product with the values.
    pub product: NodeId,
    /// Whether the pattern is its left operand.
    pub pattern_left: bool,
    /// The other operand first, then its dominators up to the projection that made it.
    pub value: Vec<ValueId>,
    /// The product's output first, then the same under other axes.
    pub z: Vec<ValueId>,
    /// Where the scores come from.
    pub score: Result<ScoreTrace, String>,
    /// Whether the values come from the stream itself, and not only from another tower.
    pub self_attention: bool,
}

/// The product of queries and keys.
#[derive(Clone, Debug)]
pub struct ScoreTrace {
    /// The product.
    pub node: NodeId,
    /// Left operand first, then its dominators up to the projection that made it.
    pub left: Vec<ValueId>,
    /// Right operand, likewise.
    pub right: Vec<ValueId>,
    /// From the product's output to the softmax's input.
    pub path: Vec<ValueId>,
    /// Products of the data with something fixed that are added to the scores (relative positions).
    pub extra_terms: usize,
}

/// A Softmax that is not attention, and why.
#[derive(Clone, Debug)]
pub struct Rejected {
    /// Its output.
    pub softmax: ValueId,
    /// Why it is none.
    pub reason: String,
}

/// Every softmax on the way to the output.
pub(super) fn softmaxes(flow: &Flow<'_>) -> Vec<Softmax> {
    flow.graph()
        .nodes()
        .filter_map(|(id, node)| softmax(flow, id, node))
        .filter(|s| flow.on_path(s.output))
        .collect()
}

fn softmax(flow: &Flow<'_>, id: NodeId, node: &Node) -> Option<Softmax> {
    let output = node.outputs.first().copied().flatten()?;
    let first = node.inputs.first().copied().flatten()?;
    if !flow.live(output) {
        return None;
    }
    if node.is("Softmax") {
        return Some(Softmax {
            node: id,
            scores: first,
            output,
        });
    }
    // exp(x) / sum(exp(x))
    if !node.is("Div") {
        return None;
    }
    let (_, exp) = flow.maker(first).filter(|(_, n)| n.is("Exp"))?;
    let (_, sum) = flow
        .maker(node.inputs.get(1).copied().flatten()?)
        .filter(|(_, n)| n.is("ReduceSum"))?;
    if sum.inputs.first().copied().flatten() != Some(first) {
        return None;
    }
    Some(Softmax {
        node: id,
        scores: exp.inputs.first().copied().flatten()?,
        output,
    })
}

/// What this softmax is, if it is attention.
pub(super) fn attention(flow: &Flow<'_>, softmax: Softmax) -> Result<AttentionTrace, String> {
    let (pattern, product) = towards_values(flow, softmax)?;
    let node = flow.graph().node(product);
    let operand = *pattern
        .last()
        .expect("the way from a softmax holds at least its output");
    let (left, right) = (
        node.inputs.first().copied().flatten(),
        node.inputs.get(1).copied().flatten(),
    );
    let pattern_left = left == Some(operand);
    let value = if pattern_left { right } else { left }
        .ok_or_else(|| "its product lacks an operand".to_owned())?;
    let output = node
        .outputs
        .first()
        .copied()
        .flatten()
        .ok_or_else(|| "its product has no output".to_owned())?;
    let self_attention = flow.live(value);
    Ok(AttentionTrace {
        softmax,
        product,
        pattern_left,
        value: operand_origins(flow, value),
        z: relayouts(flow, output),
        score: score(flow, softmax, self_attention),
        pattern,
        self_attention,
    })
}

/// From the softmax's output to the first product with other data.
fn towards_values(flow: &Flow<'_>, softmax: Softmax) -> Result<(Vec<ValueId>, NodeId), String> {
    let mut from: HashMap<ValueId, ValueId> = HashMap::new();
    let mut open = VecDeque::from([(softmax.output, 0)]);
    let mut reason = "no product with values follows it".to_owned();
    while let Some((value, steps)) = open.pop_front() {
        for (id, node) in flow.consumers(value) {
            if let Some(other) = partner(node, value) {
                if is_data(flow, other) && !flow.reaches(softmax.output, other) {
                    let mut path = vec![value];
                    let mut at = value;
                    while let Some(before) = from.get(&at) {
                        path.push(*before);
                        at = *before;
                    }
                    path.reverse();
                    return Ok((path, id));
                }
                reason = "its output is multiplied with weights, not with values".to_owned();
                continue;
            }
            if steps < MAX_STEPS && may_follow(flow, node) {
                for output in node.outputs.iter().flatten().filter(|o| flow.on_path(**o)) {
                    if *output != softmax.output && !from.contains_key(output) {
                        from.insert(*output, value);
                        open.push_back((*output, steps + 1));
                    }
                }
            }
        }
    }
    Err(reason)
}

/// Whether a value depends on the input of a run: on the stream, or on another tower.
fn is_data(flow: &Flow<'_>, value: ValueId) -> bool {
    flow.live(value) || flow.foreign(value)
}

/// The other operand of a two-operand product.
fn partner(node: &Node, value: ValueId) -> Option<ValueId> {
    if !(node.is("MatMul") || node.is("Einsum") || node.is("Gemm") || node.op == "FusedMatMul") {
        return None;
    }
    match node.inputs[..] {
        [Some(left), Some(right), ..] if left == value => Some(right),
        [Some(left), Some(right), ..] if right == value => Some(left),
        _ => None,
    }
}

/// Steps between softmax and product: casts, axes, guards against empty rows, masks, a sink cut off.
fn may_follow(flow: &Flow<'_>, node: &Node) -> bool {
    is_copy(node)
        || is_scale(flow, node)
        || node.is("Where")
        || node.is("Trilu")
        || (node.is("Mul") && flow.sources(node).len() == 1)
}

/// The value and its dominators up to the projection that made it, nearest first.
pub(super) fn origins(flow: &Flow<'_>, value: ValueId) -> Vec<ValueId> {
    let mut chain = vec![value];
    let mut at = value;
    while let Some(up) = flow.dominator(at) {
        if between(flow, up, at)
            .iter()
            .any(|id| is_projection(flow, flow.graph().node(*id)))
        {
            break;
        }
        chain.push(up);
        at = up;
    }
    chain
}

/// As [`origins`], but a projection's bias belongs to it, and so does the scale that makes floats of a quantised one's integers: what
/// lies behind is left out. Of another tower's value, which the flow does not reach, only copies and scales are undone.
fn operand_origins(flow: &Flow<'_>, value: ValueId) -> Vec<ValueId> {
    if !flow.live(value) {
        return foreign_origins(flow, value);
    }
    let mut chain = origins(flow, value);
    let biased = chain.iter().position(|v| {
        flow.maker(*v)
            .filter(|(_, n)| is_shift(flow, n))
            .and_then(|(_, n)| only_source(flow, n))
            .is_some_and(|source| {
                walk_back(flow, source, is_copy)
                    .last()
                    .and_then(|o| flow.maker(*o))
                    .is_some_and(|(_, n)| is_projection(flow, n) || dequantises(flow, n))
            })
    });
    let scaled = || {
        chain
            .iter()
            .position(|v| flow.maker(*v).is_some_and(|(_, n)| dequantises(flow, n)))
    };
    if let Some(at) = biased.or_else(scaled) {
        chain.truncate(at + 1);
    }
    chain
}

/// A value of another tower, and the same before its axes were moved, its heads repeated and its numbers scaled.
fn foreign_origins(flow: &Flow<'_>, value: ValueId) -> Vec<ValueId> {
    let mut chain = vec![value];
    let mut at = value;
    while let Some(id) = flow.graph().producer(at) {
        let node = flow.graph().node(id);
        let mut data = node.reads().filter(|v| flow.foreign(*v));
        let (Some(source), None) = (data.next(), data.next()) else {
            break;
        };
        if !is_copy(node) && !node.is("Mul") && !node.is("Div") {
            break;
        }
        chain.push(source);
        at = source;
    }
    chain
}

/// Nodes on the ways from `from` to `to`, which it dominates.
pub(super) fn between(flow: &Flow<'_>, from: ValueId, to: ValueId) -> Vec<NodeId> {
    let mut nodes = Vec::new();
    let mut seen = std::collections::HashSet::from([to]);
    let mut open = vec![to];
    while let Some(v) = open.pop() {
        if v == from {
            continue;
        }
        if let Some((id, node)) = flow.maker(v) {
            if !nodes.contains(&id) {
                nodes.push(id);
            }
            open.extend(flow.sources(node).into_iter().filter(|s| seen.insert(*s)));
        }
    }
    nodes
}

/// A value and the same elements under other axes further on.
pub(super) fn relayouts(flow: &Flow<'_>, value: ValueId) -> Vec<ValueId> {
    let mut found = vec![value];
    let mut at = value;
    'on: for _ in 0..MAX_STEPS {
        for (_, node) in flow.consumers(at) {
            if is_layout(node)
                && let Some(next) = node.outputs.first().copied().flatten()
                && flow.on_path(next)
            {
                found.push(next);
                at = next;
                continue 'on;
            }
        }
        break;
    }
    found
}

/// The product of queries and keys above a softmax. Without self-attention the keys are another tower's.
fn score(flow: &Flow<'_>, softmax: Softmax, self_attention: bool) -> Result<ScoreTrace, String> {
    struct Found {
        node: NodeId,
        left: ValueId,
        right: ValueId,
        path: Vec<ValueId>,
        gathered: bool,
    }
    let mut found: Vec<Found> = Vec::new();
    let mut extra_terms = 0;
    let mut seen = std::collections::HashSet::from([softmax.scores]);
    let mut open = VecDeque::from([(vec![softmax.scores], false)]);
    while let Some((path, gathered)) = open.pop_front() {
        let at = *path.last().expect("a path begins with the scores");
        let Some((id, node)) = flow.maker(at) else {
            continue;
        };
        let product = match self_attention {
            true => live_product(flow, node),
            false => cross_product(flow, node),
        };
        if let Some((left, right)) = product {
            found.push(Found {
                node: id,
                left,
                right,
                path: path.iter().rev().copied().collect(),
                gathered,
            });
            continue;
        }
        if is_projection(flow, node) {
            extra_terms += 1;
            continue;
        }
        if path.len() > 2 * MAX_STEPS || !may_precede(flow, node) {
            continue;
        }
        let gathers = gathered || node.is("GatherElements") || node.is("Gather");
        // The condition of a Where is no term of the scores.
        let skip = usize::from(node.is("Where"));
        for source in node.inputs.iter().skip(skip).flatten() {
            if flow.live(*source) && seen.insert(*source) {
                let mut longer = path.clone();
                longer.push(*source);
                open.push_back((longer, gathers));
            }
        }
    }
    if found.iter().any(|f| !f.gathered) {
        found.retain(|f| !f.gathered);
    }
    match &found[..] {
        [] => Err("no product of queries and keys lies above the softmax".to_owned()),
        [one] => Ok(ScoreTrace {
            node: one.node,
            left: operand_origins(flow, one.left),
            right: operand_origins(flow, one.right),
            path: one.path.clone(),
            extra_terms,
        }),
        several => Err(format!(
            "the scores are a sum of {} products of data with data",
            several.len()
        )),
    }
}

fn may_precede(flow: &Flow<'_>, node: &Node) -> bool {
    is_copy(node)
        || is_scale(flow, node)
        || is_shift(flow, node)
        || (node.domain.is_empty()
            && [
                "Add",
                "Sub",
                "Sum",
                "Where",
                "Tanh",
                "Max",
                "Min",
                "Clip",
                "GatherElements",
                "Mul",
                "Div",
            ]
            .contains(&node.op.as_str()))
}
