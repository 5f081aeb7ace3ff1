//! Operators that set entries of an axis against each other, and rotary positions.

use super::{super::tape::Tape, fixed, made, need, only};
use crate::onnx::{Node, ValueId};

type Given<'a> = &'a [Option<ValueId>];

/// The axes over which a softmax runs. Before opset 13 an operator ran over all axes from its axis on.
fn softmax_axes(t: &Tape<'_>, node: &Node) -> Result<Vec<i64>, String> {
    let rank = t.rank(need(node, 0)?)?;
    if t.opset() < 13 {
        let from = t.axis(node.int("axis").unwrap_or(1), rank)?;
        return Ok((from as i64..rank as i64).collect());
    }
    let axis = t.axis(node.int("axis").unwrap_or(-1), rank)?;
    Ok(vec![axis as i64])
}

/// `y (g - sum(g y))`
pub(super) fn softmax(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x, y) = (only(given)?, need(node, 0)?, made(node)?);
    let axes = softmax_axes(t, node)?;
    let product = t.op("Mul", &[g, y]);
    let sum = t.reduce("ReduceSum", product, &axes, true);
    let share = t.op("Mul", &[y, sum]);
    let gradient = t.op("Sub", &[product, share]);
    t.give(x, gradient);
    Ok(())
}

/// `g - exp(y) sum(g)`
pub(super) fn log_softmax(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x, y) = (only(given)?, need(node, 0)?, made(node)?);
    let axes = softmax_axes(t, node)?;
    let sum = t.reduce("ReduceSum", g, &axes, true);
    let share = t.op("Exp", &[y]);
    let share = t.op("Mul", &[share, sum]);
    let gradient = t.op("Sub", &[g, share]);
    t.give(x, gradient);
    Ok(())
}

/// The last axes, from the node's axis on.
fn normalised(t: &Tape<'_>, node: &Node) -> Result<Vec<i64>, String> {
    let rank = t.rank(need(node, 0)?)?;
    let from = t.axis(node.int("axis").unwrap_or(-1), rank)?;
    Ok((from as i64..rank as i64).collect())
}

/// `1 / sqrt(mean(v^2) + epsilon)`
fn inverse_size(
    t: &mut Tape<'_>,
    node: &Node,
    v: ValueId,
    axes: &[i64],
) -> Result<ValueId, String> {
    let epsilon = f64::from(node.float("epsilon").unwrap_or(1e-5));
    let x = need(node, 0)?;
    let square = t.op("Mul", &[v, v]);
    let mean = t.reduce("ReduceMean", square, axes, true);
    let epsilon = t.number_like(epsilon, x)?;
    let moved = t.op("Add", &[mean, epsilon]);
    let size = t.op("Sqrt", &[moved]);
    Ok(t.op("Reciprocal", &[size]))
}

/// With `n` the normalised input, `w = g scale`, `r` the inverse deviation: `r (w - mean(w) - n mean(w n))`.
pub(super) fn layer(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    fixed(t, node, 1, "scale")?;
    fixed(t, node, 2, "bias")?;
    let (g, x, scale) = (only(given)?, need(node, 0)?, need(node, 1)?);
    let axes = normalised(t, node)?;
    let mean = t.reduce("ReduceMean", x, &axes, true);
    let centred = t.op("Sub", &[x, mean]);
    let inverse = inverse_size(t, node, centred, &axes)?;
    let normal = t.op("Mul", &[centred, inverse]);
    let weighted = t.op("Mul", &[g, scale]);
    let shift = t.reduce("ReduceMean", weighted, &axes, true);
    let along = t.op("Mul", &[weighted, normal]);
    let along = t.reduce("ReduceMean", along, &axes, true);
    let along = t.op("Mul", &[normal, along]);
    let rest = t.op("Sub", &[weighted, shift]);
    let rest = t.op("Sub", &[rest, along]);
    let gradient = t.op("Mul", &[inverse, rest]);
    t.give(x, gradient);
    Ok(())
}

/// With `n` the normalised input, `w = g scale`, `r` the inverse root mean square: `r (w - n mean(w n))`.
pub(super) fn rms(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    fixed(t, node, 1, "scale")?;
    let (g, x, scale) = (only(given)?, need(node, 0)?, need(node, 1)?);
    let axes = normalised(t, node)?;
    let inverse = inverse_size(t, node, x, &axes)?;
    let normal = t.op("Mul", &[x, inverse]);
    let weighted = t.op("Mul", &[g, scale]);
    let along = t.op("Mul", &[weighted, normal]);
    let along = t.reduce("ReduceMean", along, &axes, true);
    let along = t.op("Mul", &[normal, along]);
    let rest = t.op("Sub", &[weighted, along]);
    let gradient = t.op("Mul", &[inverse, rest]);
    t.give(x, gradient);
    Ok(())
}

/// A rotation is undone by the opposite angle: the same operator with the sine negated.
pub(super) fn rotary(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    for (slot, what) in [(1, "cosine"), (2, "sine")] {
        fixed(t, node, slot, what)?;
    }
    let (g, x, sine) = (only(given)?, need(node, 0)?, need(node, 2)?);
    let back = t.op("Neg", &[sine]);
    let mut inputs = node.inputs.clone();
    (inputs[0], inputs[2]) = (Some(g), Some(back));
    let turned = t.make(None, "RotaryEmbedding", &inputs, node.attributes().to_vec());
    t.give(x, turned);
    Ok(())
}
