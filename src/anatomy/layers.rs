//! Residual blocks in the order of the stream become layers.
//!
//! A layer holds one self-attention, with what stands beside it in every other layer: usually one perceptron behind
//! it; one in front as well in a "macaron"; adapters behind it; a cross-attention in a decoder. Of several perceptrons none is
//! *the* perceptron of the layer. Mixers other than attention
//! (convolutions, linear recurrences) followed by a perceptron make a layer without attention, so that layers keep
//! the numbers that their authors gave them.

use super::{
    attention::AttentionTrace,
    blocks::{Block, holds},
    flow::Flow,
    mlp::{MlpTrace, mlp, reached_nodes},
    ops::{dequantises, is_activation, is_layout, is_projection, walk_back},
};
use crate::onnx::{NodeId, ValueId};

const NO_PERCEPTRON: &str = "the layer has no perceptron";

/// One layer, as far as structure tells.
#[derive(Clone, Debug)]
pub struct LayerTrace {
    /// The stream that enters.
    pub start: ValueId,
    /// The stream that leaves, before any norm.
    pub end: ValueId,
    /// Index of its self-attention among the trace's attentions.
    pub attention: Option<usize>,
    /// Its attention to another sequence.
    pub cross: Option<CrossTrace>,
    /// Where the attention is added to the stream.
    pub attention_block: Option<Block>,
    /// What the attention adds to the stream, or why it cannot be told; none without attention.
    pub attention_out: Option<Result<ValueId, String>>,
    /// Where the (last) perceptron is added to the stream.
    pub mlp_block: Option<Block>,
    /// The perceptron, or why there is none to show.
    pub mlp: Result<MlpTrace, String>,
    /// How many perceptrons were found, each adding to the stream.
    pub perceptrons: usize,
    /// Attention and perceptron read the same stream and are added at once.
    pub parallel: bool,
}

/// A cross-attention within a layer.
#[derive(Clone, Debug)]
pub struct CrossTrace {
    /// Its index among the trace's attentions.
    pub attention: usize,
    /// Where it is added to the stream.
    pub block: Block,
    /// What it adds, or why that cannot be told.
    pub out: Result<ValueId, String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Attention(usize),
    Cross(usize),
    Mlp,
    Other,
}

struct Part {
    block: Block,
    kind: Kind,
    mlp: Result<MlpTrace, String>,
    attention_out: Option<Result<ValueId, String>>,
}

/// Layers, and the attentions that belong to none of them.
pub(super) fn layers(
    flow: &Flow<'_>,
    blocks: &[Block],
    attentions: &[AttentionTrace],
) -> (Vec<LayerTrace>, Vec<usize>) {
    let mut owner: Vec<Option<usize>> = vec![None; attentions.len()];
    for (i, attention) in attentions.iter().enumerate() {
        owner[i] = blocks
            .iter()
            .enumerate()
            .filter(|(_, b)| holds(flow, b, attention))
            .max_by_key(|(_, b)| flow.order(b.start))
            .map(|(at, _)| at);
    }
    let parts: Vec<Part> = blocks
        .iter()
        .enumerate()
        .map(|(at, block)| part(flow, block, at, &owner, attentions))
        .collect();
    let orphans = (0..attentions.len())
        .filter(|i| {
            !parts
                .iter()
                .any(|p| p.kind == Kind::Attention(*i) || p.kind == Kind::Cross(*i))
        })
        .collect();
    let groups = group(&parts);
    (
        groups.into_iter().map(|g| layer(&parts, g)).collect(),
        orphans,
    )
}

fn part(
    flow: &Flow<'_>,
    block: &Block,
    at: usize,
    owner: &[Option<usize>],
    attentions: &[AttentionTrace],
) -> Part {
    let mut mine: Vec<usize> = (0..attentions.len())
        .filter(|i| owner[*i] == Some(at))
        .collect();
    // Beside an attention a branch may normalise other weights (of a kernel, of heads): scores come from a product.
    let scored = |i: &usize| attentions[*i].self_attention && attentions[*i].score.is_ok();
    if mine.len() > 1 && mine.iter().any(scored) {
        mine.retain(scored);
    }
    let [one] = mine[..] else {
        let out = block.branches[0];
        let found = mlp(flow, block.start, out);
        let kind = match (&found, mine.is_empty()) {
            (Ok(_), true) => Kind::Mlp,
            (Err(_), true) if routed(flow, block) => Kind::Mlp,
            _ => Kind::Other,
        };
        return Part {
            block: block.clone(),
            kind,
            mlp: found,
            attention_out: None,
        };
    };
    let kind = if attentions[one].self_attention {
        Kind::Attention(one)
    } else {
        Kind::Cross(one)
    };
    let z = attentions[one].z[0];
    let (attention_out, mlp) = match shares(flow, block, z) {
        Ok((attended, Some(out))) => (Ok(attended), mlp(flow, block.start, out)),
        Ok((attended, None)) => (Ok(attended), Err(NO_PERCEPTRON.to_owned())),
        Err(reason) => (Err(reason.clone()), Err(reason)),
    };
    Part {
        block: block.clone(),
        kind,
        mlp,
        attention_out: Some(attention_out),
    }
}

/// Whether tokens are sent to experts in this branch: a perceptron in the order of layers, though not one to show.
fn routed(flow: &Flow<'_>, block: &Block) -> bool {
    super::attention::between(flow, block.start, block.branches[0])
        .into_iter()
        .any(|id| flow.graph().node(id).is_any(&["TopK", "NonZero", "OneHot"]))
}

/// What attention and perceptron each add to the stream in this block.
fn shares(
    flow: &Flow<'_>,
    block: &Block,
    z: ValueId,
) -> Result<(ValueId, Option<ValueId>), String> {
    if let [a, b] = block.branches[..] {
        return match (flow.reaches(z, a), flow.reaches(z, b)) {
            (true, false) => Ok((a, Some(b))),
            (false, true) => Ok((b, Some(a))),
            _ => Err("more than one branch holds the attention".to_owned()),
        };
    }
    let [branch] = block.branches[..] else {
        return Err("attention and perceptron are not told apart in the layer's sum".to_owned());
    };
    // One branch may itself be the sum of both.
    for v in walk_back(flow, branch, is_layout) {
        if let Some((_, node)) = flow.maker(v)
            && node.is("Add")
            && let [a, b] = flow.live_inputs(node)[..]
        {
            match (flow.reaches(z, a), flow.reaches(z, b)) {
                (true, false) if flow.dominates(block.start, b) => return Ok((a, Some(b))),
                (false, true) if flow.dominates(block.start, a) => return Ok((b, Some(a))),
                _ => {}
            }
        }
    }
    if goes_on(flow, z, branch) {
        return Err("one branch holds the attention and a perceptron behind it".to_owned());
    }
    Ok((branch, None))
}

/// Whether a perceptron lies between the product that all of z passes and the end of its branch: a bend with weights behind it. A gate
/// or a norm on the way is none.
fn goes_on(flow: &Flow<'_>, z: ValueId, branch: ValueId) -> bool {
    let node = |id: NodeId| flow.graph().node(id);
    let made = |id: NodeId| node(id).output(0);
    let mut way = reached_nodes(flow, z, branch);
    way.sort_by_key(|id| made(*id).map(|v| flow.order(v)));
    let projects = |id: &&NodeId| {
        let node = node(**id);
        is_projection(flow, node) || dequantises(flow, node)
    };
    let own = way
        .iter()
        .filter(projects)
        .filter_map(|id| made(*id))
        .find(|v| flow.post_dominates(*v, z));
    let Some(own) = own else {
        return false;
    };
    let mut backwards = way.iter().rev().filter(projects);
    let last = backwards.find_map(|id| made(*id));
    way.iter()
        .filter(|id| is_activation(node(**id)))
        .filter_map(|id| made(*id))
        .any(|bend| flow.reaches(own, bend) && last.is_some_and(|l| flow.reaches(bend, l)))
}

/// Ranges of parts that make one layer each.
fn group(parts: &[Part]) -> Vec<Vec<usize>> {
    let attention_at: Vec<usize> = parts
        .iter()
        .enumerate()
        .filter(|(_, p)| matches!(p.kind, Kind::Attention(_)))
        .map(|(i, _)| i)
        .collect();
    let Some((first, last)) = attention_at.first().zip(attention_at.last()) else {
        return mixed(parts);
    };
    let spell = |range: std::ops::Range<usize>| -> String {
        parts[range]
            .iter()
            .map(|p| match p.kind {
                Kind::Attention(_) => 'A',
                Kind::Cross(_) => 'X',
                Kind::Mlp => 'M',
                Kind::Other => 'O',
            })
            .collect()
    };
    // A mixer and its perceptron, the mixer standing behind another perceptron or first of all.
    let whole = spell(0..parts.len());
    if whole.starts_with("OM") || whole.contains("MOM") {
        return mixed(parts);
    }
    let gaps: Vec<String> = attention_at
        .windows(2)
        .map(|w| spell(w[0] + 1..w[1]))
        .collect();
    let tail = spell(*last + 1..parts.len());
    let regular = gaps.windows(2).all(|w| w[0] == w[1]);
    if regular && attention_at.len() > 1 {
        // Of what lies between two attentions, as much belongs behind the first as follows the last one.
        let gap = &gaps[0];
        let behind = gap
            .chars()
            .zip(tail.chars())
            .take_while(|(a, b)| a == b)
            .count();
        let ahead = gap.len() - behind;
        if spell(first.saturating_sub(ahead)..*first) == gap[behind..] {
            return attention_at
                .iter()
                .map(|at| (at - ahead..=(at + behind).min(parts.len() - 1)).collect())
                .collect();
        }
    }
    if attention_at.len() == 1 {
        let until = tail.chars().take_while(|k| *k != 'O').count();
        return vec![(*first..=*first + until).collect()];
    }
    mixed(parts)
}

/// Layers of several kinds: a mixer that a perceptron follows opens a layer as an attention does.
fn mixed(parts: &[Part]) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (i, p) in parts.iter().enumerate() {
        let opens = matches!(p.kind, Kind::Attention(_))
            || (p.kind == Kind::Other && parts.get(i + 1).is_some_and(|n| n.kind == Kind::Mlp));
        if opens {
            groups.push(vec![i]);
        } else if matches!(p.kind, Kind::Mlp | Kind::Cross(_))
            && let Some(open) = groups.last_mut()
        {
            open.push(i);
        }
    }
    groups
}

fn layer(parts: &[Part], group: Vec<usize>) -> LayerTrace {
    let members: Vec<&Part> = group.iter().map(|i| &parts[*i]).collect();
    let attention = members.iter().find_map(|p| match p.kind {
        Kind::Attention(i) => Some((i, *p)),
        Kind::Cross(_) | Kind::Mlp | Kind::Other => None,
    });
    let cross = members
        .iter()
        .find_map(|p| match (p.kind, &p.attention_out) {
            (Kind::Cross(attention), Some(out)) => Some(CrossTrace {
                attention,
                block: p.block.clone(),
                out: out.clone(),
            }),
            (Kind::Cross(_) | Kind::Attention(_) | Kind::Mlp | Kind::Other, _) => None,
        });
    let parallel = attention.is_some_and(|(_, p)| p.mlp.is_ok());
    let separate = members.iter().rev().find(|p| p.kind == Kind::Mlp);
    let apart = members.iter().filter(|p| p.kind == Kind::Mlp).count();
    let perceptrons = apart + usize::from(parallel);
    let mlp = match (perceptrons, separate, attention) {
        (2.., _, _) => Err(format!("the layer has {perceptrons} perceptrons")),
        (_, Some(p), _) => p.mlp.clone(),
        (_, None, Some((_, p))) => p.mlp.clone(),
        (_, None, None) => Err(NO_PERCEPTRON.to_owned()),
    };
    LayerTrace {
        start: members[0].block.start,
        end: members[members.len() - 1].block.end,
        attention: attention.map(|(i, _)| i),
        cross,
        attention_block: attention.map(|(_, p)| p.block.clone()),
        attention_out: attention.and_then(|(_, p)| p.attention_out.clone()),
        mlp_block: separate.map(|p| p.block.clone()),
        mlp,
        perceptrons,
        parallel,
    }
}
