//! Operators that move values and change none.

use super::{super::tape::Tape, fixed, index::scatter, made, need, only};
use crate::onnx::{Attribute, Node, ValueId, number_of};

type Given<'a> = &'a [Option<ValueId>];

/// Without change. A dropout in a model that is exported for use is none.
pub(super) fn identity(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    if let Some(training) = node.input(2) {
        let on = t.patch.draft().constant(training);
        if on.is_none_or(|on| on.bytes().iter().any(|b| *b != 0)) {
            return Err("it may drop values out at random".to_owned());
        }
    }
    let (g, x) = (only(given)?, need(node, 0)?);
    t.give(x, g);
    Ok(())
}

/// Back to the type that it came from.
pub(super) fn cast(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x) = (only(given)?, need(node, 0)?);
    let to = Attribute::int("to", i64::from(number_of(t.dtype(x)?)));
    let back = t.with("Cast", &[g], vec![to]);
    t.give(x, back);
    Ok(())
}

/// Back to the shape that it came from.
pub(super) fn reshape(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x) = (only(given)?, need(node, 0)?);
    let back = t.reshape_like(g, x);
    t.give(x, back);
    Ok(())
}

/// By the inverse permutation.
pub(super) fn transpose(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x) = (only(given)?, need(node, 0)?);
    let back = match node.ints("perm") {
        // Without one the axes are reversed, and reversing them again undoes it.
        None => t.op("Transpose", &[g]),
        Some(perm) => {
            let mut inverse = vec![0; perm.len()];
            for (to, from) in perm.iter().enumerate() {
                let from = usize::try_from(*from).ok();
                let place = from.and_then(|f| inverse.get_mut(f));
                *place.ok_or("its permutation is none")? = to as i64;
            }
            t.transpose(g, &inverse)
        }
    };
    t.give(x, back);
    Ok(())
}

/// The sum over what was stretched.
pub(super) fn expand(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x, y) = (only(given)?, need(node, 0)?, made(node)?);
    t.give_narrowed(x, g, y)
}

/// Each input gets its part.
pub(super) fn concat(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, y) = (only(given)?, made(node)?);
    let axis = node.int("axis").ok_or("it has no axis")?;
    let axis = t.axis(axis, t.rank(y)?)?;
    let mut from = t.ints(&[0]);
    for x in node.reads() {
        let extent = t.extent_list(x, axis)?;
        let to = t.op("Add", &[from, extent]);
        if t.wants(x) {
            let part = t.slice_at(g, axis as i64, from, to);
            t.give(x, part);
        }
        from = to;
    }
    Ok(())
}

/// The parts put together again; a part that nothing reads is zero.
pub(super) fn split(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    fixed(t, node, 1, "split")?;
    let x = need(node, 0)?;
    let axis = t.axis(node.int("axis").unwrap_or(0), t.rank(x)?)?;
    let mut parts = Vec::new();
    for (part, gradient) in node.outputs.iter().zip(given) {
        parts.push(match (gradient, part) {
            (Some(g), _) => *g,
            (None, Some(part)) => {
                let zero = t.number_like(0.0, x)?;
                let shape = t.op("Shape", &[*part]);
                t.op("Expand", &[zero, shape])
            }
            (None, None) => return Err("one of its parts has no name".to_owned()),
        });
    }
    let whole = t.concat(&parts, axis as i64);
    t.give(x, whole);
    Ok(())
}

/// Padding with zeros is cut off again; what was padded by entries of the value itself goes back to them.
pub(super) fn pad(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    fixed(t, node, 2, "padding")?;
    let (g, x) = (only(given)?, need(node, 0)?);
    let mode = node.string("mode").unwrap_or("constant").to_owned();
    if mode != "constant" {
        return pad_by_entries(t, node, (x, g), &mode);
    }
    let cut = match (node.input(1), node.ints("pads")) {
        (Some(pads), _) => {
            let back = t.op("Neg", &[pads]);
            let inputs = [Some(g), Some(back), None, node.input(3)];
            let given = if node.input(3).is_some() { 4 } else { 2 };
            t.make(None, "Pad", &inputs[..given], vec![])
        }
        // Before opset 11.
        (None, Some(pads)) => {
            let back: Vec<i64> = pads.iter().map(|p| -p).collect();
            t.with("Pad", &[g], vec![Attribute::ints("pads", &back)])
        }
        (None, None) => return Err("it has no pads".to_owned()),
    };
    t.give(x, cut);
    Ok(())
}

/// Axis by axis: the entries that the padding took are those that it takes of `0, 1, 2, ...`.
fn pad_by_entries(
    t: &mut Tape<'_>,
    node: &Node,
    (x, mut g): (ValueId, ValueId),
    mode: &str,
) -> Result<(), String> {
    let rank = t.rank(x)?;
    let pads = match node.input(1) {
        Some(pads) => t.constant_ints(pads),
        None => node.ints("pads").map(<[i64]>::to_vec),
    };
    let pads = pads.ok_or("its pads are not constant")?;
    let axes = match node.input(3) {
        Some(axes) => t.constant_ints(axes).ok_or("its axes are not constant")?,
        None => (0..rank as i64).collect(),
    };
    if pads.len() != 2 * axes.len() {
        return Err("its pads do not fit its axes".to_owned());
    }
    for (at, axis) in axes.iter().enumerate() {
        let (before, after) = (pads[at], pads[at + axes.len()]);
        if (before, after) == (0, 0) {
            continue;
        }
        let axis = t.axis(*axis, rank)?;
        let extent = t.extent(x, axis as i64);
        let numbers = t.range(extent);
        let how = Attribute::string("mode", mode);
        let list = t.ints(&[before, after]);
        let taken = t.with("Pad", &[numbers, list], vec![how]);
        g = scatter(t, x, g, taken, axis)?;
    }
    t.give(x, g);
    Ok(())
}

/// The sum over the copies.
pub(super) fn tile(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x, repeats) = (only(given)?, need(node, 0)?, need(node, 1)?);
    // Each axis in two: the copies, and what was copied.
    let shape = t.op("Shape", &[x]);
    let columns = [repeats, shape].map(|v| t.unsqueeze(v, &[1]));
    let pairs = t.concat(&columns, 1);
    let pairs = t.reshape(pairs, &[-1]);
    let apart = t.op("Reshape", &[g, pairs]);
    let copies: Vec<i64> = (0..t.rank(x)? as i64).map(|a| 2 * a).collect();
    let sum = t.reduce("ReduceSum", apart, &copies, false);
    t.give(x, sum);
    Ok(())
}
