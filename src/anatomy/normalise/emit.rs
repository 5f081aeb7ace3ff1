//! The writing side of a rule: a patch, what is known of the values, and the node at hand.

use std::ops::{Deref, DerefMut};

use super::facts::{Fact, Facts};
use crate::{
    onnx::{Graph, Node, NodeId, OnnxError, Patch, ValueId, Writer},
    tensor::DType,
};

/// What a rule asks of its node.
pub(super) trait Needs {
    /// An input that the operator cannot be without.
    fn need(&self, slot: usize) -> Result<ValueId, String>;
    /// Refuses an input that the rule does not know how to honour.
    fn without(&self, slot: usize, what: &str) -> Result<(), String>;
}

impl Needs for Node {
    fn need(&self, slot: usize) -> Result<ValueId, String> {
        self.input(slot)
            .ok_or_else(|| format!("its input {slot} is missing"))
    }

    fn without(&self, slot: usize, what: &str) -> Result<(), String> {
        match self.input(slot) {
            Some(_) => Err(format!("its input {slot} ({what}) is fed")),
            None => Ok(()),
        }
    }
}

/// Writes nodes into a patch, for one fused node after the other.
pub(super) struct Emit<'a> {
    graph: &'a Graph,
    facts: Facts,
    writer: Writer,
    /// Nodes that were there before the node at hand.
    before: usize,
}

impl Deref for Emit<'_> {
    type Target = Writer;

    fn deref(&self) -> &Writer {
        &self.writer
    }
}

impl DerefMut for Emit<'_> {
    fn deref_mut(&mut self) -> &mut Writer {
        &mut self.writer
    }
}

impl<'a> Emit<'a> {
    pub(super) fn new(graph: &'a Graph, facts: Facts, opset: i64) -> Self {
        Self {
            graph,
            facts,
            writer: Writer::new(Patch::new(graph, "unfused"), opset),
            before: 0,
        }
    }

    /// Begins a node; what is written for it is named after it.
    pub(super) fn begin(&mut self, label: &str) {
        self.patch.name_under(label);
        self.before = self.patch.nodes();
    }

    /// The node is written in full and goes. Gives the operators that stand in its place.
    pub(super) fn commit(&mut self, node: NodeId) -> Vec<String> {
        let written = self.patch.operators_since(self.before);
        self.patch.remove(node);
        written
    }

    pub(super) fn apply(self) -> Result<Graph, OnnxError> {
        self.writer.patch.apply()
    }

    /// The graph as it was.
    pub(super) fn graph(&self) -> &'a Graph {
        self.graph
    }

    /// What is known of a value of the graph as it was.
    pub(super) fn fact(&self, value: ValueId) -> Fact {
        self.facts.get(value)
    }

    /// The dtype of a value, or why a rule cannot go on.
    pub(super) fn dtype(&self, value: ValueId) -> Result<DType, String> {
        self.fact(value)
            .dtype
            .ok_or_else(|| format!("the element type of \"{}\" is not known", self.name(value)))
    }

    /// The number of axes of a value, or why a rule cannot go on.
    pub(super) fn rank(&self, value: ValueId) -> Result<usize, String> {
        self.fact(value).rank.ok_or_else(|| {
            format!(
                "the number of axes of \"{}\" is not known",
                self.name(value)
            )
        })
    }

    pub(super) fn name(&self, value: ValueId) -> &'a str {
        self.graph.name(value)
    }

    /// Output `slot` of the fused node, if anything reads it.
    pub(super) fn wanted(&self, node: &Node, slot: usize) -> Option<ValueId> {
        let value = node.output(slot)?;
        let read = !self.graph.consumers(value).is_empty() || self.graph.is_output(value);
        read.then_some(value)
    }

    /// Refuses a node of which an output is read that has no equal in standard operators.
    pub(super) fn unread(&self, node: &Node, slot: usize, what: &str) -> Result<(), String> {
        match self.wanted(node, slot) {
            Some(_) => Err(format!("its output {slot} ({what}) is read")),
            None => Ok(()),
        }
    }

    /// The fused node's output `made` is the same as `value`.
    pub(super) fn alias(&mut self, made: Option<ValueId>, value: ValueId) {
        if made.is_some() {
            self.end(made, "Identity", &[value]);
        }
    }
}
