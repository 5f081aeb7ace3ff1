//! Elementwise operators of one input: the gradient is multiplied by the slope.

use std::f64::consts::FRAC_2_SQRT_PI;

use super::{super::tape::Tape, made, need, only};
use crate::onnx::{Node, ValueId};

type Given<'a> = &'a [Option<ValueId>];

/// `dx = g slope`
pub(super) fn by_slope(
    t: &mut Tape<'_>,
    node: &Node,
    given: Given<'_>,
    slope: impl FnOnce(&mut Tape<'_>, ValueId, ValueId) -> Result<ValueId, String>,
) -> Result<(), String> {
    let (g, x, y) = (only(given)?, need(node, 0)?, made(node)?);
    let slope = slope(t, x, y)?;
    let product = t.op("Mul", &[g, slope]);
    t.give(x, product);
    Ok(())
}

/// `dx = condition ? g : 0`
pub(super) fn where_it_moves(
    t: &mut Tape<'_>,
    node: &Node,
    given: Given<'_>,
    condition: impl FnOnce(&mut Tape<'_>, ValueId, ValueId) -> Result<ValueId, String>,
) -> Result<(), String> {
    let (g, x, y) = (only(given)?, need(node, 0)?, made(node)?);
    let moves = condition(t, x, y)?;
    let zero = t.number_like(0.0, x)?;
    let kept = t.op("Where", &[moves, g, zero]);
    t.give(x, kept);
    Ok(())
}

/// `1 - v`
pub(super) fn complement(t: &mut Tape<'_>, v: ValueId, like: ValueId) -> Result<ValueId, String> {
    let one = t.number_like(1.0, like)?;
    Ok(t.op("Sub", &[one, v]))
}

/// `-g`
pub(super) fn neg(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x) = (only(given)?, need(node, 0)?);
    let negative = t.op("Neg", &[g]);
    t.give(x, negative);
    Ok(())
}

/// `sign x`
pub(super) fn abs(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, _| Ok(t.op("Sign", &[x])))
}

/// `-sin x`
pub(super) fn cos(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, _| {
        let sine = t.op("Sin", &[x]);
        Ok(t.op("Neg", &[sine]))
    })
}

/// `cos x`
pub(super) fn sin(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, _| Ok(t.op("Cos", &[x])))
}

/// `2 / sqrt(pi) exp(-x^2)`
pub(super) fn erf(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, _| {
        let square = t.op("Mul", &[x, x]);
        let negative = t.op("Neg", &[square]);
        let bell = t.op("Exp", &[negative]);
        t.scaled(bell, FRAC_2_SQRT_PI, x)
    })
}

/// `y`
pub(super) fn exp(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |_, _, y| Ok(y))
}

/// `1 / x`
pub(super) fn log(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, _| Ok(t.op("Reciprocal", &[x])))
}

/// `-y^2`
pub(super) fn reciprocal(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, _, y| {
        let square = t.op("Mul", &[y, y]);
        Ok(t.op("Neg", &[square]))
    })
}

/// `1 / (2 y)`
pub(super) fn sqrt(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, y| {
        let half = t.number_like(0.5, x)?;
        Ok(t.op("Div", &[half, y]))
    })
}

/// `1 - y^2`
pub(super) fn tanh(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, y| {
        let square = t.op("Mul", &[y, y]);
        complement(t, square, x)
    })
}

/// `1 / sqrt(1 - x^2)`
pub(super) fn asin(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, _| {
        let square = t.op("Mul", &[x, x]);
        let rest = complement(t, square, x)?;
        let root = t.op("Sqrt", &[rest]);
        Ok(t.op("Reciprocal", &[root]))
    })
}

/// `-1 / sqrt(1 - x^2)`
pub(super) fn acos(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, _| {
        let square = t.op("Mul", &[x, x]);
        let rest = complement(t, square, x)?;
        let root = t.op("Sqrt", &[rest]);
        let slope = t.op("Reciprocal", &[root]);
        Ok(t.op("Neg", &[slope]))
    })
}

/// `1 / (1 + x^2)`
pub(super) fn atan(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, _| {
        let square = t.op("Mul", &[x, x]);
        let one = t.number_like(1.0, x)?;
        let sum = t.op("Add", &[square, one]);
        Ok(t.op("Reciprocal", &[sum]))
    })
}

/// `1 + y^2`
pub(super) fn tan(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, y| {
        let square = t.op("Mul", &[y, y]);
        let one = t.number_like(1.0, x)?;
        Ok(t.op("Add", &[square, one]))
    })
}

/// `cosh x`
pub(super) fn sinh(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, _| Ok(t.op("Cosh", &[x])))
}

/// `sinh x`
pub(super) fn cosh(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, _| Ok(t.op("Sinh", &[x])))
}

/// `1 / cosh y`
pub(super) fn asinh(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, _, y| {
        let root = t.op("Cosh", &[y]);
        Ok(t.op("Reciprocal", &[root]))
    })
}

/// `1 / sinh y`
pub(super) fn acosh(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, _, y| {
        let root = t.op("Sinh", &[y]);
        Ok(t.op("Reciprocal", &[root]))
    })
}

/// `1 / (1 - x^2)`
pub(super) fn atanh(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, _| {
        let square = t.op("Mul", &[x, x]);
        let rest = complement(t, square, x)?;
        Ok(t.op("Reciprocal", &[rest]))
    })
}
