//! Operators that move values and change none.

use super::{super::tape::Tape, fixed, made, need, only};
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
