//! Operators that pick by position. What they pick gets its gradient; what they leave out gets zero.

use super::{super::tape::Tape, made, need, only};
use crate::{
    onnx::{Attribute, END, Node, ValueId},
    tensor::DType,
};

type Given<'a> = &'a [Option<ValueId>];

/// Scatters `g`, whose axis `axis` has the entries `indices` of that axis of `x`, to the shape of `x`: a product with the
/// one-hot rows of the indices, which adds up what was picked more than once.
pub(super) fn scatter(
    t: &mut Tape<'_>,
    x: ValueId,
    g: ValueId,
    indices: ValueId,
    axis: usize,
) -> Result<ValueId, String> {
    let dtype = t.dtype(x)?;
    let rank = t.rank(x)?;
    let depth = t.extent_list(x, axis)?;
    let (zero, one) = (t.number(0.0, dtype), t.number(1.0, dtype));
    let (zero, one) = (t.unsqueeze(zero, &[0]), t.unsqueeze(one, &[0]));
    let values = t.concat(&[zero, one], 0);
    let rows = t.op("OneHot", &[indices, depth, values]);
    if axis + 1 == rank {
        return Ok(t.op("MatMul", &[g, rows]));
    }
    // Its own inverse.
    let mut swap: Vec<i64> = (0..rank as i64).collect();
    swap.swap(axis, rank - 1);
    let last = t.transpose(g, &swap);
    let placed = t.op("MatMul", &[last, rows]);
    Ok(t.transpose(placed, &swap))
}

/// Entries of one axis, by a list of any number of axes.
pub(super) fn gather(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x, indices) = (only(given)?, need(node, 0)?, need(node, 1)?);
    let axis = t.axis(node.int("axis").unwrap_or(0), t.rank(x)?)?;
    let flat = t.ints(&[-1]);
    let indices = t.op("Reshape", &[indices, flat]);
    // The axes of the indices as one, in the place of the axis.
    let shape = t.op("Shape", &[x]);
    let before = t.slice(shape, 0, 0, axis as i64);
    let after = t.slice(shape, 0, axis as i64 + 1, END);
    let shape = t.concat(&[before, flat, after], 0);
    let g = t.op("Reshape", &[g, shape]);
    let placed = scatter(t, x, g, indices, axis)?;
    t.give(x, placed);
    Ok(())
}

/// From this operator set on the scattering operators can add up.
const SCATTER_ADDS: i64 = 16;

/// Zeros of the shape of a value.
fn zeros_like(t: &mut Tape<'_>, value: ValueId, like: ValueId) -> Result<ValueId, String> {
    let zero = t.number_like(0.0, like)?;
    let shape = t.op("Shape", &[value]);
    Ok(t.op("Expand", &[zero, shape]))
}

/// Entries of one axis, by an index for each entry of the result.
pub(super) fn gather_elements(
    t: &mut Tape<'_>,
    node: &Node,
    given: Given<'_>,
) -> Result<(), String> {
    let (g, x, indices) = (only(given)?, need(node, 0)?, need(node, 1)?);
    let axis = t.axis(node.int("axis").unwrap_or(0), t.rank(x)?)?;
    let placed = if t.opset() < SCATTER_ADDS {
        scatter_elements_by_product(t, x, g, indices, axis)?
    } else {
        let zeros = zeros_like(t, x, x)?;
        let attributes = vec![
            Attribute::int("axis", axis as i64),
            Attribute::string("reduction", "add"),
        ];
        t.with("ScatterElements", &[zeros, indices, g], attributes)
    };
    t.give(x, placed);
    Ok(())
}

/// With the axis last: the row of gradients times the one-hot rows of its indices. As much memory as indices times extent.
fn scatter_elements_by_product(
    t: &mut Tape<'_>,
    x: ValueId,
    g: ValueId,
    indices: ValueId,
    axis: usize,
) -> Result<ValueId, String> {
    let dtype = t.dtype(x)?;
    let last = t.rank(x)? as i64 - 1;
    let mut swap: Vec<i64> = (0..=last).collect();
    swap.swap(axis, last as usize);
    let depth = t.extent_list(x, axis)?;
    let (g, indices) = (t.transpose(g, &swap), t.transpose(indices, &swap));
    let (zero, one) = (t.number(0.0, dtype), t.number(1.0, dtype));
    let (zero, one) = (t.unsqueeze(zero, &[0]), t.unsqueeze(one, &[0]));
    let values = t.concat(&[zero, one], 0);
    let rows = t.op("OneHot", &[indices, depth, values]);
    let row = t.unsqueeze(g, &[last]);
    let placed = t.op("MatMul", &[row, rows]);
    let shape = t.op("Shape", &[g]);
    let before = t.slice(shape, 0, 0, last);
    let shape = t.concat(&[before, depth], 0);
    let placed = t.op("Reshape", &[placed, shape]);
    let placed = t.transpose(placed, &swap);
    // The indices may leave out the ends of other axes.
    let (whole, there) = (t.op("Shape", &[x]), t.op("Shape", &[placed]));
    let lacks = t.op("Sub", &[whole, there]);
    let none = t.ints(&vec![0; last as usize + 1]);
    let pads = t.concat(&[none, lacks], 0);
    Ok(t.op("Pad", &[placed, pads]))
}

/// Entries of the leading axes, by tuples. The operator itself, on the numbers of those entries, tells which they are.
pub(super) fn gather_nd(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x, indices) = (only(given)?, need(node, 0)?, need(node, 1)?);
    let shape = t.op("Shape", &[x]);
    let tuple = t.op("Shape", &[indices]);
    let tuple = t.slice(tuple, 0, -1, END);
    let rows = t.ints(&[node.int("batch_dims").unwrap_or(0)]);
    let leading = t.op("Add", &[rows, tuple]);
    let (start, end) = (t.ints(&[0]), t.ints(&[END]));
    let lead = t.slice_at(shape, 0, start, leading);
    let rest = t.slice_at(shape, 0, leading, end);
    let keep = vec![Attribute::int("keepdims", 0)];
    let count = t.with("ReduceProd", &[lead], keep);
    let numbers = t.range(count);
    let numbers = t.op("Reshape", &[numbers, lead]);
    let picked = t.with("GatherND", &[numbers, indices], node.attributes().to_vec());

    let flat = t.ints(&[-1]);
    let as_rows = t.concat(&[flat, rest], 0);
    let g = t.op("Reshape", &[g, as_rows]);
    let placed = if t.opset() < SCATTER_ADDS {
        // One-hot columns times the gradients, with whatever is behind as one axis.
        let dtype = t.dtype(x)?;
        let picked = t.op("Reshape", &[picked, flat]);
        let (zero, one) = (t.number(0.0, dtype), t.number(1.0, dtype));
        let (zero, one) = (t.unsqueeze(zero, &[0]), t.unsqueeze(one, &[0]));
        let values = t.concat(&[zero, one], 0);
        let attributes = vec![Attribute::int("axis", 0)];
        let depth = t.unsqueeze(count, &[0]);
        let columns = t.with("OneHot", &[picked, depth, values], attributes);
        let g = t.with("Flatten", &[g], vec![Attribute::int("axis", 1)]);
        t.op("MatMul", &[columns, g])
    } else {
        let picked = t.reshape(picked, &[-1, 1]);
        let zeros = zeros_like(t, x, x)?;
        let zeros = t.op("Reshape", &[zeros, as_rows]);
        let attributes = vec![Attribute::string("reduction", "add")];
        t.with("ScatterND", &[zeros, picked, g], attributes)
    };
    let placed = t.reshape_like(placed, x);
    t.give(x, placed);
    Ok(())
}

/// What was overwritten gets nothing, what was written gets its gradient. (A place that is written
/// twice has no defined value.)
pub(super) fn scatter_into(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let adds = match node.string("reduction").unwrap_or("none") {
        "none" => false,
        "add" => true,
        other => return Err(format!("its reduction is \"{other}\"")),
    };
    let (g, indices) = (only(given)?, need(node, 1)?);
    let axis: Vec<Attribute> = node
        .int("axis")
        .map(|a| Attribute::int("axis", a))
        .into_iter()
        .collect();
    let picks = if node.is("ScatterND") {
        "GatherND"
    } else {
        "GatherElements"
    };
    if let Some(x) = t.wanted_input(node, 0) {
        let left = if adds {
            g
        } else {
            let zeros = zeros_like(t, need(node, 2)?, x)?;
            t.with(&node.op, &[g, indices, zeros], axis.clone())
        };
        t.give(x, left);
    }
    if let Some(updates) = t.wanted_input(node, 2) {
        let picked = t.with(picks, &[g, indices], axis);
        t.give(updates, picked);
    }
    Ok(())
}

/// Ranges of some axes: padded with zeros, or scattered where the step is not one.
pub(super) fn slice(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x, y) = (only(given)?, need(node, 0)?, made(node)?);
    let (starts, ends) = (need(node, 1)?, need(node, 2)?);
    let constant = |v: ValueId| t.constant_ints(v);
    let rank = t.rank(x)?;
    let axes = match node.input(3) {
        Some(axes) => constant(axes).ok_or("its axes are not constant")?,
        None => (0..rank as i64).collect(),
    };
    let steps = match node.input(4) {
        Some(steps) => constant(steps).ok_or("its steps are not constant")?,
        None => vec![1; axes.len()],
    };
    if steps.iter().any(|s| *s != 1) {
        return match (axes[..].first(), steps[..].first()) {
            (Some(axis), Some(step)) if axes.len() == 1 => {
                let axis = t.axis(*axis, rank)?;
                strided(t, (x, g), axis, [starts, ends], *step)
            }
            _ => Err("it has steps along more than one axis".to_owned()),
        };
    }
    let zero = t.ints(&[0]);
    let (mut before, mut after) = (vec![zero; rank], vec![zero; rank]);
    for (at, axis) in axes.iter().enumerate() {
        let axis = t.axis(*axis, rank)?;
        let extent = t.extent_list(x, axis)?;
        let kept = t.extent_list(y, axis)?;
        let start = t.slice(starts, 0, at as i64, at as i64 + 1);
        let start = counted(t, start, extent);
        let behind = t.op("Sub", &[extent, start]);
        (before[axis], after[axis]) = (start, t.op("Sub", &[behind, kept]));
    }
    let pads: Vec<ValueId> = before.into_iter().chain(after).collect();
    let pads = t.concat(&pads, 0);
    let padded = t.op("Pad", &[g, pads]);
    t.give(x, padded);
    Ok(())
}

/// A start as `Slice` means it: negative ones from the end, kept between zero and the extent.
fn counted(t: &mut Tape<'_>, start: ValueId, extent: ValueId) -> ValueId {
    let zero = t.ints(&[0]);
    let start = t.cast(start, DType::I64);
    let from_end = t.op("Add", &[start, extent]);
    let negative = t.op("Less", &[start, zero]);
    let start = t.op("Where", &[negative, from_end, start]);
    let below = t.op("Less", &[start, zero]);
    let start = t.op("Where", &[below, zero, start]);
    let beyond = t.op("Greater", &[start, extent]);
    t.op("Where", &[beyond, extent, start])
}

/// A range with a step: the entries that it picks are those that it picks of `0, 1, 2, ...`.
fn strided(
    t: &mut Tape<'_>,
    (x, g): (ValueId, ValueId),
    axis: usize,
    [start, end]: [ValueId; 2],
    step: i64,
) -> Result<(), String> {
    let extent = t.extent_list(x, axis)?;
    let scalar = Attribute::ints("axes", &[0]);
    let extent = if t.opset() < 13 {
        t.with("Squeeze", &[extent], vec![scalar])
    } else {
        let zero = t.ints(&[0]);
        t.op("Squeeze", &[extent, zero])
    };
    let all = t.range(extent);
    let (first, step) = (t.ints(&[0]), t.ints(&[step]));
    let (start, end) = (t.cast(start, DType::I64), t.cast(end, DType::I64));
    let indices = t.op("Slice", &[all, start, end, first, step]);
    let placed = scatter(t, x, g, indices, axis)?;
    t.give(x, placed);
    Ok(())
}

/// The same triangle.
pub(super) fn trilu(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x) = (only(given)?, need(node, 0)?);
    let inputs: Vec<Option<ValueId>> = std::iter::once(Some(g))
        .chain(node.inputs.iter().skip(1).copied())
        .collect();
    let kept = t.make(None, "Trilu", &inputs, node.attributes().to_vec());
    t.give(x, kept);
    Ok(())
}
