//! Activations: elementwise operators of one input that bend it, and the slope that some of them learn.

use std::f64::consts::PI;

use super::{
    super::tape::Tape,
    fixed, need, only,
    unary::{by_slope, complement, where_it_moves},
};
use crate::onnx::{Node, ValueId};

type Given<'a> = &'a [Option<ValueId>];

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

/// `x > 0 ? 1 : exp(x / alpha)`
pub(super) fn celu(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let alpha = f64::from(node.float("alpha").unwrap_or(1.0));
    by_slope(t, node, given, |t, x, _| {
        let (zero, one) = (t.number_like(0.0, x)?, t.number_like(1.0, x)?);
        // Never of a positive number, whose exponential may be infinite.
        let low = t.op("Min", &[x, zero]);
        let low = t.scaled(low, alpha.recip(), x)?;
        let low = t.op("Exp", &[low]);
        let positive = t.op("Greater", &[x, zero]);
        Ok(t.op("Where", &[positive, one, low]))
    })
}

/// `x > 0 ? gamma : y + gamma alpha`
pub(super) fn selu(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let alpha = f64::from(node.float("alpha").unwrap_or(1.673_263_2));
    let gamma = f64::from(node.float("gamma").unwrap_or(1.050_701));
    by_slope(t, node, given, |t, x, y| {
        let zero = t.number_like(0.0, x)?;
        let (high, level) = (t.number_like(gamma, x)?, t.number_like(gamma * alpha, x)?);
        let low = t.op("Add", &[y, level]);
        let positive = t.op("Greater", &[x, zero]);
        Ok(t.op("Where", &[positive, high, low]))
    })
}

/// Of `x tanh(softplus x)`: `tanh(softplus x) + x sigmoid(x) (1 - tanh(softplus x)^2)`.
pub(super) fn mish(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, _| {
        let soft = t.op("Softplus", &[x]);
        let tanh = t.op("Tanh", &[soft]);
        let square = t.op("Mul", &[tanh, tanh]);
        let rest = complement(t, square, x)?;
        let gate = t.op("Sigmoid", &[x]);
        let gate = t.op("Mul", &[x, gate]);
        let bend = t.op("Mul", &[gate, rest]);
        Ok(t.op("Add", &[tanh, bend]))
    })
}

/// Of `x s`, `s = sigmoid(alpha x)`: `s + alpha x s (1 - s)`.
pub(super) fn swish(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let alpha = f64::from(node.float("alpha").unwrap_or(1.0));
    by_slope(t, node, given, |t, x, _| {
        let inner = t.scaled(x, alpha, x)?;
        let gate = t.op("Sigmoid", &[inner]);
        let rest = complement(t, gate, x)?;
        let bend = t.op("Mul", &[inner, gate]);
        let bend = t.op("Mul", &[bend, rest]);
        Ok(t.op("Add", &[gate, bend]))
    })
}

/// `1 / (1 + |x|)^2`
pub(super) fn softsign(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    by_slope(t, node, given, |t, x, _| {
        let size = t.op("Abs", &[x]);
        let one = t.number_like(1.0, x)?;
        let sum = t.op("Add", &[size, one]);
        let square = t.op("Mul", &[sum, sum]);
        Ok(t.op("Reciprocal", &[square]))
    })
}

/// `x > alpha ? 1 : 0`
pub(super) fn thresholded_relu(
    t: &mut Tape<'_>,
    node: &Node,
    given: Given<'_>,
) -> Result<(), String> {
    let alpha = f64::from(node.float("alpha").unwrap_or(1.0));
    where_it_moves(t, node, given, |t, x, _| {
        let alpha = t.number_like(alpha, x)?;
        Ok(t.op("Greater", &[x, alpha]))
    })
}

/// `x < 0 ? g slope : g`; the slope is a weight.
pub(super) fn prelu(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    fixed(t, node, 1, "slope")?;
    let (g, x, slope) = (only(given)?, need(node, 0)?, need(node, 1)?);
    let zero = t.number_like(0.0, x)?;
    let negative = t.op("Less", &[x, zero]);
    let bent = t.op("Mul", &[g, slope]);
    let gradient = t.op("Where", &[negative, bent, g]);
    t.give(x, gradient);
    Ok(())
}
