//! `com.microsoft.GroupQueryAttention`: grouped queries over a cache, with rotary positions inside.
//!
//! The cache may hold more than is valid, and rows of a batch may hold different amounts. With `P` valid tokens in the
//! cache of a row, of a capacity `C`, the keys are the cache and then the new tokens:
//!
//! ```text
//!   column      0 .. P-1   P .. C-1   C .. C+S-1
//!   stands at   0 .. P-1   left out   P .. P+S-1
//! ```
//! so that one graph serves the prompt (an empty cache), steps, and rows of different length; `P` is
//! `max(seqlens_k + 1 - S, 0)` as in the kernel. The present is cache and new tokens one after the other, as the runtime
//! writes it for rows of equal length and a cache that grows.

use super::{
    emit::{Emit, Needs},
    rotary::{self, Tables},
    scores::{self, Heads, Scores},
};
use crate::{
    onnx::{Node, ValueId},
    tensor::DType,
};

/// `com.microsoft.GroupQueryAttention`.
pub(super) fn attention(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    refuse(node)?;
    let query = node.need(0)?;
    let (count, shared) = (
        scores::heads(node, "num_heads")?,
        scores::heads(node, "kv_num_heads")?,
    );
    scores::head_counts(count, shared)?;
    let dtype = e.dtype(query)?;
    let causal = node.int("causal").unwrap_or(1) == 1;
    let tables = tables(e, node)?;
    let hidden = e.fact(query).last;
    let (mut heads, width) = match (node.input(1), node.input(2)) {
        (Some(key), Some(value)) => {
            let heads = Heads {
                q: scores::split_heads(e, query, count),
                k: scores::split_heads(e, key, shared),
                v: scores::split_heads(e, value, shared),
            };
            (heads, hidden.map(|w| w / count))
        }
        _ => {
            let packed = scores::split_heads(e, query, count + 2 * shared);
            let heads = Heads {
                q: e.slice(packed, 1, 0, count),
                k: e.slice(packed, 1, count, count + shared),
                v: e.slice(packed, 1, count + shared, count + 2 * shared),
            };
            (heads, hidden.map(|w| w / (count + 2 * shared)))
        }
    };
    let cache = Cache::read(e, node, heads.q)?;
    if let Some(tables) = tables {
        let turns = tables.width(e)?;
        let positions = cache.positions(e, node);
        let angles = tables.rows(e, positions, 1);
        let whole = width == Some(turns);
        heads.q = rotary::rotate(e, heads.q, &angles, turns, whole);
        heads.k = rotary::rotate(e, heads.k, &angles, turns, whole);
    }
    if let Some((key, value)) = cache.past {
        heads.k = e.concat(&[key, heads.k], 2);
        heads.v = e.concat(&[value, heads.v], 2);
    }
    e.alias(e.wanted(node, 1), heads.k);
    e.alias(e.wanted(node, 2), heads.v);
    let keep = cache.keep(e, node, heads.k, causal);
    let mut terms: Vec<ValueId> = node.input(10).into_iter().collect();
    terms.push(scores::leave_out(e, keep, f32::NEG_INFINITY, dtype));
    heads.k = scores::repeat_heads(e, heads.k, count, shared);
    heads.v = scores::repeat_heads(e, heads.v, count, shared);
    let scores = Scores {
        dtype,
        scale: node.float("scale").filter(|s| *s != 0.0),
        width,
        softcap: node.float("softcap").unwrap_or(0.0),
        terms,
        precision: None,
        guard: false,
    };
    let done = scores::attend(e, None, &heads, &scores);
    scores::merge_heads(e, e.wanted(node, 0), done.z);
    Ok(())
}

fn refuse(node: &Node) -> Result<(), String> {
    node.without(11, "sinks that join each softmax")?;
    node.without(12, "scales of a quantised cache")?;
    node.without(13, "scales of a quantised cache")?;
    node.without(14, "norms of queries, which only CUDA computes")?;
    node.without(15, "norms of keys, which only CUDA computes")?;
    node.without(16, "chunks of queries of different length")?;
    let set = |name| node.int(name).unwrap_or(0) > 0;
    let quantised = ["k_quant_type", "v_quant_type"]
        .iter()
        .any(|a| node.string(a).is_some_and(|kind| kind != "NONE"));
    match () {
        () if set("smooth_softmax") => {
            Err("its softmax has a sink, so its pattern does not sum to one".to_owned())
        }
        () if set("sliding_window_cache") => {
            Err("its cache drops tokens that leave a window".to_owned())
        }
        () if quantised => Err("its cache is quantised".to_owned()),
        () => Ok(()),
    }
}

fn tables(e: &Emit<'_>, node: &Node) -> Result<Option<Tables>, String> {
    if node.int("do_rotary").unwrap_or(0) == 0 {
        return Ok(None);
    }
    let tables = Tables {
        cos: node.need(7)?,
        sin: node.need(8)?,
        interleaved: node.int("rotary_interleaved").unwrap_or(0) != 0,
    };
    tables.width(e)?;
    Ok(Some(tables))
}

/// What is known of the tokens before these.
struct Cache {
    past: Option<(ValueId, ValueId)>,
    /// Where the last token of each row stands, `(batch)`.
    last: ValueId,
    /// `P` of each row, `(batch)`.
    valid: ValueId,
    /// New tokens, an integer.
    length: ValueId,
}

impl Cache {
    fn read(e: &mut Emit<'_>, node: &Node, q: ValueId) -> Result<Self, String> {
        let last = e.cast(node.need(5)?, DType::I64);
        let length = e.extent(q, 2);
        let (one, zero) = (e.int(1), e.int(0));
        let total = e.op("Add", &[last, one]);
        let before = e.op("Sub", &[total, length]);
        let some = e.op("Greater", &[before, zero]);
        let valid = e.op("Where", &[some, before, zero]);
        let past = node.input(3).zip(node.input(4));
        Ok(Self {
            past,
            last,
            valid,
            length,
        })
    }

    /// Positions of the new tokens, `(batch, S)`. Positions that are fed count, except that the kernel takes only the
    /// first of them for a prompt, and counts on from there.
    fn positions(&self, e: &mut Emit<'_>, node: &Node) -> ValueId {
        let count = e.range(self.length);
        let Some(fed) = node.input(9) else {
            let first = e.unsqueeze(self.valid, &[1]);
            return e.op("Add", &[first, count]);
        };
        let Some(total) = node.input(6) else {
            return fed;
        };
        let first = e.slice(fed, 0, 0, 1);
        let first = e.slice(first, 1, 0, 1);
        let counted = e.op("Add", &[first, count]);
        let total = e.cast(total, DType::I64);
        let prompt = e.op("Equal", &[total, self.length]);
        e.op("Where", &[prompt, counted, fed])
    }

    /// Keys that a query attends to, `(batch, 1, query, key)`.
    fn keep(&self, e: &mut Emit<'_>, node: &Node, k: ValueId, causal: bool) -> ValueId {
        let valid = e.unsqueeze(self.valid, &[1, 2, 3]);
        let keys = e.extent(k, 2);
        let columns = e.range(keys);
        // Where each column stands, and whether it holds a token.
        let (places, held) = if let Some((key, _)) = self.past {
            let capacity = e.extent(key, 2);
            let cached = e.op("Less", &[columns, capacity]);
            let fresh = e.op("Sub", &[columns, capacity]);
            let fresh = e.op("Add", &[fresh, valid]);
            let places = e.op("Where", &[cached, columns, fresh]);
            let new = e.op("Not", &[cached]);
            let early = e.op("Less", &[columns, valid]);
            (places, Some(e.op("Or", &[new, early])))
        } else {
            (columns, None)
        };
        let count = e.range(self.length);
        let rows = e.unsqueeze(count, &[1]);
        let rows = e.op("Add", &[rows, valid]);
        let mut conditions: Vec<ValueId> = held.into_iter().collect();
        // Without an order of time only the padding after the last token is left out.
        let last = if causal {
            rows
        } else {
            e.unsqueeze(self.last, &[1, 2, 3])
        };
        let later = e.op("Greater", &[places, last]);
        conditions.push(e.op("Not", &[later]));
        if let Some(window) = node.int("local_window_size").filter(|n| *n >= 0) {
            let window = e.int(window);
            let first = e.op("Sub", &[rows, window]);
            conditions.push(e.op("Greater", &[places, first]));
        }
        scores::all(e, &conditions).expect("there is a condition on later keys")
    }
}
