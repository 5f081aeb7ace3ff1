//! Elementwise operators of more than one input, with broadcasting.

use super::{super::tape::Tape, fixed, made, need, only};
use crate::onnx::{Node, ValueId};

type Given<'a> = &'a [Option<ValueId>];

/// `da = g, db = g`
pub(super) fn add(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, y) = (only(given)?, made(node)?);
    for slot in 0..2 {
        if let Some(x) = t.wanted_input(node, slot) {
            t.give_narrowed(x, g, y)?;
        }
    }
    Ok(())
}

/// `da = g, db = -g`
pub(super) fn sub(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, y) = (only(given)?, made(node)?);
    if let Some(a) = t.wanted_input(node, 0) {
        t.give_narrowed(a, g, y)?;
    }
    if let Some(b) = t.wanted_input(node, 1) {
        let sum = t.narrowed(b, g, y)?;
        let negative = t.op("Neg", &[sum]);
        t.give(b, negative);
    }
    Ok(())
}

/// `da = g b, db = g a`
pub(super) fn mul(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, y) = (only(given)?, made(node)?);
    for (slot, other) in [(0, 1), (1, 0)] {
        if let Some(x) = t.wanted_input(node, slot) {
            let product = t.op("Mul", &[g, need(node, other)?]);
            t.give_narrowed(x, product, y)?;
        }
    }
    Ok(())
}

/// `da = g / b, db = -g y / b`
pub(super) fn div(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, y, b) = (only(given)?, made(node)?, need(node, 1)?);
    let by = t.op("Div", &[g, b]);
    if let Some(a) = t.wanted_input(node, 0) {
        t.give_narrowed(a, by, y)?;
    }
    if t.wants(b) {
        let product = t.op("Mul", &[by, y]);
        let sum = t.narrowed(b, product, y)?;
        let negative = t.op("Neg", &[sum]);
        t.give(b, negative);
    }
    Ok(())
}

/// `dx = g p x^(p - 1)`, for an exponent that does not depend on a point.
pub(super) fn pow(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    fixed(t, node, 1, "exponent")?;
    let (g, y, x, p) = (only(given)?, made(node)?, need(node, 0)?, need(node, 1)?);
    let exponent = t.patch.draft().constant_scalar(p);
    let slope = if exponent == Some(2.0) {
        t.scaled(x, 2.0, x)?
    } else {
        let dtype = t.dtype(x)?;
        let p = if t.dtype(p)? == dtype {
            p
        } else {
            t.cast(p, dtype)
        };
        let one = t.number(1.0, dtype);
        let less = t.op("Sub", &[p, one]);
        let power = t.op("Pow", &[x, less]);
        t.op("Mul", &[p, power])
    };
    let product = t.op("Mul", &[g, slope]);
    t.give_narrowed(x, product, y)
}

/// `da = c ? g : 0, db = c ? 0 : g`
pub(super) fn select(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, y, c) = (only(given)?, made(node)?, need(node, 0)?);
    let zero = t.number_like(0.0, y)?;
    for (slot, picked) in [(1, [c, g, zero]), (2, [c, zero, g])] {
        if let Some(x) = t.wanted_input(node, slot) {
            let part = t.op("Where", &picked);
            t.give_narrowed(x, part, y)?;
        }
    }
    Ok(())
}

/// The greatest (or least) input gets the gradient; equal ones share it.
pub(super) fn extreme(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, y) = (only(given)?, made(node)?);
    let dtype = t.dtype(y)?;
    let inputs: Vec<ValueId> = node.reads().collect();
    let mut hits = Vec::new();
    for x in &inputs {
        let equal = t.op("Equal", &[*x, y]);
        hits.push(t.cast(equal, dtype));
    }
    let mut count = hits[0];
    for hit in &hits[1..] {
        count = t.op("Add", &[count, *hit]);
    }
    let share = t.op("Div", &[g, count]);
    for (x, hit) in inputs.into_iter().zip(hits) {
        if t.wants(x) {
            let part = t.op("Mul", &[share, hit]);
            t.give_narrowed(x, part, y)?;
        }
    }
    Ok(())
}
