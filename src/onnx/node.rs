//! Nodes and their attributes.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::{
    graph::ValueId,
    proto::{self, AttributeProto},
};
use crate::tensor::Tensor;

/// One operator call. An empty name in the file (an optional input left out) is `None` here.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Operator type, such as `MatMul`.
    pub op: String,
    /// Operator domain; empty for the standard one (`ai.onnx` is read as empty).
    pub domain: String,
    /// Name in the file; may be empty and need not be unique.
    pub name: String,
    /// Inputs in the operator's order.
    pub inputs: Vec<Option<ValueId>>,
    /// Outputs in the operator's order.
    pub outputs: Vec<Option<ValueId>>,
    /// Values of the enclosing graph that the node's subgraphs read.
    pub implicit: Vec<ValueId>,
    pub(super) attributes: Vec<AttributeProto>,
}

impl Node {
    /// Whether this is the standard operator `op`.
    pub fn is(&self, op: &str) -> bool {
        self.domain.is_empty() && self.op == op
    }

    /// Whether this is one of the standard operators `ops`.
    pub fn is_any(&self, ops: &[&str]) -> bool {
        ops.iter().any(|op| self.is(op))
    }

    /// Input `slot`, if it is there.
    pub fn input(&self, slot: usize) -> Option<ValueId> {
        self.inputs.get(slot).copied().flatten()
    }

    /// Output `slot`, if it is there.
    pub fn output(&self, slot: usize) -> Option<ValueId> {
        self.outputs.get(slot).copied().flatten()
    }

    /// Every value that the node reads, those of its subgraphs included.
    pub fn reads(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.inputs.iter().flatten().chain(&self.implicit).copied()
    }

    /// Whether an attribute of this name is there.
    pub fn has(&self, name: &str) -> bool {
        self.attribute(name).is_some()
    }

    fn attribute(&self, name: &str) -> Option<&AttributeProto> {
        self.attributes.iter().find(|a| a.name == name)
    }

    fn of_kind(&self, name: &str, kind: i32) -> Option<&AttributeProto> {
        self.attribute(name).filter(|a| a.r#type == kind)
    }

    /// An integer attribute.
    pub fn int(&self, name: &str) -> Option<i64> {
        self.of_kind(name, kind::INT).map(|a| a.i)
    }

    /// A float attribute.
    pub fn float(&self, name: &str) -> Option<f32> {
        self.of_kind(name, kind::FLOAT).map(|a| a.f)
    }

    /// A list of integers.
    pub fn ints(&self, name: &str) -> Option<&[i64]> {
        self.of_kind(name, kind::INTS).map(|a| &a.ints[..])
    }

    /// A list of floats.
    pub fn floats(&self, name: &str) -> Option<&[f32]> {
        self.of_kind(name, kind::FLOATS).map(|a| &a.floats[..])
    }

    /// A string attribute that is valid UTF-8.
    pub fn string(&self, name: &str) -> Option<&str> {
        let a = self.of_kind(name, kind::STRING)?;
        std::str::from_utf8(&a.s).ok()
    }

    /// A dense tensor attribute of a dtype that we know.
    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        let a = self.of_kind(name, kind::TENSOR)?;
        super::constant::tensor(a.t.as_ref()?)
    }

    /// Whether any attribute is a graph.
    pub fn has_subgraph(&self) -> bool {
        self.attributes
            .iter()
            .any(|a| a.g.is_some() || !a.graphs.is_empty())
    }

    /// A label for people: the name, or the operator and the first output's place when there is none.
    pub fn label(&self) -> String {
        if self.name.is_empty() {
            self.op.clone()
        } else {
            format!("{} ({})", self.name, self.op)
        }
    }
}

/// Names that the subgraphs of a node take from outside.
pub(super) fn outer_names(node: &proto::NodeProto) -> BTreeSet<&str> {
    let mut outer = BTreeSet::new();
    for graph in subgraphs(&node.attribute) {
        graph_outer_names(graph, &mut outer);
    }
    outer
}

fn graph_outer_names<'a>(graph: &'a proto::GraphProto, outer: &mut BTreeSet<&'a str>) {
    let mut inside: BTreeSet<&str> = graph.input.iter().map(|i| i.name.as_str()).collect();
    inside.extend(graph.initializer.iter().map(|i| i.name.as_str()));
    inside.extend(
        graph
            .sparse_initializer
            .iter()
            .filter_map(|s| Some(s.values.as_ref()?.name.as_str())),
    );
    inside.extend(
        graph
            .node
            .iter()
            .flat_map(|n| n.output.iter().map(String::as_str)),
    );
    let reads = graph.node.iter().flat_map(|n| {
        let mut names = outer_names(n);
        names.extend(n.input.iter().map(String::as_str));
        names
    });
    let outputs = graph.output.iter().map(|o| o.name.as_str());
    outer.extend(
        reads
            .chain(outputs)
            .filter(|n| !n.is_empty() && !inside.contains(n)),
    );
}

/// The graphs among attributes.
pub(super) fn subgraphs(attributes: &[AttributeProto]) -> impl Iterator<Item = &proto::GraphProto> {
    attributes.iter().flat_map(|a| a.g.iter().chain(&a.graphs))
}

/// Numbers of the attribute kinds.
pub(super) mod kind {
    pub(in crate::onnx) const FLOAT: i32 = 1;
    pub(in crate::onnx) const INT: i32 = 2;
    pub(in crate::onnx) const STRING: i32 = 3;
    pub(in crate::onnx) const TENSOR: i32 = 4;
    pub(in crate::onnx) const FLOATS: i32 = 6;
    pub(in crate::onnx) const INTS: i32 = 7;
}

/// An attribute for a new node.
#[derive(Clone, Debug, PartialEq)]
pub struct Attribute(pub(super) AttributeProto);

impl Attribute {
    fn new(name: &str, kind: i32, fill: impl FnOnce(&mut AttributeProto)) -> Self {
        let mut a = AttributeProto {
            name: name.to_owned(),
            r#type: kind,
            ..AttributeProto::default()
        };
        fill(&mut a);
        Self(a)
    }

    /// An integer.
    pub fn int(name: &str, value: i64) -> Self {
        Self::new(name, kind::INT, |a| a.i = value)
    }

    /// A float.
    pub fn float(name: &str, value: f32) -> Self {
        Self::new(name, kind::FLOAT, |a| a.f = value)
    }

    /// A list of integers.
    pub fn ints(name: &str, values: &[i64]) -> Self {
        Self::new(name, kind::INTS, |a| a.ints = values.to_vec())
    }

    /// A list of floats.
    pub fn floats(name: &str, values: &[f32]) -> Self {
        Self::new(name, kind::FLOATS, |a| a.floats = values.to_vec())
    }

    /// A string.
    pub fn string(name: &str, value: &str) -> Self {
        Self::new(name, kind::STRING, |a| {
            a.s = Bytes::copy_from_slice(value.as_bytes());
        })
    }

    /// A tensor.
    pub fn tensor(name: &str, value: &Tensor) -> Self {
        Self::new(name, kind::TENSOR, |a| {
            a.t = Some(super::constant::message("", value));
        })
    }
}
