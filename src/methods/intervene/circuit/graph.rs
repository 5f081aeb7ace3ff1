//! Nodes, edges, and which edges make a circuit.

/// A part of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What enters the first layer.
    Embedding,
    /// A head.
    Head(u32),
    /// The attention of a layer.
    Attention,
    /// The perceptron of a layer.
    Perceptron,
    /// Final norm and head of the model.
    Output,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub part: Part,
    /// Of which layer, where it belongs to one.
    pub layer: Option<u32>,
    /// Nodes write to those of greater stages.
    stage: u32,
}

impl Node {
    pub(super) fn new(part: Part, layer: Option<u32>, stage: u32) -> Self {
        Self { part, layer, stage }
    }

    /// `embed`, `a1.h3`, `a1`, `m1`, `logits`: as circuits are drawn.
    pub fn name(&self) -> String {
        let layer = self.layer.unwrap_or_default();
        match self.part {
            Part::Embedding => "embed".to_owned(),
            Part::Head(head) => format!("a{layer}.h{head}"),
            Part::Attention => format!("a{layer}"),
            Part::Perceptron => format!("m{layer}"),
            Part::Output => "logits".to_owned(),
        }
    }
}

/// An edge, by the numbers of its nodes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Edge {
    /// Who writes.
    pub from: usize,
    /// Who reads.
    pub to: usize,
    /// To first order, what it does to the number.
    pub score: f64,
}

/// All edges, and those of the circuit.
#[derive(Clone, Debug, PartialEq)]
pub struct Graph {
    /// In the order of the graph.
    pub nodes: Vec<Node>,
    /// All edges.
    pub edges: Vec<Edge>,
    /// Those of the circuit, the greatest magnitude first.
    pub circuit: Vec<Edge>,
}

impl Graph {
    /// Nodes without edges.
    pub fn new(nodes: Vec<Node>) -> Self {
        Self {
            nodes,
            edges: Vec::new(),
            circuit: Vec::new(),
        }
    }

    /// Adds an edge, unless its second node does not read what its first writes.
    pub fn score(&mut self, edge: Edge) {
        if self.nodes[edge.from].stage < self.nodes[edge.to].stage {
            self.edges.push(edge);
        }
    }

    /// Takes so many edges of the greatest magnitude, and leaves out those that no path from the embedding to the output passes.
    pub fn keep(&mut self, most: usize) {
        let mut ranked: Vec<Edge> = self
            .edges
            .iter()
            .copied()
            .filter(|e| e.score != 0.0)
            .collect();
        ranked.sort_by(|a, b| b.score.abs().total_cmp(&a.score.abs()));
        ranked.truncate(most);
        let reached = |ranked: &[Edge], begin: usize, forwards: bool| {
            let mut seen = vec![false; self.nodes.len()];
            seen[begin] = true;
            let mut grows = true;
            while grows {
                grows = false;
                for edge in ranked {
                    let (from, to) = match forwards {
                        true => (edge.from, edge.to),
                        false => (edge.to, edge.from),
                    };
                    if seen[from] && !seen[to] {
                        seen[to] = true;
                        grows = true;
                    }
                }
            }
            seen
        };
        let last = self.nodes.len().saturating_sub(1);
        let (down, up) = (reached(&ranked, 0, true), reached(&ranked, last, false));
        ranked.retain(|e| down[e.from] && up[e.to]);
        self.circuit = ranked;
    }

    /// Who writes to a node, in the circuit.
    pub(super) fn writers(&self, to: usize) -> impl Iterator<Item = usize> + '_ {
        let edges = self.circuit.iter().filter(move |e| e.to == to);
        edges.map(|e| e.from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(scores: &[(usize, usize, f64)]) -> Graph {
        let mut graph = Graph::new(vec![
            Node::new(Part::Embedding, None, 0),
            Node::new(Part::Head(0), Some(0), 1),
            Node::new(Part::Head(1), Some(0), 1),
            Node::new(Part::Perceptron, Some(0), 2),
            Node::new(Part::Output, None, 3),
        ]);
        for (from, to, score) in scores {
            graph.score(Edge {
                from: *from,
                to: *to,
                score: *score,
            });
        }
        graph
    }

    #[test]
    fn heads_of_a_layer_do_not_read_each_other() {
        let graph = graph(&[(1, 2, 1.0), (2, 1, 1.0), (3, 1, 1.0), (1, 3, 1.0)]);
        assert_eq!(graph.edges.len(), 1);
    }

    #[test]
    fn edges_that_lead_nowhere_are_left_out() {
        let mut graph = graph(&[
            (0, 1, 5.0),
            (0, 2, -4.0),
            (2, 3, 3.0),
            (3, 4, -2.0),
            (1, 4, 0.5),
        ]);
        graph.keep(4);
        let kept: Vec<(usize, usize)> = graph.circuit.iter().map(|e| (e.from, e.to)).collect();
        assert_eq!(
            kept,
            [(0, 2), (2, 3), (3, 4)],
            "a head that nobody reads is no part"
        );
        assert_eq!(graph.writers(3).collect::<Vec<_>>(), [2]);
        graph.keep(5);
        assert_eq!(graph.circuit.len(), 5);
        let names: Vec<String> = graph.nodes.iter().map(Node::name).collect();
        assert_eq!(names, ["embed", "a0.h0", "a0.h1", "m0", "logits"]);
    }
}
