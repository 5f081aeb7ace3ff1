//! `com.microsoft.Attention`: the projections of query, key and value in one matrix, and the attention after them.
//!
//! Masks in every form of the CPU kernel (see [`scores::padding`]), a term to add to the scores, `unidirectional`, past
//! and present stacked in one tensor, widths that differ between keys and values.

use super::{
    emit::{Emit, Needs},
    scores::{self, Heads, Scores},
};
use crate::onnx::{Node, ValueId};

/// What the runtime adds to the score of a masked key.
const FILTER: f32 = -10000.0;

/// `com.microsoft.Attention`.
pub(super) fn attention(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    let (input, weights) = (node.need(0)?, node.need(1)?);
    if node.int("do_rotary").unwrap_or(0) != 0 {
        return Err("it rotates queries and keys by a table that is not in the file".to_owned());
    }
    shares_no_buffer(node)?;
    node.without(6, "the length of a shared past")?;
    let dtype = e.dtype(weights).or_else(|_| e.dtype(input))?;
    let count = scores::heads(node, "num_heads")?;
    let widths = widths(e, node, weights)?;
    let k_from = widths[0];
    let v_from = k_from + widths[1];
    let width = widths[0] / count;

    let mut projected = e.op("MatMul", &[input, weights]);
    if let Some(bias) = node.input(2) {
        projected = e.op("Add", &[projected, bias]);
    }
    let part = |e: &mut Emit<'_>, from, width: i64| {
        let part = e.slice(projected, 2, from, from + width);
        scores::split_heads(e, part, count)
    };
    let mut heads = Heads {
        q: part(e, 0, widths[0]),
        k: part(e, k_from, widths[1]),
        v: part(e, v_from, widths[2]),
    };
    let past = node
        .input(4)
        .map(|past| [e.pick(past, 0, 0), e.pick(past, 0, 1)]);
    if let Some([key, value]) = past {
        heads.k = e.concat(&[key, heads.k], 2);
        heads.v = e.concat(&[value, heads.v], 2);
    }
    if let present @ Some(_) = e.wanted(node, 1) {
        let pair = [heads.k, heads.v].map(|x| e.unsqueeze(x, &[0]));
        let both = e.concat(&pair, 0);
        e.alias(present, both);
    }
    let padding = node.input(3).map(|m| (m, true));
    let terms = terms(
        e,
        node,
        &heads,
        padding,
        node.input(5),
        past.map(|p| p[0]),
        dtype,
    )?;
    let scores = Scores {
        dtype,
        scale: given_scale(node),
        width: Some(width),
        softcap: 0.0,
        terms,
        precision: None,
        guard: false,
    };
    let done = scores::attend(e, None, &heads, &scores);
    scores::merge_heads(e, e.wanted(node, 0), done.z);
    Ok(())
}

/// Widths of query, key and value in the merged weights.
fn widths(e: &Emit<'_>, node: &Node, weights: ValueId) -> Result<[i64; 3], String> {
    let widths = match node.ints("qkv_hidden_sizes") {
        Some(widths) if !widths.is_empty() => widths.try_into().ok(),
        _ => {
            let last = e
                .fact(weights)
                .last
                .or(node.input(2).and_then(|b| e.fact(b).last));
            last.filter(|n| n % 3 == 0).map(|n| [n / 3; 3])
        }
    };
    widths
        .filter(|w: &[i64; 3]| w.iter().all(|n| *n > 0))
        .ok_or_else(|| format!("the widths inside \"{}\" are not known", e.name(weights)))
}

/// A past that lies in the buffer of the present is written over while it is read: no graph of values does that.
pub(super) fn shares_no_buffer(node: &Node) -> Result<(), String> {
    if node.int("past_present_share_buffer").unwrap_or(0) != 0 {
        return Err("its past and present share a buffer".to_owned());
    }
    Ok(())
}

/// The attribute, which means nothing when it is zero.
pub(super) fn given_scale(node: &Node) -> Option<f32> {
    node.float("scale").filter(|s| *s != 0.0)
}

/// What is added to the scores: a bias, the filter where padding is masked, minus infinity after a query.
/// `padding` is the mask, and whether lengths may be followed by starts.
pub(super) fn terms(
    e: &mut Emit<'_>,
    node: &Node,
    heads: &Heads,
    padding: Option<(ValueId, bool)>,
    bias: Option<ValueId>,
    past: Option<ValueId>,
    dtype: crate::tensor::DType,
) -> Result<Vec<ValueId>, String> {
    let mut terms: Vec<ValueId> = bias.into_iter().collect();
    if let Some((mask, starts)) = padding {
        let keep = scores::padding(e, mask, heads.k, starts)?;
        let filter = node.float("mask_filter_value").unwrap_or(FILTER);
        terms.push(scores::leave_out(e, keep, filter, dtype));
    }
    if node.int("unidirectional").unwrap_or(0) == 1 {
        terms.push(scores::causal(e, heads.q, heads.k, past, dtype));
    }
    Ok(terms)
}
