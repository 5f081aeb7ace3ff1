//! `Attention` of the standard operators, versions 23 to 25.
//!
//! Four axes or three (heads counted by attributes), grouped queries, causal and windowed masks aligned with the past or
//! with `nonpad_kv_seqlen`, boolean and float masks, soft cap, precision of the softmax, past and present, and the four
//! modes of `qk_matmul_output` as ONNX Runtime 1.32 numbers them (scaled, capped, masked, pattern). Masked scores that are shown are
//! minus infinity where the kernel writes the lowest finite number.

use super::{
    emit::{Emit, Needs},
    scores::{self, Heads, Places, Scores},
};
use crate::{
    onnx::{Dim, Node, ValueId, dtype_of},
    tensor::DType,
};

/// `Attention`.
pub(super) fn attention(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    let (q, k, v) = (node.need(0)?, node.need(1)?, node.need(2)?);
    let dtype = e.dtype(q).or_else(|_| e.dtype(k))?;
    let precision = precision(node, dtype)?;
    let mask = node.input(3);
    let boolean = match mask {
        Some(mask) => e.dtype(mask)? == DType::Bool,
        None => false,
    };
    let folded = folded(e, node, q)?;
    let mut heads = Heads { q, k, v };
    let mut width = e.fact(q).last;
    if let Some((queries, shared)) = folded {
        width = width.map(|w| w / queries);
        heads = Heads {
            q: scores::split_heads(e, q, queries),
            k: scores::split_heads(e, k, shared),
            v: scores::split_heads(e, v, shared),
        };
    }
    let past = node.input(4);
    if let (Some(key), Some(value)) = (past, node.input(5)) {
        heads.k = e.concat(&[key, heads.k], 2);
        heads.v = e.concat(&[value, heads.v], 2);
    }
    e.alias(e.wanted(node, 1), heads.k);
    e.alias(e.wanted(node, 2), heads.v);

    let mut keep = conditions(e, node, &heads);
    keep.extend(mask.filter(|_| boolean));
    let keep = scores::all(e, &keep);
    let mut terms: Vec<ValueId> = mask.filter(|_| !boolean).into_iter().collect();
    terms.extend(keep.map(|keep| scores::leave_out(e, keep, f32::NEG_INFINITY, dtype)));

    let counts = folded.or_else(|| Some((axis_extent(e, q)?, axis_extent(e, k)?)));
    match counts {
        Some((queries, shared)) => {
            scores::head_counts(queries, shared)?;
            heads.k = scores::repeat_heads(e, heads.k, queries, shared);
            heads.v = scores::repeat_heads(e, heads.v, queries, shared);
        }
        None => repeat_as_found(e, &mut heads),
    }
    let scores = Scores {
        dtype,
        scale: node.float("scale"),
        width,
        softcap: node.float("softcap").unwrap_or(0.0),
        terms,
        precision,
        // A causal mask alone leaves every query a key; these need not.
        guard: mask.is_some() || node.input(6).is_some(),
    };
    let made = e.wanted(node, 0);
    let done = if folded.is_some() {
        let done = scores::attend(e, None, &heads, &scores);
        scores::merge_heads(e, made, done.z);
        done
    } else {
        scores::attend(e, made, &heads, &scores)
    };
    let shown = match node.int("qk_matmul_output_mode").unwrap_or(0) {
        0 => done.scaled,
        1 => done.capped,
        2 => done.masked,
        _ => done.pattern,
    };
    e.alias(e.wanted(node, 3), shown);
    Ok(())
}

/// Query and key heads when the inputs have three axes.
fn folded(e: &Emit<'_>, node: &Node, q: ValueId) -> Result<Option<(i64, i64)>, String> {
    match e.rank(q) {
        Ok(4) => Ok(None),
        Ok(3) => {
            let queries = scores::heads(node, "q_num_heads")?;
            let shared = scores::heads(node, "kv_num_heads")?;
            Ok(Some((queries, shared)))
        }
        Ok(rank) => Err(format!("its query has {rank} axes, neither three nor four")),
        // The attributes are for three axes, and with four the runtime would not need them.
        Err(why) if node.has("q_num_heads") => Err(why),
        Err(_) => Ok(None),
    }
}

/// Dtype of the softmax where it differs from that of the scores.
fn precision(node: &Node, dtype: DType) -> Result<Option<DType>, String> {
    let Some(number) = node.int("softmax_precision").filter(|n| *n != 0) else {
        return Ok(None);
    };
    let precision = i32::try_from(number)
        .ok()
        .and_then(dtype_of)
        .filter(|d| d.is_float());
    let precision = precision.ok_or(format!("{number} is no precision for a softmax"))?;
    Ok((precision != dtype).then_some(precision))
}

/// Extent of the head axis, where the file declares it.
fn axis_extent(e: &Emit<'_>, value: ValueId) -> Option<i64> {
    let ports = || e.graph().inputs().find(|p| p.value == value)?.fact.as_ref();
    match e
        .graph()
        .declared(value)
        .or_else(ports)?
        .dims
        .as_ref()?
        .get(1)?
    {
        Dim::Fixed(n) => Some(*n),
        Dim::Named(_) | Dim::Unknown => None,
    }
}

/// Repeats key and value heads when only a run tells how many there are. The group comes from a reshape that the runtime
/// checks, never from an integer division.
fn repeat_as_found(e: &mut Emit<'_>, heads: &mut Heads) {
    let extents = |e: &mut Emit<'_>, value, axes: [i64; 3]| {
        axes.map(|axis| {
            let n = e.extent(value, axis);
            e.unsqueeze(n, &[0])
        })
    };
    let [queries, rows, width] = extents(e, heads.q, [1, 2, 3]);
    let first = e.extent(heads.k, 1);
    let first = e.unsqueeze(first, &[0]);
    let (same, rest, one) = (e.ints(&[0]), e.ints(&[-1]), e.ints(&[1]));
    let shape = e.concat(&[same, first, rest, rows, width], 0);
    let grouped = e.op("Reshape", &[heads.q, shape]);
    let group = e.extent(grouped, 2);
    let group = e.unsqueeze(group, &[0]);
    let wide = e.concat(&[one, one, group, one, one], 0);
    for value in [&mut heads.k, &mut heads.v] {
        let [_, length, width] = extents(e, *value, [1, 2, 3]);
        let shared = e.unsqueeze(*value, &[2]);
        let repeated = e.op("Expand", &[shared, wide]);
        let shape = e.concat(&[same, queries, length, width], 0);
        *value = e.op("Reshape", &[repeated, shape]);
    }
}

/// Which keys a query may attend to, apart from the mask that is fed.
fn conditions(e: &mut Emit<'_>, node: &Node, heads: &Heads) -> Vec<ValueId> {
    let causal = node.int("is_causal").unwrap_or(0) == 1;
    let window = |name| node.int(name).filter(|n| *n >= 0);
    let (before, after) = (window("left_window_size"), window("right_window_size"));
    let valid = node.input(6);
    if !causal && before.is_none() && after.is_none() && valid.is_none() {
        return Vec::new();
    }
    let valid = valid.map(|n| e.unsqueeze(n, &[1, 2, 3]));
    // Earlier keys: the past, or in a cache from outside what is valid and not of these queries.
    let offset = match (node.input(4), valid) {
        (Some(past), _) => Some(e.extent(past, 2)),
        (None, Some(valid)) => {
            let queries = e.extent(heads.q, 2);
            Some(e.op("Sub", &[valid, queries]))
        }
        (None, None) => None,
    };
    let places = Places::new(e, heads.q, heads.k, offset);
    let mut keep = Vec::new();
    if let Some(valid) = valid {
        keep.push(e.op("Less", &[places.keys, valid]));
    }
    if causal {
        keep.push(places.until(e, 0));
    }
    if let Some(after) = after {
        keep.push(places.until(e, after));
    }
    if let Some(before) = before {
        keep.push(places.since(e, before));
    }
    keep
}
