//! Edits as values. A patch is built against a graph, and applying it gives a new graph that has passed every check
//! of a loaded one; the old graph stays as it was.
//!
//! ```text
//! tap        v ──┬──▶ readers          a value also becomes an output
//!                └──▶ output
//! shunt      v ─╳    w ──▶ readers     readers of v read w instead
//! intercept  v ──▶ f ──▶ readers       readers of v read f(v)
//! ```
//!
//! Reroutes act in the order in which they were asked for, on the readers that were there by then: of two intercepts of one value, the
//! later one stands nearer to it. A value that a subgraph of a control-flow operator reads cannot be
//! rerouted; that is an error.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::{
    OnnxError,
    attribute::Attribute,
    graph::{Data, Dim, Graph, Initializer, NodeId, Port, TypeFact, ValueId},
    node::Node,
    proto::number_of,
};
use crate::tensor::{DType, Tensor};

/// A node to add.
#[derive(Clone, Debug, Default)]
pub struct NodeSpec<'a> {
    /// Operator type.
    pub op: &'a str,
    /// Operator domain; empty for the standard one.
    pub domain: &'a str,
    /// Inputs in the operator's order.
    pub inputs: Vec<Option<ValueId>>,
    /// Attributes.
    pub attributes: Vec<Attribute>,
    /// Number of outputs.
    pub outputs: usize,
}

/// A set of edits to one graph.
#[derive(Clone, Debug)]
pub struct Patch {
    prefix: String,
    /// The base graph with what is added; not yet checked.
    draft: Graph,
    shunts: Vec<Shunt>,
    removed: HashSet<NodeId>,
    keep_outputs: Option<Vec<ValueId>>,
}

#[derive(Clone, Debug)]
struct Shunt {
    from: ValueId,
    to: ValueId,
    /// Nodes of the patch from this one on go on reading `from`: those that the replacement is made of, and those that
    /// were added after the reroute was asked for.
    before: u32,
}

impl Patch {
    /// An empty patch. `prefix` begins the names of what it adds.
    pub fn new(base: &Graph, prefix: &str) -> Self {
        Self {
            prefix: prefix.to_owned(),
            draft: base.clone(),
            shunts: Vec::new(),
            removed: HashSet::new(),
            keep_outputs: None,
        }
    }

    /// From here on the names of what is added begin with this.
    pub fn name_under(&mut self, prefix: &str) {
        prefix.clone_into(&mut self.prefix);
    }

    /// The graph that the patch edits, with what was added so far.
    pub fn draft(&self) -> &Graph {
        &self.draft
    }

    /// Nodes of the draft, those that are to be removed included.
    pub fn nodes(&self) -> usize {
        self.draft.nodes.len()
    }

    /// Operator types of the nodes that were added since [`Patch::nodes`] said so many.
    pub fn operators_since(&self, before: usize) -> Vec<String> {
        let added = self.draft.nodes.iter().skip(before).flatten();
        added.map(|node| node.op.clone()).collect()
    }

    fn taken(&self, name: &str) -> bool {
        self.draft.index.contains_key(name) || self.draft.inner.contains(name)
    }

    fn fresh(&mut self, hint: &str) -> ValueId {
        let mut at = self.draft.names.len();
        loop {
            let name = format!("{}/{hint}_{at}", self.prefix);
            if !self.taken(&name) {
                return self.draft.intern(&name);
            }
            at += 1;
        }
    }

    /// Adds a node; its outputs are new values.
    pub fn node(&mut self, spec: NodeSpec<'_>) -> Vec<ValueId> {
        let outputs: Vec<ValueId> = (0..spec.outputs).map(|_| self.fresh(spec.op)).collect();
        self.node_making(spec, outputs.iter().copied().map(Some).collect());
        outputs
    }

    /// Adds a node that makes the given values, which must have lost their producer (see [`Patch::remove`]).
    pub fn node_making(&mut self, spec: NodeSpec<'_>, outputs: Vec<Option<ValueId>>) -> NodeId {
        let name = format!("{}/{}_{}", self.prefix, spec.op, self.draft.nodes.len());
        self.draft.nodes.push(Some(Arc::new(Node {
            op: spec.op.to_owned(),
            domain: spec.domain.to_owned(),
            name,
            inputs: spec.inputs,
            outputs,
            implicit: Vec::new(),
            attributes: spec.attributes,
        })));
        NodeId((self.draft.nodes.len() - 1) as u32)
    }

    /// Puts a node in the place of another; it makes the same values.
    pub fn replace(&mut self, node: NodeId, spec: NodeSpec<'_>) -> NodeId {
        let outputs = self.draft.node(node).outputs.clone();
        self.remove(node);
        self.node_making(spec, outputs)
    }

    /// Lets a node make outputs that it left out, up to so many; all of them, in its order.
    pub fn with_outputs(&mut self, node: NodeId, count: usize) -> Vec<ValueId> {
        let mut made = self.draft.node(node).clone();
        made.outputs.resize(count.max(made.outputs.len()), None);
        for slot in 0..made.outputs.len() {
            if made.outputs[slot].is_none() {
                made.outputs[slot] = Some(self.fresh(&made.op));
            }
        }
        let outputs = made.outputs.iter().flatten().copied().collect();
        self.draft.nodes[node.0 as usize] = Some(Arc::new(made));
        outputs
    }

    /// Adds a standard node with one output.
    pub fn op(&mut self, op: &str, inputs: &[ValueId], attributes: Vec<Attribute>) -> ValueId {
        self.node(NodeSpec {
            op,
            inputs: inputs.iter().copied().map(Some).collect(),
            attributes,
            outputs: 1,
            ..NodeSpec::default()
        })[0]
    }

    /// Adds a weight.
    pub fn constant(&mut self, hint: &str, tensor: &Tensor) -> ValueId {
        let value = self.fresh(hint);
        let weight = Initializer {
            element: number_of(tensor.dtype()),
            dims: tensor.shape().to_vec(),
            data: Data::Dense {
                bytes: tensor.bytes().clone(),
                origin: None,
            },
        };
        self.draft.initializers.insert(value, Arc::new(weight));
        value
    }

    /// Adds a constant list of integers.
    pub fn ints(&mut self, values: &[i64]) -> ValueId {
        let tensor = Tensor::from_i64(vec![values.len()], values)
            .expect("a list has the length of its shape");
        self.constant("ints", &tensor)
    }

    /// Adds a float constant without axes.
    pub fn scalar(&mut self, value: f32) -> ValueId {
        let tensor = Tensor::from_f32(vec![], &[value]).expect("one element for a scalar");
        self.constant("scalar", &tensor)
    }

    /// Adds an input under a name that must be new.
    pub fn input(
        &mut self,
        name: &str,
        dtype: DType,
        dims: Vec<Dim>,
    ) -> Result<ValueId, OnnxError> {
        let value = self.new_name(name)?;
        let fact = Some(TypeFact {
            element: number_of(dtype),
            dtype: Some(dtype),
            dims: Some(dims),
        });
        self.draft.inputs.push(Port { value, fact });
        Ok(value)
    }

    /// Makes a value an output under a name that must be new; answers with the output.
    pub fn tap(&mut self, value: ValueId, name: &str) -> Result<ValueId, OnnxError> {
        let output = self.new_name(name)?;
        self.node_making(
            NodeSpec {
                op: "Identity",
                inputs: vec![Some(value)],
                ..NodeSpec::default()
            },
            vec![Some(output)],
        );
        let fact = self.draft.declared.get(&value).cloned();
        self.draft.outputs.push(Port {
            value: output,
            fact,
        });
        Ok(output)
    }

    /// Makes a value an output under its own name, if it is none yet.
    pub fn output(&mut self, value: ValueId) {
        if !self.draft.is_output(value) {
            let fact = self.draft.declared.get(&value).cloned();
            self.draft.outputs.push(Port { value, fact });
        }
    }

    fn new_name(&mut self, name: &str) -> Result<ValueId, OnnxError> {
        if name.is_empty() || self.taken(name) {
            return Err(OnnxError::patch(format!(
                "the name \"{name}\" is in use already"
            )));
        }
        Ok(self.draft.intern(name))
    }

    /// Every reader of `from`, and an output under it, reads `to` instead. An output keeps its name.
    pub fn shunt(&mut self, from: ValueId, to: ValueId) {
        let before = self.draft.nodes.len() as u32;
        self.shunts.push(Shunt { from, to, before });
    }

    /// Puts `f` between a value and its readers. What `f` adds goes on reading the value itself.
    pub fn intercept(&mut self, value: ValueId, f: impl FnOnce(&mut Patch, ValueId) -> ValueId) {
        let before = self.draft.nodes.len() as u32;
        let to = f(self, value);
        self.shunts.push(Shunt {
            from: value,
            to,
            before,
        });
    }

    /// Takes a node out; what it made must be made anew or read no more.
    pub fn remove(&mut self, node: NodeId) {
        self.removed.insert(node);
    }

    /// Keeps these outputs only, and prunes every node that none of them needs.
    pub fn keep_outputs(&mut self, values: &[ValueId]) {
        self.keep_outputs = Some(values.to_vec());
    }

    /// Makes the new graph.
    pub fn apply(mut self) -> Result<Graph, OnnxError> {
        self.known()?;
        for node in &self.removed {
            self.draft.nodes[node.0 as usize] = None;
        }
        let shunts = std::mem::take(&mut self.shunts);
        let mut readers = if shunts.is_empty() {
            HashMap::new()
        } else {
            self.readers()
        };
        let added = self.draft.nodes.len() as u32;
        for shunt in shunts.iter().filter(|s| s.from != s.to) {
            self.reroute(shunt, added, &mut readers)?;
        }
        if let Some(keep) = &self.keep_outputs {
            let keep: HashSet<ValueId> = keep.iter().copied().collect();
            self.draft.outputs.retain(|p| keep.contains(&p.value));
            if self.draft.outputs.is_empty() {
                return Err(OnnxError::patch("no output would be left"));
            }
        }
        let prune = self.keep_outputs.is_some() || !self.removed.is_empty();
        let graph = self.draft.finish()?;
        if prune { pruned(graph) } else { Ok(graph) }
    }

    /// Every id that the patch uses is one of its graph, and every output to keep is one.
    fn known(&self) -> Result<(), OnnxError> {
        let values = self.draft.names.len();
        let of_nodes = self.draft.nodes.iter().flatten().flat_map(|n| {
            let made = n.outputs.iter().flatten().copied();
            n.reads().chain(made)
        });
        let of_outputs = self.draft.outputs.iter().map(|p| p.value);
        let of_shunts = self.shunts.iter().flat_map(|s| [s.from, s.to]);
        let strange = |v: ValueId| v.index() >= values;
        if of_nodes.chain(of_outputs).chain(of_shunts).any(strange) {
            return Err(OnnxError::patch("it uses a value of another graph"));
        }
        let there = |n: &NodeId| matches!(self.draft.nodes.get(n.0 as usize), Some(Some(_)));
        if !self.removed.iter().all(there) {
            return Err(OnnxError::patch("it removes a node that is not there"));
        }
        for value in self.keep_outputs.iter().flatten() {
            // A shunt gives an output's name to another value; before that it is still the one that was asked for.
            if strange(*value) || !self.draft.is_output(*value) {
                let name = self.draft.names.get(value.index());
                let name = name.map_or("?", |n| n);
                return Err(OnnxError::patch(format!("\"{name}\" is no output to keep")));
            }
        }
        Ok(())
    }

    /// The nodes that read each value.
    fn readers(&self) -> HashMap<ValueId, Vec<u32>> {
        let mut readers: HashMap<ValueId, Vec<u32>> = HashMap::new();
        for (at, node) in self.draft.nodes.iter().enumerate() {
            for value in node.iter().flat_map(|n| n.reads()) {
                readers.entry(value).or_default().push(at as u32);
            }
        }
        readers
    }

    fn reroute(
        &mut self,
        shunt: &Shunt,
        added: u32,
        readers: &mut HashMap<ValueId, Vec<u32>>,
    ) -> Result<(), OnnxError> {
        let Shunt { from, to, before } = shunt;
        let all = readers.remove(from).unwrap_or_default();
        let (stay, moved): (Vec<u32>, Vec<u32>) =
            all.iter().partition(|n| (*before..added).contains(n));
        for at in &moved {
            let Some(node) = &mut self.draft.nodes[*at as usize] else {
                continue;
            };
            if node.implicit.contains(from) {
                return Err(OnnxError::patch(format!(
                    "\"{}\" is read inside a subgraph of node \"{}\"",
                    self.draft.names[from.index()],
                    node.label()
                )));
            }
            for input in &mut Arc::make_mut(node).inputs {
                if *input == Some(*from) {
                    *input = Some(*to);
                }
            }
        }
        readers.insert(*from, stay);
        readers.entry(*to).or_default().extend(moved);
        if self.draft.is_output(*from) {
            let identity = self.rename_output(*from, *to)?;
            readers.entry(*to).or_default().push(identity.0);
        }
        Ok(())
    }

    /// An output keeps its name: the value that had it takes another, and an `Identity` brings the new value under the old name.
    fn rename_output(&mut self, from: ValueId, to: ValueId) -> Result<NodeId, OnnxError> {
        let name = self.draft.names[from.index()].clone();
        let given = self.draft.inputs.iter().any(|p| p.value == from)
            || self.draft.initializers.contains_key(&from)
            || self.draft.sparse.contains_key(&from);
        if given {
            return Err(OnnxError::patch(format!(
                "\"{name}\" is an input or a weight and an output at once"
            )));
        }
        let inner = self.fresh("inner");
        let inner_name = self.draft.names[inner.index()].clone();
        // The two ids change names; every reader and producer holds ids.
        self.draft.names[from.index()] = inner_name.clone();
        self.draft.names[inner.index()] = name.clone();
        self.draft.index.insert(inner_name, from);
        self.draft.index.insert(name, inner);
        for port in &mut self.draft.outputs {
            if port.value == from {
                port.value = inner;
            }
        }
        for kept in self.keep_outputs.iter_mut().flatten() {
            if *kept == from {
                *kept = inner;
            }
        }
        let spec = NodeSpec {
            op: "Identity",
            inputs: vec![Some(to)],
            ..NodeSpec::default()
        };
        Ok(self.node_making(spec, vec![Some(inner)]))
    }
}

/// The graph without nodes and weights that no output needs. Inputs stay, for they are the contract with the caller; those that
/// only give a weight that goes are no part of it.
fn pruned(mut graph: Graph) -> Result<Graph, OnnxError> {
    let mut needed: HashSet<ValueId> = graph.outputs.iter().map(|p| p.value).collect();
    let mut kept = vec![false; graph.nodes.len()];
    for (id, node) in graph.nodes().rev() {
        if node.outputs.iter().flatten().any(|v| needed.contains(v)) {
            needed.extend(node.reads());
            kept[id.0 as usize] = true;
        }
    }
    for (node, kept) in graph.nodes.iter_mut().zip(kept) {
        if !kept {
            *node = None;
        }
    }
    let (initializers, sparse) = (&graph.initializers, &graph.sparse);
    graph.inputs.retain(|p| {
        let optional = initializers.contains_key(&p.value) || sparse.contains_key(&p.value);
        !optional || needed.contains(&p.value)
    });
    graph.initializers.retain(|v, _| needed.contains(v));
    graph.sparse.retain(|v, _| needed.contains(v));
    graph.finish()
}

#[cfg(test)]
mod tests {
    use super::{
        super::build::{diamond, model, read},
        *,
    };

    fn ops(g: &Graph) -> Vec<String> {
        g.nodes().map(|(_, n)| n.op.clone()).collect()
    }

    #[test]
    fn an_empty_patch_changes_nothing() {
        let m = diamond();
        let g = Patch::new(&m.graph, "p").apply().unwrap();
        assert_eq!(g.dump(), m.graph.dump());
    }

    #[test]
    fn a_tap_adds_an_output_and_leaves_the_rest() {
        let m = diamond();
        let mut p = Patch::new(&m.graph, "p");
        p.tap(m.graph.value("a").unwrap(), "seen").unwrap();
        let g = p.apply().unwrap();
        assert_eq!(g.outputs().len(), 2);
        assert_eq!(g.name(g.outputs()[1].value), "seen");
        assert_eq!(m.graph.outputs().len(), 1, "the base is as it was");
    }

    #[test]
    fn a_tap_under_a_name_in_use_is_refused() {
        let m = diamond();
        let mut p = Patch::new(&m.graph, "p");
        assert!(p.tap(m.graph.value("a").unwrap(), "b").is_err());
    }

    #[test]
    fn an_intercept_stands_between_a_value_and_its_readers() {
        let m = diamond();
        let mut p = Patch::new(&m.graph, "p");
        p.intercept(m.graph.value("a").unwrap(), |p, v| {
            p.op("Neg", &[v], vec![])
        });
        let g = p.apply().unwrap();
        let add = g.nodes().find(|(_, n)| n.op == "Add").unwrap().1;
        let left = g.producer(add.input(0).unwrap()).unwrap();
        assert_eq!(g.node(left).op, "Neg");
        assert_eq!(ops(&g).len(), 4);
    }

    #[test]
    fn an_intercepted_output_keeps_its_name() {
        let m = diamond();
        let mut p = Patch::new(&m.graph, "p");
        p.intercept(m.graph.value("y").unwrap(), |p, v| {
            p.op("Neg", &[v], vec![])
        });
        let g = p.apply().unwrap();
        assert_eq!(g.name(g.outputs()[0].value), "y");
        let identity = g.node(g.producer(g.outputs()[0].value).unwrap());
        assert_eq!(identity.op, "Identity");
        let neg = g.node(g.producer(identity.input(0).unwrap()).unwrap());
        assert_eq!(neg.op, "Neg");
    }

    #[test]
    fn early_exit_prunes_what_is_not_needed() {
        let m = diamond();
        let mut p = Patch::new(&m.graph, "p");
        let a = m.graph.value("a").unwrap();
        p.output(a);
        p.keep_outputs(&[a]);
        assert_eq!(ops(&p.apply().unwrap()), ["Relu"]);
    }

    #[test]
    fn a_shunt_that_makes_a_cycle_is_refused() {
        let m = read(&model(&["x"], "a = Relu x\nb = Tanh a\ny = Neg b", &["y"])).unwrap();
        let mut p = Patch::new(&m.graph, "p");
        p.shunt(m.graph.value("x").unwrap(), m.graph.value("b").unwrap());
        assert!(p.apply().unwrap_err().to_string().contains("cycle"));
    }
}
