//! Undoes fusions: operators that hide a transformer's inside become standard ones.
//!
//! ONNX Runtime's optimizers and the newest exporters write a whole attention, an embedding with its norm, or a norm
//! with its residual sum as one operator. [`unfuse`] gives the model as it would be without them, in standard operators
//! of the model's own operator set, so that scores, pattern and residual sums are values of the graph:
//!
//! ```text
//!   q ─┐                                   ┌─ v
//!   k ─┴▶ MatMul ─▶ Mul(scale) ─▶ (cap) ─▶ Add(mask) ─▶ Softmax ─▶ MatMul ─▶ z
//! ```
//!
//! What it promises:
//! - The values that a fused operator made keep their ids and names; only what was hidden is new.
//! - It computes what the fused operator computes on the CPU, up to rounding. The masks are those of the runtime's
//!   kernels: `mask_filter_value` where they add it, minus infinity where they leave a key out.
//! - It is pure, and a model with nothing to undo comes back as it was.
//! - What stays fused is named with the reason: no guess is made about a form that is not known for certain.
//!
//! Left out: operators inside the subgraphs of control flow; caches in a buffer shared between past and present.
//!
//! Sources: the operators' schemas in ONNX (`Attention` 23 to 25) and in ONNX Runtime 1.32 (`com.microsoft`), and what
//! its CPU kernels answer where a schema is silent; `tests/unfuse_operators.rs` holds each form against them.

mod activation;
mod attention_fused;
mod attention_grouped;
mod attention_multi_head;
mod attention_standard;
mod embedding;
mod emit;
mod facts;
mod norm;
mod opaque;
mod product;
mod rotary;
mod scores;

use crate::onnx::{Graph, Model, Node, OnnxError};
use emit::Emit;
use facts::Facts;

/// Oldest operator set that the rules write.
const OLDEST: i64 = 11;
/// Domain of ONNX Runtime's own operators.
const RUNTIME_DOMAIN: &str = "com.microsoft";

/// A model without the fusions that could be undone.
#[derive(Clone, Debug)]
pub struct Unfused {
    /// The model in standard operators; the one that was given when nothing was replaced.
    pub model: Model,
    /// What was undone, in the order of the graph.
    pub replaced: Vec<Replaced>,
    /// What stays as it is, in the order of the graph.
    pub left: Vec<Left>,
}

/// A fused node that is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replaced {
    /// Its name, or that of its first output when it has none.
    pub node: String,
    /// Its operator, with the domain.
    pub op: String,
    /// The operators that stand in its place, in order.
    pub with: Vec<String>,
}

/// A node that is not of the standard operators and stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// Its name, or that of its first output when it has none.
    pub node: String,
    /// Its operator, with the domain.
    pub op: String,
    /// Why it stays.
    pub reason: String,
}

/// Writes what one node does in standard operators, or says why it cannot.
type Rule = fn(&mut Emit<'_>, &Node) -> Result<(), String>;

/// Every operator that can be undone: domain, operator, rule.
const RULES: &[(&str, &str, Rule)] = &[
    ("", "Attention", attention_standard::attention),
    (RUNTIME_DOMAIN, "Attention", attention_fused::attention),
    (
        RUNTIME_DOMAIN,
        "MultiHeadAttention",
        attention_multi_head::attention,
    ),
    (
        RUNTIME_DOMAIN,
        "GroupQueryAttention",
        attention_grouped::attention,
    ),
    (RUNTIME_DOMAIN, "RotaryEmbedding", rotary::embedding),
    (RUNTIME_DOMAIN, "EmbedLayerNormalization", embedding::embed),
    (RUNTIME_DOMAIN, "SkipLayerNormalization", norm::skip_layer),
    (
        RUNTIME_DOMAIN,
        "SkipSimplifiedLayerNormalization",
        norm::skip_rms,
    ),
    ("", "SimplifiedLayerNormalization", norm::rms),
    (RUNTIME_DOMAIN, "SimplifiedLayerNormalization", norm::rms),
    ("", "LayerNormalization", norm::layer),
    (RUNTIME_DOMAIN, "LayerNormalization", norm::layer),
    (RUNTIME_DOMAIN, "Gelu", activation::gelu),
    (RUNTIME_DOMAIN, "BiasGelu", activation::gelu),
    (RUNTIME_DOMAIN, "FastGelu", activation::fast_gelu),
    (RUNTIME_DOMAIN, "QuickGelu", activation::quick_gelu),
    (RUNTIME_DOMAIN, "BiasSplitGelu", activation::bias_split_gelu),
    (RUNTIME_DOMAIN, "BiasAdd", product::bias_add),
    (RUNTIME_DOMAIN, "FusedMatMul", product::fused_matmul),
    (RUNTIME_DOMAIN, "TransposeMatMul", product::fused_matmul),
    (RUNTIME_DOMAIN, "FusedGemm", product::fused_gemm),
    (RUNTIME_DOMAIN, "GemmFastGelu", product::gemm_fast_gelu),
];

/// The model in standard operators, as far as that is possible.
///
/// # Errors
/// When the graph that the rules wrote breaks a rule of graphs, as every patch is checked.
pub fn unfuse(model: &Model) -> Result<Unfused, OnnxError> {
    let graph = &model.graph;
    let opset = model.opset();
    let mut replaced = Vec::new();
    let mut left = Vec::new();
    let mut emit = None;
    for (id, node) in graph.nodes() {
        let written = match rule(node, opset) {
            None if node.domain.is_empty() => continue,
            None => Err(opaque::reason(node)),
            Some(_) if opset < OLDEST => Err(format!(
                "operator set {opset} is older than {OLDEST}, export the model again"
            )),
            Some(rule) => {
                // Facts are gathered once, and only for models that need them.
                let emit = emit.get_or_insert_with(|| Emit::new(graph, Facts::of(graph), opset));
                emit.begin(&label(graph, node));
                rule(emit, node).map(|()| emit.commit(id))
            }
        };
        let (name, op) = (label(graph, node), operator(node));
        match written {
            Ok(with) => replaced.push(Replaced {
                node: name,
                op,
                with,
            }),
            Err(reason) => left.push(Left {
                node: name,
                op,
                reason,
            }),
        }
    }
    let model = match emit {
        // What a rule wrote before it gave up is read by nothing, and pruned.
        Some(emit) if !replaced.is_empty() => model.with_graph(emit.apply()?),
        _ => model.clone(),
    };
    Ok(Unfused {
        model,
        replaced,
        left,
    })
}

fn rule(node: &Node, opset: i64) -> Option<Rule> {
    // From this operator set on it is a standard operator.
    if opset >= norm::LAYER_OPSET && node.is("LayerNormalization") {
        return None;
    }
    RULES
        .iter()
        .find(|(domain, op, _)| *domain == node.domain && *op == node.op)
        .map(|(_, _, rule)| *rule)
}

fn label(graph: &Graph, node: &Node) -> String {
    let first = || node.outputs.iter().flatten().next();
    if node.name.is_empty() {
        first().map_or_else(|| node.op.clone(), |v| graph.name(*v).to_owned())
    } else {
        node.name.clone()
    }
}

fn operator(node: &Node) -> String {
    if node.domain.is_empty() {
        node.op.clone()
    } else {
        format!("{}.{}", node.domain, node.op)
    }
}
