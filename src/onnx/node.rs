//! Nodes, and what their subgraphs read.

use std::collections::BTreeSet;

use super::{
    attribute::{Attribute, Payload},
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
    pub(super) attributes: Vec<Attribute>,
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
        self.payload(name).is_some()
    }

    fn payload(&self, name: &str) -> Option<&Payload> {
        let found = self.attributes.iter().find(|a| &*a.name == name)?;
        Some(&found.payload)
    }

    /// An integer attribute.
    pub fn int(&self, name: &str) -> Option<i64> {
        let Payload::Int(v) = self.payload(name)? else {
            return None;
        };
        Some(*v)
    }

    /// A float attribute.
    pub fn float(&self, name: &str) -> Option<f32> {
        let Payload::Float(v) = self.payload(name)? else {
            return None;
        };
        Some(*v)
    }

    /// A list of integers.
    pub fn ints(&self, name: &str) -> Option<&[i64]> {
        let Payload::Ints(v) = self.payload(name)? else {
            return None;
        };
        Some(v)
    }

    /// A list of floats.
    pub fn floats(&self, name: &str) -> Option<&[f32]> {
        let Payload::Floats(v) = self.payload(name)? else {
            return None;
        };
        Some(v)
    }

    /// A string attribute that is valid UTF-8.
    pub fn string(&self, name: &str) -> Option<&str> {
        let Payload::String(v) = self.payload(name)? else {
            return None;
        };
        std::str::from_utf8(v).ok()
    }

    /// A dense tensor attribute of a dtype that we know.
    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        let Payload::Tensor(v) = self.payload(name)? else {
            return None;
        };
        Some(v.clone())
    }

    /// Attributes in the order of the file.
    pub fn attributes(&self) -> &[Attribute] {
        &self.attributes
    }

    /// Whether any attribute is a graph.
    pub fn has_subgraph(&self) -> bool {
        self.graphs().next().is_some()
    }

    /// Its subgraphs.
    pub(super) fn graphs(&self) -> impl Iterator<Item = &proto::GraphProto> {
        self.attributes.iter().flat_map(Attribute::graphs)
    }

    /// A label for people: name and operator, or the operator alone when there is no name.
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
