//! Residual blocks: `x + f(x)`.
//!
//! ```text
//!    start ──────────────┐ skip          An `Add` of two live values closes a block when one of them (up to scale
//!      │                 │               and axes) dominates the other and weights lie between. A parallel block
//!      ├──▶ f ── branch ─┤               sums more than two: then one summand dominates all the others.
//!      └──▶ g ── branch ─┤
//!                       end
//! ```
//!
//! Dominance is asked locally, from the start of a block to its branch, so long skips over many blocks do no harm.

use super::{
    attention::{AttentionTrace, between},
    flow::Flow,
    ops::{is_layout, is_projection, is_scale, walk_back},
};
use crate::onnx::ValueId;

/// How many sums in a row one parallel block may be written as.
const MAX_SUMS: usize = 4;

/// One residual block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// The stream that enters.
    pub start: ValueId,
    /// The stream as it stands in the sum: `start` up to scale and axes.
    pub skip: ValueId,
    /// What is added to it.
    pub branches: Vec<ValueId>,
    /// The sum.
    pub end: ValueId,
    /// Partial sums of a parallel block.
    pub partial: Vec<ValueId>,
}

/// Every residual block on the way to the output, in order; those inside a branch of another are left out.
pub(super) fn blocks(flow: &Flow<'_>, attentions: &[AttentionTrace]) -> Vec<Block> {
    let mut found: Vec<Block> = flow
        .graph()
        .nodes()
        .filter_map(|(_, node)| {
            let end = node.output(0).filter(|v| flow.on_path(*v))?;
            (node.is("Add") || node.is("Sum"))
                .then(|| close(flow, end))
                .flatten()
        })
        .collect();
    let partial: Vec<(ValueId, ValueId)> = found
        .iter()
        .flat_map(|b| b.partial.iter().map(|p| (b.start, *p)))
        .collect();
    found.retain(|b| !partial.contains(&(b.start, b.end)));
    unnest(flow, found, attentions)
}

/// The block that this sum closes.
fn close(flow: &Flow<'_>, end: ValueId) -> Option<Block> {
    let mut summands = summands(flow, end)?;
    let mut partial = Vec::new();
    for _ in 0..MAX_SUMS {
        for (i, skip) in summands.iter().enumerate() {
            let branches: Vec<ValueId> = summands
                .iter()
                .enumerate()
                .filter(|(j, _)| *j != i)
                .map(|(_, v)| *v)
                .collect();
            if let Some(start) = root(flow, *skip, &branches) {
                return Some(Block {
                    start,
                    skip: *skip,
                    branches,
                    end,
                    partial,
                });
            }
        }
        let before = summands.len();
        summands = summands
            .into_iter()
            .flat_map(|v| match self::summands(flow, v) {
                Some(inner) => {
                    partial.push(v);
                    inner
                }
                None => vec![v],
            })
            .collect();
        if summands.len() == before {
            return None;
        }
    }
    None
}

/// The live operands of a sum of at least two.
fn summands(flow: &Flow<'_>, value: ValueId) -> Option<Vec<ValueId>> {
    let (_, node) = flow.maker(value)?;
    if !node.is("Add") && !node.is("Sum") {
        return None;
    }
    let live = flow.live_inputs(node);
    (live.len() > 1).then_some(live)
}

/// The value behind `skip` that dominates every branch with weights on the way to each.
fn root(flow: &Flow<'_>, skip: ValueId, branches: &[ValueId]) -> Option<ValueId> {
    walk_back(flow, skip, |n| is_layout(n) || is_scale(flow, n))
        .into_iter()
        .find(|r| branches.iter().all(|b| *b != *r && flow.dominates(*r, *b)))
        .filter(|r| {
            branches.iter().all(|b| {
                between(flow, *r, *b)
                    .iter()
                    .any(|id| is_projection(flow, flow.graph().node(*id)))
            })
        })
}

/// Of blocks within blocks, keeps the outer one, unless an attention closes its own block inside: then the outer
/// sum is a long skip.
fn unnest(flow: &Flow<'_>, found: Vec<Block>, attentions: &[AttentionTrace]) -> Vec<Block> {
    let inside = |inner: &Block, outer: &Block| {
        inner.end != outer.end
            && inner.start != outer.start
            && flow.dominates(outer.start, inner.start)
            && outer
                .branches
                .iter()
                .any(|b| flow.post_dominates(*b, inner.end))
    };
    let first_inside = |inner: &Block, outer: &Block| {
        inner.end != outer.end
            && inner.start == outer.start
            && outer
                .branches
                .iter()
                .any(|b| flow.post_dominates(*b, inner.end))
    };
    let nested = |inner: &Block, outer: &Block| inside(inner, outer) || first_inside(inner, outer);
    let long: Vec<bool> = found
        .iter()
        .map(|outer| {
            found.iter().any(|inner| {
                nested(inner, outer) && attentions.iter().any(|a| holds(flow, inner, a))
            })
        })
        .collect();
    let kept: Vec<Block> = found
        .into_iter()
        .zip(long)
        .filter(|(_, long)| !long)
        .map(|(b, _)| b)
        .collect();
    let top: Vec<bool> = kept
        .iter()
        .map(|inner| !kept.iter().any(|outer| nested(inner, outer)))
        .collect();
    kept.into_iter()
        .zip(top)
        .filter(|(_, top)| *top)
        .map(|(b, _)| b)
        .collect()
}

/// Whether an attention lies within a branch of the block.
pub(super) fn holds(flow: &Flow<'_>, block: &Block, attention: &AttentionTrace) -> bool {
    attention.z.first().is_some_and(|z| {
        flow.dominates(block.start, *z)
            && block.branches.iter().any(|b| flow.post_dominates(*b, *z))
    })
}
