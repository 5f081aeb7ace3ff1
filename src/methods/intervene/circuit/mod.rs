//! Circuits: which edges between the parts of a model carry a behaviour, by edge attribution patching (Syed et al. 2023), and how much of it
//! those that were found restore by themselves.
//!
//! ```text
//!   out_u     what u writes into the residual stream: the embedding, a head (z_h W_O), the attention of a layer, a perceptron
//!   in_v      the residual stream as v reads it, before its own norm: a head (queries, keys and values together), a perceptron, the output
//!   score(u -> v) = sum over positions of (out_u(source) - out_u(input)) . dF(input)/d in_v,     the gradient through v alone
//! ```
//!
//! The input is the corrupted one, the source the clean one, as in a [sweep](super::sweep). The gradient through a branch alone is that of the stream where it
//! leaves less that of what the branch writes, which is added to the rest of it; the gradient through one head alone is the same of a row in which the
//! other heads of its layer are held at what they are. Only streams that are plain sums have edges: the sum is checked for both rows.
//!
//! [`graph`] ranks and prunes; `restored` runs the source with every edge but those of the circuit as it is for the input.

mod gradients;
pub mod graph;
mod restored;

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    engine::{Ctx, EngineError, Lane, ModelHandle},
    ipc::{info::ModelInfo, spec::Reduction},
    methods::{
        input::{self, Input, Token},
        lens::{
            direct::{self, Layer, components, written},
            head::{distance, tolerance},
            stream::Stream,
        },
        subject::{Show, Spent, Subject, floats},
        target::{self, Objective, Target, Terms},
    },
};
use graph::{Edge, Graph, Node, Part};

/// What is asked.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The corrupted input.
    pub input: Input,
    /// The clean one.
    pub source: Input,
    /// The number that is explained.
    pub target: Target,
    /// Whether heads are nodes, or the attention of a layer as a whole.
    pub heads: bool,
    /// Edges of the circuit, before those that lead nowhere are left out.
    pub edges: usize,
}

/// What a request may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Rows.
    pub max_rows: usize,
    /// Bytes of hook points that are held.
    pub max_bytes: usize,
    /// Where rows wait.
    pub lane: Lane,
}

/// A search that can run.
#[derive(Debug)]
pub struct Started {
    /// Tokens of the input.
    pub tokens: Vec<Token>,
    /// Tokens that truncation cut off.
    pub truncated: u32,
    /// What is explained.
    pub objective: Objective,
    /// Its value for the input.
    pub value: f64,
    /// Its value for the source.
    pub source_value: f64,
    /// The nodes, in the order of the graph.
    pub nodes: Vec<Node>,
    /// Rows that will be run, about.
    pub rows: usize,
    subject: Subject,
    edges: usize,
    plan: Plan,
    corrupted: Seen,
    clean: Seen,
}

/// How a model is taken apart.
#[derive(Debug)]
struct Plan {
    stream: Stream,
    blocks: Vec<Block>,
    /// With heads as nodes.
    layers: Vec<Layer>,
    positions: usize,
}

/// What a block has.
#[derive(Clone, Debug)]
struct Block {
    layer: u32,
    /// What attention reads.
    before: String,
    attention: Option<String>,
    /// What the perceptron reads, and what it writes.
    perceptron: Option<(String, String)>,
}

impl Block {
    /// Whether attention and perceptron read the same stream.
    fn is_parallel(&self) -> bool {
        let reads = self.perceptron.as_ref().map(|(reads, _)| reads);
        self.attention.is_some() && reads == Some(&self.before)
    }
}

/// What stands at hook points in a run, by name: `[position, ...]`.
type Seen = BTreeMap<String, Vec<f32>>;

/// What was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Scores of all edges, and the circuit.
    pub graph: Graph,
    /// F of the source with every edge but those of the circuit as it is for the input.
    pub circuit_value: f64,
    /// `(F(circuit) - F(input)) / (F(source) - F(input))`: 1 when the circuit does it all.
    pub faithfulness: Option<f64>,
}

/// Runs both inputs once.
///
/// # Errors
/// With paths of fields that begin at the request. [`EngineError::FailedPrecondition`] for a model whose stream is no sum of what its parts write.
pub async fn start(
    handle: &ModelHandle,
    asked: Asked,
    limits: Limits,
    ctx: &Ctx,
) -> Result<Started, EngineError> {
    let lane = limits.lane;
    let mut prepared = input::prepare(handle, asked.input, ctx)
        .await
        .map_err(|e| e.beneath("input"))?;
    let mut clean = input::prepare(handle, asked.source, ctx)
        .await
        .map_err(|e| e.beneath("source"))?;
    let of_target = |e: EngineError| e.beneath("target");
    let diverges = matches!(asked.target.of, Terms::Divergence(_));
    let right = if diverges { &mut clean } else { &mut prepared };
    let objective = target::resolve(handle, &asked.target, right, lane, ctx).await;
    let objective = objective.map_err(of_target)?;
    if objective.at.is_some() {
        return Err(EngineError::invalid(
            "target",
            "is a number inside of the model, and a circuit ends at its output: name a label or token",
        ));
    }
    if objective.asked > 0 {
        target::resolve(handle, &asked.target, &mut clean, lane, ctx)
            .await
            .map_err(of_target)?;
    }
    if clean.group.length != prepared.group.length {
        return Err(EngineError::invalid(
            "source",
            format!(
                "has {} tokens and the input {}: give a source of as many tokens",
                clean.tokens.len(),
                prepared.tokens.len()
            ),
        ));
    }
    let info = handle.info().clone();
    let mut plan = plan(&info, asked.heads)?;
    let subject = |row, tokens| {
        let terms = (lane, ctx.clone());
        Subject::new(handle.clone(), (row, tokens), objective.clone(), terms)
    };
    let expose = plan.shown(&info);
    let length = prepared.group.length.or(plan.stream.fixed).unwrap_or(1);
    let nodes = plan.nodes();
    // Of both runs what they show; of each node what it writes, and the gradient by what it reads.
    let held = 2 * (expose.len() + nodes.len());
    let bytes = [held, length, plan.stream.width, size_of::<f32>()];
    let bytes = bytes.into_iter().fold(1, usize::saturating_mul);
    let rows = plan.rows();
    if rows > limits.max_rows || bytes > limits.max_bytes {
        return Err(EngineError::exhausted(
            format!(
                "the search would take {rows} rows and {bytes} bytes, and the limits are {} and {}: give a shorter input, or take the attention of a layer as one node",
                limits.max_rows, limits.max_bytes
            ),
            None,
        ));
    }
    let mut theirs = subject(clean.group, clean.tokens);
    let (source_value, clean) = see(&mut theirs, &expose).await?;
    let mut subject = subject(prepared.group, prepared.tokens.clone());
    subject.spent = theirs.spent;
    subject.spent.timings.tokenize = prepared.tokenize;
    let (value, corrupted) = see(&mut subject, &expose).await?;
    for seen in [&corrupted, &clean] {
        plan.positions = plan.sums_up(&info, seen)?;
    }
    subject.plan(rows);
    Ok(Started {
        tokens: prepared.tokens,
        truncated: prepared.truncated,
        objective,
        value,
        source_value,
        nodes,
        rows,
        subject,
        edges: asked.edges,
        plan,
        corrupted,
        clean,
    })
}

/// Takes a model apart.
fn plan(info: &ModelInfo, heads: bool) -> Result<Plan, EngineError> {
    let stream = Stream::of(info)?;
    let written = components(info, &stream)?;
    if let Some(cross) = written.iter().find(|w| w.ends_with("hook_cross_attn_out")) {
        return Err(EngineError::precondition(format!(
            "model \"{}\" attends to another sequence (\"{cross}\"), and circuits are of models that read one",
            info.name
        )));
    }
    let has = |name: String| Some(name).filter(|n| written.contains(n));
    let blocks = (0..info.dims.layers).map(|layer| {
        let name = |part: &str| format!("blocks.{layer}.{part}");
        let before = stream.states[layer].clone();
        let middle = info.hook(&name("hook_resid_mid")).map(|h| h.name.clone());
        let reads = middle.unwrap_or_else(|| before.clone());
        Block {
            layer: u32::try_from(layer).unwrap_or(u32::MAX),
            attention: has(name("hook_attn_out")),
            perceptron: has(name("hook_mlp_out")).map(|writes| (reads, writes)),
            before,
        }
    });
    Ok(Plan {
        blocks: blocks.collect(),
        layers: match heads {
            true => direct::layers(info)?,
            false => Vec::new(),
        },
        stream,
        positions: 0,
    })
}

impl Plan {
    /// Hook points that both runs show.
    fn shown(&self, info: &ModelInfo) -> BTreeSet<String> {
        let mut expose: BTreeSet<String> = self.stream.states.iter().cloned().collect();
        for block in &self.blocks {
            expose.extend(block.attention.clone());
            if let Some((reads, writes)) = &block.perceptron {
                expose.extend([reads.clone(), writes.clone()]);
            }
        }
        let z = |h: &&crate::ipc::info::HookInfo| h.name.ends_with("attn.hook_z");
        expose.extend(info.hooks.iter().filter(z).map(|h| h.name.clone()));
        expose
    }

    /// The heads of a block, with heads as nodes.
    fn heads(&self, block: &Block) -> Option<&Layer> {
        self.layers.iter().find(|l| l.number == block.layer)
    }

    fn nodes(&self) -> Vec<Node> {
        let mut nodes = vec![Node::new(Part::Embedding, None, 0)];
        for (at, block) in (0u32..).zip(&self.blocks) {
            let layer = Some(block.layer);
            match self.heads(block) {
                Some(heads) => nodes.extend(
                    (0u32..)
                        .take(heads.heads)
                        .map(|head| Node::new(Part::Head(head), layer, 2 * at + 1)),
                ),
                None if block.attention.is_some() => {
                    nodes.push(Node::new(Part::Attention, layer, 2 * at + 1));
                }
                None => {}
            }
            if block.perceptron.is_some() {
                let stage = 2 * at + if block.is_parallel() { 1 } else { 2 };
                nodes.push(Node::new(Part::Perceptron, layer, stage));
            }
        }
        let end = u32::try_from(2 * self.blocks.len() + 1).unwrap_or(u32::MAX);
        nodes.push(Node::new(Part::Output, None, end));
        nodes
    }

    /// Rows of gradients, of output projections, and of the circuit.
    fn rows(&self) -> usize {
        let heads: usize = self.layers.iter().map(|l| l.heads).sum();
        4 + 2 * heads + 3 * self.blocks.len()
    }

    /// How many positions there are, when what is written sums up to the end of the stream.
    fn sums_up(&self, info: &ModelInfo, seen: &Seen) -> Result<usize, EngineError> {
        let end = of(seen, self.stream.end())?;
        let mut sum = vec![0f64; end.len()];
        for component in components(info, &self.stream)? {
            for (sum, v) in sum.iter_mut().zip(of(seen, &component)?) {
                *sum += f64::from(*v);
            }
        }
        #[allow(clippy::cast_possible_truncation)]
        // compared with what was computed in single precision
        let sum: Vec<f32> = sum.iter().map(|s| *s as f32).collect();
        let (off, allowed) = (distance(&sum, end), tolerance(self.stream.dtype));
        if off > allowed {
            return Err(EngineError::precondition(format!(
                "what the parts of model \"{}\" write sums up to something {off:.1e} off the end of its residual stream, where {allowed:.0e} is allowed: \
                 its parts are not joined by edges",
                info.name
            )));
        }
        Ok(end.len() / self.stream.width.max(1))
    }
}

fn of<'a>(seen: &'a Seen, name: &str) -> Result<&'a [f32], EngineError> {
    let found = seen.get(name).map(Vec::as_slice);
    found.ok_or_else(|| EngineError::internal(format!("a row ended without \"{name}\"")))
}

/// The number, and what stands at hook points.
async fn see(subject: &mut Subject, expose: &BTreeSet<String>) -> Result<(f64, Seen), EngineError> {
    let show = Show {
        expose: expose.clone(),
        ..Show::objective()
    };
    let (mut value, mut seen) = (f64::NAN, Seen::new());
    subject
        .run(
            &show,
            (1, 1),
            |_| Ok(Vec::new()),
            |_, _, tensors| {
                value = floats(tensors, 0)?
                    .first()
                    .map_or(f64::NAN, |v| f64::from(*v));
                for (at, name) in show.expose.iter().enumerate() {
                    seen.insert(name.clone(), floats(tensors, at + 1)?);
                }
                Ok(())
            },
        )
        .await?;
    if !value.is_finite() {
        return Err(EngineError::precondition(format!(
            "the target's value for an input is {value}: there is nothing to explain"
        )));
    }
    Ok((value, seen))
}

fn less(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

impl Started {
    /// The model that answers.
    pub fn handle(&self) -> &ModelHandle {
        &self.subject.handle
    }

    /// What was spent so far.
    pub fn spent(&self) -> Spent {
        self.subject.spent
    }

    /// Where progress can be watched.
    pub fn watch(&self) -> tokio::sync::watch::Receiver<crate::methods::Partial> {
        self.subject.watch()
    }

    /// Scores all edges, finds the circuit, and runs it.
    ///
    /// # Errors
    /// Those of the runs: an operator without gradient among them.
    pub async fn run(&mut self) -> Result<Found, EngineError> {
        let changes = self.changes().await?;
        let gradients =
            gradients::through(&mut self.subject, &self.plan, &self.corrupted, &self.nodes).await?;
        let (nodes, edges) = (self.nodes.clone(), self.edges);
        let scored = move || {
            let mut graph = Graph::new(nodes);
            for (from, change) in changes.iter().enumerate() {
                for (to, gradient) in gradients.iter().enumerate() {
                    if let (Some(change), Some(gradient)) = (change, gradient) {
                        let products = change.iter().zip(gradient);
                        let score = products.map(|(c, g)| f64::from(*c) * f64::from(*g)).sum();
                        graph.score(Edge { from, to, score });
                    }
                }
            }
            graph.keep(edges);
            (graph, changes)
        };
        let (graph, changes) = tokio::task::spawn_blocking(scored)
            .await
            .map_err(EngineError::internal)?;
        let embedding = changes.into_iter().next().flatten().unwrap_or_default();
        let circuit_value = restored::value(
            &mut self.subject,
            &self.plan,
            &self.corrupted,
            (&graph, embedding),
        )
        .await?;
        let whole = self.source_value - self.value;
        Ok(Found {
            graph,
            circuit_value,
            faithfulness: (whole != 0.0).then(|| (circuit_value - self.value) / whole),
        })
    }

    /// What each node writes for the source, less what it writes for the input; none of the output.
    async fn changes(&mut self) -> Result<Vec<Option<Vec<f32>>>, EngineError> {
        let plan = &self.plan;
        let change = |name: &str| Ok(less(of(&self.clean, name)?, of(&self.corrupted, name)?));
        let mut z = Seen::new();
        for layer in &plan.layers {
            z.insert(layer.z.clone(), change(&layer.z)?);
        }
        let everywhere: Vec<usize> = (0..plan.positions).collect();
        let mut by_head = written(
            &mut self.subject,
            &plan.stream,
            &plan.layers,
            (&z, plan.positions),
            &everywhere,
        )
        .await?;
        for (layer, rows) in plan.layers.iter().zip(&mut by_head) {
            // The last row is what is written without heads: the bias.
            let none = rows.pop().unwrap_or_default();
            rows.truncate(layer.heads);
            rows.iter_mut().for_each(|row| *row = less(row, &none));
            let all = rows.iter().fold(vec![0f32; none.len()], |sum, row| {
                sum.iter().zip(row).map(|(a, b)| a + b).collect()
            });
            let out = change(&layer.out)?;
            let (off, allowed) = (distance(&all, &out), 10.0 * tolerance(plan.stream.dtype));
            if off > allowed {
                return Err(EngineError::precondition(format!(
                    "what the heads of layer {} write is {off:.1e} off \"{}\" where {allowed:.0e} is allowed (a norm behind the output projection?): take the attention of \
                     a layer as one node",
                    layer.number, layer.out
                )));
            }
        }
        let block = |node: &Node| plan.blocks.iter().find(|b| Some(b.layer) == node.layer);
        self.nodes
            .iter()
            .map(|node| {
                let name = match (node.part, block(node)) {
                    (Part::Embedding, _) => plan.stream.states.first(),
                    (Part::Attention, Some(block)) => block.attention.as_ref(),
                    (Part::Perceptron, Some(block)) => block.perceptron.as_ref().map(|(_, w)| w),
                    (Part::Head(head), _) => {
                        let at = plan
                            .layers
                            .iter()
                            .position(|l| Some(l.number) == node.layer);
                        let written = at.and_then(|at| by_head[at].get(head as usize));
                        return Ok(written.cloned());
                    }
                    (Part::Output | Part::Attention | Part::Perceptron, _) => None,
                };
                name.map(|name| change(name)).transpose()
            })
            .collect()
    }
}

/// The gradient of the whole, at these hook points.
async fn gradients_at(
    subject: &mut Subject,
    names: &BTreeSet<String>,
) -> Result<Seen, EngineError> {
    let show = Show {
        points: names
            .iter()
            .map(|n| (n.clone(), Reduction::Whole))
            .collect(),
        ..Show::objective()
    };
    let mut seen = Seen::new();
    subject
        .run(
            &show,
            (1, 1),
            |_| Ok(Vec::new()),
            |_, _, tensors| {
                for (at, name) in show.points.keys().enumerate() {
                    seen.insert(name.clone(), floats(tensors, at + 1)?);
                }
                Ok(())
            },
        )
        .await?;
    Ok(seen)
}
