//! Data flow from the embedding to the output, and who dominates whom on it.
//!
//! `Shape` and `Size` carry no data, nor does the range that values are quantised by, so masks, position ids and rotary tables do not count as flowing from the
//! embedding. A value *dominates* another when every path from the start to the other passes it, and
//! *post-dominates* it when every path from the other to the output does. The graph is acyclic and its nodes are in
//! topological order, so both trees come out of one sweep each (the simple algorithm of Cooper, Harvey and Kennedy
//! needs no iteration there).

use crate::onnx::{Graph, Node, NodeId, ValueId};

/// Data flow of one graph between a start value and an output value.
pub(super) struct Flow<'g> {
    graph: &'g Graph,
    start: ValueId,
    output: ValueId,
    live: Vec<bool>,
    foreign: Vec<bool>,
    towards: Vec<bool>,
    order: Vec<u32>,
    dominators: Tree,
    post_dominators: Tree,
}

/// A dominator tree over values: parent and depth, indexed by value.
struct Tree {
    parent: Vec<Option<ValueId>>,
    depth: Vec<u32>,
}

impl Tree {
    fn new(values: usize) -> Self {
        Tree {
            parent: vec![None; values],
            depth: vec![0; values],
        }
    }

    fn attach(&mut self, value: ValueId, parent: ValueId) {
        self.parent[value.index()] = Some(parent);
        self.depth[value.index()] = self.depth[parent.index()] + 1;
    }

    /// The nearest common ancestor; both must hang on the same root.
    fn common(&self, mut a: ValueId, mut b: ValueId) -> ValueId {
        while a != b {
            if self.depth[a.index()] < self.depth[b.index()] {
                std::mem::swap(&mut a, &mut b);
            }
            match self.parent[a.index()] {
                Some(up) => a = up,
                None => return a,
            }
        }
        a
    }

    fn is_ancestor(&self, a: ValueId, mut b: ValueId) -> bool {
        while self.depth[b.index()] > self.depth[a.index()] {
            match self.parent[b.index()] {
                Some(up) => b = up,
                None => return false,
            }
        }
        a == b
    }
}

/// Whether a node passes no data on, only sizes.
fn carries_no_data(node: &Node) -> bool {
    node.is("Shape") || node.is("Size")
}

/// Whether an output of a node is the range that its data were quantised by, not the data. Products of quantised values are scaled by
/// it, as floats are by a constant.
fn is_range(node: &Node, place: usize) -> bool {
    node.is("DynamicQuantizeLinear") && place > 0
}

impl<'g> Flow<'g> {
    /// The flow from `start` to `output`; nothing when no data flows there.
    pub(super) fn new(graph: &'g Graph, start: ValueId, output: ValueId) -> Option<Self> {
        let values = graph.values().map(|v| v.index() + 1).max().unwrap_or(0);
        let mut order = vec![0; values];
        let mut live = vec![false; values];
        let mut dominators = Tree::new(values);
        live[start.index()] = true;
        for (at, (_, node)) in (1u32..).zip(graph.nodes()) {
            let mut parent: Option<ValueId> = None;
            if !carries_no_data(node) {
                for v in node.reads().filter(|v| live[v.index()]) {
                    parent = Some(parent.map_or(v, |p| dominators.common(p, v)));
                }
            }
            for (place, v) in node.outputs.iter().enumerate() {
                let Some(v) = v else { continue };
                order[v.index()] = at;
                if *v != start
                    && !is_range(node, place)
                    && let Some(parent) = parent
                {
                    live[v.index()] = true;
                    dominators.attach(*v, parent);
                }
            }
        }
        if !live[output.index()] {
            return None;
        }
        let (towards, post_dominators) = backwards(graph, &live, output, values);
        Some(Flow {
            graph,
            start,
            output,
            live,
            foreign: foreign(graph, values),
            towards,
            order,
            dominators,
            post_dominators,
        })
    }

    /// Where the flow begins.
    pub(super) fn start(&self) -> ValueId {
        self.start
    }

    /// Where the flow ends.
    pub(super) fn output(&self) -> ValueId {
        self.output
    }

    /// How many values lie on the way.
    pub(super) fn size(&self) -> usize {
        self.live
            .iter()
            .zip(&self.towards)
            .filter(|(l, t)| **l && **t)
            .count()
    }

    /// Whether a value that data of the start does not reach depends on data all the same: on another lookup or
    /// floating-point input.
    pub(super) fn foreign(&self, value: ValueId) -> bool {
        !self.live(value) && self.foreign[value.index()]
    }

    /// The graph underneath.
    pub(super) fn graph(&self) -> &'g Graph {
        self.graph
    }

    /// Whether data of the start reaches this value.
    pub(super) fn live(&self, value: ValueId) -> bool {
        self.live[value.index()]
    }

    /// Whether the value lies on a way from start to output.
    pub(super) fn on_path(&self, value: ValueId) -> bool {
        self.live[value.index()] && self.towards[value.index()]
    }

    /// The node that makes a live value, when it is not the start itself.
    pub(super) fn maker(&self, value: ValueId) -> Option<(NodeId, &'g Node)> {
        if value == self.start || !self.live(value) {
            return None;
        }
        let id = self.graph.producer(value)?;
        Some((id, self.graph.node(id)))
    }

    /// The live inputs of a node, in order.
    pub(super) fn live_inputs(&self, node: &Node) -> Vec<ValueId> {
        if carries_no_data(node) {
            return Vec::new();
        }
        node.reads().filter(|v| self.live(*v)).collect()
    }

    /// The live inputs of a node without repetition.
    pub(super) fn sources(&self, node: &Node) -> Vec<ValueId> {
        let mut inputs = self.live_inputs(node);
        let mut seen = std::collections::HashSet::new();
        inputs.retain(|v| seen.insert(*v));
        inputs
    }

    /// Consumers of a value that pass data on towards the output.
    pub(super) fn consumers(
        &self,
        value: ValueId,
    ) -> impl Iterator<Item = (NodeId, &'g Node)> + '_ {
        let graph = self.graph;
        let mut seen = std::collections::HashSet::new();
        graph
            .consumers(value)
            .iter()
            .map(move |(id, _)| (*id, graph.node(*id)))
            .filter(move |(id, node)| {
                seen.insert(*id)
                    && !carries_no_data(node)
                    && node.outputs.iter().flatten().any(|o| self.on_path(*o))
            })
    }

    /// Position of a value in topological order; inputs and initializers are 0.
    pub(super) fn order(&self, value: ValueId) -> u32 {
        self.order[value.index()]
    }

    /// Whether every path from the start to `b` passes `a` (a value dominates itself).
    pub(super) fn dominates(&self, a: ValueId, b: ValueId) -> bool {
        self.live(a) && self.live(b) && self.dominators.is_ancestor(a, b)
    }

    /// Whether every path from `b` to the output passes `a`.
    pub(super) fn post_dominates(&self, a: ValueId, b: ValueId) -> bool {
        self.on_path(a) && self.on_path(b) && self.post_dominators.is_ancestor(a, b)
    }

    /// The nearest value that dominates this one.
    pub(super) fn dominator(&self, value: ValueId) -> Option<ValueId> {
        self.dominators.parent[value.index()]
    }

    /// The nearest value that post-dominates this one.
    pub(super) fn post_dominator(&self, value: ValueId) -> Option<ValueId> {
        self.post_dominators.parent[value.index()]
    }

    /// The dominators of the output, start first: the spine of the model.
    pub(super) fn chain(&self) -> Vec<ValueId> {
        self.chain_to(self.output)
    }

    /// The dominators of a live value, start first, the value itself last.
    pub(super) fn chain_to(&self, value: ValueId) -> Vec<ValueId> {
        let mut chain = vec![value];
        let mut at = value;
        while let Some(up) = self.dominator(at) {
            chain.push(up);
            at = up;
        }
        chain.reverse();
        chain
    }

    /// Whether data of `a` reaches `b`.
    pub(super) fn reaches(&self, a: ValueId, b: ValueId) -> bool {
        if self.dominates(a, b) {
            return true;
        }
        let floor = self.order(a);
        let mut seen = std::collections::HashSet::from([b]);
        let mut open = vec![b];
        while let Some(v) = open.pop() {
            if v == a {
                return true;
            }
            if self.order(v) <= floor {
                continue;
            }
            if let Some((_, node)) = self.maker(v) {
                open.extend(
                    self.live_inputs(node)
                        .into_iter()
                        .filter(|i| seen.insert(*i)),
                );
            }
        }
        false
    }
}

/// Values that data of any lookup or floating-point input reaches.
fn foreign(graph: &Graph, values: usize) -> Vec<bool> {
    let mut reached = vec![false; values];
    for port in graph.inputs() {
        reached[port.value.index()] = port.dtype().is_some_and(crate::tensor::DType::is_float)
            && port.dims().is_some_and(|d| d.len() > 2);
    }
    for lookup in super::inputs::lookups(graph).iter().filter(|l| l.direct) {
        reached[lookup.output.index()] = true;
    }
    for (_, node) in graph.nodes() {
        if !carries_no_data(node) && node.reads().any(|v| reached[v.index()]) {
            for output in node.outputs.iter().flatten() {
                reached[output.index()] = true;
            }
        }
    }
    reached
}

fn backwards(graph: &Graph, live: &[bool], output: ValueId, values: usize) -> (Vec<bool>, Tree) {
    let mut towards = vec![false; values];
    let mut tree = Tree::new(values);
    // The nearest common post-dominator of what the consumers seen so far lead to.
    let mut next: Vec<Option<ValueId>> = vec![None; values];
    towards[output.index()] = true;
    let nodes: Vec<_> = graph.nodes().collect();
    for (_, node) in nodes.into_iter().rev() {
        if carries_no_data(node) {
            continue;
        }
        let mut leads: Option<ValueId> = None;
        for v in node.outputs.iter().flatten() {
            if *v != output
                && let Some(parent) = next[v.index()]
            {
                towards[v.index()] = true;
                tree.attach(*v, parent);
            }
            if towards[v.index()] {
                leads = Some(leads.map_or(*v, |l| tree.common(l, *v)));
            }
        }
        let Some(leads) = leads else { continue };
        for v in node.reads().filter(|v| live[v.index()]) {
            next[v.index()] = Some(next[v.index()].map_or(leads, |l| tree.common(l, leads)));
        }
    }
    // Values without a live producer (the start): their turn never came in the sweep over producers.
    for v in graph.values() {
        if v != output
            && live[v.index()]
            && !towards[v.index()]
            && let Some(parent) = next[v.index()]
        {
            towards[v.index()] = true;
            tree.attach(v, parent);
        }
    }
    (towards, tree)
}
