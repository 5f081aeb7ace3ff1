//! Elementwise operators of more than one input, with broadcasting.

use super::{super::tape::Tape, fixed, made, need, only};
use crate::onnx::{Node, ValueId};

type Given<'a> = &'a [Option<ValueId>];

/// Of a sum of any number of values: `g` for each.
pub(super) fn add(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, y) = (only(given)?, made(node)?);
    for slot in 0..node.inputs.len() {
        if let Some(x) = t.wanted_input(node, slot) {
            t.give_narrowed(x, g, y)?;
        }
    }
    Ok(())
}

/// Of the mean of n values: `g / n` for each.
pub(super) fn mean(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, y) = (only(given)?, made(node)?);
    let share = t.scaled(g, (node.inputs.len() as f64).recip(), y)?;
    for slot in 0..node.inputs.len() {
        if let Some(x) = t.wanted_input(node, slot) {
            t.give_narrowed(x, share, y)?;
        }
    }
    Ok(())
}

/// The remainder of a division by what is fixed: `g`.
pub(super) fn remainder(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    fixed(t, node, 1, "divisor")?;
    let (g, y, x) = (only(given)?, made(node)?, need(node, 0)?);
    t.give_narrowed(x, g, y)
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

/// `dx = g p x^(p - 1)`, `dp = g y log(x)`; where x is zero, y does not move with the exponent.
pub(super) fn pow(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, y, x, p) = (only(given)?, made(node)?, need(node, 0)?, need(node, 1)?);
    let dtype = t.dtype(x)?;
    if t.wants(x) {
        let exponent = t.patch.draft().constant_scalar(p);
        let slope = if exponent == Some(2.0) {
            t.scaled(x, 2.0, x)?
        } else {
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
        t.give_narrowed(x, product, y)?;
    }
    if t.wants(p) {
        let (zero, one) = (t.number(0.0, dtype), t.number(1.0, dtype));
        let still = t.op("Equal", &[x, zero]);
        let base = t.op("Where", &[still, one, x]);
        let log = t.op("Log", &[base]);
        let slope = t.op("Mul", &[y, log]);
        let product = t.op("Mul", &[g, slope]);
        if t.dtype(p)? != dtype {
            return Err("its exponent has another type than its base".to_owned());
        }
        t.give_narrowed(p, product, y)?;
    }
    Ok(())
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
