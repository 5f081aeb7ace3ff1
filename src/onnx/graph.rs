//! The graph: values, nodes, who makes and who reads what. Immutable once built.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashMap, HashSet},
    sync::Arc,
};

use bytes::Bytes;

use super::{
    OnnxError,
    node::Node,
    proto::{SparseTensorProto, TensorProto, TypeProto, dtype_of},
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

/// Where the bytes of a weight stand in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Path relative to [`super::Model::weights_folder`].
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
    pub(super) sparse: BTreeMap<ValueId, Arc<SparseTensorProto>>,
    pub(super) declared: HashMap<ValueId, TypeFact>,
    /// Declared types that are no tensors.
    pub(super) other_types: HashMap<ValueId, Arc<TypeProto>>,
    /// Names of values inside subgraphs; a new value must not take one.
    pub(super) inner: Arc<HashSet<Arc<str>>>,
    // Derived by `finish`:
    order: Vec<NodeId>,
    producers: Vec<Option<NodeId>>,
    /// Readers of all values in one list, and where those of each value begin in it.
    readers: Vec<(NodeId, usize)>,
    readers_from: Vec<u32>,
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
            sparse: BTreeMap::new(),
            declared: HashMap::new(),
            other_types: HashMap::new(),
            inner: Arc::default(),
            order: Vec::new(),
            producers: Vec::new(),
            readers: Vec::new(),
            readers_from: Vec::new(),
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
        let mut given: Vec<bool> = vec![false; count];
        for port in &self.inputs {
            if std::mem::replace(&mut given[port.value.index()], true) {
                return Err(self.invalid(port.value, "is an input twice"));
            }
        }
        // An initializer may give an input its default; anything else named twice is an error.
        for value in self.initializers.keys().chain(self.sparse.keys()) {
            given[value.index()] = true;
        }
        self.producers = vec![None; count];
        for (at, node) in self.nodes.iter().enumerate() {
            let Some(node) = node else { continue };
            for value in node.outputs.iter().flatten() {
                let slot = &mut self.producers[value.index()];
                if slot.is_some() || given[value.index()] {
                    return Err(self.invalid(*value, "is made twice"));
                }
                *slot = Some(NodeId(at as u32));
            }
        }
        self.index_readers();
        for (at, there) in given.iter().enumerate() {
            if *there || self.producers[at].is_some() {
                continue;
            }
            if let Some((reader, _)) = self.consumers(ValueId(at as u32)).first() {
                let why = format!("reads \"{}\", which nothing makes", self.names[at]);
                return Err(OnnxError::invalid(self.place(*reader), why));
            }
        }
        for port in &self.outputs {
            if !given[port.value.index()] && self.producers[port.value.index()].is_none() {
                return Err(self.invalid(port.value, "is an output that nothing makes"));
            }
        }
        self.order = self.topological()?;
        Ok(self)
    }

    /// Every read of a value, with its node and slot; slots past a node's inputs stand for its subgraphs.
    fn reads(&self) -> impl Iterator<Item = (ValueId, NodeId, usize)> + '_ {
        let nodes = self.nodes.iter().enumerate();
        nodes.flat_map(|(at, node)| {
            let reads = node.iter().flat_map(|n| {
                let inputs = n.inputs.iter().copied();
                let slots = inputs.chain(n.implicit.iter().copied().map(Some));
                slots.enumerate()
            });
            reads.filter_map(move |(slot, value)| Some((value?, NodeId(at as u32), slot)))
        })
    }

    fn index_readers(&mut self) {
        let mut from = vec![0u32; self.names.len() + 1];
        for (value, _, _) in self.reads() {
            from[value.index() + 1] += 1;
        }
        for at in 1..from.len() {
            from[at] += from[at - 1];
        }
        let mut next = from.clone();
        let mut readers = vec![(NodeId(0), 0); from.last().map_or(0, |n| *n as usize)];
        for (value, node, slot) in self.reads() {
            let place = &mut next[value.index()];
            readers[*place as usize] = (node, slot);
            *place += 1;
        }
        (self.readers, self.readers_from) = (readers, from);
    }

    fn invalid(&self, value: ValueId, why: &str) -> OnnxError {
        OnnxError::invalid(format!("value \"{}\"", self.name(value)), why)
    }

    /// A node in an error: by its name, or by what it makes when it has none.
    fn place(&self, id: NodeId) -> String {
        let node = self.node(id);
        match node.outputs.iter().flatten().next() {
            Some(made) if node.name.is_empty() => {
                format!("node \"{} of {}\"", node.op, self.name(*made))
            }
            _ => format!("node \"{}\"", node.label()),
        }
    }

    /// Kahn's algorithm, taking nodes in the order of the file wherever it is free to choose, so that order is a
    /// function of the file.
    fn topological(&self) -> Result<Vec<NodeId>, OnnxError> {
        let mut waits: Vec<usize> = vec![0; self.nodes.len()];
        let mut ready = BinaryHeap::new();
        let mut present = 0;
        let made = |v: &ValueId| self.producers[v.index()];
        for (at, node) in self.nodes.iter().enumerate() {
            let Some(node) = node else { continue };
            present += 1;
            waits[at] = node.reads().filter(|v| made(v).is_some()).count();
            if waits[at] == 0 {
                ready.push(Reverse(NodeId(at as u32)));
            }
        }
        let mut order = Vec::with_capacity(present);
        while let Some(Reverse(id)) = ready.pop() {
            order.push(id);
            for value in self.node(id).outputs.iter().flatten() {
                for (reader, _) in self.consumers(*value) {
                    let left = &mut waits[reader.0 as usize];
                    *left -= 1;
                    if *left == 0 {
                        ready.push(Reverse(*reader));
                    }
                }
            }
        }
        if order.len() == present {
            return Ok(order);
        }
        // Every node that waits has a maker that waits: going back as many steps as there are nodes ends on the cycle.
        let waiting = |id: &NodeId| waits[id.0 as usize] > 0;
        let mut at = (0..self.nodes.len() as u32).map(NodeId).find(waiting);
        for _ in 0..self.nodes.len() {
            let maker = |id: NodeId| self.node(id).reads().filter_map(|v| made(&v)).find(waiting);
            at = at.and_then(maker);
        }
        let place = at.map_or_else(|| "graph".to_owned(), |id| self.place(id));
        Err(OnnxError::invalid(place, "is part of a cycle"))
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
    pub fn values(&self) -> impl ExactSizeIterator<Item = ValueId> + use<> {
        (0..self.names.len() as u32).map(ValueId)
    }

    /// The node that makes a value; `None` for inputs and initializers.
    pub fn producer(&self, value: ValueId) -> Option<NodeId> {
        self.producers[value.0 as usize]
    }

    /// The nodes that read a value, each with the input slot; slots past a node's inputs stand for its subgraphs.
    pub fn consumers(&self, value: ValueId) -> &[(NodeId, usize)] {
        let at = value.index();
        &self.readers[self.readers_from[at] as usize..self.readers_from[at + 1] as usize]
    }

    /// Inputs that a caller must give: those without a default.
    pub fn inputs(&self) -> impl Iterator<Item = &Port> + '_ {
        self.inputs.iter().filter(|p| {
            !self.initializers.contains_key(&p.value) && !self.sparse.contains_key(&p.value)
        })
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
