//! Element types of values, as far as they follow from the inputs, and what needs them: integer divisions that can end
//! the process.
//!
//! Left out: shapes (they are measured, see [`crate::anatomy`]), and values that come out of control flow, sequences or
//! fused operators not named here; for those the file's own declaration is taken.

use super::{
    graph::{Graph, NodeId, ValueId},
    node::{self, Node},
    proto::{GraphProto, dtype_of},
};
use crate::tensor::{DType, Tensor};

/// Operators whose results have types that their inputs and attributes do not tell here.
const UNTOLD: [&str; 14] = [
    "BitCast",
    "If",
    "ImageDecoder",
    "Loop",
    "Optional",
    "OptionalGetElement",
    "OptionalHasElement",
    "Scan",
    "SequenceAt",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceMap",
    "SplitToSequence",
    "StringSplit",
];

/// Operators of `com.microsoft` that answer in the type of their first input.
const FUSED: [&str; 15] = [
    "Attention",
    "BiasGelu",
    "BiasSoftmax",
    "FastGelu",
    "FusedGemm",
    "FusedMatMul",
    "Gelu",
    "GroupQueryAttention",
    "MatMulNBits",
    "MultiHeadAttention",
    "QuickGelu",
    "RotaryEmbedding",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
];

impl Graph {
    /// Element type of every value, by [`ValueId::index`]; `None` where it is not known.
    pub fn element_types(&self) -> Vec<Option<DType>> {
        let mut types = vec![None; self.values().len()];
        for port in &self.inputs {
            types[port.value.index()] = port.dtype();
        }
        for (value, weight) in &self.initializers {
            types[value.index()] = weight.dtype();
        }
        for (_, node) in self.nodes() {
            for (slot, value) in node.outputs.iter().enumerate() {
                let Some(value) = value else { continue };
                let declared = || self.declared(*value)?.dtype;
                types[value.index()] = made(node, slot, &types).or_else(declared);
            }
        }
        types
    }

    /// Nodes whose integer division or remainder can meet a zero, or the smallest number and minus one, at run time: a
    /// trap that ends the process. A node counts too when such a division stands in one of its subgraphs.
    pub fn integer_divisions(&self) -> Vec<NodeId> {
        let divides = |n: &Node| n.is_any(&["Div", "Mod"]) || n.graphs().any(divides_inside);
        if !self.nodes().any(|(_, n)| divides(n)) {
            return Vec::new();
        }
        let types = self.element_types();
        let float = |v: Option<ValueId>| {
            let known = v.and_then(|v| types[v.index()]);
            known.is_some_and(DType::is_float)
        };
        self.nodes()
            .filter(|(_, n)| divides(n))
            .filter(|(_, n)| {
                let by = n.input(1);
                let safe = || {
                    by.and_then(|v| self.constant(v))
                        .is_some_and(|t| !traps(&t))
                };
                n.has_subgraph() || !(float(n.input(0)) || float(by) || safe())
            })
            .map(|(id, _)| id)
            .collect()
    }
}

/// Whether a divisor holds a zero or, where numbers have signs, a minus one.
fn traps(divisor: &Tensor) -> bool {
    let signed = matches!(
        divisor.dtype(),
        DType::I8 | DType::I16 | DType::I32 | DType::I64
    );
    let all = |element: &[u8], byte: u8| element.iter().all(|b| *b == byte);
    divisor
        .bytes()
        .chunks(divisor.dtype().size())
        .any(|e| all(e, 0) || (signed && all(e, 0xff)))
}

fn divides_inside(graph: &GraphProto) -> bool {
    graph.node.iter().any(|n| {
        matches!(n.op_type.as_str(), "Div" | "Mod")
            || node::subgraphs(&n.attribute).any(divides_inside)
    })
}

/// Element type of output `slot`.
fn made(node: &Node, slot: usize, types: &[Option<DType>]) -> Option<DType> {
    let input = |at: usize| node.input(at).and_then(|v| types[v.index()]);
    let named = |attribute: &str| {
        let number = node.int(attribute)?;
        dtype_of(i32::try_from(number).ok()?)
    };
    if node.domain == "com.microsoft" {
        return match node.op.as_str() {
            "EmbedLayerNormalization" => input(2),
            op if FUSED.contains(&op) => input(0),
            _ => None,
        };
    }
    if !node.domain.is_empty() || UNTOLD.contains(&node.op.as_str()) {
        return None;
    }
    match (node.op.as_str(), slot) {
        ("Constant", _) => {
            let tensor = node.tensor("value").map(|t| t.dtype());
            let float = node.has("value_float") || node.has("value_floats");
            let int = node.has("value_int") || node.has("value_ints");
            tensor
                .or(float.then_some(DType::F32))
                .or(int.then_some(DType::I64))
        }
        ("ConstantOfShape", _) if node.has("value") => node.tensor("value").map(|t| t.dtype()),
        ("ConstantOfShape" | "TfIdfVectorizer", _) => Some(DType::F32),
        ("Cast", _) => named("to"),
        ("Shape" | "Size" | "NonZero" | "ArgMax" | "ArgMin" | "NonMaxSuppression", _) => {
            Some(DType::I64)
        }
        ("TopK" | "MaxPool", 1) | ("Unique", 1..) => Some(DType::I64),
        (
            "And" | "Equal" | "Greater" | "GreaterOrEqual" | "IsInf" | "IsNaN" | "Less"
            | "LessOrEqual" | "Not" | "Or" | "RegexFullMatch" | "Xor",
            _,
        )
        | ("Dropout", 1) => Some(DType::Bool),
        ("CastLike" | "DequantizeLinear" | "Where", _) => input(1),
        ("OneHot", _) => input(2),
        ("QLinearConv" | "QLinearMatMul", _) => input(7),
        ("ConvInteger" | "MatMulInteger", _) => Some(DType::I32),
        ("DynamicQuantizeLinear", 1) => Some(DType::F32),
        ("DynamicQuantizeLinear", _) => Some(DType::U8),
        ("QuantizeLinear", _) => named("output_dtype").or_else(|| {
            if node.input(2).is_some() {
                input(2)
            } else {
                Some(DType::U8)
            }
        }),
        ("LayerNormalization", 1..) => Some(DType::F32),
        ("RandomNormal" | "RandomUniform", _) => named("dtype").or(Some(DType::F32)),
        ("RandomNormalLike" | "RandomUniformLike" | "EyeLike" | "Bernoulli", _) => {
            named("dtype").or_else(|| input(0))
        }
        ("Multinomial", _) => named("dtype").or(Some(DType::I32)),
        ("BlackmanWindow" | "HammingWindow" | "HannWindow", _) => {
            named("output_datatype").or(Some(DType::F32))
        }
        _ => input(0),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        build::{constant, model, read},
        proto::ModelProto,
    };

    /// Labels of the nodes that are reported.
    fn reported(m: &ModelProto) -> Vec<String> {
        let g = read(m).unwrap().graph;
        let label = |id| g.node(id).label();
        g.integer_divisions().into_iter().map(label).collect()
    }

    #[test]
    fn integer_divisors_from_a_request_are_reported_and_float_ones_are_not() {
        let m = model(
            &["x", "z"],
            "n = Shape x
             k = Shape z
             ints = Div n k
             rest = Mod n k
             floats = Div x z
             y = Identity ints",
            &["y", "rest", "floats"],
        );
        assert_eq!(reported(&m), ["ints (Div)", "rest (Mod)"]);
    }

    #[test]
    fn a_constant_divisor_is_safe_unless_it_traps() {
        for (divisor, safe) in [(2, true), (0, false), (-1, false), (i64::MIN, true)] {
            let mut m = model(&["x"], "n = Shape x\ny = Div n by", &["y"]);
            constant(&mut m, "by", &[divisor]);
            assert_eq!(reported(&m).is_empty(), safe, "{divisor}");
        }
    }
}
