//! Outputs of the file: their axes, what they say about the task, and whether padding shows in them.

use ndarray::{ArrayD, Axis as Nd, Slice};

use super::{
    Found,
    lab::{Lab, array, difference},
};
use crate::{
    anatomy::{
        hooks::{HookPoint, OutputFact},
        layout::Layout,
        trials::Trials,
    },
    ipc::info::{Axis, Dims, InputRole, Task},
    onnx::ValueId,
    tensor::DType,
};

/// Axes of every output, as far as extents tell.
pub(super) fn outputs(lab: &Lab<'_>, dims: &Dims, positions: Option<&[usize]>) -> Vec<OutputFact> {
    lab.model
        .graph
        .outputs()
        .iter()
        .map(|port| {
            let shapes = lab.shapes(port.value).unwrap_or_default();
            let rank = shapes.first().map_or(0, |s| s.len());
            let extents: Vec<Vec<usize>> = (0..rank)
                .map(|axis| shapes.iter().map(|s| s[axis]).collect())
                .collect();
            let axes = axes(lab, dims, positions, &extents);
            OutputFact {
                name: lab.model.graph.name(port.value).to_owned(),
                dims: extents
                    .iter()
                    .map(|e| e.iter().all(|n| *n == e[0]).then_some(e[0]))
                    .zip(&axes)
                    .map(|(d, axis)| d.filter(|_| *axis != Axis::Batch))
                    .collect(),
                axes,
                dtype: lab.dtype(port.value).or(port.dtype()).unwrap_or(DType::F32),
            }
        })
        .collect()
}

fn axes(
    lab: &Lab<'_>,
    dims: &Dims,
    positions: Option<&[usize]>,
    extents: &[Vec<usize>],
) -> Vec<Axis> {
    let (batches, lengths) = (lab.batches(), lab.trials.lengths());
    let mut seen_batch = false;
    let mut seen_pos = false;
    extents
        .iter()
        .enumerate()
        .map(|(i, e)| {
            let last = i + 1 == extents.len();
            if !seen_batch && *e == batches && i == 0 {
                seen_batch = true;
                return Axis::Batch;
            }
            let follows = positions == Some(&e[..])
                || (*e == lengths && lengths[0] != lengths[lengths.len() - 1]);
            if follows && !seen_pos && (!last || e[0] != e[e.len() - 1]) {
                seen_pos = true;
                return Axis::Pos;
            }
            let n = e[0];
            if e.iter().any(|x| *x != n) || !last {
                return Axis::Other(format!("axis{i}"));
            }
            if dims.vocab == Some(n) {
                Axis::Vocab
            } else if dims.d_model == Some(n) {
                Axis::DModel
            } else {
                Axis::Label
            }
        })
        .collect()
}

/// What the model is for, by its main output.
pub(super) fn task(lab: &Lab<'_>, outputs: &[OutputFact], dims: &Dims, causal: bool) -> Task {
    let Some(main) = main(lab, outputs) else {
        return Task::Unknown;
    };
    let pictures = lab
        .trace
        .inputs
        .iter()
        .any(|i| i.role == InputRole::Pixels && i.dims.len() == 4);
    // A head padded to a round number of columns is still a head over the vocabulary.
    let near_vocabulary = match (main.dims.last().copied().flatten(), dims.vocab) {
        (Some(n), Some(v)) => n.abs_diff(v) * 20 <= v,
        _ => false,
    };
    match main.axes[..] {
        [Axis::Batch, Axis::Pos, Axis::Vocab] => lm(causal),
        [Axis::Batch, Axis::Pos, Axis::DModel] | [Axis::Batch, Axis::DModel] => Task::Encoder,
        [Axis::Batch, Axis::Pos, Axis::Label] if near_vocabulary => lm(causal),
        [Axis::Batch, Axis::Pos, Axis::Label] => Task::TokenClassification,
        [Axis::Batch, Axis::Label | Axis::Vocab] if pictures => Task::ImageClassification,
        [Axis::Batch, Axis::Label | Axis::Vocab] => Task::SequenceClassification,
        _ => Task::Unknown,
    }
}

fn lm(causal: bool) -> Task {
    if causal {
        Task::CausalLm
    } else {
        Task::MaskedLm
    }
}

fn main<'o>(lab: &Lab<'_>, outputs: &'o [OutputFact]) -> Option<&'o OutputFact> {
    let name = lab.model.graph.name(lab.trace.output?);
    outputs.iter().find(|o| o.name == name)
}

/// The main output as a hook point, when a head made it.
pub(super) fn logits(lab: &Lab<'_>, found: &mut Found, outputs: &[OutputFact], task: Task) {
    let Some((main, value)) = main(lab, outputs).zip(lab.trace.output) else {
        return;
    };
    if task == Task::Encoder {
        found.lack(
            "logits",
            "the model ends in its representation and has no head",
        );
        return;
    }
    found.hooks.push(HookPoint {
        name: "logits".to_owned(),
        aliases: Vec::new(),
        layer: None,
        value,
        layout: Layout::identity(),
        axes: main.axes.clone(),
        dims: main.dims.clone(),
        dtype: main.dtype,
    });
}

/// Whether a padded row gave what it gave alone, in the stream and in the output.
pub(super) fn pads(lab: &Lab<'_>, found: &Found, outputs: &[OutputFact]) -> bool {
    const EVEN: f64 = 1e-4;
    let lengths = lab.trials.lengths();
    let (Some(short), Some(long), Some(rows)) = (
        lengths.get(Trials::TWINS).copied(),
        lengths.get(Trials::PADDED).copied(),
        lab.batches().get(Trials::TWINS).copied(),
    ) else {
        return false;
    };
    if rows < 2 || short >= long {
        return false;
    }
    let stays = |value: ValueId, layout: &Layout, axes: &[Axis]| -> Option<bool> {
        let row = |run: usize| -> Option<ArrayD<f32>> {
            let raw = array(lab.trials.value(run, value)?)?;
            let placed = layout.apply(&raw, lab.batches()[run])?;
            let row = placed.index_axis(Nd(0), 1).to_owned();
            Some(match axes.get(1) {
                Some(Axis::Pos) => {
                    let n = row.shape()[0];
                    let kept = short + n.saturating_sub(lengths[run]);
                    row.slice_axis(Nd(0), Slice::from(..kept.min(n))).to_owned()
                }
                _ => row,
            })
        };
        Some(difference(&row(Trials::TWINS)?, &row(Trials::PADDED)?) <= EVEN)
    };
    let stream = found
        .hooks
        .iter()
        .rfind(|h| h.name.ends_with("hook_resid_post"));
    let main = main(lab, outputs).zip(lab.trace.output);
    let checks = [
        stream.and_then(|h| stays(h.value, &h.layout, &h.axes)),
        main.filter(|(o, _)| o.axes.first() == Some(&Axis::Batch))
            .and_then(|(o, v)| stays(v, &Layout::identity(), &o.axes)),
    ];
    checks.iter().all(|c| *c == Some(true))
}

/// Outputs that the exporter named as hidden states or attentions stand in where nothing was found.
pub(super) fn named_outputs(lab: &Lab<'_>, found: &mut Found) {
    for port in lab.model.graph.outputs() {
        let name = lab.model.graph.name(port.value);
        let Some(alias) = alias_of(name) else {
            continue;
        };
        let known = found
            .hooks
            .iter()
            .any(|h| h.name == alias || h.aliases.contains(&alias));
        let Some(placed) = lab.place(port.value, Layout::identity()) else {
            continue;
        };
        if known || placed.compared().ndim() < 3 {
            continue;
        }
        let axes = match (alias.starts_with("attentions"), placed.compared().ndim()) {
            (true, 4) => vec![Axis::Batch, Axis::Head, Axis::Query, Axis::Key],
            (false, 3) => vec![Axis::Batch, Axis::Pos, Axis::DModel],
            (_, rank) => (0..rank).map(|i| Axis::Other(format!("axis{i}"))).collect(),
        };
        found.notes.push(format!(
            "\"{alias}\" is the file's own output \"{name}\", taken at its word"
        ));
        let layer = alias.rsplit('.').next().and_then(|n| n.parse().ok());
        found.add(alias, layer, &placed, axes);
    }
}

/// `hidden_states.3` for an output called `hidden_states.3`, `hidden_states_3`, `hidden_state_3` ...
fn alias_of(name: &str) -> Option<String> {
    let at = name.rfind(|c: char| !c.is_ascii_digit())?;
    let number: usize = name[at + 1..].parse().ok()?;
    let stem = name[..=at].trim_end_matches(['.', '_', '-', '/']);
    match stem.to_ascii_lowercase().as_str() {
        "hidden_states" | "hidden_state" => Some(format!("hidden_states.{number}")),
        "attentions" | "attention" => Some(format!("attentions.{number}")),
        _ => None,
    }
}
