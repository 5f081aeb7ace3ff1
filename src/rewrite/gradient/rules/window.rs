//! Convolutions and pools: each entry of the result has a window of the input, and gives its gradient back to it.

use super::{super::tape::Tape, fixed, made, need, only};
use crate::{
    onnx::{Attribute, END, Node, NodeSpec, ValueId},
    tensor::Tensor,
};

type Given<'a> = &'a [Option<ValueId>];

/// How windows lie over the axes behind those of row and channel.
struct Windows {
    strides: Vec<i64>,
    dilations: Vec<i64>,
    padding: Padding,
}

/// What the axes are padded with before the windows are laid.
enum Padding {
    /// Counts at the beginnings, then at the ends.
    Fixed(Vec<i64>),
    /// As much as the windows need; of an odd number the one more goes to the end, or to the beginning.
    Same { more_at_end: bool },
}

impl Windows {
    fn of(t: &Tape<'_>, node: &Node) -> Result<Self, String> {
        let axes = t.rank(need(node, 0)?)?.saturating_sub(2);
        let list = |name: &str, default: i64, n: usize| {
            let list = node.ints(name).map(<[i64]>::to_vec);
            let list = list.unwrap_or_else(|| vec![default; n]);
            (list.len() == n)
                .then_some(list)
                .ok_or_else(|| format!("its {name} do not fit its axes"))
        };
        let padding = match node.string("auto_pad").unwrap_or("NOTSET") {
            "NOTSET" => Padding::Fixed(list("pads", 0, 2 * axes)?),
            "VALID" => Padding::Fixed(vec![0; 2 * axes]),
            "SAME_UPPER" => Padding::Same { more_at_end: true },
            "SAME_LOWER" => Padding::Same { more_at_end: false },
            other => return Err(format!("its auto_pad \"{other}\" is not known")),
        };
        Ok(Self {
            strides: list("strides", 1, axes)?,
            dilations: list("dilations", 1, axes)?,
            padding,
        })
    }

    fn axes(&self) -> usize {
        self.strides.len()
    }

    /// The padding where it is written down.
    fn fixed(&self) -> Result<&[i64], String> {
        match &self.padding {
            Padding::Fixed(pads) => Ok(pads),
            Padding::Same { .. } => Err("its padding follows the extents".to_owned()),
        }
    }

    fn attributes(&self, group: i64) -> Vec<Attribute> {
        vec![
            Attribute::ints("strides", &self.strides),
            Attribute::ints("dilations", &self.dilations),
            Attribute::int("group", group),
        ]
    }
}

/// Extents behind row and channel, as a list.
fn extents(t: &mut Tape<'_>, value: ValueId) -> ValueId {
    let shape = t.op("Shape", &[value]);
    t.slice(shape, 0, 2, END)
}

/// What a transposed convolution gave without padding, cut (or filled with zeros) to the extents before padding.
fn unpadded(t: &mut Tape<'_>, full: ValueId, windows: &Windows, wanted: ValueId) -> ValueId {
    let there = extents(t, full);
    let lacks = t.op("Sub", &[wanted, there]);
    let before = match &windows.padding {
        Padding::Fixed(pads) => t.ints(&pads[..windows.axes()]),
        Padding::Same { more_at_end } => {
            let (zero, two) = (t.ints(&[0]), t.ints(&[2]));
            let over = t.op("Neg", &[lacks]);
            let short = t.op("Less", &[over, zero]);
            let over = t.op("Where", &[short, zero, over]);
            let half = t.op("Div", &[over, two]);
            if *more_at_end {
                half
            } else {
                t.op("Sub", &[over, half])
            }
        }
    };
    let after = t.op("Add", &[lacks, before]);
    let before = t.op("Neg", &[before]);
    let none = t.ints(&[0, 0]);
    let pads = t.concat(&[none, before, none, after], 0);
    t.op("Pad", &[full, pads])
}

/// The transposed convolution with the same weight.
pub(super) fn conv(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    fixed(t, node, 1, "weight")?;
    fixed(t, node, 2, "bias")?;
    let (g, x, weight) = (only(given)?, need(node, 0)?, need(node, 1)?);
    let windows = Windows::of(t, node)?;
    let mut attributes = windows.attributes(node.int("group").unwrap_or(1));
    let gradient = match &windows.padding {
        // Every entry lies under a window.
        Padding::Fixed(pads) if windows.strides.iter().all(|s| *s == 1) => {
            attributes.push(Attribute::ints("pads", pads));
            t.with("ConvTranspose", &[g, weight], attributes)
        }
        Padding::Fixed(_) | Padding::Same { .. } => {
            let full = t.with("ConvTranspose", &[g, weight], attributes);
            let wanted = extents(t, x);
            unpadded(t, full, &windows, wanted)
        }
    };
    t.give(x, gradient);
    Ok(())
}

/// The convolution with the same weight.
pub(super) fn conv_transpose(
    t: &mut Tape<'_>,
    node: &Node,
    given: Given<'_>,
) -> Result<(), String> {
    fixed(t, node, 1, "weight")?;
    fixed(t, node, 2, "bias")?;
    if node.has("output_shape") {
        return Err("its padding follows the shape of its output".to_owned());
    }
    let (g, x, weight) = (only(given)?, need(node, 0)?, need(node, 1)?);
    let windows = Windows::of(t, node)?;
    let mut attributes = windows.attributes(node.int("group").unwrap_or(1));
    attributes.push(Attribute::ints("pads", windows.fixed()?));
    let gradient = t.with("Conv", &[g, weight], attributes);
    t.give(x, gradient);
    Ok(())
}

/// The same share for every entry of a window. How many entries a mean was taken of, the operator itself tells on ones.
pub(super) fn average_pool(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x, y) = (only(given)?, need(node, 0)?, made(node)?);
    let dtype = t.dtype(x)?;
    let windows = Windows::of(t, node)?;
    let pads = windows.fixed()?;
    let axes = windows.axes();
    let kernel = node.ints("kernel_shape").ok_or("it has no kernel_shape")?;
    let sizes: Vec<usize> = kernel
        .iter()
        .map(|k| usize::try_from(*k).map_err(|e| e.to_string()))
        .collect::<Result<_, _>>()?;
    let shape = [&[1, 1], &sizes[..]].concat();
    let weight = Tensor::from_f32(shape, &vec![1.0; sizes.iter().product()])
        .and_then(|w| w.cast_float(dtype))
        .map_err(|e| e.to_string())?;
    let weight = t.patch.constant("ones", &weight);

    let (to, from) = (extents(t, x), extents(t, y));
    let one = t.number(1.0, dtype);
    let pair = t.ints(&[1, 1]);
    let shape = t.concat(&[pair, to], 0);
    let ones = t.op("Expand", &[one, shape]);
    let mean = t.with("AveragePool", &[ones], node.attributes().to_vec());
    // Windows may reach behind the padding at the end: there is enough to let all of them lie, and more are cut off.
    let mut enough = pads.to_vec();
    for axis in 0..axes {
        enough[axes + axis] += kernel[axis] * windows.dilations[axis] + windows.strides[axis];
    }
    let mut attributes = windows.attributes(1);
    attributes.push(Attribute::ints("pads", &enough));
    let count = t.with("Conv", &[ones, weight], attributes);
    let starts = t.ints(&vec![0; axes]);
    let which = t.ints(&(2..2 + axes as i64).collect::<Vec<_>>());
    let count = t.op("Slice", &[count, starts, from, which]);
    let share = t.op("Div", &[mean, count]);
    let share = t.op("Mul", &[g, share]);

    let rows = t.ints(&[-1, 1]);
    let shape = t.concat(&[rows, from], 0);
    let share = t.op("Reshape", &[share, shape]);
    let full = t.with("ConvTranspose", &[share, weight], windows.attributes(1));
    let gradient = unpadded(t, full, &windows, to);
    let gradient = t.reshape_like(gradient, x);
    t.give(x, gradient);
    Ok(())
}

/// `g / n` everywhere.
pub(super) fn global_average_pool(
    t: &mut Tape<'_>,
    node: &Node,
    given: Given<'_>,
) -> Result<(), String> {
    let (g, x, y) = (only(given)?, need(node, 0)?, made(node)?);
    let dtype = t.dtype(x)?;
    let (all, left) = (t.op("Size", &[x]), t.op("Size", &[y]));
    let count = t.op("Div", &[all, left]);
    let count = t.cast(count, dtype);
    let share = t.op("Div", &[g, count]);
    let shape = t.op("Shape", &[x]);
    let gradient = t.op("Expand", &[share, shape]);
    t.give(x, gradient);
    Ok(())
}

/// The entry that was the greatest of its window, as the operator itself tells.
pub(super) fn max_pool(t: &mut Tape<'_>, node: &Node, given: Given<'_>) -> Result<(), String> {
    let (g, x) = (only(given)?, need(node, 0)?);
    let windows = Windows::of(t, node)?;
    let kernel = node.ints("kernel_shape").ok_or("it has no kernel_shape")?;
    let apart = windows.strides.iter().zip(kernel).all(|(s, k)| s >= k);
    let adds = t.opset() >= 16;
    if !adds && !apart {
        return Err(
            "its windows overlap, and the model's operator set is older than 16, which cannot add up what is picked twice"
                .to_owned(),
        );
    }
    if node.int("storage_order").unwrap_or(0) != 0 {
        return Err("it counts by columns".to_owned());
    }
    let both = t.patch.node(NodeSpec {
        op: "MaxPool",
        inputs: vec![Some(x)],
        attributes: node.attributes().to_vec(),
        outputs: 2,
        ..NodeSpec::default()
    });
    let zero = t.number_like(0.0, x)?;
    let flat = t.ints(&[-1]);
    let shape = t.op("Shape", &[x]);
    let zeros = t.op("Expand", &[zero, shape]);
    let lists = [zeros, both[1], g].map(|v| t.op("Reshape", &[v, flat]));
    let mut attributes = vec![Attribute::int("axis", 0)];
    if adds {
        attributes.push(Attribute::string("reduction", "add"));
    }
    let placed = t.with("ScatterElements", &lists, attributes);
    let gradient = t.reshape_like(placed, x);
    t.give(x, gradient);
    Ok(())
}
