//! What kinds of operators there are, as far as finding a transformer needs to know.
//!
//! Everything is judged on the live inputs of a node (those that data of the embedding reaches): an `Add` with one
//! live input is a bias, a `Mul` with one a scale, a `MatMul` with one a product with weights.

use super::flow::Flow;
use crate::onnx::{Graph, Node, ValueId};

const RUNTIME_DOMAIN: &str = "com.microsoft";

fn named(node: &Node, standard: &[&str]) -> bool {
    node.domain.is_empty() && standard.contains(&node.op.as_str())
}

fn contributed(node: &Node, ops: &[&str]) -> bool {
    node.domain == RUNTIME_DOMAIN && ops.contains(&node.op.as_str())
}

/// The values stay what they are, up to rounding: other dtype, or nothing at all.
pub(super) fn is_pass(node: &Node) -> bool {
    named(
        node,
        &[
            "Identity",
            "Cast",
            "CastLike",
            "Dropout",
            "QuantizeLinear",
            "DequantizeLinear",
            "DynamicQuantizeLinear",
        ],
    ) || contributed(node, &["QuantizeLinear", "DequantizeLinear"])
}

/// The same elements under other axes.
pub(super) fn is_layout(node: &Node) -> bool {
    is_pass(node)
        || named(
            node,
            &["Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"],
        )
}

/// Some of the elements, or some of them several times.
pub(super) fn is_copy(node: &Node) -> bool {
    is_layout(node)
        || named(
            node,
            &[
                "Expand", "Tile", "Gather", "GatherND", "Slice", "Split", "Concat", "Pad",
            ],
        )
}

/// A sum of tensors, element by element.
pub(super) fn is_sum(node: &Node) -> bool {
    named(node, &["Add", "Sum"])
}

/// A product of two tensors that sums over an axis.
pub(super) fn is_product(node: &Node) -> bool {
    named(
        node,
        &[
            "MatMul",
            "Gemm",
            "Einsum",
            "Conv",
            "MatMulInteger",
            "ConvInteger",
            "QLinearMatMul",
            "QLinearConv",
        ],
    ) || contributed(
        node,
        &[
            "MatMulNBits",
            "FusedMatMul",
            "FusedGemm",
            "MatMulIntegerToFloat",
            "DynamicQuantizeMatMul",
            "MatMulBnb4",
            "QGemm",
        ],
    )
}

/// Functions of one value that bend it: what makes a perceptron more than a matrix.
pub(super) fn is_activation(node: &Node) -> bool {
    named(
        node,
        &[
            "Relu",
            "Gelu",
            "Erf",
            "Tanh",
            "Sigmoid",
            "HardSigmoid",
            "HardSwish",
            "Swish",
            "Softplus",
            "Softsign",
            "LeakyRelu",
            "PRelu",
            "Elu",
            "Selu",
            "Celu",
            "Mish",
            "ThresholdedRelu",
            "Clip",
            "Exp",
            "Sin",
        ],
    ) || contributed(node, &["Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Silu"])
}

/// `x * c`, `x / c` or `-x` with nothing else live.
pub(super) fn is_scale(flow: &Flow<'_>, node: &Node) -> bool {
    (named(node, &["Mul"]) && flow.live_inputs(node).len() == 1)
        || (named(node, &["Div"])
            && flow.live_inputs(node).len() == 1
            && node
                .inputs
                .first()
                .copied()
                .flatten()
                .is_some_and(|v| flow.live(v)))
        || named(node, &["Neg"])
}

/// `x + c` or `x - c` with nothing else live.
pub(super) fn is_shift(flow: &Flow<'_>, node: &Node) -> bool {
    named(node, &["Add", "Sub"]) && flow.live_inputs(node).len() == 1
}

/// A product of live data with something that is not: weights.
pub(super) fn is_projection(flow: &Flow<'_>, node: &Node) -> bool {
    is_product(node) && flow.sources(node).len() == 1 && !product_of_itself(flow, node)
}

fn product_of_itself(flow: &Flow<'_>, node: &Node) -> bool {
    node.inputs
        .iter()
        .flatten()
        .take(2)
        .filter(|v| flow.live(**v))
        .count()
        > 1
}

/// The float scale after an integer product.
pub(super) fn dequantises(flow: &Flow<'_>, node: &Node) -> bool {
    node.is("Mul")
        && node.inputs.iter().flatten().any(|v| {
            walk_back(flow, *v, is_layout)
                .last()
                .and_then(|o| flow.maker(*o))
                .is_some_and(|(_, n)| n.is_any(&["MatMulInteger", "ConvInteger"]))
        })
}

/// The two live operands of a product of live data with live data, left one first.
pub(super) fn live_product(flow: &Flow<'_>, node: &Node) -> Option<(ValueId, ValueId)> {
    operands(node).filter(|(left, right)| flow.live(*left) && flow.live(*right))
}

/// The operands of a product of data with data of another tower.
pub(super) fn cross_product(flow: &Flow<'_>, node: &Node) -> Option<(ValueId, ValueId)> {
    operands(node).filter(|(left, right)| {
        flow.live(*left) && flow.foreign(*right) || flow.foreign(*left) && flow.live(*right)
    })
}

fn operands(node: &Node) -> Option<(ValueId, ValueId)> {
    if !named(node, &["MatMul", "Einsum", "Gemm"]) && !contributed(node, &["FusedMatMul"]) {
        return None;
    }
    match node.inputs[..] {
        [Some(left), Some(right), ..] => Some((left, right)),
        _ => None,
    }
}

/// The only live input of a node, if it has just one.
pub(super) fn only_source(flow: &Flow<'_>, node: &Node) -> Option<ValueId> {
    match flow.sources(node)[..] {
        [only] => Some(only),
        _ => None,
    }
}

/// Walks from a value towards its origin while `step` accepts the maker and one live input leads on; the value itself
/// comes first.
pub(super) fn walk_back(
    flow: &Flow<'_>,
    value: ValueId,
    step: impl Fn(&Node) -> bool,
) -> Vec<ValueId> {
    let mut walked = vec![value];
    let mut at = value;
    while let Some((_, node)) = flow.maker(at)
        && step(node)
        && let Some(source) = only_source(flow, node)
    {
        walked.push(source);
        at = source;
    }
    walked
}

/// A product or sum with a vector: the weight or bias of a norm, and not a scale of everything.
pub(super) fn is_vector_step(graph: &Graph, node: &Node) -> bool {
    named(node, &["Mul", "Add", "Sub", "Div"])
        && !node
            .inputs
            .iter()
            .flatten()
            .any(|v| graph.constant(*v).is_some_and(|c| c.elements() == 1))
}
