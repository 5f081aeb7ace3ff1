//! Elementwise operators of one input: the gradient is multiplied by the slope.

use std::f64::consts::{FRAC_2_SQRT_PI, PI};

use super::{super::tape::Tape, fixed, made, need, only};
use crate::onnx::{Node, ValueId};

type Given<'a> = &'a [Option<ValueId>];

/// `dx = g slope`
fn by_slope(
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
fn where_it_moves(
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
fn complement(t: &mut Tape<'_>, v: ValueId, like: ValueId) -> Result<ValueId, String> {
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

/// One between the bounds, which belong to it.
pub(super) fn clip(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    fixed(t, node, 1, "lower bound")?;
    fixed(t, node, 2, "upper bound")?;
    // Since opset 11 the bounds are inputs; they were attributes before.
    if node.has("min") || node.has("max") {
        return Err("its bounds are attributes (opset 6)".to_owned());
    }
    let bounds = [(1, "Less"), (2, "Greater")];
    where_it_moves(t, node, given, |t, x, _| {
        let mut inside: Option<ValueId> = None;
        for (slot, beyond) in bounds {
            let Some(bound) = node.input(slot) else {
                continue;
            };
            let out = t.op(beyond, &[x, bound]);
            let within = t.op("Not", &[out]);
            inside = Some(match inside {
                None => within,
                Some(before) => t.op("And", &[before, within]),
            });
        }
        inside.ok_or_else(|| "it has no bounds".to_owned())
    })
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

/// `x > 0 ? 1 : y + alpha`
pub(super) fn elu(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let alpha = f64::from(node.float("alpha").unwrap_or(1.0));
    by_slope(t, node, given, |t, x, y| {
        let (zero, one) = (t.number_like(0.0, x)?, t.number_like(1.0, x)?);
        let alpha = t.number_like(alpha, x)?;
        let low = t.op("Add", &[y, alpha]);
        let positive = t.op("Greater", &[x, zero]);
        Ok(t.op("Where", &[positive, one, low]))
    })
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

/// Of `x Phi(x)`: `Phi(x) + x phi(x)`; of its approximation by a hyperbolic tangent the derivative of that.
pub(super) fn gelu(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    match node.string("approximate").unwrap_or("none") {
        "none" => by_slope(t, node, given, |t, x, _| {
            let scaled = t.scaled(x, 0.5f64.sqrt(), x)?;
            let erf = t.op("Erf", &[scaled]);
            let one = t.number_like(1.0, x)?;
            let twice = t.op("Add", &[erf, one]);
            let cdf = t.scaled(twice, 0.5, x)?;
            let square = t.op("Mul", &[x, x]);
            let half = t.scaled(square, -0.5, x)?;
            let bell = t.op("Exp", &[half]);
            let pdf = t.scaled(bell, (2.0 * PI).sqrt().recip(), x)?;
            let rest = t.op("Mul", &[x, pdf]);
            Ok(t.op("Add", &[cdf, rest]))
        }),
        // 0.5 x (1 + tanh u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        "tanh" => by_slope(t, node, given, |t, x, _| {
            let (width, cubic) = ((2.0 / PI).sqrt(), 0.044715);
            let square = t.op("Mul", &[x, x]);
            let one = t.number_like(1.0, x)?;
            let bent = t.scaled(square, cubic, x)?;
            let bent = t.op("Add", &[bent, one]);
            let inner = t.op("Mul", &[x, bent]);
            let inner = t.scaled(inner, width, x)?;
            let tanh = t.op("Tanh", &[inner]);
            let gate = t.op("Add", &[tanh, one]);
            let steep = t.scaled(square, 3.0 * cubic, x)?;
            let steep = t.op("Add", &[steep, one]);
            let tanh_square = t.op("Mul", &[tanh, tanh]);
            let slope = complement(t, tanh_square, x)?;
            let slope = t.op("Mul", &[slope, steep]);
            let slope = t.op("Mul", &[slope, x]);
            let slope = t.scaled(slope, width, x)?;
            let sum = t.op("Add", &[gate, slope]);
            t.scaled(sum, 0.5, x)
        }),
        other => Err(format!("its approximation \"{other}\" is not known")),
    }
}

/// `alpha` where `0 < y < 1`
pub(super) fn hard_sigmoid(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let alpha = f64::from(node.float("alpha").unwrap_or(0.2));
    by_slope(t, node, given, |t, x, y| {
        let (zero, one) = (t.number_like(0.0, x)?, t.number_like(1.0, x)?);
        let above = t.op("Greater", &[y, zero]);
        let below = t.op("Less", &[y, one]);
        let inside = t.op("And", &[above, below]);
        let alpha = t.number_like(alpha, x)?;
        Ok(t.op("Where", &[inside, alpha, zero]))
    })
}

/// Of `x max(0, min(1, x / 6 + 1 / 2))`: 0 below -3, 1 above 3, `x / 3 + 1 / 2` between.
pub(super) fn hard_swish(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, _| {
        let numbers = [-3.0, 3.0, 0.0, 1.0, 0.5];
        let numbers: Result<Vec<_>, _> = numbers.iter().map(|n| t.number_like(*n, x)).collect();
        let numbers = numbers?;
        let third = t.scaled(x, 1.0 / 3.0, x)?;
        let between = t.op("Add", &[third, numbers[4]]);
        let low = t.op("Less", &[x, numbers[0]]);
        let high = t.op("Greater", &[x, numbers[1]]);
        let upper = t.op("Where", &[high, numbers[3], between]);
        Ok(t.op("Where", &[low, numbers[2], upper]))
    })
}

/// `x > 0 ? 1 : alpha`
pub(super) fn leaky_relu(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let alpha = f64::from(node.float("alpha").unwrap_or(0.01));
    by_slope(t, node, given, |t, x, _| {
        let (zero, one) = (t.number_like(0.0, x)?, t.number_like(1.0, x)?);
        let alpha = t.number_like(alpha, x)?;
        let positive = t.op("Greater", &[x, zero]);
        Ok(t.op("Where", &[positive, one, alpha]))
    })
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

/// `x > 0 ? 1 : 0`
pub(super) fn relu(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    where_it_moves(t, node, given, |t, x, _| {
        let zero = t.number_like(0.0, x)?;
        Ok(t.op("Greater", &[x, zero]))
    })
}

/// `y (1 - y)`
pub(super) fn sigmoid(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, y| {
        let rest = complement(t, y, x)?;
        Ok(t.op("Mul", &[y, rest]))
    })
}

/// `sigmoid x`
pub(super) fn softplus(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, _| Ok(t.op("Sigmoid", &[x])))
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
