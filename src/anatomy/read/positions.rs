//! What is added to the tokens for their positions: `hook_pos_embed`.
//!
//! ```text
//!   tokens ──▶ + ──▶ + ──▶ ... ──▶ first layer       Of what joins the way and does not come from the tokens, the first that is the
//!              │     │                               same in every row and another at every position. Types are neither.
//!            types  positions
//! ```
//!
//! Rotary and relative positions join behind, in the attentions, and linear biases at the scores: models with those have none.

use ndarray::{ArrayD, Axis as Nd};

use super::{
    lab::{Lab, Placed, batch_target, difference, fixed, target},
    stream::Streamed,
};
use crate::{ipc::info::Axis, onnx::ValueId};

/// Rows that differ by less are the same.
const SAME: f64 = 1e-6;

/// The embedding of positions among what is added, as `batch, pos, width`; the batch has the extent 1 where the graph makes it once for all
/// rows.
pub(super) fn embedding(lab: &Lab<'_>, positions: &[usize]) -> Option<Streamed> {
    lab.trace
        .added
        .iter()
        .find_map(|value| placed(lab, *value, positions))
        .map(|placed| Streamed {
            placed,
            axes: vec![Axis::Batch, Axis::Pos, Axis::DModel],
        })
}

fn placed(lab: &Lab<'_>, value: ValueId, positions: &[usize]) -> Option<Placed> {
    let shapes = lab.shapes(value)?;
    let batches = lab.batches();
    if positions.len() != batches.len() {
        return None;
    }
    for rows in [vec![1; batches.len()], batches.clone()] {
        let mut widths = shapes
            .iter()
            .zip(rows.iter().zip(positions))
            .map(|(shape, (rows, n))| {
                let (total, part) = (shape.iter().product::<usize>(), rows * n);
                (part > 0 && total.is_multiple_of(part)).then(|| total / part)
            });
        let Some(width) = widths.next().flatten().filter(|w| *w > 1) else {
            continue;
        };
        if !widths.all(|w| w == Some(width)) {
            continue;
        }
        let first = if rows == batches {
            batch_target(rows)
        } else {
            target(rows)
        };
        let targets = [
            first,
            target(positions.to_vec()),
            fixed(width, batches.len()),
        ];
        let found = lab.placements(value, &targets).into_iter();
        if let Some(found) = found.into_iter().find(|p| p.runs.iter().all(of_positions)) {
            return Some(found);
        }
    }
    None
}

/// Whether numbers `[batch, pos, width]` are the same in every row and others at every position.
fn of_positions(run: &ArrayD<f32>) -> bool {
    if run.ndim() != 3 || run.shape()[0] == 0 {
        return false;
    }
    let first = run.index_axis(Nd(0), 0);
    let alike = run
        .axis_iter(Nd(0))
        .all(|row| difference(&row.to_owned(), &first.to_owned()) <= SAME);
    let at: Vec<ArrayD<f32>> = first.axis_iter(Nd(0)).map(|p| p.to_owned()).collect();
    let apart = at.iter().enumerate().all(|(n, a)| {
        let others = at[n + 1..].iter();
        others.into_iter().all(|b| difference(a, b) > SAME)
    });
    alike && at.len() > 1 && apart
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn positions_are_told_from_types_and_tokens() {
        let positions = array![[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]].into_dyn();
        assert!(of_positions(&positions));
        let types = array![[[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]].into_dyn();
        assert!(!of_positions(&types));
        let tokens = array![[[1.0, 2.0], [3.0, 4.0]], [[3.0, 4.0], [5.0, 6.0]]].into_dyn();
        assert!(!of_positions(&tokens));
        let once = array![[[1.0, 2.0]]].into_dyn();
        assert!(!of_positions(&once), "one position tells nothing");
    }
}
