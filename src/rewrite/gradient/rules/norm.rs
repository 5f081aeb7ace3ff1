//! Operators that set entries of an axis against each other, and rotary positions.
//!
//! For relevance the size that a norm divides by is a number, so that it hands on what reaches it (`relevance`).

use super::{super::tape::Tape, fixed, made, need, only};
use crate::{
    onnx::{Node, ValueId},
    tensor::DType,
};

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

/// What a norm keeps beside its result, up to this output, in the type of its input: it has the statistics already.
fn kept(t: &mut Tape<'_>, node: &Node, slot: usize) -> Result<Vec<ValueId>, String> {
    let (x, y) = (need(node, 0)?, made(node)?);
    let maker = t.patch.draft().producer(y);
    let maker = maker.ok_or_else(|| "nothing makes its result".to_owned())?;
    let dtype = t.dtype(x)?;
    let outputs = t.patch.with_outputs(maker, slot + 1);
    let single = node.int("stash_type").unwrap_or(1) == 1 && dtype != DType::F64;
    let kept = outputs.into_iter().skip(1);
    Ok(if single && dtype != DType::F32 {
        kept.map(|v| t.cast(v, dtype)).collect()
    } else {
        kept.collect()
    })
}

/// With `n` the normalised input, `w = g scale`, `r` the inverse deviation: `r (w - mean(w) - n mean(w n))`.
pub(super) fn layer(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    fixed(t, node, 1, "scale")?;
    fixed(t, node, 2, "bias")?;
    let (g, x, scale) = (only(given)?, need(node, 0)?, need(node, 1)?);
    let axes = normalised(t, node)?;
    let statistics = kept(t, node, 2)?;
    let centred = t.op("Sub", &[x, statistics[0]]);
    let inverse = statistics[1];
    let weighted = t.op("Mul", &[g, scale]);
    let gradient = through_norm(t, weighted, (centred, inverse), &axes);
    t.give(x, gradient);
    Ok(())
}

/// `r (w - mean(w) - n mean(w n))`, with `r` the inverse deviation and `n` what was centred times it.
fn through_norm(
    t: &mut Tape<'_>,
    weighted: ValueId,
    (centred, inverse): (ValueId, ValueId),
    axes: &[i64],
) -> ValueId {
    let shift = t.reduce("ReduceMean", weighted, axes, true);
    if t.sizes_are_fixed() {
        let rest = t.op("Sub", &[weighted, shift]);
        return t.op("Mul", &[inverse, rest]);
    }
    let normal = t.op("Mul", &[centred, inverse]);
    let along = t.op("Mul", &[weighted, normal]);
    let along = t.reduce("ReduceMean", along, axes, true);
    let along = t.op("Mul", &[normal, along]);
    let rest = t.op("Sub", &[weighted, shift]);
    let rest = t.op("Sub", &[rest, along]);
    t.op("Mul", &[inverse, rest])
}

/// A number for each channel, in the place of the second of these many axes.
fn per_channel(t: &mut Tape<'_>, numbers: ValueId, rank: usize) -> ValueId {
    let mut shape = vec![1; rank];
    if let Some(channels) = shape.get_mut(1) {
        *channels = -1;
    }
    t.reshape(numbers, &shape)
}

/// Each channel by its own mean and deviation over the axes behind it.
pub(super) fn instance(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    fixed(t, node, 1, "scale")?;
    fixed(t, node, 2, "bias")?;
    let (g, x, scale) = (only(given)?, need(node, 0)?, need(node, 1)?);
    let rank = t.rank(x)?;
    let axes: Vec<i64> = (2..rank as i64).collect();
    let scale = per_channel(t, scale, rank);
    let weighted = t.op("Mul", &[g, scale]);
    let mean = t.reduce("ReduceMean", x, &axes, true);
    let centred = t.op("Sub", &[x, mean]);
    let inverse = inverse_size(t, node, centred, &axes)?;
    let gradient = through_norm(t, weighted, (centred, inverse), &axes);
    t.give(x, gradient);
    Ok(())
}

/// Each group of channels by its own mean and deviation; the scale is one number per group before opset 21, per channel since.
pub(super) fn group(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    fixed(t, node, 1, "scale")?;
    fixed(t, node, 2, "bias")?;
    let (g, x, scale) = (only(given)?, need(node, 0)?, need(node, 1)?);
    let groups = node.int("num_groups").ok_or("it has no num_groups")?;
    let folded = [0, groups, -1];
    let in_groups = t.reshape(x, &folded);
    let weighted = if t.opset() < 21 {
        let g = t.reshape(g, &folded);
        let scale = per_channel(t, scale, 3);
        t.op("Mul", &[g, scale])
    } else {
        let rank = t.rank(x)?;
        let scale = per_channel(t, scale, rank);
        let weighted = t.op("Mul", &[g, scale]);
        t.reshape(weighted, &folded)
    };
    let mean = t.reduce("ReduceMean", in_groups, &[2], true);
    let centred = t.op("Sub", &[in_groups, mean]);
    let inverse = inverse_size(t, node, centred, &[2])?;
    let gradient = through_norm(t, weighted, (centred, inverse), &[2]);
    let gradient = t.reshape_like(gradient, x);
    t.give(x, gradient);
    Ok(())
}

/// By the mean and variance of the training data: `g scale / sqrt(variance + epsilon)`.
pub(super) fn batch(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    if node.int("training_mode").unwrap_or(0) != 0 {
        return Err("it takes its mean over the batch".to_owned());
    }
    for (slot, what) in [(1, "scale"), (2, "bias"), (3, "mean"), (4, "variance")] {
        fixed(t, node, slot, what)?;
    }
    let (g, x) = (only(given)?, need(node, 0)?);
    let (scale, variance) = (need(node, 1)?, need(node, 4)?);
    let epsilon = f64::from(node.float("epsilon").unwrap_or(1e-5));
    let epsilon = t.number_like(epsilon, variance)?;
    let moved = t.op("Add", &[variance, epsilon]);
    let size = t.op("Sqrt", &[moved]);
    let slope = t.op("Div", &[scale, size]);
    let rank = t.rank(x)?;
    let slope = per_channel(t, slope, rank);
    let gradient = t.op("Mul", &[g, slope]);
    t.give(x, gradient);
    Ok(())
}

/// With `n` the Euclidean norm: `(g - y sum(g y)) / n`.
pub(super) fn unit_length(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    if node.int("p").unwrap_or(2) != 2 {
        return Err("its norm is not the Euclidean one".to_owned());
    }
    let (g, x, y) = (only(given)?, need(node, 0)?, made(node)?);
    let axis = t.axis(node.int("axis").unwrap_or(-1), t.rank(x)?)? as i64;
    let size = t.reduce("ReduceL2", x, &[axis], true);
    if t.sizes_are_fixed() {
        let gradient = t.op("Div", &[g, size]);
        t.give(x, gradient);
        return Ok(());
    }
    let along = t.op("Mul", &[g, y]);
    let along = t.reduce("ReduceSum", along, &[axis], true);
    let along = t.op("Mul", &[y, along]);
    let rest = t.op("Sub", &[g, along]);
    let gradient = t.op("Div", &[rest, size]);
    t.give(x, gradient);
    Ok(())
}

/// With `n` the normalised input, `w = g scale`, `r` the inverse root mean square: `r (w - n mean(w n))`.
pub(super) fn rms(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    fixed(t, node, 1, "scale")?;
    let (g, x, scale) = (only(given)?, need(node, 0)?, need(node, 1)?);
    let axes = normalised(t, node)?;
    let inverse = if node.is("RMSNormalization") {
        // The standard one keeps nothing.
        inverse_size(t, node, x, &axes)?
    } else {
        kept(t, node, 1)?[0]
    };
    let weighted = t.op("Mul", &[g, scale]);
    if t.sizes_are_fixed() {
        let gradient = t.op("Mul", &[inverse, weighted]);
        t.give(x, gradient);
        return Ok(());
    }
    let normal = t.op("Mul", &[x, inverse]);
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
