//! Reductions: the gradient is spread over what was put together.

use super::{super::tape::Tape, made, need, only};
use crate::onnx::{Attribute, Node, ValueId};

type Given<'a> = &'a [Option<ValueId>];

/// A value of the shape of the result, with the reduced axes back as extents of one.
fn kept(t: &mut Tape<'_>, node: &Node, value: ValueId) -> Result<ValueId, String> {
    if node.int("keepdims").unwrap_or(1) != 0 {
        return Ok(value);
    }
    let x = need(node, 0)?;
    let rank = t.rank(x)?;
    match axes(t, node)? {
        Some(axes) => {
            let counted: Result<Vec<usize>, String> =
                axes.iter().map(|a| t.axis(*a, rank)).collect();
            let mut counted: Vec<i64> = counted?.into_iter().map(|a| a as i64).collect();
            counted.sort_unstable();
            Ok(t.unsqueeze(value, &counted))
        }
        None => Ok(t.reshape(value, &vec![1; rank])),
    }
}

/// The axes; `None` is all of them.
fn axes(t: &Tape<'_>, node: &Node) -> Result<Option<Vec<i64>>, String> {
    let axes = match node.input(1) {
        Some(axes) => {
            let constant = t.constant_ints(axes);
            Some(constant.ok_or("its axes are not constant")?)
        }
        None => node.ints("axes").map(<[i64]>::to_vec),
    };
    if axes.as_ref().is_none_or(Vec::is_empty) {
        if node.int("noop_with_empty_axes").unwrap_or(0) != 0 {
            return Err("it reduces nothing".to_owned());
        }
        return Ok(None);
    }
    Ok(axes)
}

/// `g` everywhere.
pub(super) fn sum(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x) = (only(given)?, need(node, 0)?);
    let spread = spread(t, node, g, x)?;
    t.give(x, spread);
    Ok(())
}

fn spread(t: &mut Tape<'_>, node: &Node, g: ValueId, x: ValueId) -> Result<ValueId, String> {
    let g = kept(t, node, g)?;
    let shape = t.op("Shape", &[x]);
    Ok(t.op("Expand", &[g, shape]))
}

/// `g / n`
pub(super) fn mean(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x, y) = (only(given)?, need(node, 0)?, made(node)?);
    let dtype = t.dtype(x)?;
    let (all, left) = (t.op("Size", &[x]), t.op("Size", &[y]));
    let count = t.op("Div", &[all, left]);
    let count = t.cast(count, dtype);
    let share = t.op("Div", &[g, count]);
    let spread = spread(t, node, share, x)?;
    t.give(x, spread);
    Ok(())
}

/// `2 g x`
pub(super) fn sum_square(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x) = (only(given)?, need(node, 0)?);
    let g = kept(t, node, g)?;
    let twice = t.scaled(x, 2.0, x)?;
    let product = t.op("Mul", &[g, twice]);
    t.give(x, product);
    Ok(())
}

/// `g x / y`
pub(super) fn l2(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x, y) = (only(given)?, need(node, 0)?, made(node)?);
    let share = t.op("Div", &[g, y]);
    let share = kept(t, node, share)?;
    let product = t.op("Mul", &[share, x]);
    t.give(x, product);
    Ok(())
}

/// `g sign(x)`
pub(super) fn l1(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x) = (only(given)?, need(node, 0)?);
    let g = kept(t, node, g)?;
    let sign = t.op("Sign", &[x]);
    let product = t.op("Mul", &[g, sign]);
    t.give(x, product);
    Ok(())
}

/// `g exp(-y)`
pub(super) fn log_sum(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x, y) = (only(given)?, need(node, 0)?, made(node)?);
    let negative = t.op("Neg", &[y]);
    let inverse = t.op("Exp", &[negative]);
    let share = t.op("Mul", &[g, inverse]);
    let spread = spread(t, node, share, x)?;
    t.give(x, spread);
    Ok(())
}

/// `g exp(x - y)`
pub(super) fn log_sum_exp(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x, y) = (only(given)?, need(node, 0)?, made(node)?);
    let (g, y) = (kept(t, node, g)?, kept(t, node, y)?);
    let less = t.op("Sub", &[x, y]);
    let share = t.op("Exp", &[less]);
    let product = t.op("Mul", &[g, share]);
    t.give(x, product);
    Ok(())
}

/// `g` times the product of the others: with one zero among them it is all that gets a gradient, with two nothing does.
pub(super) fn prod(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x) = (only(given)?, need(node, 0)?);
    let dtype = t.dtype(x)?;
    let g = kept(t, node, g)?;
    let (zero, one) = (t.number(0.0, dtype), t.number(1.0, dtype));
    let vanishes = t.op("Equal", &[x, zero]);
    let rank = t.rank(x)? as i64;
    let over = axes(t, node)?.unwrap_or_else(|| (0..rank).collect());
    let counted = t.cast(vanishes, dtype);
    let zeros = t.reduce("ReduceSum", counted, &over, true);
    let filled = t.op("Where", &[vanishes, one, x]);
    let rest = t.reduce("ReduceProd", filled, &over, true);
    // How many of the others are zero.
    let others = t.op("Sub", &[zeros, counted]);
    let moves = t.op("Equal", &[others, zero]);
    let slope = t.op("Div", &[rest, filled]);
    let slope = t.op("Where", &[moves, slope, zero]);
    let product = t.op("Mul", &[g, slope]);
    t.give(x, product);
    Ok(())
}

/// Every entry counts in those behind it: the same sums from the other end.
pub(super) fn cumulative(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x, axis) = (only(given)?, need(node, 0)?, need(node, 1)?);
    let flag = |name: &str| node.int(name).unwrap_or(0);
    let attributes = vec![
        Attribute::int("exclusive", flag("exclusive")),
        Attribute::int("reverse", 1 - flag("reverse")),
    ];
    let sums = t.with("CumSum", &[g, axis], attributes);
    t.give(x, sums);
    Ok(())
}

/// The greatest (or least) entry gets the gradient; equal ones share it.
pub(super) fn extreme(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x, y) = (only(given)?, need(node, 0)?, made(node)?);
    let dtype = t.dtype(x)?;
    let y = kept(t, node, y)?;
    let g = kept(t, node, g)?;
    let equal = t.op("Equal", &[x, y]);
    let hits = t.cast(equal, dtype);
    let rank = t.rank(x)? as i64;
    let over = axes(t, node)?.unwrap_or_else(|| (0..rank).collect());
    let count = t.reduce("ReduceSum", hits, &over, true);
    let share = t.op("Div", &[g, count]);
    let product = t.op("Mul", &[hits, share]);
    t.give(x, product);
    Ok(())
}
