//! `com.microsoft.MultiHeadAttention`: attention over projections that were made outside.
//!
//! | query | key | value |
//! |---|---|---|
//! | `(batch, query, hidden)` | `(batch, key, hidden)` | `(batch, key, hidden)` |
//! | `(batch, query, hidden)` | `(batch, head, key, d_head)` | `(batch, head, key, d_head)`, the bias is the query's only |
//! | `(batch, query, hidden)` | `(batch, key, head, 2, d_head)` | none |
//! | `(batch, query, head, 3, d_head)` | none | none |
//!
//! The packed forms have no CPU kernel; they are held against the first form.

use super::{
    attention_fused::{given_scale, terms},
    emit::{Emit, Needs},
    scores::{self, Heads, Scores},
};
use crate::onnx::{END, Node, ValueId};

/// `com.microsoft.MultiHeadAttention`.
pub(super) fn attention(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    let query = node.need(0)?;
    node.without(8, "the length of a shared past")?;
    node.without(9, "indices of beams in a shared past")?;
    let count = scores::heads(node, "num_heads")?;
    let key = node.input(1);
    let dtype = e.dtype(query).or_else(|_| e.dtype(key.unwrap_or(query)))?;
    let (q, k, v, width) = match (key, node.input(2)) {
        (None, _) => {
            let width = e.fact(query).last;
            let [q, k, v] = [0, 1, 2].map(|part| unpack(e, query, part));
            (q, Side::Rows(k), Side::Rows(v), width)
        }
        (Some(key), None) => {
            let [k, v] = [0, 1].map(|part| unpack(e, key, part));
            (query, Side::Rows(k), Side::Rows(v), e.fact(key).last)
        }
        (Some(key), Some(value)) => {
            let width = e.fact(query).last.map(|w| w / count);
            match e.rank(key)? {
                3 => (query, Side::Rows(key), Side::Rows(value), width),
                4 => (query, Side::Heads(key), Side::Heads(value), width),
                rank => return Err(format!("its key has {rank} axes, neither three nor four")),
            }
        }
    };
    let [q_bias, k_bias, v_bias] = biases(e, node, q);
    let q = Side::Rows(q).heads(e, q_bias, count);
    let mut heads = Heads {
        q,
        k: k.heads(e, k_bias, count),
        v: v.heads(e, v_bias, count),
    };
    let past = node.input(6);
    if let (Some(key), Some(value)) = (past, node.input(7)) {
        heads.k = e.concat(&[key, heads.k], 2);
        heads.v = e.concat(&[value, heads.v], 2);
    }
    e.alias(e.wanted(node, 1), heads.k);
    e.alias(e.wanted(node, 2), heads.v);
    let padding = node.input(4).map(|m| (m, false));
    let terms = terms(e, node, &heads, padding, node.input(5), past, dtype)?;
    let scores = Scores {
        dtype,
        scale: given_scale(node),
        width,
        softcap: 0.0,
        terms,
        precision: None,
        guard: false,
    };
    let done = scores::attend(e, None, &heads, &scores);
    scores::merge_heads(e, e.wanted(node, 0), done.z);
    e.alias(e.wanted(node, 3), done.masked);
    Ok(())
}

/// Keys or values as they are given.
#[derive(Clone, Copy)]
enum Side {
    /// `(batch, position, hidden)`.
    Rows(ValueId),
    /// `(batch, head, position, d_head)`, biased already.
    Heads(ValueId),
}

impl Side {
    fn heads(self, e: &mut Emit<'_>, bias: Option<ValueId>, count: i64) -> ValueId {
        match self {
            Side::Heads(value) => value,
            Side::Rows(rows) => {
                let rows = match bias {
                    Some(bias) => e.op("Add", &[rows, bias]),
                    None => rows,
                };
                scores::split_heads(e, rows, count)
            }
        }
    }
}

/// One part of `(batch, position, head, parts, d_head)` as rows.
fn unpack(e: &mut Emit<'_>, packed: ValueId, part: i64) -> ValueId {
    let heads = e.pick(packed, 3, part);
    e.reshape(heads, &[0, 0, -1])
}

/// The bias cut into the parts of query, key and value. Query and key are equally wide; the rest is the value's.
fn biases(e: &mut Emit<'_>, node: &Node, q: ValueId) -> [Option<ValueId>; 3] {
    let Some(bias) = node.input(3) else {
        return [None; 3];
    };
    // A value that a rule made has no facts, but then its width is a third of the bias.
    let known = match node.input(1) {
        Some(_) => e.fact(q).last,
        None => e.fact(bias).last.map(|n| n / 3),
    };
    let (zero, end) = (e.ints(&[0]), e.ints(&[END]));
    let (first, second) = if let Some(width) = known {
        (e.ints(&[width]), e.ints(&[2 * width]))
    } else {
        let width = e.extent(q, 2);
        let width = e.unsqueeze(width, &[0]);
        (width, e.op("Add", &[width, width]))
    };
    [(zero, first), (first, second), (second, end)]
        .map(|(from, to)| Some(e.slice_at(bias, 0, from, to)))
}
