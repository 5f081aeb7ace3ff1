//! Direct logit attribution (Elhage et al. 2021; TransformerLens's `logit_attrs`): what each part of the model writes into the residual stream, as
//! the target reads it.
//!
//! ```text
//!   end                     = embed + sum over layers of (attn_out + cross_attn_out + mlp_out)
//!   u[position]             = dF/d end, the size that the final norm divides by held at what it is (the cached scale)
//!   contribution[c, p]      = c[p] . u[p]                                for every component c
//!   bias                    = F - sum of all contributions               the final norm's bias and that of the head
//!   head[l, h, p]           = (z_h W_O)[p] . u[p],     attn_out = sum over h of z_h W_O + b_O
//! ```
//!
//! `u` is what the rules of AttnLRP hand down to the end: for a final norm and an unembedding exactly the unembedding of the target through the
//! norm with its cached scale. A head with an activation in it (a pooler's tanh, the transform of a masked language model) is not linear: there a
//! contribution is a share by the identity rule `y / x`. Which it is shows by what the head says of a state of zeros: for an affine head that
//! is the bias.
//!
//! A stream that is no plain sum of what layers write (norms behind the sum, scaled skips) has no such attribution, and none is made up: the sum is
//! checked for every row.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Terms,
    head::{distance, tolerance},
    rows::Rows,
    stream::Stream,
};
use crate::{
    engine::{EngineError, PickSpec},
    ipc::{
        info::{Axis, HookInfo, ModelInfo},
        spec::{Reduction, Rules, VariantSpec, state_input},
    },
    methods::{
        attribute::baseline::{named, no_hook},
        subject::{Show, Subject, floats},
    },
};

/// Most bytes of inputs of a job.
const BYTES_AT_A_TIME: usize = 32 << 20;

/// What a part of the model contributes.
#[derive(Clone, Debug, PartialEq)]
pub struct Direct {
    /// F of the input.
    pub value: f64,
    /// What no component contributes.
    pub bias: f64,
    /// F where the end is zero, which is the bias if the head is affine in what the norm makes of it.
    pub of_nothing: Option<f64>,
    /// Names of the components: hook points, the first of them what enters the first layer.
    pub components: Vec<String>,
    /// `[component, position]`
    pub contributions: Vec<f64>,
    /// Of heads, where they were asked for.
    pub heads: Option<Heads>,
}

/// What heads contribute.
#[derive(Clone, Debug, PartialEq)]
pub struct Heads {
    /// Layers that have heads.
    pub layers: Vec<u32>,
    /// Heads of the layer that has most.
    pub heads: usize,
    /// `[layer, head, position]`; NaN for heads that a layer does not have.
    pub contributions: Vec<f64>,
    /// What attention writes without any head, the bias of its projection: `[layer, position]`.
    pub bias: Vec<f64>,
}

impl Direct {
    /// Whether the head is affine in what the norm makes of the end, as far as can be told.
    pub fn is_affine(&self) -> Option<bool> {
        let nothing = self.of_nothing.filter(|f| f.is_finite())?;
        let size = self.contributions.iter().map(|c| c.abs()).sum::<f64>();
        let size = size.max(self.value.abs()).max(self.bias.abs());
        Some((nothing - self.bias).abs() <= 1e-4 * size)
    }
}

/// What of a layer writes into the stream, in the order of the graph.
const WRITERS: [&str; 3] = ["hook_attn_out", "hook_cross_attn_out", "hook_mlp_out"];

/// A layer whose attention writes into the stream by heads.
#[derive(Clone, Debug)]
pub(in crate::methods) struct Layer {
    /// Its number.
    pub(in crate::methods) number: u32,
    /// Hook point of its heads.
    pub(in crate::methods) z: String,
    /// Hook point of what it writes.
    pub(in crate::methods) out: String,
    /// How many heads.
    pub(in crate::methods) heads: usize,
    d_head: usize,
}

/// The components of a model, in the order of the graph.
///
/// # Errors
/// [`EngineError::FailedPrecondition`] for a model whose layers normalise their sums.
pub(in crate::methods) fn components(
    info: &ModelInfo,
    stream: &Stream,
) -> Result<Vec<String>, EngineError> {
    if stream.normalised {
        return Err(EngineError::precondition(format!(
            "every layer of model \"{}\" normalises its own sum, so that its stream is no sum of what layers write: there is no direct logit \
             attribution; ask for the lens alone, or for an attribution of the input",
            info.name
        )));
    }
    let mut all = vec![stream.states[0].clone()];
    for layer in 0..info.dims.layers {
        for part in WRITERS {
            let name = format!("blocks.{layer}.{part}");
            all.extend(info.hook(&name).map(|h| h.name.clone()));
        }
    }
    Ok(all)
}

/// The layers whose heads can be told apart.
///
/// # Errors
/// [`EngineError::FailedPrecondition`] where they cannot.
pub(in crate::methods) fn layers(info: &ModelInfo) -> Result<Vec<Layer>, EngineError> {
    let mut found = Vec::new();
    for number in 0..info.dims.layers {
        let name = |inside: &str| format!("blocks.{number}.{inside}");
        let Some(out) = info.hook(&name("hook_attn_out")) else {
            continue;
        };
        let z = info.hook(&name("attn.hook_z"));
        let z: &HookInfo = z.ok_or_else(|| no_hook(info, &name("attn.hook_z")))?;
        let ([Axis::Batch, Axis::Pos, Axis::Head, Axis::DHead], Some(heads), Some(d_head)) =
            (&z.axes[..], z.dims[2], z.dims[3])
        else {
            let axes: Vec<&str> = z.axes.iter().map(Axis::name).collect();
            return Err(EngineError::precondition(format!(
                "\"{}\" has the axes {}: heads cannot be told apart",
                z.name,
                axes.join(", ")
            )));
        };
        found.push(Layer {
            number: u32::try_from(number).unwrap_or(u32::MAX),
            z: z.name.clone(),
            out: out.name.clone(),
            heads,
            d_head,
        });
    }
    if found.is_empty() {
        return Err(EngineError::precondition(format!(
            "model \"{}\" has no attention whose heads could be told apart",
            info.name
        )));
    }
    Ok(found)
}

/// Rows that heads take beside the one that runs backwards; none where they cannot be told apart.
pub(super) fn cost(info: &ModelInfo, stream: &Stream, heads: bool) -> Result<usize, EngineError> {
    components(info, stream)?;
    if !heads {
        return Ok(1);
    }
    let heads = |layers: Vec<Layer>| layers.iter().map(|l| l.heads).max();
    let most = layers(info).map_or(None, heads);
    Ok(most.map_or(1, |most| 2 + most))
}

/// What a row shows.
struct Seen {
    value: f64,
    /// `[position, width]`
    functional: Vec<f32>,
    /// By hook point: `[position, ...]`.
    values: BTreeMap<String, Vec<f32>>,
}

/// What there is of the heads; where they cannot be told apart, a note says why.
fn told<T>(
    found: Result<T, EngineError>,
    notes: &mut Vec<String>,
) -> Result<Option<T>, EngineError> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(EngineError::FailedPrecondition { message }) => {
            notes.push(format!("no contributions of heads: {message}"));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Attributes the objective of a row. Heads that cannot be told apart are left out, with a note.
///
/// # Errors
/// [`EngineError::FailedPrecondition`] for a model whose stream is no sum; those of the runs.
pub(super) async fn direct(
    subject: &mut Subject,
    stream: &Stream,
    (heads, notes): (bool, &mut Vec<String>),
    terms: Terms,
) -> Result<Direct, EngineError> {
    let info = subject.handle.info().clone();
    let components = components(&info, stream)?;
    let layers = match heads {
        true => told(layers(&info), notes)?.unwrap_or_default(),
        false => Vec::new(),
    };
    let mut expose: BTreeSet<String> = components.iter().cloned().collect();
    expose.insert(stream.end().to_owned());
    expose.extend(layers.iter().map(|l| l.z.clone()));
    let seen = see(subject, stream, expose, terms).await?;
    let end = of(&seen.values, stream.end())?;
    let width = stream.width.max(1);
    let positions = end.len() / width;
    let mut sum = vec![0f64; end.len()];
    let mut contributions = Vec::with_capacity(components.len() * positions);
    for component in &components {
        let values = of(&seen.values, component)?;
        if values.len() != end.len() {
            return Err(EngineError::precondition(format!(
                "\"{component}\" is of another size than the end of the stream: the stream is no sum of what layers write"
            )));
        }
        for (sum, v) in sum.iter_mut().zip(values) {
            *sum += f64::from(*v);
        }
        contributions.extend(read(values, &seen.functional, width));
    }
    #[allow(clippy::cast_possible_truncation)]
    // compared with what was computed in single precision
    let sum: Vec<f32> = sum.iter().map(|s| *s as f32).collect();
    let (off, allowed) = (distance(&sum, end), tolerance(stream.dtype));
    if off > allowed {
        return Err(EngineError::precondition(format!(
            "what enters the first layer and what layers write sum up to something {off:.1e} off \"{}\" where {allowed:.0e} is allowed{}: \
             there is no direct logit attribution",
            stream.end(),
            lacking(&info)
        )));
    }
    let bias = seen.value - contributions.iter().sum::<f64>();
    let heads = if layers.is_empty() {
        None
    } else {
        told(by_head(subject, stream, &layers, &seen).await, notes)?
    };
    Ok(Direct {
        value: seen.value,
        bias,
        of_nothing: None,
        components,
        contributions,
        heads,
    })
}

/// Why something that layers write may not be known.
fn lacking(info: &ModelInfo) -> String {
    let missing = info.missing.iter();
    missing
        .filter(|m| WRITERS.iter().any(|w| m.hook.ends_with(w)))
        .map(|m| format!(" (no \"{}\": {})", m.hook, m.reason))
        .next()
        .unwrap_or_default()
}

/// Runs the row forward, and backward to the end of the stream.
async fn see(
    subject: &mut Subject,
    stream: &Stream,
    expose: BTreeSet<String>,
    terms: Terms,
) -> Result<Seen, EngineError> {
    if let Some(length) = subject.row.length.or(stream.fixed) {
        let numbers = [expose.len() + 1, length, stream.width, size_of::<f32>()];
        let bytes = numbers.into_iter().fold(1, usize::saturating_mul);
        if bytes > terms.max_bytes {
            return Err(EngineError::exhausted(
                format!(
                    "the attribution would take {bytes} bytes, more than the limit of {}: give a shorter input",
                    terms.max_bytes
                ),
                None,
            ));
        }
    }
    let show = Show {
        objective: true,
        points: BTreeMap::from([(stream.end().to_owned(), Reduction::Whole)]),
        rules: Rules::AttnLrp,
        expose,
        ..Show::default()
    };
    let mut seen = None;
    subject
        .run(
            &show,
            (1, 1),
            |_| Ok(Vec::new()),
            |_, _, tensors| {
                let value = floats(tensors, 0)?;
                let value = value.first().copied().map_or(f64::NAN, f64::from);
                let shown = show.expose.iter().enumerate();
                seen = Some(Seen {
                    value,
                    functional: floats(tensors, 1)?,
                    values: shown
                        .map(|(at, name)| Ok((name.clone(), floats(tensors, at + 2)?)))
                        .collect::<Result<_, EngineError>>()?,
                });
                Ok(())
            },
        )
        .await?;
    let seen = seen.ok_or_else(|| EngineError::internal("a row ended without its answer"))?;
    if !seen.value.is_finite() || seen.functional.iter().any(|u| !u.is_finite()) {
        return Err(EngineError::precondition(format!(
            "the target's value for this input is {}, or its gradient is not finite: there is nothing to attribute",
            seen.value
        )));
    }
    Ok(seen)
}

fn of<'a>(values: &'a BTreeMap<String, Vec<f32>>, name: &str) -> Result<&'a [f32], EngineError> {
    let found = values.get(name).map(Vec::as_slice);
    found.ok_or_else(|| EngineError::internal(format!("a row ended without \"{name}\"")))
}

/// At each position, a vector as a functional reads it.
fn read<'a>(
    vectors: &'a [f32],
    functional: &'a [f32],
    width: usize,
) -> impl Iterator<Item = f64> + 'a {
    let pairs = vectors
        .chunks_exact(width)
        .zip(functional.chunks_exact(width));
    pairs.map(|(v, u)| {
        let products = v.iter().zip(u).map(|(v, u)| f64::from(*v) * f64::from(*u));
        products.sum()
    })
}

/// What heads write through the output projection of their layer: `[layer][row][position, width]` at the positions that are read. A row for each head, of
/// all layers that have it, with every other head zero; the last row is what is written without any. `z` has what stands at the heads of each
/// layer, `[position, head, d_head]`, by name.
///
/// # Errors
/// Those of the runs.
pub(in crate::methods) async fn written(
    subject: &mut Subject,
    stream: &Stream,
    layers: &[Layer],
    (z, positions): (&BTreeMap<String, Vec<f32>>, usize),
    read_at: &[usize],
) -> Result<Vec<Vec<Vec<f32>>>, EngineError> {
    if layers.is_empty() {
        return Ok(Vec::new());
    }
    let width = stream.width.max(1);
    let heads = layers.iter().map(|l| l.heads).max().unwrap_or_default();
    let rows = Rows::of(subject, positions, stream.fixed);
    let kept: Vec<usize> = if rows.short {
        read_at.to_vec()
    } else {
        (0..positions).collect()
    };
    let picked: Vec<u32> = if rows.short {
        Vec::new()
    } else {
        read_at
            .iter()
            .filter_map(|p| u32::try_from(*p).ok())
            .collect()
    };
    let spec = VariantSpec {
        keep_outputs: false,
        enter: layers.iter().map(|l| l.z.clone()).collect(),
        ..VariantSpec::exposing(layers.iter().map(|l| l.out.clone()))
    };
    let picks: Vec<PickSpec> = layers
        .iter()
        .map(|l| PickSpec {
            output: l.out.clone(),
            positions: picked.clone(),
            ..PickSpec::default()
        })
        .collect();
    let row_numbers: usize = layers
        .iter()
        .map(|l| kept.len() * (l.heads * l.d_head + width))
        .sum();
    let at_a_time = (BYTES_AT_A_TIME / (row_numbers * size_of::<f32>()).max(1)).max(1);
    let at_a_time = if rows.alone { 1 } else { at_a_time };
    let all = heads + 1;
    let mut written = vec![vec![Vec::new(); all]; layers.len()];
    for from in (0..all).step_by(at_a_time) {
        let chunk = from..all.min(from + at_a_time);
        let states = layers.iter().map(|layer| {
            let z = of(z, &layer.z)?;
            let mut values = Vec::with_capacity(chunk.len() * kept.len() * layer.heads);
            for row in chunk.clone() {
                for head in kept
                    .iter()
                    .flat_map(|p| (0..layer.heads).map(move |h| (p, h)))
                {
                    let (position, head) = head;
                    let begins = (position * layer.heads + head) * layer.d_head;
                    if head == row {
                        values.extend_from_slice(&z[begins..begins + layer.d_head]);
                    } else {
                        values.resize(values.len() + layer.d_head, 0.0);
                    }
                }
            }
            let info = subject.info().hook(&layer.z);
            let dtype = info.map_or(stream.dtype, |h| h.dtype);
            let shape = vec![chunk.len(), kept.len(), layer.heads, layer.d_head];
            named(&state_input(&layer.z), shape, &values, dtype)
        });
        let states = states.collect::<Result<Vec<_>, _>>()?;
        let extent = (chunk.len(), kept.len());
        let group = rows.group(subject, extent, states, picks.clone())?;
        let mut queued = subject.submit(spec.clone(), vec![group], true).await?;
        while let Some(done) = subject.next(&mut queued).await? {
            for (at, written) in written.iter_mut().enumerate() {
                let values = floats(&done.tensors, at)?;
                let size = (values.len() / done.rows.len().max(1)).max(1);
                for (row, values) in done.rows.clone().zip(values.chunks_exact(size)) {
                    if let Some(here) = written.get_mut(chunk.start + row) {
                        *here = values.to_vec();
                    }
                }
            }
        }
    }
    Ok(written)
}

/// What each head writes, as the target reads it.
async fn by_head(
    subject: &mut Subject,
    stream: &Stream,
    layers: &[Layer],
    seen: &Seen,
) -> Result<Heads, EngineError> {
    let width = stream.width.max(1);
    let positions = seen.functional.len() / width;
    // Positions that the target does not read directly contribute nothing, whatever is written there.
    let read_at: Vec<usize> = (0..positions)
        .filter(|p| {
            seen.functional[p * width..][..width]
                .iter()
                .any(|u| *u != 0.0)
        })
        .collect();
    let heads = layers.iter().map(|l| l.heads).max().unwrap_or_default();
    let mut found = Heads {
        layers: layers.iter().map(|l| l.number).collect(),
        heads,
        contributions: vec![0.0; layers.len() * heads * positions],
        bias: vec![0.0; layers.len() * positions],
    };
    for (at, layer) in layers.iter().enumerate() {
        let lacks = (at * heads + layer.heads) * positions..(at + 1) * heads * positions;
        found.contributions[lacks].fill(f64::NAN);
    }
    if read_at.is_empty() {
        return Ok(found);
    }
    let written = written(subject, stream, layers, (&seen.values, positions), &read_at).await?;
    let functional: Vec<f32> = read_at
        .iter()
        .flat_map(|p| seen.functional[p * width..][..width].iter().copied())
        .collect();
    for (at, (layer, written)) in layers.iter().zip(&written).enumerate() {
        let (by_head, none) = (&written[..layer.heads], &written[heads]);
        let out = of(&seen.values, &layer.out)?;
        let out: Vec<f32> = read_at
            .iter()
            .flat_map(|p| out[p * width..][..width].iter().copied())
            .collect();
        adds_up(layer, (by_head, none), &out, tolerance(stream.dtype))?;
        let bias: Vec<f64> = read(none, &functional, width).collect();
        for (place, position) in read_at.iter().enumerate() {
            found.bias[at * positions + position] = bias[place];
        }
        for (head, written) in by_head.iter().enumerate() {
            let row = (at * heads + head) * positions;
            let with = read(written, &functional, width).zip(&bias);
            for ((with, bias), position) in with.zip(&read_at) {
                found.contributions[row + position] = with - bias;
            }
        }
    }
    Ok(found)
}

/// Whether attention writes the sum of what its heads write, and a bias.
fn adds_up(
    layer: &Layer,
    (by_head, none): (&[Vec<f32>], &[f32]),
    out: &[f32],
    allowed: f64,
) -> Result<(), EngineError> {
    let mut sum: Vec<f64> = none.iter().map(|b| f64::from(*b)).collect();
    for written in by_head {
        for ((sum, w), b) in sum.iter_mut().zip(written).zip(none) {
            *sum += f64::from(*w) - f64::from(*b);
        }
    }
    #[allow(clippy::cast_possible_truncation)]
    // compared with what was computed in single precision
    let sum: Vec<f32> = sum.iter().map(|s| *s as f32).collect();
    let off = distance(&sum, out);
    if off <= allowed {
        return Ok(());
    }
    Err(EngineError::precondition(format!(
        "what the heads of layer {} write is {off:.1e} off \"{}\" where {allowed:.0e} is allowed (a norm behind the output projection?): heads \
         cannot be told apart",
        layer.number, layer.out
    )))
}
