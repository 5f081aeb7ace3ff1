//! What the inputs of a graph are for, read off what becomes of them.
//!
//! - *Token ids* select rows of a two-dimensional table of weights. Where several inputs do, the ids are those whose table
//!   also makes the logits, or the largest; what an input calls itself decides only between equals.
//! - *Type ids* and *position ids* select rows too, which join the tokens by a sum or a rotation; or (positions) feed a rotary table.
//! - The *mask* reaches the scores without ever being data.
//! - The ids of *another sequence* (an encoder's, beside the tokens of its decoder) select rows of the tokens' own table, or rows that
//!   pass weights before they meet the tokens. They have no role, nor has the mask of that sequence: nobody but the caller knows them.
//! - A floating-point input that flows to the output is *data* (pixels, spectra, embeddings).
//! - The *past* of a decoder is concatenated with keys and values; it may be empty.

use std::collections::{HashMap, HashSet};

use super::{
    flow::Flow,
    ops::{is_product, is_sum},
};
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
    /// It belongs to another sequence than the tokens, whose length is its own.
    pub apart: bool,
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
    /// The table, as the file carries it.
    pub(super) table: ValueId,
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
                    table: carried(graph, table),
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

/// The weights behind a table that is made of nothing else.
fn carried(graph: &Graph, table: ValueId) -> ValueId {
    let mut at = table;
    while let Some(maker) = graph.producer(at).map(|id| graph.node(id))
        && let Some(source) = maker.input(0)
    {
        at = source;
    }
    at
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

/// What the inputs are judged against: the data that flows to the output.
pub(super) struct Stream<'f, 'g> {
    /// The flow.
    pub(super) flow: &'f Flow<'g>,
    /// The lookup that it begins with, for ids.
    pub(super) tokens: Option<&'f Lookup>,
    /// Nodes that normalise scores within the flow.
    pub(super) own: Vec<NodeId>,
    /// Nodes that normalise scores of the flow against another sequence.
    pub(super) across: Vec<NodeId>,
}

impl Stream<'_, '_> {
    /// Whether lookups of an input are those of another sequence.
    fn is_another(&self, lookups: &[&Lookup]) -> bool {
        let table = self.tokens.map(|t| t.table);
        let shared = lookups.iter().any(|l| Some(l.table) == table);
        let mut direct = lookups.iter().filter(|l| l.direct).peekable();
        shared || direct.peek().is_some() && !direct.any(|l| joins(self.flow, l.output))
    }

    /// Whether an input masks scores, and those of the tokens among themselves where there are others.
    fn is_masked_by(&self, input: ValueId) -> bool {
        let graph = self.flow.graph();
        let reached = if self.across.is_empty() {
            reach(graph, input)
        } else {
            reach_as_mask(graph, input)
        };
        let mut scores = self.own.iter().flat_map(|n| graph.node(*n).reads());
        scores.any(|v| reached.contains(&v))
    }
}

/// Roles of the inputs.
pub(super) fn roles(graph: &Graph, stream: Option<&Stream<'_, '_>>) -> Vec<InputTrace> {
    let found = lookups(graph);
    let mut inputs: Vec<InputTrace> = graph
        .inputs()
        .map(|port| {
            let mine: Vec<&Lookup> = found.iter().filter(|l| l.input == port.value).collect();
            let mut traced = InputTrace {
                name: graph.name(port.value).to_owned(),
                value: port.value,
                dtype: port.dtype().unwrap_or(DType::I64),
                dims: port.dims().unwrap_or_default().to_vec(),
                role: InputRole::Other,
                rows: mine.iter().filter(|l| l.direct).map(|l| l.rows).min(),
                past: false,
                apart: false,
            };
            traced.past = joins_keys(graph, port.value, &traced.dims, traced.dtype);
            judge(graph, stream, &mine, &mut traced);
            traced
        })
        .collect();
    give_up_what_is_anothers(&mut inputs);
    // Beside another sequence, what has no role may have its length.
    let second = stream.is_some_and(|s| !s.across.is_empty()) || inputs.iter().any(|i| i.apart);
    for input in inputs.iter_mut().filter(|i| i.role == InputRole::Other) {
        input.apart = second && input.dims.len() > 1;
    }
    inputs
}

/// Takes the role of an input back whose second axis has the name of another sequence's, and not that of the tokens.
fn give_up_what_is_anothers(inputs: &mut [InputTrace]) {
    let second = |i: &InputTrace| {
        i.dims
            .get(1)
            .filter(|d| matches!(d, Dim::Named(_)))
            .cloned()
    };
    let tokens = inputs.iter().find(|i| i.role == InputRole::TokenIds);
    let tokens = tokens.and_then(second);
    let others: Vec<Dim> = inputs
        .iter()
        .filter(|i| i.apart)
        .filter_map(second)
        .collect();
    for input in inputs.iter_mut() {
        let fills = match input.role {
            InputRole::AttentionMask | InputRole::TypeIds | InputRole::PositionIds => true,
            InputRole::TokenIds | InputRole::Pixels | InputRole::Past | InputRole::Other => false,
        };
        let along = second(input);
        if fills && along != tokens && along.is_some_and(|d| others.contains(&d)) {
            input.role = InputRole::Other;
        }
    }
}

/// Gives an input its role.
fn judge(
    graph: &Graph,
    stream: Option<&Stream<'_, '_>>,
    lookups: &[&Lookup],
    input: &mut InputTrace,
) {
    let tokens = stream
        .and_then(|s| s.tokens)
        .filter(|l| l.input == input.value);
    if let Some(tokens) = tokens {
        input.rows = Some(tokens.rows);
        input.role = InputRole::TokenIds;
    } else if stream.is_some_and(|s| s.flow.start() == input.value) {
        input.role = InputRole::Pixels;
    } else if input.past {
        input.role = InputRole::Past;
    } else if stream.is_some_and(|s| s.is_another(lookups)) {
        input.rows = lookups.iter().map(|l| l.rows).min();
        input.apart = true;
    } else if input.rows.is_some() && stream.is_some() {
        input.role = selected(&input.name, input.rows);
    } else if feeds_rotation(graph, input.value) && is_integer(input.dtype) {
        input.role = InputRole::PositionIds;
    } else if input.dims.len() >= 2 && stream.is_some_and(|s| s.is_masked_by(input.value)) {
        input.role = InputRole::AttentionMask;
    }
}

/// Whether what an input selects meets the tokens as their positions and types do: by a sum or a rotation, before any product with
/// weights, and not as a stream with sums of its own.
fn joins(flow: &Flow<'_>, selected: ValueId) -> bool {
    let graph = flow.graph();
    let derived = reach(graph, selected);
    let mut met = HashSet::from([selected]);
    for (_, node) in graph.nodes() {
        if node.is("Shape") || node.is("Size") || !node.reads().any(|v| met.contains(&v)) {
            continue;
        }
        if node.reads().any(|v| flow.live(v)) {
            if !is_product(node) && !node.is("Concat") {
                return true;
            }
            continue;
        }
        let sources: HashSet<ValueId> = node.reads().filter(|v| derived.contains(v)).collect();
        let residual = is_sum(node) && sources.len() > 1;
        if !is_product(node) && !residual {
            met.extend(node.outputs.iter().flatten());
        }
    }
    false
}

/// Values that `value` reaches without being multiplied with anything but itself in a product: so a mask reaches scores, while what it
/// leaves of another sequence reaches none.
fn reach_as_mask(graph: &Graph, value: ValueId) -> HashSet<ValueId> {
    let mut reached = HashSet::from([value]);
    for (_, node) in graph.nodes() {
        let passes = if is_product(node) {
            node.reads().all(|v| reached.contains(&v))
        } else {
            node.reads().any(|v| reached.contains(&v))
        };
        if passes && !node.is("Shape") && !node.is("Size") {
            reached.extend(node.outputs.iter().flatten());
        }
    }
    reached
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
