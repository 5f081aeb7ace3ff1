//! What attention says: where information could have come from.
//!
//! ```text
//!   rollout (Abnar and Zuidema 2020)     A' = norm(mean_h A + I);  R = A'_L ... A'_1
//!   flow (the same)                      maximum flow from a position of the last layer to each token, through the graph of the A'
//!   gradient x attention (Chefer 2021)   R = R + mean_h max(0, dF/dA * A) R, from R = I, first layer first
//!   value zeroing (Mohebbi et al. 2023)  V[i, j] = cosine distance of what leaves the layer at i, with the value vectors of j zero;
//!                                        rows sum to one, combined by multiplication
//! ```
//!
//! The scores are the row of one position: that of the target, the last of causal models, the first otherwise, or the caller's.

use std::collections::BTreeMap;

use petgraph::{algo::dinics, graph::DiGraph};

use super::{
    Attributed, Cost, Explanation, Extent, Extra,
    baseline::{moved, no_hook},
};
use crate::{
    engine::EngineError,
    ipc::{
        info::{HookInfo, ModelInfo},
        spec::Reduction,
    },
    methods::{
        subject::{Show, Subject, floats},
        target,
    },
    tensor::Tensor,
};

/// Most tokens of a flow: one maximum flow for each, through a graph of a square of them for each layer.
const MOST_FLOW_TOKENS: usize = 128;

/// Which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Attention rollout.
    Rollout,
    /// Attention flow.
    Flow,
    /// Gradient times attention.
    Gradient,
    /// Value zeroing.
    ValueZeroing,
}

impl Kind {
    /// The method's name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Rollout => "attention_rollout",
            Kind::Flow => "attention_flow",
            Kind::Gradient => "gradient_attention",
            Kind::ValueZeroing => "value_zeroing",
        }
    }

    pub(super) const fn site(self) -> &'static str {
        match self {
            Kind::Rollout | Kind::Flow | Kind::Gradient => "blocks.*.attn.hook_pattern",
            Kind::ValueZeroing => "blocks.*.attn.hook_v",
        }
    }

    pub(super) fn cost(self, extent: Extent) -> Cost {
        match self {
            Kind::Rollout | Kind::Flow => Cost::forward(1),
            Kind::Gradient => Cost::gradient(1),
            Kind::ValueZeroing => Cost::forward(1 + extent.layers * extent.units),
        }
    }
}

/// A square matrix, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Square {
    /// Rows.
    pub n: usize,
    /// Numbers.
    pub values: Vec<f64>,
}

impl Square {
    /// Ones on the diagonal.
    pub fn identity(n: usize) -> Self {
        let mut values = vec![0.0; n * n];
        for at in 0..n {
            values[at * n + at] = 1.0;
        }
        Self { n, values }
    }

    /// A row.
    pub fn row(&self, at: usize) -> &[f64] {
        &self.values[at * self.n..(at + 1) * self.n]
    }

    /// `self * other`.
    pub fn times(&self, other: &Self) -> Self {
        let n = self.n;
        let mut values = vec![0.0; n * n];
        for (row, of) in values
            .chunks_exact_mut(n.max(1))
            .zip(self.values.chunks_exact(n.max(1)))
        {
            for (k, a) in of.iter().enumerate() {
                for (v, b) in row.iter_mut().zip(other.row(k)) {
                    *v += a * b;
                }
            }
        }
        Self { n, values }
    }

    fn plus(mut self, other: &Self) -> Self {
        for (a, b) in self.values.iter_mut().zip(&other.values) {
            *a += b;
        }
        self
    }

    /// Every row sums to one, unless it is zero.
    fn normalised(mut self) -> Self {
        for row in self.values.chunks_exact_mut(self.n.max(1)) {
            let sum: f64 = row.iter().sum();
            if sum > 0.0 {
                for v in row {
                    *v /= sum;
                }
            }
        }
        self
    }
}

/// Rollout of the patterns of every layer, each `[head, query, key]`, first layer first.
pub fn rollout(layers: &[Square]) -> Option<Square> {
    let n = layers.first()?.n;
    let all = layers.iter().fold(Square::identity(n), |rolled, layer| {
        augmented(layer).times(&rolled)
    });
    Some(all)
}

/// With the residual stream: `norm(A + I)`.
fn augmented(mean: &Square) -> Square {
    mean.clone().plus(&Square::identity(mean.n)).normalised()
}

/// The maximum flow from a position of the last layer to every token.
pub fn flow(layers: &[Square], from: usize) -> Vec<f64> {
    let Some(n) = layers.first().map(|l| l.n) else {
        return Vec::new();
    };
    let mut graph: DiGraph<(), f64> = DiGraph::new();
    // Node `level * n + position`; level 0 holds the tokens.
    let nodes: Vec<_> = (0..(layers.len() + 1) * n)
        .map(|_| graph.add_node(()))
        .collect();
    for (level, layer) in layers.iter().enumerate() {
        let layer = augmented(layer);
        for query in 0..n {
            for (key, weight) in layer.row(query).iter().enumerate() {
                if *weight > 0.0 {
                    graph.add_edge(
                        nodes[(level + 1) * n + query],
                        nodes[level * n + key],
                        *weight,
                    );
                }
            }
        }
    }
    let source = nodes[layers.len() * n + from];
    (0..n)
        .map(|token| dinics(&graph, source, nodes[token]).0)
        .collect()
}

pub(super) async fn run(
    kind: Kind,
    position: Option<i32>,
    e: &mut Explanation,
) -> Result<Attributed, EngineError> {
    let info = e.subject.handle.info().clone();
    let patterns = of_every_layer(&info, "attn.hook_pattern")?;
    match kind {
        Kind::Rollout | Kind::Flow => {
            let layers = attentions(&mut e.subject, &patterns).await?;
            let at = position_of(position, e, layers.first())?;
            if kind == Kind::Rollout {
                let rolled = rollout(&layers)
                    .ok_or_else(|| EngineError::internal("no layer was captured"))?;
                return answer(
                    e,
                    rolled.row(at).to_vec(),
                    "rollout of attention with residual connections",
                    vec![matrix("rollout", &rolled)?],
                );
            }
            let n = layers.first().map_or(0, |l| l.n);
            if n > MOST_FLOW_TOKENS {
                return Err(EngineError::invalid(
                    "position",
                    format!(
                        "a flow is computed for at most {MOST_FLOW_TOKENS} tokens, the input has {n}: use rollout"
                    ),
                ));
            }
            let scores = tokio::task::spawn_blocking(move || flow(&layers, at))
                .await
                .map_err(EngineError::internal)?;
            answer(
                e,
                scores,
                "maximum flow of attention with residual connections",
                Vec::new(),
            )
        }
        Kind::Gradient => {
            let relevance = chefer(&mut e.subject, &patterns).await?;
            let at = position_of(position, e, Some(&relevance))?;
            let extra = matrix("relevance", &relevance)?;
            answer(
                e,
                relevance.row(at).to_vec(),
                "R = R + mean over heads of max(0, gradient x attention) R",
                vec![extra],
            )
        }
        Kind::ValueZeroing => {
            let pattern = attentions(&mut e.subject, &patterns[..1]).await?;
            let positions = pattern.first().map_or(0, |p| p.n);
            let layers = zeroed(&mut e.subject, &info, positions).await?;
            let at = position_of(position, e, pattern.first())?;
            let n = layers.first().map_or(0, |l| l.n);
            let all = layers.iter().fold(Square::identity(n), |rolled, l| {
                l.clone().normalised().times(&rolled)
            });
            #[allow(clippy::cast_possible_truncation)] // sent in single precision
            let flat: Vec<f32> = layers
                .iter()
                .flat_map(|l| l.values.iter().map(|v| *v as f32))
                .collect();
            let tensor =
                Tensor::from_f32(vec![layers.len(), n, n], &flat).map_err(EngineError::internal)?;
            let extra = Extra {
                name: "value_zeroing",
                axes: vec!["layer", "query", "key"],
                tensor,
            };
            answer(
                e,
                all.row(at).to_vec(),
                "cosine distance under value zeroing, rows normalised, rolled out",
                vec![extra],
            )
        }
    }
}

fn answer(
    e: &Explanation,
    units: Vec<f64>,
    convention: &str,
    extras: Vec<Extra>,
) -> Result<Attributed, EngineError> {
    Ok(Attributed {
        scores: e.features_of(units.len()).sums(&units),
        convention: convention.to_owned(),
        extras,
        ..Attributed::default()
    })
}

fn matrix(name: &'static str, square: &Square) -> Result<Extra, EngineError> {
    #[allow(clippy::cast_possible_truncation)] // sent in single precision
    let values: Vec<f32> = square.values.iter().map(|v| *v as f32).collect();
    Ok(Extra {
        name,
        axes: vec!["query", "key"],
        tensor: Tensor::from_f32(vec![square.n, square.n], &values)
            .map_err(EngineError::internal)?,
    })
}

/// Whose row is the answer.
fn position_of(
    given: Option<i32>,
    e: &Explanation,
    pattern: Option<&Square>,
) -> Result<usize, EngineError> {
    let n = pattern.map_or(e.subject.length(), |p| p.n);
    if let Some(given) = given {
        return Ok(target::at(given, Some(n), "position")? as usize);
    }
    let read = e
        .subject
        .objective
        .terms
        .iter()
        .filter_map(|t| t.position)
        .max();
    if let (Some(position), None) = (read, &e.subject.objective.at) {
        return Ok(position as usize);
    }
    // Where the first position looks at nothing behind it, the last one is what is read.
    let causal = pattern.is_some_and(|p| n > 1 && p.row(0)[1..].iter().all(|v| *v == 0.0));
    Ok(if causal { n - 1 } else { 0 })
}

/// A hook point of every layer, first layer first.
fn of_every_layer<'a>(info: &'a ModelInfo, kind: &str) -> Result<Vec<&'a HookInfo>, EngineError> {
    let layers: Vec<&HookInfo> = (0..info.dims.layers)
        .map(|l| {
            let name = format!("blocks.{l}.{kind}");
            info.hook(&name).ok_or_else(|| no_hook(info, &name))
        })
        .collect::<Result<_, _>>()?;
    if layers.is_empty() {
        return Err(no_hook(info, &format!("blocks.0.{kind}")));
    }
    Ok(layers)
}

/// What leaves each layer: where a layer ends with a norm, not the sum before it.
fn leaving(info: &ModelInfo) -> Result<Vec<&HookInfo>, EngineError> {
    let sums = of_every_layer(info, "hook_resid_post")?;
    let normalised = |l: usize| info.hook(&format!("blocks.{l}.hook_normalized_resid_post"));
    Ok(sums
        .iter()
        .enumerate()
        .map(|(l, sum)| normalised(l).unwrap_or(sum))
        .collect())
}

/// The patterns of layers, mean over heads.
async fn attentions(
    subject: &mut Subject,
    hooks: &[&HookInfo],
) -> Result<Vec<Square>, EngineError> {
    let show = Show {
        expose: hooks.iter().map(|h| h.name.clone()).collect(),
        ..Show::default()
    };
    let order: Vec<String> = show.expose.iter().cloned().collect();
    let mut found: BTreeMap<String, Square> = BTreeMap::new();
    subject
        .run(
            &show,
            (1, 1),
            |_| Ok(Vec::new()),
            |_, _, tensors| {
                for (at, name) in order.iter().enumerate() {
                    found.insert(name.clone(), mean_of_heads(tensors, at, None)?);
                }
                Ok(())
            },
        )
        .await?;
    let layer = |h: &&HookInfo| found.remove(&h.name);
    hooks
        .iter()
        .map(layer)
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| EngineError::internal("a layer's pattern did not come"))
}

/// Mean over heads of a pattern, or of `max(0, gradient * pattern)`.
fn mean_of_heads(
    tensors: &[Tensor],
    pattern: usize,
    gradient: Option<usize>,
) -> Result<Square, EngineError> {
    let shape = tensors.get(pattern).map(Tensor::shape).unwrap_or_default();
    let [.., heads, queries, keys] = shape[..] else {
        return Err(EngineError::internal(format!(
            "a pattern of shape {shape:?}"
        )));
    };
    if queries != keys {
        return Err(EngineError::precondition(format!(
            "attention of {queries} queries to {keys} keys cannot be followed through the layers"
        )));
    }
    let values = floats(tensors, pattern)?;
    let gradients = gradient.map(|at| floats(tensors, at)).transpose()?;
    let n = queries;
    let mut mean = vec![0.0; n * n];
    for (at, value) in values.iter().enumerate().take(heads * n * n) {
        let v = match &gradients {
            None => f64::from(*value),
            Some(g) => (f64::from(*value) * f64::from(g[at])).max(0.0),
        };
        mean[at % (n * n)] += v / heads as f64;
    }
    Ok(Square { n, values: mean })
}

async fn chefer(subject: &mut Subject, hooks: &[&HookInfo]) -> Result<Square, EngineError> {
    let names: Vec<String> = hooks.iter().map(|h| h.name.clone()).collect();
    let show = Show {
        points: names
            .iter()
            .map(|n| (n.clone(), Reduction::Whole))
            .collect(),
        expose: names.iter().cloned().collect(),
        ..Show::default()
    };
    // Both come in the order of names.
    let order: Vec<&String> = show.points.keys().collect();
    let place: Vec<usize> = names
        .iter()
        .map(|name| order.iter().position(|n| *n == name).unwrap_or_default())
        .collect();
    let mut relevance = None;
    subject
        .run(
            &show,
            (1, 1),
            |_| Ok(Vec::new()),
            |_, _, tensors| {
                let mut all: Option<Square> = None;
                for at in &place {
                    let layer = mean_of_heads(tensors, names.len() + at, Some(*at))?;
                    let before = all.take().unwrap_or_else(|| Square::identity(layer.n));
                    all = Some(before.clone().plus(&layer.times(&before)));
                }
                relevance = all;
                Ok(())
            },
        )
        .await?;
    relevance.ok_or_else(|| EngineError::internal("no layer was captured"))
}

/// How far each position of each layer moves when the values of each token are zero.
async fn zeroed(
    subject: &mut Subject,
    info: &ModelInfo,
    n: usize,
) -> Result<Vec<Square>, EngineError> {
    let values = of_every_layer(info, "attn.hook_v")?;
    let after = leaving(info)?;
    let mut matrices = Vec::with_capacity(values.len());
    for (v, post) in values.iter().zip(&after) {
        let show = Show {
            expose: [post.name.clone()].into(),
            ..Show::default()
        }
        .moving(&v.name);
        let rank = v.axes.len();
        let mut out: Vec<Vec<f32>> = vec![Vec::new(); n + 1];
        // Row `n` is the input as it is.
        subject
            .run(
                &show,
                (n + 1, n * size_of::<f32>()),
                |rows| {
                    let mut scale = vec![1.0; rows.len() * n];
                    for (i, row) in rows.clone().enumerate().filter(|(_, row)| *row < n) {
                        scale[i * n + row] = 0.0;
                    }
                    let mut along = vec![1; rank];
                    along[0] = rows.len();
                    let still = along.clone();
                    along[1] = n;
                    moved(
                        info,
                        &v.name,
                        (along, &scale),
                        (still, &vec![0.0; rows.len()]),
                    )
                },
                |_, rows, tensors| {
                    let all = floats(tensors, 0)?;
                    let size = (all.len() / rows.len().max(1)).max(1);
                    for (row, values) in rows.zip(all.chunks_exact(size)) {
                        out[row] = values.to_vec();
                    }
                    Ok(())
                },
            )
            .await?;
        let plain = out
            .pop()
            .ok_or_else(|| EngineError::internal("no row was run"))?;
        let width = plain.len() / n.max(1);
        let mut square = vec![0.0; n * n];
        for (token, moved) in out.iter().enumerate() {
            for position in 0..n {
                let part = position * width..(position + 1) * width;
                square[position * n + token] = cosine_distance(&plain[part.clone()], &moved[part]);
            }
        }
        matrices.push(Square { n, values: square });
    }
    Ok(matrices)
}

/// `1 - cos(a, b)`, as half the square of the distance of the directions: vectors that hardly differ keep their digits.
fn cosine_distance(a: &[f32], b: &[f32]) -> f64 {
    let length = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let (x, y) = (length(a), length(b));
    if x <= 0.0 || y <= 0.0 {
        return 0.0;
    }
    let apart = a
        .iter()
        .zip(b)
        .map(|(a, b)| (f64::from(*a) / x - f64::from(*b) / y).powi(2));
    apart.sum::<f64>() / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn square(values: &[f64]) -> Square {
        Square {
            n: 2,
            values: values.to_vec(),
        }
    }

    #[test]
    fn a_rollout_multiplies_from_the_first_layer_up() {
        let (first, second) = (square(&[1.0, 0.0, 1.0, 0.0]), square(&[0.0, 1.0, 0.0, 1.0]));
        // norm(A + I): [[1, 0], [.5, .5]], then [[.5, .5], [0, 1]].
        let rolled = rollout(&[first, second]).unwrap();
        assert_eq!(rolled.values, [0.75, 0.25, 0.5, 0.5]);
        assert!(rollout(&[]).is_none());
    }

    #[test]
    fn a_flow_is_bounded_by_the_narrowest_edge() {
        let layer = square(&[1.0, 0.0, 1.0, 0.0]);
        // One layer: the flow is the edge itself.
        assert_eq!(flow(std::slice::from_ref(&layer), 1), [0.5, 0.5]);
        let two = flow(&[layer.clone(), layer], 1);
        // To token 1: only by 1, .5 both times. To token 0: .5 by 0 and .5 by 1.
        assert_eq!(two, [1.0, 0.5]);
    }

    #[test]
    fn rows_of_zeros_stay() {
        assert_eq!(
            square(&[0.0, 0.0, 2.0, 2.0]).normalised().values,
            [0.0, 0.0, 0.5, 0.5]
        );
    }
}
