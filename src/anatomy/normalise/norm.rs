//! Norms, alone and fused with the residual sum before them.
//!
//! ```text
//!   input ─┐
//!   skip ──┴▶ Add ─▶ Add(bias) ─┬▶ norm ─▶ output 0
//!                               └────────▶ output 3, the residual stream
//! ```

use super::emit::{Emit, Needs};
use crate::{
    onnx::{Attribute, Node, ValueId},
    tensor::DType,
};

/// Operator set that brought `LayerNormalization`; the runtime writes it into older ones too.
pub(super) const LAYER_OPSET: i64 = 17;
/// Operator set that brought `RMSNormalization`.
const RMS_OPSET: i64 = 23;
/// What the schemas give when the attribute is left out.
const EPSILON: f32 = 1e-5;
const SKIP_EPSILON: f32 = 1e-12;

/// `(x - mean) / sqrt(variance + epsilon) * gamma + beta` over the last axis, or without the mean.
pub(super) struct Norm {
    pub(super) gamma: ValueId,
    /// Only where `centred`.
    pub(super) beta: Option<ValueId>,
    pub(super) epsilon: f32,
    pub(super) centred: bool,
}

/// `LayerNormalization` in an operator set that has none.
pub(super) fn layer(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    alone(e, node, true)
}

/// `SimplifiedLayerNormalization`.
pub(super) fn rms(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    alone(e, node, false)
}

fn alone(e: &mut Emit<'_>, node: &Node, centred: bool) -> Result<(), String> {
    let x = node.need(0)?;
    let axis = node.int("axis").unwrap_or(-1);
    let last = axis == -1 || e.fact(x).rank.is_some_and(|r| axis + 1 == r as i64);
    if !last {
        return Err(format!(
            "it normalises from axis {axis} on, not over the last axis"
        ));
    }
    e.unread(node, 1, "statistics for training")?;
    e.unread(node, 2, "statistics for training")?;
    let norm = Norm {
        gamma: node.need(1)?,
        beta: node.input(2).filter(|_| centred),
        epsilon: node.float("epsilon").unwrap_or(EPSILON),
        centred,
    };
    let dtype = e.dtype(x)?;
    write(e, e.wanted(node, 0), x, dtype, &norm);
    Ok(())
}

/// `SkipLayerNormalization`.
pub(super) fn skip_layer(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    skip(e, node, true)
}

/// `SkipSimplifiedLayerNormalization`, which has no beta: its bias comes one slot earlier.
pub(super) fn skip_rms(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    skip(e, node, false)
}

fn skip(e: &mut Emit<'_>, node: &Node, centred: bool) -> Result<(), String> {
    let (input, skip) = (node.need(0)?, node.need(1)?);
    let dtype = e.dtype(node.need(2)?).or_else(|_| e.dtype(input))?;
    e.unread(node, 1, "statistics for training")?;
    e.unread(node, 2, "statistics for training")?;
    let (beta, bias) = if centred {
        (node.input(3), node.input(4))
    } else {
        (None, node.input(3))
    };
    let norm = Norm {
        gamma: node.need(2)?,
        beta,
        epsilon: node.float("epsilon").unwrap_or(SKIP_EPSILON),
        centred,
    };
    // The bias belongs to the projection that made the input.
    let input = match bias {
        Some(bias) => e.op("Add", &[input, bias]),
        None => input,
    };
    let made = e.wanted(node, 3);
    let stream = e.end(made, "Add", &[input, skip]);
    write(e, e.wanted(node, 0), stream, dtype, &norm);
    Ok(())
}

/// Writes a norm over the last axis: as one operator where the operator set has it, otherwise step by step.
pub(super) fn write(
    e: &mut Emit<'_>,
    made: Option<ValueId>,
    x: ValueId,
    dtype: DType,
    norm: &Norm,
) -> ValueId {
    let (op, since) = if norm.centred {
        ("LayerNormalization", LAYER_OPSET)
    } else {
        ("RMSNormalization", RMS_OPSET)
    };
    if e.opset() >= since {
        let attributes = vec![
            Attribute::int("axis", -1),
            Attribute::float("epsilon", norm.epsilon),
        ];
        let mut inputs = vec![Some(x), Some(norm.gamma)];
        inputs.extend(norm.beta.map(Some));
        return e.make(made, op, &inputs, attributes);
    }
    // The runtime takes the statistics of half floats in single precision.
    let half = matches!(dtype, DType::F16 | DType::Bf16);
    let (inside, wide) = if half {
        (DType::F32, e.cast(x, DType::F32))
    } else {
        (dtype, x)
    };
    let centred = if norm.centred {
        let mean = e.mean(wide);
        e.op("Sub", &[wide, mean])
    } else {
        wide
    };
    let square = e.op("Mul", &[centred, centred]);
    let variance = e.mean(square);
    let epsilon = e.number(norm.epsilon, inside);
    let variance = e.op("Add", &[variance, epsilon]);
    let deviation = e.op("Sqrt", &[variance]);
    let mut normal = e.op("Div", &[centred, deviation]);
    if half {
        normal = e.cast(normal, dtype);
    }
    match norm.beta {
        Some(beta) => {
            let scaled = e.op("Mul", &[normal, norm.gamma]);
            e.end(made, "Add", &[scaled, beta])
        }
        None => e.end(made, "Mul", &[normal, norm.gamma]),
    }
}
