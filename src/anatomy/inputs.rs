//! What the inputs of a graph are for, read off what becomes of them.
//!
//! - *Token ids* select rows of a two-dimensional table of weights. Where several inputs do, the ids are those whose table
//!   also makes the logits, or the largest; what an input calls itself decides only between equals.
//! - *Type ids* and *position ids* select rows too, or (positions) feed a rotary table.
//! - The *mask* reaches the scores without ever being data.
//! - A floating-point input that flows to the output is *data* (pixels, spectra, embeddings).
//! - The *past* of a decoder is concatenated with keys and values; it may be empty.

use std::collections::{HashMap, HashSet};

use crate::{
    ipc::info::{Axis, InputRole},
    onnx::{Dim, Graph, Node, NodeId, ValueId},
    tensor::DType,
};

/// One input of the model.
#[derive(Clone, Debug)]
pub struct InputTrace {
    /// Name in the graph.
    pub name: String,
    /// The value.
    pub value: ValueId,
    /// Element type; `i64` when the file does not say.
    pub dtype: DType,
    /// Extents as declared.
    pub dims: Vec<Dim>,
    /// What it is for.
    pub role: InputRole,
    /// Rows of the table that it selects from, for ids.
    pub rows: Option<usize>,
    /// Keys or values of earlier tokens, which may be empty: none of our runs has earlier tokens.
    pub past: bool,
}

impl InputTrace {
    /// What its axes mean, where the role tells: `batch, pos` for everything that has a place per token.
    pub fn axes(&self) -> Vec<Axis> {
        match (self.role, self.dims.len()) {
            (
                InputRole::TokenIds
                | InputRole::AttentionMask
                | InputRole::TypeIds
                | InputRole::PositionIds,
                2,
            ) => vec![Axis::Batch, Axis::Pos],
            (InputRole::Pixels, rank) if rank > 0 => std::iter::once(Axis::Batch)
                .chain((1..rank).map(|i| Axis::Other(format!("axis{i}"))))
                .collect(),
            _ => Vec::new(),
        }
    }
}

/// A lookup of an embedding table by an input.
#[derive(Clone, Debug)]
pub(super) struct Lookup {
    pub(super) input: ValueId,
    /// The value that the lookup gives: where data begins.
    pub(super) output: ValueId,
    pub(super) rows: usize,
    /// Nothing but casts and reshapes lie between the input and the lookup.
    pub(super) direct: bool,
    /// The table is used elsewhere too, as by tied logits.
    pub(super) tied: bool,
}

/// All lookups of two-dimensional tables by integer inputs, in graph order.
pub(super) fn lookups(graph: &Graph) -> Vec<Lookup> {
    let constants = constants(graph);
    // For every value derived from exactly one integer input: the input, and whether directly.
    let mut from: HashMap<ValueId, (ValueId, bool)> = graph
        .inputs()
        .filter(|port| port.dtype().is_none_or(is_integer))
        .map(|port| (port.value, (port.value, true)))
        .collect();
    let mut found = Vec::new();
    for (_, node) in graph.nodes() {
        if node.is("Shape") || node.is("Size") {
            continue;
        }
        let origins: Vec<(ValueId, bool)> =
            node.reads().filter_map(|v| from.get(&v).copied()).collect();
        let Some((input, _)) = origins.first().copied() else {
            continue;
        };
        if node.is("Gather")
            && let [Some(table), Some(index), ..] = node.inputs[..]
            && let Some((input, direct)) = from.get(&index).copied()
            && let Some(shape) = constants.get(&table)
        {
            if let [rows, _] = shape[..]
                && let Some(output) = node.outputs.first().copied().flatten()
            {
                found.push(Lookup {
                    input,
                    output: dequantized(graph, output),
                    rows,
                    direct,
                    tied: graph.consumers(table).len() > 1,
                });
            }
            continue;
        }
        let one = origins.iter().all(|(i, _)| *i == input);
        if !one {
            continue;
        }
        let direct = origins.iter().all(|(_, d)| *d) && moves_only(node);
        for output in node.outputs.iter().flatten() {
            from.insert(*output, (input, direct));
        }
    }
    found
}

/// What a lookup in a table of quantised rows means: the rows as floats.
fn dequantized(graph: &Graph, rows: ValueId) -> ValueId {
    match graph.consumers(rows) {
        [(only, 0)] if graph.node(*only).op == "DequantizeLinear" => {
            graph.node(*only).output(0).unwrap_or(rows)
        }
        _ => rows,
    }
}

/// Dtypes of ids.
pub(super) fn is_integer(dtype: DType) -> bool {
    matches!(
        dtype,
        DType::I8
            | DType::I16
            | DType::I32
            | DType::I64
            | DType::U8
            | DType::U16
            | DType::U32
            | DType::U64
    )
}

fn moves_only(node: &Node) -> bool {
    node.domain.is_empty()
        && [
            "Cast",
            "Identity",
            "Reshape",
            "Flatten",
            "Squeeze",
            "Unsqueeze",
            "Transpose",
            "Slice",
            "Clip",
            "Expand",
        ]
        .contains(&node.op.as_str())
}

/// Values made of weights alone by nodes that keep the shape a table, with their extents.
fn constants(graph: &Graph) -> HashMap<ValueId, Vec<usize>> {
    let mut found: HashMap<ValueId, Vec<usize>> = graph
        .values()
        .filter_map(|v| {
            let shape = match graph.initializer(v) {
                Some(i) => i.dims().to_vec(),
                None => graph.constant(v)?.shape().to_vec(),
            };
            Some((v, shape))
        })
        .collect();
    for (_, node) in graph.nodes() {
        let keeps = [
            "Cast",
            "Identity",
            "DequantizeLinear",
            "Dropout",
            "Transpose",
        ]
        .contains(&node.op.as_str());
        if keeps
            && let Some(Some(input)) = node.inputs.first()
            && let Some(mut shape) = found.get(input).cloned()
            && let Some(Some(output)) = node.outputs.first()
        {
            if node.is("Transpose") {
                shape.reverse();
            }
            found.insert(*output, shape);
        }
    }
    found
}

/// Values that data of `value` reaches, itself included.
pub(super) fn reach(graph: &Graph, value: ValueId) -> HashSet<ValueId> {
    let mut reached = HashSet::from([value]);
    for (_, node) in graph.nodes() {
        if !node.is("Shape") && !node.is("Size") && node.reads().any(|v| reached.contains(&v)) {
            reached.extend(node.outputs.iter().flatten());
        }
    }
    reached
}

/// What an input calls itself: only ever asked to decide between inputs that the graph treats alike.
pub(super) fn calls_itself(name: &str, words: &[&str]) -> bool {
    let name = name.to_ascii_lowercase();
    words.iter().any(|w| name.contains(w))
}

/// Roles of the inputs, given the lookup chosen as the token embedding (if any), the value where data starts and the
/// nodes that normalise scores.
pub(super) fn roles(
    graph: &Graph,
    tokens: Option<&Lookup>,
    start: Option<ValueId>,
    softmaxes: &[NodeId],
) -> Vec<InputTrace> {
    let found = lookups(graph);
    let rows_of = |value: ValueId| {
        found
            .iter()
            .filter(|l| l.input == value && l.direct)
            .map(|l| l.rows)
            .min()
    };
    let inputs: Vec<InputTrace> = graph
        .inputs()
        .map(|port| {
            let name = graph.name(port.value).to_owned();
            let dtype = port.dtype().unwrap_or(DType::I64);
            let dims = port.dims().unwrap_or_default().to_vec();
            let mut rows = rows_of(port.value);
            let past = joins_keys(graph, port.value, &dims, dtype);
            let role = if tokens.is_some_and(|l| l.input == port.value) {
                rows = tokens.map(|l| l.rows);
                InputRole::TokenIds
            } else if start == Some(port.value) {
                InputRole::Pixels
            } else if past {
                InputRole::Past
            } else if rows.is_some() {
                selected(&name, rows)
            } else if feeds_rotation(graph, port.value) && is_integer(dtype) {
                InputRole::PositionIds
            } else {
                let reached = reach(graph, port.value);
                let masks = softmaxes
                    .iter()
                    .any(|n| graph.node(*n).reads().any(|v| reached.contains(&v)));
                if masks && dims.len() >= 2 {
                    InputRole::AttentionMask
                } else {
                    InputRole::Other
                }
            };
            InputTrace {
                name,
                value: port.value,
                dtype,
                dims,
                role,
                rows,
                past,
            }
        })
        .collect();
    inputs
}

/// An input that selects rows and is not the tokens: segments have few rows, positions many.
fn selected(name: &str, rows: Option<usize>) -> InputRole {
    const FEW: usize = 8;
    if calls_itself(name, &["position"]) {
        InputRole::PositionIds
    } else if calls_itself(name, &["type", "segment"]) || rows.is_some_and(|n| n <= FEW) {
        InputRole::TypeIds
    } else {
        InputRole::PositionIds
    }
}

fn feeds_rotation(graph: &Graph, value: ValueId) -> bool {
    let reached = reach(graph, value);
    graph.nodes().any(|(_, node)| {
        // What is rotated comes first; everything reaches that.
        let rotated = usize::from(node.op == "RotaryEmbedding");
        (node.is("Cos") || node.is("Sin") || rotated == 1)
            && node
                .inputs
                .iter()
                .skip(rotated)
                .flatten()
                .any(|v| reached.contains(v))
    })
}

/// Rank four, floating point, and first met by a `Concat`: keys or values of earlier tokens.
fn joins_keys(graph: &Graph, value: ValueId, dims: &[Dim], dtype: DType) -> bool {
    dtype.is_float()
        && dims.len() == 4
        && graph
            .consumers(value)
            .iter()
            .map(|(id, _)| graph.node(*id))
            .filter(|n| !n.is("Shape"))
            .any(|n| n.is("Concat"))
        && graph
            .consumers(value)
            .iter()
            .map(|(id, _)| graph.node(*id))
            .all(|n| n.is("Concat") || n.is("Shape"))
}
