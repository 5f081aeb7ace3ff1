//! One rule per operator: from the gradients of a node's outputs to those of its inputs.

mod binary;
mod index;
mod layout;
mod norm;
mod product;
mod reduce;
mod unary;

use super::tape::Tape;
use crate::onnx::{Node, ValueId};

/// Gives the wanted inputs of a node their gradients, from those of its outputs. An error says what it does not know.
pub(super) type Rule = fn(&mut Tape<'_>, &Node, &[Option<ValueId>]) -> Result<(), String>;

/// The rule of a node's operator.
pub(super) fn of(node: &Node) -> Option<Rule> {
    if !node.domain.is_empty() {
        return None;
    }
    Some(match node.op.as_str() {
        "Add" => binary::add,
        "Sub" => binary::sub,
        "Mul" => binary::mul,
        "Div" => binary::div,
        "Pow" => binary::pow,
        "Where" => binary::select,
        "Max" | "Min" => binary::extreme,

        "Abs" => unary::abs,
        "Clip" => unary::clip,
        "Cos" => unary::cos,
        "Elu" => unary::elu,
        "Erf" => unary::erf,
        "Exp" => unary::exp,
        "Gelu" => unary::gelu,
        "HardSigmoid" => unary::hard_sigmoid,
        "HardSwish" => unary::hard_swish,
        "LeakyRelu" => unary::leaky_relu,
        "Log" => unary::log,
        "Neg" => unary::neg,
        "Reciprocal" => unary::reciprocal,
        "Relu" => unary::relu,
        "Sigmoid" => unary::sigmoid,
        "Sin" => unary::sin,
        "Softplus" => unary::softplus,
        "Sqrt" => unary::sqrt,
        "Tanh" => unary::tanh,

        "Cast" => layout::cast,
        "Concat" => layout::concat,
        "Dropout" | "Identity" => layout::identity,
        "Expand" => layout::expand,
        "Flatten" | "Reshape" | "Squeeze" | "Unsqueeze" => layout::reshape,
        "Split" => layout::split,
        "Transpose" => layout::transpose,

        "Gather" => index::gather,
        "GatherElements" => index::gather_elements,
        "Slice" => index::slice,
        "Trilu" => index::trilu,

        "Einsum" => product::einsum,
        "Gemm" => product::gemm,
        "MatMul" => product::matmul,

        "ReduceMax" | "ReduceMin" => reduce::extreme,
        "ReduceMean" => reduce::mean,
        "ReduceSum" => reduce::sum,
        "ReduceSumSquare" => reduce::sum_square,
        "ReduceL2" => reduce::l2,

        "LayerNormalization" => norm::layer,
        "LogSoftmax" => norm::log_softmax,
        "RMSNormalization" | "SimplifiedLayerNormalization" => norm::rms,
        "RotaryEmbedding" => norm::rotary,
        "Softmax" => norm::softmax,
        _ => return None,
    })
}

/// The input that a node cannot be without.
fn need(node: &Node, slot: usize) -> Result<ValueId, String> {
    node.input(slot)
        .ok_or_else(|| format!("its input {slot} is missing"))
}

/// The output that a node cannot be without.
fn made(node: &Node) -> Result<ValueId, String> {
    node.output(0).ok_or_else(|| "it makes nothing".to_owned())
}

/// The gradient of the first output, where no other output has one.
fn only(given: &[Option<ValueId>]) -> Result<ValueId, String> {
    match given {
        [Some(g), rest @ ..] if rest.iter().all(Option::is_none) => Ok(*g),
        _ => Err("an output besides the first is read".to_owned()),
    }
}

/// Refuses an input that must not depend on what is differentiated.
fn fixed(t: &Tape<'_>, node: &Node, slot: usize, what: &str) -> Result<(), String> {
    match t.wanted_input(node, slot) {
        Some(_) => Err(format!("its {what} depends on what is differentiated")),
        None => Ok(()),
    }
}
