//! The residual stream, measured: which axis is which, what is a norm of what, and whether sums hold.

use ndarray::{ArrayD, Axis as Nd};

use super::lab::{Lab, Placed, batch_target, difference, fixed, proportion, target};
use crate::{
    anatomy::{
        layout::Layout,
        ops::{is_pass, is_vector_step},
    },
    ipc::info::Axis,
    onnx::ValueId,
};

/// Numbers that differ by less, relative to the largest, are those of the formula.
const NEAR: f64 = 1e-3;

/// A value of the stream with the names of its axes.
#[derive(Clone, Debug)]
pub(super) struct Streamed {
    pub(super) placed: Placed,
    pub(super) axes: Vec<Axis>,
}

/// A value as `batch, pos, width`. `positions` are those that an attention asked for; without, the raw axes must
/// speak for themselves.
pub(super) fn stream(
    lab: &Lab<'_>,
    value: ValueId,
    positions: Option<&[usize]>,
    width: Axis,
) -> Result<Streamed, String> {
    let shapes = lab
        .shapes(value)
        .ok_or("the trials did not show it as numbers")?;
    let batches = lab.batches();
    if let Some(positions) = positions
        && let Some(n) = width_of(&shapes, &batches, positions)
    {
        let targets = [
            batch_target(batches.clone()),
            target(positions.to_vec()),
            fixed(n, batches.len()),
        ];
        if let Some(placed) = lab.placements(value, &targets).into_iter().next() {
            return Ok(Streamed {
                placed,
                axes: vec![Axis::Batch, Axis::Pos, width],
            });
        }
    }
    let leads = shapes
        .iter()
        .zip(&batches)
        .all(|(s, b)| s.first() == Some(b));
    let rank = shapes.first().map_or(0, |s| s.len());
    let axes = match (leads, rank) {
        (true, 3) => vec![Axis::Batch, Axis::Pos, width],
        (true, 4) => vec![
            Axis::Batch,
            width,
            Axis::Other("height".to_owned()),
            Axis::Other("width".to_owned()),
        ],
        _ => {
            return Err(format!(
                "its axes are not those of a stream: {:?}",
                shapes.first()
            ));
        }
    };
    let placed = lab
        .place(value, Layout::identity())
        .ok_or("it is no float value")?;
    Ok(Streamed { placed, axes })
}

fn width_of(shapes: &[&[usize]], batches: &[usize], positions: &[usize]) -> Option<usize> {
    let mut widths = shapes
        .iter()
        .zip(batches.iter().zip(positions))
        .map(|(s, (b, p))| {
            let (total, part) = (s.iter().product::<usize>(), b * p);
            (part > 0 && total.is_multiple_of(part)).then(|| total / part)
        });
    let first = widths.next()??;
    (first > 1 && widths.all(|w| w == Some(first))).then_some(first)
}

/// Largest relative distance of `a + b + ...` from `sum`, over all runs.
pub(super) fn sum_error(parts: &[&Placed], sum: &Placed) -> f64 {
    (0..sum.runs.len())
        .map(|run| {
            let mut total = parts[0].runs[run].clone();
            for part in &parts[1..] {
                if part.runs[run].shape() != total.shape() {
                    return f64::INFINITY;
                }
                total += &part.runs[run];
            }
            difference(&total, &sum.runs[run])
        })
        .fold(0.0, f64::max)
}

/// Whether `y` is a norm of `x` over the last axis: channel by channel an affine function of the standardised `x`
/// (LayerNorm) or of `x` over its root mean square (RMSNorm). However it is spelled in the graph, the numbers tell.
pub(super) fn is_norm(x: &Placed, y: &Placed) -> bool {
    let run = x.runs.len() - 1;
    is_norm_in(&x.runs[run], &y.runs[run])
}

/// Whether a layer ends in `y` as the norm of its sum `x`: a norm, be it that padding is zeroed behind it, or the weight and bias alone of
/// one that standardises nothing (MobileBERT's).
pub(super) fn is_norm_of_layer(x: &Placed, y: &Placed) -> bool {
    let (sum, normed) = (x.compared(), y.compared());
    is_norm(x, y)
        || is_norm_in(sum, normed)
        || proportion(sum, normed).1 > NEAR
            && sum.shape() == normed.shape()
            && sum.ndim() == 3
            && affine_error(sum, normed) < NEAR
}

fn is_norm_in(x: &ArrayD<f32>, y: &ArrayD<f32>) -> bool {
    if x.shape() != y.shape() || x.ndim() != 3 {
        return false;
    }
    [true, false]
        .into_iter()
        .any(|centred| affine_error(&standardised(x, centred), y) < NEAR)
}

fn standardised(x: &ArrayD<f32>, centred: bool) -> ArrayD<f32> {
    let mut out = x.clone();
    for mut lane in out.lanes_mut(Nd(2)) {
        let n = lane.len() as f32;
        let mean = if centred { lane.sum() / n } else { 0.0 };
        lane.mapv_inplace(|v| v - mean);
        let size = (lane.dot(&lane) / n).sqrt();
        if size > 0.0 {
            lane.mapv_inplace(|v| v / size);
        }
    }
    out
}

/// How far `y` is from the best per-channel line through `x`, relative to the size of `y`.
fn affine_error(x: &ArrayD<f32>, y: &ArrayD<f32>) -> f64 {
    let width = x.shape()[2];
    let mut worst = 0f64;
    let mut scale = 0f64;
    for channel in 0..width {
        let xs: Vec<f64> = x
            .index_axis(Nd(2), channel)
            .iter()
            .map(|v| f64::from(*v))
            .collect();
        let ys: Vec<f64> = y
            .index_axis(Nd(2), channel)
            .iter()
            .map(|v| f64::from(*v))
            .collect();
        let n = xs.len() as f64;
        if xs.len() < 4 {
            return f64::INFINITY;
        }
        let (mx, my) = (xs.iter().sum::<f64>() / n, ys.iter().sum::<f64>() / n);
        let (mut xy, mut xx) = (0.0, 0.0);
        for (a, b) in xs.iter().zip(&ys) {
            xy += (a - mx) * (b - my);
            xx += (a - mx) * (a - mx);
        }
        let slope = if xx > 0.0 { xy / xx } else { 0.0 };
        for (a, b) in xs.iter().zip(&ys) {
            worst = worst.max((my + slope * (a - mx) - b).abs());
            scale = scale.max(b.abs());
        }
    }
    if scale == 0.0 {
        f64::INFINITY
    } else {
        worst / scale
    }
}

/// The first norm of `x` along a way of values, with the weight and bias that follow it.
pub(super) fn norm_along(
    lab: &Lab<'_>,
    x: &Placed,
    way: &[ValueId],
    positions: &[usize],
) -> Option<(usize, Streamed)> {
    let mut found: Option<(usize, Streamed)> = None;
    for (i, value) in way.iter().enumerate() {
        let node = lab.maker(*value)?;
        if found.is_some() && !is_vector_step(&lab.model.graph, node) && !is_pass(node) {
            break;
        }
        let next = stream(lab, *value, Some(positions), Axis::DModel)
            .ok()
            .filter(|s| is_norm(x, &s.placed));
        match next {
            Some(s) => found = Some((i, s)),
            None if found.is_some() => break,
            None => {}
        }
    }
    found
}
