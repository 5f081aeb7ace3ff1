//! Operators that pick by position. What they pick gets its gradient; what they leave out gets zero.

use super::{super::tape::Tape, made, need, only};
use crate::{
    onnx::{Attribute, END, Node, ValueId},
    tensor::DType,
};

type Given<'a> = &'a [Option<ValueId>];

/// Scatters `g`, whose axis `axis` has the entries `indices` of that axis of `x`, to the shape of `x`: a product with the
/// one-hot rows of the indices, which adds up what was picked more than once.
fn scatter(
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

/// Entries of one axis, by an index for each entry of the result.
pub(super) fn gather_elements(
    t: &mut Tape<'_>,
    node: &Node,
    given: Given<'_>,
) -> Result<(), String> {
    if t.opset() < 16 {
        return Err(
            "the model's operator set is older than 16, which cannot add up what is picked twice"
                .to_owned(),
        );
    }
    let (g, x, indices) = (only(given)?, need(node, 0)?, need(node, 1)?);
    let zero = t.number_like(0.0, x)?;
    let shape = t.op("Shape", &[x]);
    let zeros = t.op("Expand", &[zero, shape]);
    let attributes = vec![
        Attribute::int("axis", node.int("axis").unwrap_or(0)),
        Attribute::string("reduction", "add"),
    ];
    let placed = t.with("ScatterElements", &[zeros, indices, g], attributes);
    t.give(x, placed);
    Ok(())
}

/// Ranges of some axes: padded with zeros, or scattered where the step is not one.
pub(super) fn slice(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x, y) = (only(given)?, need(node, 0)?, made(node)?);
    let (starts, ends) = (need(node, 1)?, need(node, 2)?);
    let constant = |v: ValueId| t.patch.draft().constant_ints(v);
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
