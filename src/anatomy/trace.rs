//! The static part: from a graph alone, where the stream begins and ends, which residual blocks it passes and what
//! lies in them. What structure cannot tell is left to the trials: the trace lists the values that they must show.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    attention::{AttentionTrace, Rejected, Softmax, attention, softmaxes},
    blocks::{blocks, holds},
    flow::Flow,
    inputs::{InputTrace, Lookup, Stream, calls_itself, lookups, roles},
    layers::{LayerTrace, layers},
    ops::{is_layout, is_projection, is_sum},
};
use crate::{
    onnx::{Graph, Model, NodeId, ValueId},
    tensor::Tensor,
};

/// Values after the last layer that may be its norm, the final norm or the head.
const MAX_TAIL: usize = 32;
/// Starts tried; a model has one or two.
const MAX_STARTS: usize = 12;

/// What structure tells about a model.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Inputs and their roles.
    pub inputs: Vec<InputTrace>,
    /// Where data begins: the token embedding, or the floating-point input itself.
    pub start: Option<ValueId>,
    /// The first representation of the input: the token embedding, or the first product with weights.
    pub embed: Option<ValueId>,
    /// What joins the tokens before the first layer by sums, and does not come from them, in graph order.
    pub added: Vec<ValueId>,
    /// Those of [`Self::added`] that the file carries.
    pub constants: Vec<(ValueId, Tensor)>,
    /// Rows of the token table.
    pub vocabulary: Option<usize>,
    /// The output that everything leads to.
    pub output: Option<ValueId>,
    /// The dominators of the output: the spine.
    pub chain: Vec<ValueId>,
    /// Every attention on the way.
    pub attentions: Vec<AttentionTrace>,
    /// Layers in order.
    pub layers: Vec<LayerTrace>,
    /// Softmaxes that are no attention of a layer.
    pub rejected: Vec<Rejected>,
    /// Where the stream stops being a sum: an attention without a residual block, before or between layers. Those behind it
    /// are left out, since nobody can number them.
    pub interrupted: Option<ValueId>,
    /// The way on from the end of the last layer, one post-dominator after the other.
    pub tail: Vec<ValueId>,
    /// How many steps of `tail` belong to the last layer: as many as lie between any two layers.
    pub between_layers: usize,
    /// Between attention and perceptron of a layer lie steps: a norm after the sum.
    pub norm_after_attention: bool,
    /// Integers are divided by numbers that depend on the inputs: with short ones, by zero, which kills the process.
    pub divides: bool,
    /// Numbers that reshapes are made of: an exporter that traced with an example may have left its batch or length there.
    pub written_sizes: Vec<usize>,
    /// Values whose shapes and contents the next step wants.
    pub observe: Vec<ValueId>,
}

/// Reads the structure of a model.
pub fn trace(model: &Model) -> Trace {
    let graph = &model.graph;
    let Some((start, lookup, flow)) = spine(graph) else {
        return Trace {
            inputs: roles(graph, None),
            start: None,
            embed: None,
            added: Vec::new(),
            constants: Vec::new(),
            vocabulary: None,
            output: None,
            chain: Vec::new(),
            attentions: Vec::new(),
            layers: Vec::new(),
            rejected: Vec::new(),
            interrupted: None,
            tail: Vec::new(),
            between_layers: 0,
            norm_after_attention: false,
            divides: false,
            written_sizes: Vec::new(),
            observe: graph.outputs().iter().map(|p| p.value).collect(),
        };
    };
    let found = softmaxes(&flow);
    let (attentions, mut rejected) = sort_out(&flow, &found);
    let blocks = blocks(&flow, &attentions);
    let (mut layers, orphans) = layers(&flow, &blocks, &attentions);
    let mut interrupted = None;
    for attention in orphans.into_iter().map(|i| &attentions[i]) {
        let held = blocks.iter().any(|b| holds(&flow, b, attention));
        let softmax = attention.softmax.output;
        rejected.push(Rejected {
            softmax,
            reason: if held {
                "its residual block holds other attentions too".to_owned()
            } else {
                "it lies in no residual block".to_owned()
            },
        });
        let breaks = !held && attention.self_attention && attention.score.is_ok();
        let ended = layers
            .iter()
            .take_while(|l| flow.order(l.end) < flow.order(softmax))
            .count();
        if breaks && ended < layers.len() {
            interrupted = Some(softmax);
            layers.truncate(ended);
        }
    }
    let tail = tail(&flow, &layers);
    let mut trace = Trace {
        inputs: roles(
            graph,
            Some(&stream(&flow, lookup.as_ref(), &attentions, &found)),
        ),
        start: Some(start),
        embed: embed(&flow, lookup.is_some(), layers.first()),
        added: added(&flow, layers.first()),
        constants: Vec::new(),
        vocabulary: lookup.map(|l| l.rows),
        output: Some(flow.output()),
        chain: flow.chain(),
        between_layers: between_layers(&flow, &layers, &tail),
        norm_after_attention: layers.iter().any(|l| norm_after_attention(&flow, l)),
        attentions,
        layers,
        rejected,
        interrupted,
        tail,
        divides: !graph.integer_divisions().is_empty(),
        written_sizes: written_sizes(graph),
        observe: Vec::new(),
    };
    trace.observe = observe(graph, &flow, &trace);
    let carried = trace.added.iter();
    let carried = carried.filter_map(|v| Some((*v, graph.initializer(*v)?.tensor()?)));
    trace.constants = carried.collect();
    trace
}

/// What the inputs are judged against.
fn stream<'f, 'g>(
    flow: &'f Flow<'g>,
    tokens: Option<&'f Lookup>,
    attentions: &[AttentionTrace],
    found: &[Softmax],
) -> Stream<'f, 'g> {
    let across: Vec<NodeId> = attentions
        .iter()
        .filter(|a| !a.self_attention)
        .map(|a| a.softmax.node)
        .collect();
    let own = found.iter().map(|s| s.node);
    Stream {
        flow,
        tokens,
        own: own.filter(|n| !across.contains(n)).collect(),
        across,
    }
}

fn embed(flow: &Flow<'_>, ids: bool, first: Option<&LayerTrace>) -> Option<ValueId> {
    if ids {
        return Some(flow.start());
    }
    flow.chain_to(first?.start)
        .into_iter()
        .find(|v| flow.maker(*v).is_some_and(|(_, n)| is_projection(flow, n)))
}

/// Operands of the sums between the tokens and the first layer that the tokens do not reach; of a sum among those, its operands too.
fn added(flow: &Flow<'_>, first: Option<&LayerTrace>) -> Vec<ValueId> {
    const STEPS: usize = 3;
    let Some(end) = first.map(|l| l.start) else {
        return Vec::new();
    };
    let graph = flow.graph();
    let mut found = Vec::new();
    for (_, node) in graph.nodes().filter(|(_, n)| is_sum(n)) {
        let Some(sum) = node.output(0).filter(|v| flow.on_path(*v)) else {
            continue;
        };
        if flow.order(sum) > flow.order(end) || !flow.reaches(sum, end) {
            continue;
        }
        let mut open: Vec<(ValueId, usize)> = node
            .reads()
            .filter(|v| !flow.live(*v))
            .map(|v| (v, 0))
            .collect();
        while let Some((value, steps)) = open.pop() {
            if !found.contains(&value) {
                found.push(value);
            }
            if let Some(maker) = graph.producer(value).map(|id| graph.node(id))
                && steps < STEPS
                && is_sum(maker)
            {
                open.extend(maker.reads().map(|v| (v, steps + 1)));
            }
        }
    }
    found
}

fn sort_out(flow: &Flow<'_>, found: &[Softmax]) -> (Vec<AttentionTrace>, Vec<Rejected>) {
    let mut attentions: Vec<AttentionTrace> = Vec::new();
    let mut rejected = Vec::new();
    for softmax in found {
        match attention(flow, *softmax) {
            Ok(a) => attentions.push(a),
            Err(reason) => rejected.push(Rejected {
                softmax: softmax.output,
                reason,
            }),
        }
    }
    (attentions, rejected)
}

/// Start, lookup (for ids) and flow that hold the most of the model.
fn spine(graph: &Graph) -> Option<(ValueId, Option<Lookup>, Flow<'_>)> {
    let mut all = lookups(graph);
    // Stable: of one input, the first lookup in the graph.
    all.sort_by_key(|l| std::cmp::Reverse(preference(graph, l)));
    let mut starts: Vec<(ValueId, Option<Lookup>)> =
        all.into_iter().map(|l| (l.output, Some(l))).collect();
    starts.extend(
        graph
            .inputs()
            .filter(|p| p.dtype().is_some_and(crate::tensor::DType::is_float))
            .map(|p| (p.value, None)),
    );
    let ids = starts
        .iter()
        .any(|(_, l)| l.as_ref().is_some_and(|l| l.direct));
    let mut inputs = Vec::new();
    let mut best: Option<(isize, ValueId, Option<Lookup>, Flow<'_>)> = None;
    for (start, lookup) in starts.into_iter().take(MAX_STARTS) {
        if ids && lookup.is_none() && best.as_ref().is_some_and(|b| b.0 > 0) {
            continue;
        }
        // A lookup that others follow may lead nowhere: only its shape is read.
        let served = lookup.as_ref().is_some_and(|l| inputs.contains(&l.input));
        let Some(flow) = main_flow(graph, start).filter(|_| !served) else {
            continue;
        };
        inputs.extend(lookup.iter().map(|l| l.input));
        let found = softmaxes(&flow);
        let attentions = sort_out(&flow, &found).0;
        // A tower that others look at meets their attentions outside of any block of its own.
        let owned = blocks(&flow, &attentions);
        let count = attentions
            .iter()
            .map(|a| {
                if owned.iter().any(|b| holds(&flow, b, a)) {
                    2
                } else {
                    -1
                }
            })
            .sum::<isize>();
        if best.as_ref().is_none_or(|b| count > b.0) {
            best = Some((count, start, lookup, flow));
        }
    }
    best.map(|(_, start, lookup, flow)| (start, lookup, flow))
}

/// Larger is likelier to be the tokens.
fn preference(graph: &Graph, lookup: &Lookup) -> (bool, bool, bool, usize) {
    let other = calls_itself(
        graph.name(lookup.input),
        &["position", "type", "segment", "mask"],
    );
    (lookup.direct, !other, lookup.tied, lookup.rows)
}

/// The flow to the output that most of the graph leads to.
fn main_flow(graph: &Graph, start: ValueId) -> Option<Flow<'_>> {
    let mut best: Option<(usize, Flow<'_>)> = None;
    for port in graph.outputs() {
        if let Some(flow) = Flow::new(graph, start, port.value) {
            let size = flow.size();
            if best.as_ref().is_none_or(|b| size > b.0) {
                best = Some((size, flow));
            }
        }
    }
    best.map(|(_, flow)| flow)
}

/// Post-dominators from the end of the last layer on, that end first.
fn tail(flow: &Flow<'_>, layers: &[LayerTrace]) -> Vec<ValueId> {
    let Some(last) = layers.last() else {
        return Vec::new();
    };
    let mut tail = vec![last.end];
    while let Some(next) = tail.last().and_then(|v| flow.post_dominator(*v)) {
        tail.push(next);
        if tail.len() > MAX_TAIL {
            break;
        }
    }
    tail
}

/// Steps from `from` to `to` along the dominators of `to`.
fn steps(flow: &Flow<'_>, from: ValueId, to: ValueId) -> Option<Vec<ValueId>> {
    let mut way = vec![to];
    let mut at = to;
    while at != from {
        at = flow.dominator(at)?;
        if flow.order(at) < flow.order(from) {
            return None;
        }
        way.push(at);
    }
    way.reverse();
    Some(way)
}

/// How many values the last layer still has after its sum, judged by what lies between layers before, or between
/// attention and perceptron when there is only one.
fn between_layers(flow: &Flow<'_>, layers: &[LayerTrace], tail: &[ValueId]) -> usize {
    let op = |v: &ValueId| flow.maker(*v).map(|(_, n)| n.op.clone());
    let pattern = layers
        .windows(2)
        .rev()
        .find_map(|w| steps(flow, w[0].end, w[1].start))
        .or_else(|| {
            let only = layers.first()?;
            let (a, m) = (only.attention_block.as_ref()?, only.mlp_block.as_ref()?);
            steps(flow, a.end, m.start)
        })
        .unwrap_or_default();
    // Axes may be turned back and forth in one place and not in another.
    let mut wanted = pattern
        .iter()
        .skip(1)
        .filter(|v| !turns(flow, **v))
        .peekable();
    let mut last = 0;
    for (at, value) in tail.iter().enumerate().skip(1) {
        match wanted.peek() {
            None => break,
            Some(_) if turns(flow, *value) => {}
            Some(next) if op(next) == op(value) => {
                wanted.next();
                last = at;
            }
            Some(_) => return 0,
        }
    }
    if wanted.peek().is_none() { last } else { 0 }
}

/// Whether a value is another under other axes.
fn turns(flow: &Flow<'_>, value: ValueId) -> bool {
    flow.maker(value).is_some_and(|(_, n)| is_layout(n))
}

fn norm_after_attention(flow: &Flow<'_>, layer: &LayerTrace) -> bool {
    match (&layer.attention_block, &layer.mlp_block) {
        (Some(a), Some(m)) if a.end != m.start => flow.dominates(a.end, m.start),
        _ => false,
    }
}

/// Numbers in the shapes that the graph reshapes to, most frequent first.
fn written_sizes(graph: &Graph) -> Vec<usize> {
    const STEPS: usize = 8;
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    for (_, node) in graph
        .nodes()
        .filter(|(_, n)| n.is_any(&["Reshape", "Expand"]))
    {
        let mut open: Vec<(ValueId, usize)> = node.input(1).map(|v| (v, 0)).into_iter().collect();
        while let Some((v, steps)) = open.pop() {
            if let Some(values) = graph.constant_ints(v) {
                for n in values.iter().filter_map(|n| usize::try_from(*n).ok()) {
                    *counts.entry(n).or_default() += 1;
                }
            } else if let Some(id) = graph.producer(v)
                && steps < STEPS
                && !graph.node(id).is("Shape")
            {
                open.extend(graph.node(id).reads().map(|r| (r, steps + 1)));
            }
        }
    }
    let mut sizes: Vec<(usize, usize)> = counts
        .into_iter()
        .filter(|(n, _)| (2..=4096).contains(n))
        .collect();
    sizes.sort_by_key(|(n, count)| (std::cmp::Reverse(*count), *n));
    sizes.into_iter().map(|(n, _)| n).collect()
}

/// Everything that reading the anatomy may look at.
fn observe(graph: &Graph, flow: &Flow<'_>, trace: &Trace) -> Vec<ValueId> {
    let mut wanted = BTreeSet::from([flow.start(), flow.output()]);
    wanted.extend(graph.outputs().iter().map(|p| p.value));
    wanted.extend(&trace.tail);
    if let Some(first) = trace.layers.first() {
        wanted.extend(flow.chain_to(first.start));
    }
    for a in &trace.attentions {
        wanted.insert(a.softmax.scores);
        wanted.insert(a.softmax.output);
        for list in [&a.pattern, &a.value, &a.z] {
            wanted.extend(list);
        }
        if let Ok(score) = &a.score {
            for list in [&score.left, &score.right, &score.path] {
                wanted.extend(list);
            }
        }
    }
    for layer in &trace.layers {
        wanted.extend([layer.start, layer.end]);
        wanted.extend(layer.attention_out.iter().flatten());
        let cross = layer.cross.as_ref();
        wanted.extend(cross.and_then(|c| c.out.as_ref().ok()));
        for block in [&layer.attention_block, &layer.mlp_block]
            .into_iter()
            .flatten()
            .chain(cross.map(|c| &c.block))
        {
            wanted.extend([block.start, block.skip, block.end]);
            wanted.extend(&block.branches);
        }
        if let Ok(mlp) = &layer.mlp {
            wanted.extend([mlp.pre, mlp.out]);
            wanted.extend(mlp.pre_linear);
            wanted.extend(&mlp.post);
        }
    }
    wanted.extend(&trace.added);
    // Constants and inputs are known without a run.
    wanted
        .into_iter()
        .filter(|v| graph.producer(*v).is_some())
        .collect()
}
