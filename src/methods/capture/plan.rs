//! What of a run is brought back, and what it will weigh: decided before anything runs.
//!
//! Heads and positions become picks, which the worker cuts out; pooling at one end becomes a pick of one position. What must see all
//! positions (means, maxima, greatest entries) is left for after the run.

use super::{Logits, Selection};
use crate::{
    engine::{EngineError, PickSpec, admission::exposed_bytes},
    ipc::info::{Axis, ModelInfo, ValueInfo},
    methods::{
        input::Prepared,
        predict::{self, Places},
        reduce::{Keep, Pooling},
        select::Point,
    },
};

/// Most indices of heads or positions.
const MOST_INDICES: usize = 65_536;

/// One hook point of the plan.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) name: String,
    /// Without the batch; empty where nobody has read them.
    pub(super) axes: Vec<Axis>,
    pub(super) pick: PickSpec,
    /// Axis to reduce, counted without the batch.
    pub(super) pool: Option<(usize, Pooling)>,
    pub(super) keep: Option<Keep>,
}

/// What is done with the main output.
#[derive(Clone, Debug)]
pub(super) struct Output {
    pub(super) places: Option<Places>,
    pub(super) axes: Vec<Axis>,
    pub(super) pick: PickSpec,
    /// Whether all of it was brought, not only the places.
    pub(super) whole: bool,
    /// Whether it is sent: not when it was asked for as a hook point too.
    pub(super) sent: bool,
}

/// How a point is brought back.
///
/// # Errors
/// For heads or positions that the point does not have.
pub(super) fn want(
    info: &ModelInfo,
    point: &Point<'_>,
    selection: &Selection,
    length: Option<usize>,
) -> Result<Wanted, EngineError> {
    let axes: Vec<Axis> = without_batch(point.axes());
    let dims: &[Option<usize>] = match point {
        Point::Hook(h) => &h.dims,
        Point::Value(_) => &[],
    };
    let extent = |at: usize| dims.get(at + 1).copied().flatten();
    let mut pick = PickSpec {
        output: point.name().to_owned(),
        ..PickSpec::default()
    };
    if let Some(at) = axes.iter().position(Axis::is_head) {
        pick.heads = heads(&selection.heads, extent(at), point.name())?;
    }
    let position_axis = axes
        .iter()
        .position(|a| matches!(a, Axis::Pos | Axis::Query));
    if let Some(at) = position_axis {
        let there = length.or_else(|| extent(at));
        pick.positions = positions(&selection.positions, there, info)?;
    }
    let pos = axes.iter().position(|a| *a == Axis::Pos);
    let pool = match (selection.pooling, pos) {
        (Some(pooling), Some(at)) => {
            // One position needs not bring the others along.
            let ends = match (pooling, pick.positions.is_empty()) {
                (Pooling::Cls, true) => Some(0),
                (Pooling::Last, true) => {
                    length.or_else(|| extent(at)).and_then(|n| n.checked_sub(1))
                }
                (Pooling::Cls | Pooling::Last | Pooling::Mean | Pooling::Max, _) => None,
            };
            if let Some(end) = ends.and_then(|e| u32::try_from(e).ok()) {
                pick.positions = vec![end];
            }
            Some((at, pooling))
        }
        (Some(_), None) | (None, _) => None,
    };
    let keep = if point.is_pattern() {
        selection.sparse_attention
    } else {
        selection.top_k
    };
    Ok(Wanted {
        name: point.name().to_owned(),
        axes,
        pick,
        pool,
        keep,
    })
}

fn heads(wanted: &[u32], there: Option<usize>, name: &str) -> Result<Vec<u32>, EngineError> {
    if wanted.len() > MOST_INDICES {
        return Err(EngineError::invalid(
            "selection.heads",
            format!("has {} entries: give at most {MOST_INDICES}", wanted.len()),
        ));
    }
    match (
        wanted
            .iter()
            .position(|h| there.is_some_and(|n| *h as usize >= n)),
        there,
    ) {
        (Some(at), Some(there)) => Err(EngineError::invalid(
            format!("selection.heads[{at}]"),
            format!("head {} does not exist: \"{name}\" has {there}", wanted[at]),
        )),
        (Some(_) | None, _) => Ok(wanted.to_vec()),
    }
}

fn positions(
    wanted: &[i32],
    there: Option<usize>,
    info: &ModelInfo,
) -> Result<Vec<u32>, EngineError> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    if wanted.len() > MOST_INDICES {
        return Err(EngineError::invalid(
            "selection.positions",
            format!("has {} entries: give at most {MOST_INDICES}", wanted.len()),
        ));
    }
    let there = there.ok_or_else(|| {
        EngineError::invalid(
            "selection.positions",
            format!(
                "the number of positions of model \"{}\" is not known before it runs: leave this empty",
                info.name
            ),
        )
    })?;
    wanted
        .iter()
        .enumerate()
        .map(|(at, p)| {
            let place = if *p < 0 {
                there.checked_sub(p.unsigned_abs() as usize)
            } else {
                usize::try_from(*p).ok().filter(|p| *p < there)
            };
            place.and_then(|p| u32::try_from(p).ok()).ok_or_else(|| {
                EngineError::invalid(
                    format!("selection.positions[{at}]"),
                    format!("position {p} does not exist: the input has {there}"),
                )
            })
        })
        .collect()
}

/// What is brought back of the main output; nothing when it was not asked for, or says nothing.
pub(super) fn output(
    info: &ModelInfo,
    selection: &Selection,
    prepared: &Prepared,
    length: Option<usize>,
) -> Option<Output> {
    let value = info.output(&info.main_output)?;
    let places = predict::places(info, &prepared.tokens, length);
    let whole = match selection.logits {
        Logits::None => return None,
        Logits::All => true,
        Logits::Prediction => !matches!(places, Some(Places::Positions(_))),
    };
    let positions = match &places {
        // A masked model without a mask predicts nothing.
        Some(Places::Positions(p)) if p.is_empty() && !whole => return None,
        Some(Places::Positions(p)) if !whole => p.clone(),
        Some(_) => Vec::new(),
        None if selection.logits == Logits::Prediction => return None,
        None => Vec::new(),
    };
    Some(Output {
        axes: without_batch(&value.axes),
        pick: PickSpec {
            output: value.name.clone(),
            positions,
            ..PickSpec::default()
        },
        whole,
        sent: true,
        places,
    })
}

/// Bytes of an answer, as far as extents are known.
pub(super) struct Estimate {
    /// From the worker.
    pub(super) brought: usize,
    /// To the caller.
    pub(super) sent: usize,
}

/// See [`Estimate`].
pub(super) fn estimate(
    info: &ModelInfo,
    points: &[Point<'_>],
    wanted: &[Wanted],
    output: Option<&Output>,
    length: Option<usize>,
    selection: &Selection,
) -> Estimate {
    /// An extent that only the run tells.
    const UNKNOWN: usize = 1;
    let length = length.unwrap_or(0);
    let mut estimate = Estimate {
        brought: 0,
        sent: 0,
    };
    let mut add = |value: &ValueInfo, pick: &PickSpec, wanted: Option<&Wanted>| {
        let bytes = exposed_bytes(value, pick, length, UNKNOWN);
        estimate.brought = estimate.brought.saturating_add(bytes);
        let mut elements = bytes / value.dtype.size();
        if let Some((_, _)) = wanted.and_then(|w| w.pool) {
            elements /= pick
                .positions
                .len()
                .max(if pick.positions.is_empty() { length } else { 1 })
                .max(1);
        }
        let size = if value.dtype.is_float() {
            selection.dtype.size()
        } else {
            value.dtype.size()
        };
        let sent = match wanted.and_then(|w| w.keep) {
            Some(Keep::TopK { k, .. } | Keep::Attention { k, .. }) => {
                let width = last_extent(value, length).max(1);
                let rows = elements / width;
                rows.saturating_mul(4 + k.min(width) * (4 + size))
            }
            None => elements.saturating_mul(size),
        };
        estimate.sent = estimate.sent.saturating_add(sent);
    };
    for (point, wanted) in points.iter().zip(wanted) {
        if let Point::Hook(h) = point {
            let value = ValueInfo {
                name: h.name.clone(),
                dtype: h.dtype,
                axes: h.axes.clone(),
                dims: h.dims.clone(),
            };
            add(&value, &wanted.pick, Some(wanted));
        }
    }
    if let Some(output) = output
        && output.sent
        && let Some(value) = info.output(&output.pick.output)
    {
        add(value, &output.pick, None);
    }
    estimate
}

fn last_extent(value: &ValueInfo, length: usize) -> usize {
    match (value.axes.last(), value.dims.last()) {
        (Some(axis), _) if axis.is_token() && length > 0 => length,
        (_, Some(Some(n))) => *n,
        (_, Some(None) | None) => 1,
    }
}

fn without_batch(axes: &[Axis]) -> Vec<Axis> {
    axes.iter()
        .filter(|a| **a != Axis::Batch)
        .cloned()
        .collect()
}
