//! One rule per operator: from the gradients of a node's outputs to those of its inputs.

mod activation;
mod binary;
mod index;
mod layout;
mod norm;
mod product;
mod reduce;
mod relevance;
mod unary;
mod window;

use super::tape::Tape;
use crate::{
    ipc::spec::Rules,
    onnx::{Node, ValueId},
};

/// Gives the wanted inputs of a node their gradients, from those of its outputs. An error says what it does not know.
pub(super) type Rule = fn(&mut Tape<'_>, &Node, &[Option<ValueId>]) -> Result<(), String>;

/// The rule of a node's operator.
pub(super) fn of(node: &Node, rules: Rules) -> Option<Rule> {
    match rules {
        Rules::Gradient => derivative(node),
        Rules::AttnLrp => relevance::of(node).or_else(|| derivative(node)),
    }
}

/// The vector-Jacobian product of a node's operator.
fn derivative(node: &Node) -> Option<Rule> {
    if !node.domain.is_empty() {
        return None;
    }
    Some(match node.op.as_str() {
        "Add" | "Sum" => binary::add,
        "Mean" => binary::mean,
        "Mod" => binary::remainder,
        "Sub" => binary::sub,
        "Mul" => binary::mul,
        "Div" => binary::div,
        "Pow" => binary::pow,
        "Where" => binary::select,
        "Max" | "Min" => binary::extreme,

        "Celu" => activation::celu,
        "Clip" => activation::clip,
        "Elu" => activation::elu,
        "Gelu" => activation::gelu,
        "HardSigmoid" => activation::hard_sigmoid,
        "HardSwish" => activation::hard_swish,
        "LeakyRelu" => activation::leaky_relu,
        "Mish" => activation::mish,
        "PRelu" => activation::prelu,
        "Relu" => activation::relu,
        "Selu" => activation::selu,
        "Sigmoid" => activation::sigmoid,
        "Softplus" => activation::softplus,
        "Softsign" => activation::softsign,
        "Swish" => activation::swish,
        "ThresholdedRelu" => activation::thresholded_relu,

        "Abs" => unary::abs,
        "Acos" => unary::acos,
        "Acosh" => unary::acosh,
        "Asin" => unary::asin,
        "Asinh" => unary::asinh,
        "Atan" => unary::atan,
        "Atanh" => unary::atanh,
        "Cos" => unary::cos,
        "Cosh" => unary::cosh,
        "Erf" => unary::erf,
        "Exp" => unary::exp,
        "Log" => unary::log,
        "Neg" => unary::neg,
        "Reciprocal" => unary::reciprocal,
        "Sin" => unary::sin,
        "Sinh" => unary::sinh,
        "Sqrt" => unary::sqrt,
        "Tan" => unary::tan,
        "Tanh" => unary::tanh,

        "Cast" | "CastLike" => layout::cast,
        "Concat" => layout::concat,
        "Dropout" | "Identity" => layout::identity,
        "Expand" => layout::expand,
        "Flatten" | "Reshape" | "Squeeze" | "Unsqueeze" => layout::reshape,
        "Pad" => layout::pad,
        "Split" => layout::split,
        "Tile" => layout::tile,
        "Transpose" => layout::transpose,

        "Gather" => index::gather,
        "GatherElements" => index::gather_elements,
        "GatherND" => index::gather_nd,
        "ScatterElements" | "ScatterND" => index::scatter_into,
        "Slice" => index::slice,
        "Trilu" => index::trilu,

        "Einsum" => product::einsum,
        "Gemm" => product::gemm,
        "MatMul" => product::matmul,

        "CumSum" => reduce::cumulative,
        "ReduceL1" => reduce::l1,
        "ReduceL2" => reduce::l2,
        "ReduceLogSum" => reduce::log_sum,
        "ReduceLogSumExp" => reduce::log_sum_exp,
        "ReduceMax" | "ReduceMin" => reduce::extreme,
        "ReduceMean" => reduce::mean,
        "ReduceProd" => reduce::prod,
        "ReduceSum" => reduce::sum,
        "ReduceSumSquare" => reduce::sum_square,

        "AveragePool" => window::average_pool,
        "Conv" => window::conv,
        "ConvTranspose" => window::conv_transpose,
        "GlobalAveragePool" => window::global_average_pool,
        "MaxPool" => window::max_pool,

        "BatchNormalization" => norm::batch,
        "GroupNormalization" => norm::group,
        "InstanceNormalization" => norm::instance,
        "LayerNormalization" => norm::layer,
        "LpNormalization" => norm::unit_length,
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
