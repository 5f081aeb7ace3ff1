//! Activations that the runtime fuses with their bias.
//!
//! - Gelu: `x (1 + erf(x / sqrt 2)) / 2`; as the operator of that name from operator set 20 on.
//! - FastGelu: `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`; likewise, with `approximate`.
//! - QuickGelu: `x sigmoid(alpha x)`.
//! - BiasSplitGelu: `l gelu(r)` for the halves `l`, `r` of `x + bias`.

use std::f32::consts::{FRAC_2_PI, SQRT_2};

use super::emit::{Emit, Needs};
use crate::{
    onnx::{Attribute, END, Node, ValueId},
    tensor::DType,
};

/// Operator set that brought `Gelu`.
const GELU_OPSET: i64 = 20;
const CUBIC: f32 = 0.044_715;
/// The default of `QuickGelu`'s attribute.
const QUICK: f32 = 1.702;

/// `Gelu` and `BiasGelu`.
pub(super) fn gelu(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    let (x, dtype) = biased(e, node)?;
    write_gelu(e, e.wanted(node, 0), x, dtype);
    Ok(())
}

/// `FastGelu`, with or without a bias.
pub(super) fn fast_gelu(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    let (x, dtype) = biased(e, node)?;
    write_fast_gelu(e, e.wanted(node, 0), x, dtype);
    Ok(())
}

/// `QuickGelu`; with an alpha of one it is SiLU.
pub(super) fn quick_gelu(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    let x = node.need(0)?;
    let alpha = node.float("alpha").unwrap_or(QUICK);
    let inner = if alpha == 1.0 {
        x
    } else {
        let dtype = e.dtype(x)?;
        let alpha = e.number(alpha, dtype);
        e.op("Mul", &[x, alpha])
    };
    let gate = e.op("Sigmoid", &[inner]);
    let made = e.wanted(node, 0);
    e.end(made, "Mul", &[x, gate]);
    Ok(())
}

/// `BiasSplitGelu`.
pub(super) fn bias_split_gelu(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    let width = e.fact(node.need(1)?).last.or(e.fact(node.need(0)?).last);
    let half = width.ok_or("the width of its bias is not known")? / 2;
    let (x, dtype) = biased(e, node)?;
    let left = e.slice(x, -1, 0, half);
    let right = e.slice(x, -1, half, END);
    let gate = write_gelu(e, None, right, dtype);
    let made = e.wanted(node, 0);
    e.end(made, "Mul", &[left, gate]);
    Ok(())
}

/// The first input plus the bias, if there is one.
fn biased(e: &mut Emit<'_>, node: &Node) -> Result<(ValueId, DType), String> {
    let x = node.need(0)?;
    let dtype = e.dtype(x)?;
    Ok(match node.input(1) {
        Some(bias) => (e.op("Add", &[x, bias]), dtype),
        None => (x, dtype),
    })
}

fn write_gelu(e: &mut Emit<'_>, made: Option<ValueId>, x: ValueId, dtype: DType) -> ValueId {
    if e.opset() >= GELU_OPSET {
        return e.end(made, "Gelu", &[x]);
    }
    let root = e.number(SQRT_2, dtype);
    let inner = e.op("Div", &[x, root]);
    let bend = e.op("Erf", &[inner]);
    half_of_one_plus(e, made, x, bend, dtype)
}

/// The approximation by a hyperbolic tangent.
pub(super) fn write_fast_gelu(
    e: &mut Emit<'_>,
    made: Option<ValueId>,
    x: ValueId,
    dtype: DType,
) -> ValueId {
    if e.opset() >= GELU_OPSET {
        let tanh = Attribute::string("approximate", "tanh");
        return e.make(made, "Gelu", &[Some(x)], vec![tanh]);
    }
    let square = e.op("Mul", &[x, x]);
    let cube = e.op("Mul", &[square, x]);
    let cubic = e.number(CUBIC, dtype);
    let cubic = e.op("Mul", &[cube, cubic]);
    let sum = e.op("Add", &[x, cubic]);
    let root = e.number(FRAC_2_PI.sqrt(), dtype);
    let inner = e.op("Mul", &[sum, root]);
    let bend = e.op("Tanh", &[inner]);
    half_of_one_plus(e, made, x, bend, dtype)
}

/// `x (1 + bend) / 2`.
fn half_of_one_plus(
    e: &mut Emit<'_>,
    made: Option<ValueId>,
    x: ValueId,
    bend: ValueId,
    dtype: DType,
) -> ValueId {
    let one = e.number(1.0, dtype);
    let gate = e.op("Add", &[bend, one]);
    let product = e.op("Mul", &[x, gate]);
    let half = e.number(0.5, dtype);
    e.end(made, "Mul", &[product, half])
}
