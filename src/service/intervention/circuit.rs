//! Circuits: requests validated, edges and the circuit streamed.

use super::sweep::progress;
use crate::{
    engine::{Ctx, EngineError, Lane},
    methods::{
        input,
        intervene::circuit::{
            self, Asked, Found, Limits, Started,
            graph::{Node, Part},
        },
    },
    service::{
        attribution::to_proto::{floats, quantity, term},
        call::Call,
        daemon::State,
        explained::Explained,
        from_proto::{or, required_input, unknown},
        messages::{Item, Pieces},
        teller::{Ended, Teller},
        to_proto,
        wire::introspect::{self as pb, find_circuit_response::Item as Message},
    },
};

/// Edges that are kept unless said.
const EDGES: u32 = 50;
/// Most edges that are kept.
const MOST_EDGES: u32 = 100_000;

impl Item for Message {
    fn payload(&self) -> Vec<&[u8]> {
        match self {
            Message::Tensor(t) => vec![&t.data],
            Message::Header(_)
            | Message::Progress(_)
            | Message::Circuit(_)
            | Message::Summary(_) => Vec::new(),
        }
    }

    fn summary(&self) -> Option<&pb::Summary> {
        match self {
            Message::Summary(summary) => Some(summary),
            Message::Header(_)
            | Message::Progress(_)
            | Message::Tensor(_)
            | Message::Circuit(_) => None,
        }
    }
}

impl State {
    /// Validates a search and runs both inputs once. Errors of a known model are recorded as its.
    pub(super) async fn circuit(
        &self,
        request: pb::FindCircuitRequest,
        call: &Call,
        ctx: &Ctx,
    ) -> Result<(Started, Explained), EngineError> {
        let (model, input, target) = self
            .explained_number(request.model, request.input, request.target)
            .await?;
        let nodes = pb::CircuitNodes::try_from(request.nodes)
            .map_err(|_| unknown("nodes", request.nodes))?;
        let edges = or(request.edges, EDGES);
        if edges > MOST_EDGES {
            return Err(EngineError::invalid(
                "edges",
                format!("is {edges}: give at most {MOST_EDGES}"),
            ));
        }
        let asked = Asked {
            input,
            source: required_input(request.source).map_err(|e| input::at_field(e, "source"))?,
            target,
            heads: match nodes {
                pb::CircuitNodes::Unspecified | pb::CircuitNodes::Heads => true,
                pb::CircuitNodes::Layers => false,
            },
            edges: edges as usize,
        };
        let handle = self.registry.get(&model)?;
        let explained = Explained::new(&model, "find_circuit", call.arrived);
        let limits = Limits {
            max_rows: self.config.max_rows,
            max_bytes: self.config.max_capture,
            lane: Lane::Interactive,
        };
        let started = circuit::start(&handle, asked, limits, ctx).await;
        explained.begun(started)
    }
}

fn header(started: &Started) -> pb::CircuitHeader {
    let info = started.handle().info();
    let tokens = started.tokens.iter().cloned();
    pb::CircuitHeader {
        model: info.name.clone(),
        fingerprint: info.fingerprint.clone(),
        generation: started.handle().generation(),
        provider: info.provider.clone(),
        tokens: tokens.map(to_proto::token).collect(),
        quantity: quantity(started.objective.quantity).into(),
        terms: started.objective.terms.iter().map(term).collect(),
        value: started.value,
        source_value: started.source_value,
        nodes: started.nodes.iter().map(node).collect(),
        rows: started.rows as u64,
    }
}

fn node(node: &Node) -> pb::CircuitNode {
    pb::CircuitNode {
        name: node.name(),
        layer: node.layer,
        head: match node.part {
            Part::Head(head) => Some(head),
            Part::Embedding | Part::Attention | Part::Perceptron | Part::Output => None,
        },
    }
}

/// Sends a header, progress, the scores, the circuit.
pub(super) async fn tell(
    mut started: Started,
    teller: &mut Teller<Message>,
) -> Result<Ended, EngineError> {
    teller.send(Message::Header(header(&started))).await?;
    let watch = started.watch();
    let progress = |elapsed| Message::Progress(progress(&watch.borrow(), elapsed));
    let found = teller.working(started.run(), progress).await?;
    teller.send_all(messages(&found)?).await?;
    Ok(Ended {
        truncated_tokens: started.truncated,
        ..Ended::of(&started.spent())
    })
}

/// The scores and the circuit.
fn messages(found: &Found) -> Result<Vec<Message>, EngineError> {
    let graph = &found.graph;
    let n = graph.nodes.len();
    let mut scores = vec![f64::NAN; n * n];
    for edge in &graph.edges {
        scores[edge.from * n + edge.to] = edge.score;
    }
    let axes = vec!["writer".to_owned(), "reader".to_owned()];
    let pieces = Pieces::new("scores".to_owned(), axes, floats(vec![n, n], &scores)?);
    let number = |node: usize| u32::try_from(node).unwrap_or(u32::MAX);
    let edges = graph.circuit.iter().map(|e| pb::CircuitEdge {
        from: number(e.from),
        to: number(e.to),
        score: e.score,
    });
    let circuit = pb::Circuit {
        edges: edges.collect(),
        scored: graph.edges.len() as u64,
        value: found.circuit_value,
        faithfulness: found.faithfulness,
    };
    Ok(pieces
        .map(Message::Tensor)
        .chain([Message::Circuit(circuit)])
        .collect())
}
