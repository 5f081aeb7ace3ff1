//! The graph: values, nodes, who makes and who reads what. Immutable once built.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use bytes::Bytes;

use super::{
    OnnxError,
    node::Node,
    proto::{TensorProto, dtype_of},
};
use crate::tensor::{DType, Tensor};

/// A value of a graph. Stays valid in the graphs that patches make of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub(super) u32);

impl ValueId {
    /// A dense number, for tables over the values of a graph.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A node of a graph. Stays valid in the graphs that patches make of it, unless the patch removed the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(super) u32);

/// One extent of a declared shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dim {
    /// A number.
    Fixed(i64),
    /// A symbol, equal wherever the name is equal.
    Named(String),
    /// Nothing is said.
    Unknown,
}

/// What a file declares about a value. A hint: files may lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypeFact {
    /// ONNX number of the element type.
    pub element: i32,
    /// Element type, where it is one of ours.
    pub dtype: Option<DType>,
    /// Extents, where the rank is known.
    pub dims: Option<Vec<Dim>>,
}

/// An input or output of the graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The value.
    pub value: ValueId,
    /// Its declared type; `None` for sequences, maps and undeclared outputs.
    pub fact: Option<TypeFact>,
}

impl Port {
    /// Declared element type.
    pub fn dtype(&self) -> Option<DType> {
        self.fact.as_ref()?.dtype
    }

    /// Declared extents.
    pub fn dims(&self) -> Option<&[Dim]> {
        self.fact.as_ref()?.dims.as_deref()
    }
}

/// Where the bytes of a weight stand in a file of the model's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// File name relative to the folder.
    pub file: Arc<str>,
    /// First byte.
    pub offset: u64,
}

/// A constant that the file carries.
#[derive(Clone, Debug, PartialEq)]
pub struct Initializer {
    pub(super) element: i32,
    pub(super) dims: Vec<usize>,
    pub(super) data: Data,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Data {
    /// Little-endian row-major elements.
    Dense {
        bytes: Bytes,
        origin: Option<Origin>,
    },
    /// Strings and packed kinds, passed on as they are.
    Opaque(Arc<TensorProto>),
}

impl Initializer {
    /// Element type, where it is one of ours.
    pub fn dtype(&self) -> Option<DType> {
        dtype_of(self.element)
    }

    /// Extents.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// The weight as a tensor, without copying; `None` for element types that we only pass on.
    pub fn tensor(&self) -> Option<Tensor> {
        match &self.data {
            Data::Dense { bytes, .. } => {
                Tensor::new(self.dtype()?, self.dims.clone(), bytes.clone()).ok()
            }
            Data::Opaque(_) => None,
        }
    }

    /// Where the bytes stand in a file, if they do.
    pub fn origin(&self) -> Option<&Origin> {
        match &self.data {
            Data::Dense { origin, .. } => origin.as_ref(),
            Data::Opaque(_) => None,
        }
    }
}

/// A graph whose invariants hold: value names are unique, every value that is read is made once, no cycle, and
/// [`Graph::nodes`] runs in topological order.
#[derive(Clone, Debug)]
pub struct Graph {
    pub(super) name: String,
    pub(super) names: Vec<Arc<str>>,
    pub(super) index: HashMap<Arc<str>, ValueId>,
    /// By id; `None` where a patch removed the node.
    pub(super) nodes: Vec<Option<Arc<Node>>>,
    pub(super) inputs: Vec<Port>,
    pub(super) outputs: Vec<Port>,
    pub(super) initializers: HashMap<ValueId, Arc<Initializer>>,
    pub(super) sparse: Vec<Arc<super::proto::SparseTensorProto>>,
    pub(super) declared: HashMap<ValueId, TypeFact>,
    // Derived by `finish`:
    order: Vec<NodeId>,
    producers: Vec<Option<NodeId>>,
    consumers: Vec<Vec<(NodeId, usize)>>,
}

impl Graph {
    pub(super) fn empty(name: String) -> Self {
        Self {
            name,
            names: Vec::new(),
            index: HashMap::new(),
            nodes: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            initializers: HashMap::new(),
            sparse: Vec::new(),
            declared: HashMap::new(),
            order: Vec::new(),
            producers: Vec::new(),
            consumers: Vec::new(),
        }
    }

    /// The id of a name, made when it is new.
    pub(super) fn intern(&mut self, name: &str) -> ValueId {
        if let Some(id) = self.index.get(name) {
            return *id;
        }
        let id = ValueId(u32::try_from(self.names.len()).expect("the scan bounds the names"));
        let name: Arc<str> = name.into();
        self.names.push(name.clone());
        self.index.insert(name, id);
        id
    }

    /// Checks the invariants and derives producers, consumers and order.
    pub(super) fn finish(mut self) -> Result<Self, OnnxError> {
        let count = self.names.len();
        self.producers = vec![None; count];
        self.consumers = vec![Vec::new(); count];
        let mut given: Vec<bool> = vec![false; count];
        for port in &self.inputs {
            if std::mem::replace(&mut given[port.value.0 as usize], true) {
                return Err(self.invalid(port.value, "is an input twice"));
            }
        }
        // An initializer may give an input its default; anything else named twice is an error.
        for value in self.initializers.keys() {
            given[value.0 as usize] = true;
        }
        for tensor in &self.sparse {
            let name = tensor.values.as_ref().map_or("", |v| &v.name);
            if let Some(value) = self.index.get(name) {
                given[value.0 as usize] = true;
            }
        }
        for (at, node) in self.nodes.iter().enumerate() {
            let Some(node) = node else { continue };
            let id = NodeId(at as u32);
            for value in node.outputs.iter().flatten() {
                let slot = &mut self.producers[value.0 as usize];
                if slot.is_some() || given[value.0 as usize] {
                    return Err(self.invalid(*value, "is made twice"));
                }
                *slot = Some(id);
            }
            for (slot, value) in node.inputs.iter().enumerate() {
                if let Some(value) = value {
                    self.consumers[value.0 as usize].push((id, slot));
                }
            }
            for (extra, value) in node.implicit.iter().enumerate() {
                self.consumers[value.0 as usize].push((id, node.inputs.len() + extra));
            }
        }
        for (at, readers) in self.consumers.iter().enumerate() {
            if let Some((reader, _)) = readers.first()
                && !given[at]
                && self.producers[at].is_none()
            {
                let node = self.node(*reader).label();
                return Err(OnnxError::invalid(
                    format!("node \"{node}\""),
                    format!("reads \"{}\", which nothing makes", self.names[at]),
                ));
            }
        }
        for port in &self.outputs {
            if !given[port.value.0 as usize] && self.producers[port.value.0 as usize].is_none() {
                return Err(self.invalid(port.value, "is an output that nothing makes"));
            }
        }
        self.order = self.topological()?;
        Ok(self)
    }

    fn invalid(&self, value: ValueId, why: &str) -> OnnxError {
        OnnxError::invalid(format!("value \"{}\"", self.name(value)), why)
    }

    /// Kahn's algorithm, taking nodes in the order of the file wherever it is free to choose, so that order is a
    /// function of the file.
    fn topological(&self) -> Result<Vec<NodeId>, OnnxError> {
        let mut waits: Vec<usize> = vec![0; self.nodes.len()];
        let mut ready = BTreeSet::new();
        let mut present = 0;
        for (at, node) in self.nodes.iter().enumerate() {
            let Some(node) = node else { continue };
            present += 1;
            waits[at] = node
                .reads()
                .filter(|v| self.producers[v.0 as usize].is_some())
                .count();
            if waits[at] == 0 {
                ready.insert(NodeId(at as u32));
            }
        }
        let mut order = Vec::with_capacity(present);
        while let Some(id) = ready.pop_first() {
            order.push(id);
            for value in self.node(id).outputs.iter().flatten() {
                for (reader, _) in &self.consumers[value.0 as usize] {
                    let left = &mut waits[reader.0 as usize];
                    *left -= 1;
                    if *left == 0 {
                        ready.insert(*reader);
                    }
                }
            }
        }
        if order.len() < present {
            let stuck = (0..self.nodes.len())
                .find(|at| waits[*at] > 0)
                .map_or_else(String::new, |at| self.node(NodeId(at as u32)).label());
            return Err(OnnxError::invalid(
                format!("node \"{stuck}\""),
                "is part of a cycle",
            ));
        }
        Ok(order)
    }

    /// Name of the graph in the file.
    pub fn graph_name(&self) -> &str {
        &self.name
    }

    /// Nodes in topological order.
    pub fn nodes(&self) -> impl DoubleEndedIterator<Item = (NodeId, &Node)> + '_ {
        self.order.iter().map(|id| (*id, self.node(*id)))
    }

    /// Number of nodes.
    pub fn node_count(&self) -> usize {
        self.order.len()
    }

    /// A node of this graph.
    ///
    /// # Panics
    /// When the id comes from another graph, or a patch removed the node.
    pub fn node(&self, id: NodeId) -> &Node {
        self.nodes[id.0 as usize]
            .as_deref()
            .expect("a node id is used with the graph that it came from")
    }

    /// The value of this name.
    pub fn value(&self, name: &str) -> Option<ValueId> {
        self.index.get(name).copied()
    }

    /// Name of a value; unique in the graph.
    pub fn name(&self, value: ValueId) -> &str {
        &self.names[value.0 as usize]
    }

    /// Every value that the graph has or had before a patch.
    pub fn values(&self) -> impl Iterator<Item = ValueId> + use<> {
        (0..self.names.len() as u32).map(ValueId)
    }

    /// The node that makes a value; `None` for inputs and initializers.
    pub fn producer(&self, value: ValueId) -> Option<NodeId> {
        self.producers[value.0 as usize]
    }

    /// The nodes that read a value, each with the input slot; slots past a node's inputs stand for its subgraphs.
    pub fn consumers(&self, value: ValueId) -> &[(NodeId, usize)] {
        &self.consumers[value.0 as usize]
    }

    /// Inputs that a caller must give: those without a default.
    pub fn inputs(&self) -> impl Iterator<Item = &Port> + '_ {
        self.inputs
            .iter()
            .filter(|p| !self.initializers.contains_key(&p.value))
    }

    /// Outputs in order.
    pub fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    /// Whether a value is an output.
    pub fn is_output(&self, value: ValueId) -> bool {
        self.outputs.iter().any(|p| p.value == value)
    }

    /// The weight that a value is.
    pub fn initializer(&self, value: ValueId) -> Option<&Initializer> {
        self.initializers.get(&value).map(Arc::as_ref)
    }

    /// All weights, by name.
    pub fn initializers(&self) -> impl Iterator<Item = (&str, &Initializer)> + '_ {
        self.initializers
            .iter()
            .map(|(v, i)| (self.name(*v), i.as_ref()))
    }

    /// What the file declares about a value. A hint.
    pub fn declared(&self, value: ValueId) -> Option<&TypeFact> {
        self.declared.get(&value)
    }

    /// Nodes whose integer division may meet a zero that a request brings: a fault that can end the process.
    pub fn integer_divisions(&self) -> Vec<NodeId> {
        self.nodes()
            .filter(|(_, n)| n.is_any(&["Div", "Mod"]))
            .filter(|(_, n)| {
                n.input(1).is_some_and(|d| {
                    // A constant divisor is checked by the runtime when it loads; a float one cannot trap.
                    let float = self
                        .declared(d)
                        .and_then(|f| f.dtype)
                        .is_some_and(DType::is_float);
                    self.constant(d).is_none() && !float
                })
            })
            .map(|(id, _)| id)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::build::{diamond, model, read};

    #[test]
    fn producers_and_consumers_of_a_diamond() {
        let m = diamond();
        let g = &m.graph;
        let v = |n: &str| g.value(n).unwrap();
        assert_eq!(g.consumers(v("x")).len(), 2);
        assert_eq!(g.node(g.producer(v("y")).unwrap()).op, "Add");
        assert_eq!(g.consumers(v("y")).len(), 0);
        assert!(g.is_output(v("y")));
    }

    #[test]
    fn a_file_in_non_topological_order_is_put_in_order() {
        let m = read(&model(&["x"], "y = Tanh a\na = Relu x", &["y"])).unwrap();
        let ops: Vec<_> = m.graph.nodes().map(|(_, n)| n.op.clone()).collect();
        assert_eq!(ops, ["Relu", "Tanh"]);
    }

    #[test]
    fn broken_graphs_are_refused_with_the_place() {
        for (nodes, outputs, said) in [
            ("a = Add x b\nb = Relu a", "b", "cycle"),
            ("a = Relu missing", "a", "nothing makes"),
            ("a = Relu x\na = Tanh x", "a", "made twice"),
            ("x = Relu x", "x", "made twice"),
            ("a = Relu x", "z", "nothing makes"),
        ] {
            let got = read(&model(&["x"], nodes, &[outputs])).unwrap_err();
            assert!(got.to_string().contains(said), "{nodes}: {got}");
        }
        let twice = read(&model(&["x", "x"], "a = Relu x", &["a"])).unwrap_err();
        assert!(twice.to_string().contains("input twice"), "{twice}");
    }

    #[test]
    fn an_impossible_operator_set_is_refused() {
        let mut m = model(&["x"], "a = Relu x", &["a"]);
        m.opset_import[0].version = 9999;
        assert!(
            read(&m)
                .unwrap_err()
                .to_string()
                .contains("export the model again")
        );
    }
}
