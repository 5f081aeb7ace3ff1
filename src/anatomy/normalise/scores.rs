//! The heart that all attention operators share: scores, mask, pattern and what the pattern reads.
//!
//! ```text
//!   q (batch, head, query, d_head)          scaled   capped    masked    pattern
//!   k (batch, head, key, d_head)   MatMul ─▶ Mul ─▶ (tanh) ─▶ (Add ..) ─▶ Softmax ─▶ (guard) ─▶ MatMul ─▶ z
//!   v (batch, head, key, d_head)
//! ```

use super::emit::Emit;
use crate::{
    onnx::{Attribute, Node, ValueId},
    tensor::DType,
};

/// `(batch, head, position, d_head)` each; key and value have as many heads as the query.
pub(super) struct Heads {
    pub(super) q: ValueId,
    pub(super) k: ValueId,
    pub(super) v: ValueId,
}

/// How scores become a pattern.
pub(super) struct Scores {
    pub(super) dtype: DType,
    /// `None`: one over the square root of the head's width.
    pub(super) scale: Option<f32>,
    /// The head's width where it is known before a run.
    pub(super) width: Option<i64>,
    /// Zero: none.
    pub(super) softcap: f32,
    /// Terms to add, in order, each broadcast to `(batch, head, query, key)`.
    pub(super) terms: Vec<ValueId>,
    /// Dtype of the softmax where it is not that of the scores.
    pub(super) precision: Option<DType>,
    /// A query that may attend to no key reads zeros.
    pub(super) guard: bool,
}

/// The values on the way, for operators that give them out.
pub(super) struct Attended {
    pub(super) scaled: ValueId,
    pub(super) capped: ValueId,
    pub(super) masked: ValueId,
    pub(super) pattern: ValueId,
    /// `(batch, head, query, d_head)`.
    pub(super) z: ValueId,
}

/// Writes the heart. `made` is the value that `z` is to be.
pub(super) fn attend(
    e: &mut Emit<'_>,
    made: Option<ValueId>,
    heads: &Heads,
    scores: &Scores,
) -> Attended {
    let Heads { q, k, v } = *heads;
    let keys = e.transpose(k, &[0, 1, 3, 2]);
    let product = e.op("MatMul", &[q, keys]);
    let scale = scale(e, q, scores);
    let scaled = e.op("Mul", &[product, scale]);
    let capped = if scores.softcap == 0.0 {
        scaled
    } else {
        let cap = e.number(scores.softcap, scores.dtype);
        let inner = e.op("Div", &[scaled, cap]);
        let bend = e.op("Tanh", &[inner]);
        e.op("Mul", &[bend, cap])
    };
    let masked = scores
        .terms
        .iter()
        .fold(capped, |sum, term| e.op("Add", &[sum, *term]));
    let wide = match scores.precision {
        Some(precision) => e.cast(masked, precision),
        None => masked,
    };
    let mut pattern = e.with("Softmax", &[wide], vec![Attribute::int("axis", -1)]);
    if scores.guard {
        let nowhere = e.op("IsNaN", &[pattern]);
        let zero = e.number(0.0, scores.precision.unwrap_or(scores.dtype));
        pattern = e.op("Where", &[nowhere, zero, pattern]);
    }
    if scores.precision.is_some() {
        pattern = e.cast(pattern, scores.dtype);
    }
    let z = e.end(made, "MatMul", &[pattern, v]);
    Attended {
        scaled,
        capped,
        masked,
        pattern,
        z,
    }
}

fn scale(e: &mut Emit<'_>, q: ValueId, scores: &Scores) -> ValueId {
    let fixed = scores.scale.or_else(|| {
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
        // a head is some hundred wide at most
        scores.width.map(|w| (1.0 / (w as f64).sqrt()) as f32)
    });
    if let Some(scale) = fixed {
        return e.number(scale, scores.dtype);
    }
    let width = e.extent(q, 3);
    let width = e.cast(width, DType::F32);
    let root = e.op("Sqrt", &[width]);
    let scale = e.op("Reciprocal", &[root]);
    if scores.dtype == DType::F32 {
        scale
    } else {
        e.cast(scale, scores.dtype)
    }
}

/// `(batch, position, head * d_head)` as `(batch, head, position, d_head)`.
pub(super) fn split_heads(e: &mut Emit<'_>, value: ValueId, heads: i64) -> ValueId {
    let split = e.reshape(value, &[0, 0, heads, -1]);
    e.transpose(split, &[0, 2, 1, 3])
}

/// The other way round. `made` is the value that the result is to be.
pub(super) fn merge_heads(e: &mut Emit<'_>, made: Option<ValueId>, z: ValueId) -> ValueId {
    let rows = e.transpose(z, &[0, 2, 1, 3]);
    e.reshape_to(made, rows, &[0, 0, -1])
}

/// Each head of a key or value once for every query head of its group: `0, 0, 1, 1, ..`.
pub(super) fn repeat_heads(e: &mut Emit<'_>, value: ValueId, queries: i64, heads: i64) -> ValueId {
    if queries == heads {
        return value;
    }
    let group = e.unsqueeze(value, &[2]);
    let shape = e.ints(&[1, 1, queries / heads, 1, 1]);
    let wide = e.op("Expand", &[group, shape]);
    // Expand keeps every other extent, so that only the head axes join.
    let length = e.extent(value, 2);
    let width = e.extent(value, 3);
    let parts = [length, width].map(|n| e.unsqueeze(n, &[0]));
    let front = e.ints(&[0, queries]);
    let shape = e.concat(&[front, parts[0], parts[1]], 0);
    e.op("Reshape", &[wide, shape])
}

/// Heads of query and key, checked to divide.
pub(super) fn head_counts(queries: i64, heads: i64) -> Result<(), String> {
    if queries > 0 && heads > 0 && queries % heads == 0 {
        Ok(())
    } else {
        Err(format!(
            "{queries} query heads cannot share {heads} key heads"
        ))
    }
}

/// An attribute that must be a positive number of heads.
pub(super) fn heads(node: &Node, name: &str) -> Result<i64, String> {
    node.int(name)
        .filter(|n| *n > 0)
        .ok_or_else(|| format!("its attribute \"{name}\" is not a number of heads"))
}

/// Where each query and key stands, as integers that broadcast to `(batch, head, query, key)`.
pub(super) struct Places {
    /// `(.., query, 1)`.
    pub(super) queries: ValueId,
    /// `(.., key)`.
    pub(super) keys: ValueId,
}

impl Places {
    /// Queries follow `offset` (an integer, or `(batch, 1, 1, 1)`) earlier keys; keys are counted from zero.
    pub(super) fn new(e: &mut Emit<'_>, q: ValueId, k: ValueId, offset: Option<ValueId>) -> Self {
        let length = e.extent(q, 2);
        let count = e.range(length);
        let mut queries = e.unsqueeze(count, &[1]);
        if let Some(offset) = offset {
            queries = e.op("Add", &[queries, offset]);
        }
        let length = e.extent(k, 2);
        let keys = e.range(length);
        Self { queries, keys }
    }

    /// Keys at the query's place plus `after` or earlier.
    pub(super) fn until(&self, e: &mut Emit<'_>, after: i64) -> ValueId {
        let last = shifted(e, self.queries, after);
        let later = e.op("Greater", &[self.keys, last]);
        e.op("Not", &[later])
    }

    /// Keys at the query's place minus `before` or later.
    pub(super) fn since(&self, e: &mut Emit<'_>, before: i64) -> ValueId {
        let first = shifted(e, self.queries, -before);
        let earlier = e.op("Less", &[self.keys, first]);
        e.op("Not", &[earlier])
    }
}

fn shifted(e: &mut Emit<'_>, value: ValueId, by: i64) -> ValueId {
    if by == 0 {
        return value;
    }
    let by = e.int(by);
    e.op("Add", &[value, by])
}

/// All conditions at once.
pub(super) fn all(e: &mut Emit<'_>, conditions: &[ValueId]) -> Option<ValueId> {
    let (first, rest) = conditions.split_first()?;
    Some(rest.iter().fold(*first, |a, b| e.op("And", &[a, *b])))
}

/// The term that leaves keys out: zero where `keep`, `otherwise` elsewhere.
pub(super) fn leave_out(e: &mut Emit<'_>, keep: ValueId, otherwise: f32, dtype: DType) -> ValueId {
    let zero = e.number(0.0, dtype);
    let otherwise = e.number(otherwise, dtype);
    e.op("Where", &[keep, zero, otherwise])
}

/// The term that leaves out what comes after a query, as the runtime's kernels do under `unidirectional`.
pub(super) fn causal(
    e: &mut Emit<'_>,
    q: ValueId,
    k: ValueId,
    past: Option<ValueId>,
    dtype: DType,
) -> ValueId {
    let offset = past.map(|past| e.extent(past, 2));
    let places = Places::new(e, q, k, offset);
    let keep = places.until(e, 0);
    leave_out(e, keep, f32::NEG_INFINITY, dtype)
}

/// The runtime's padding masks by their number of axes, as conditions to keep a key:
///
/// | axes | holds |
/// |---|---|
/// | 1 | `batch` lengths; `2 batch`: ends, then starts (where `starts`); `3 batch + 2`: lengths first |
/// | 2 | `(batch, key)`, not zero where kept |
/// | 3 | `(batch, query, key)`, not zero where kept |
pub(super) fn padding(
    e: &mut Emit<'_>,
    mask: ValueId,
    k: ValueId,
    starts: bool,
) -> Result<ValueId, String> {
    match e.rank(mask)? {
        1 => Ok(lengths(e, mask, k, starts)),
        rank @ (2 | 3) => {
            let wide = e.cast(mask, DType::I64);
            let zero = e.int(0);
            let keep = e.op("Greater", &[wide, zero]);
            let axes: &[i64] = if rank == 2 { &[1, 2] } else { &[1] };
            Ok(e.unsqueeze(keep, axes))
        }
        rank => Err(format!(
            "its mask has {rank} axes, a form without a CPU kernel to check it against"
        )),
    }
}

fn lengths(e: &mut Emit<'_>, mask: ValueId, k: ValueId, starts: bool) -> ValueId {
    let mask = e.cast(mask, DType::I64);
    let rows = e.extent(k, 0);
    let keys = e.extent(k, 2);
    let places = e.range(keys);
    let zero = e.ints(&[0]);
    let until = e.unsqueeze(rows, &[0]);
    let ends = e.slice_at(mask, 0, zero, until);
    let ends = e.unsqueeze(ends, &[1, 2, 3]);
    let mut keep = e.op("Less", &[places, ends]);
    if starts {
        // The last rows are the starts when there are twice as many as rows, and mean nothing otherwise.
        let size = e.op("Size", &[mask]);
        let two = e.int(2);
        let twice = e.op("Mul", &[rows, two]);
        let paired = e.op("Equal", &[size, twice]);
        let from = e.op("Sub", &[size, rows]);
        let (from, to) = (e.unsqueeze(from, &[0]), e.unsqueeze(size, &[0]));
        let first = e.slice_at(mask, 0, from, to);
        let none = e.int(0);
        let first = e.op("Where", &[paired, first, none]);
        let first = e.unsqueeze(first, &[1, 2, 3]);
        let early = e.op("Less", &[places, first]);
        let late = e.op("Not", &[early]);
        keep = e.op("And", &[keep, late]);
    }
    keep
}
