//! Where the outputs of a run land.
//!
//! An output whose shape is known before the run and of which the picks take everything is written by the runtime straight into shared
//! memory. Every other lands in memory of the runtime, from which the picks are cut out and copied.

use std::collections::HashMap;

use ort::session::IoBinding;

use super::{
    native,
    pick::Cut,
    run::{Extents, Refused, Wanted},
};
use crate::{
    ipc::{
        info::{Axis, ValueInfo},
        shm::{Segment, SharedPool, aligned},
        wire::Pick,
    },
    tensor::{DType, byte_len},
};

/// Outputs in shared memory.
#[derive(Debug)]
pub(super) struct Landing {
    pub(super) segment: Segment,
    /// By the runtime's name of the output.
    places: HashMap<String, Place>,
}

/// The place of one output.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
    pub(super) offset: usize,
    length: usize,
}

impl Landing {
    /// Places for the outputs that may have one; `None` when none may.
    pub(super) fn plan(
        outputs: &[ValueInfo],
        wanted: &Wanted<'_>,
        extents: Extents,
        pool: &SharedPool,
    ) -> Result<Option<Self>, Refused> {
        let mut places = HashMap::new();
        let mut total = 0;
        for (name, picks) in wanted {
            let output = &outputs[picks[0].output as usize];
            if let Some(shape) = picked_whole(output, picks, extents) {
                let dtype = output.dtype;
                let length = shape.iter().product::<usize>() * dtype.size();
                let place = Place {
                    dtype,
                    shape,
                    offset: total,
                    length,
                };
                places.insert((*name).to_owned(), place);
                total += aligned(length);
            }
        }
        if places.is_empty() {
            return Ok(None);
        }
        let segment = pool.with(|p| p.take(total))?;
        Ok(Some(Self { segment, places }))
    }

    /// Binds an output to its place, if it has one. What is bound writes into the segment until the binding and what the run gave
    /// are dropped.
    pub(super) fn bind(&mut self, name: &str, binding: &mut IoBinding) -> ort::Result<bool> {
        let Some(place) = self.places.get(name) else {
            return Ok(false);
        };
        let room = &mut self.segment.bytes_mut()[place.offset..place.offset + place.length];
        binding.bind_output(name, native::landing(place.dtype, &place.shape, room)?)?;
        Ok(true)
    }

    /// The place of an output.
    pub(super) fn place(&self, name: &str) -> Option<&Place> {
        self.places.get(name)
    }
}

/// The shape that an output will have, if that is known and each pick takes one run of its bytes, all of them together every byte.
fn picked_whole(output: &ValueInfo, picks: &[&Pick], extents: Extents) -> Option<Vec<usize>> {
    let shape = expected(output, extents)?;
    let size = output.dtype.size();
    let mut picked = 0;
    for pick in picks {
        let cut = Cut::plan(pick, &output.axes, &shape, extents.batch).ok()?;
        picked += cut.run(&shape, size)?.len();
    }
    let whole = byte_len(output.dtype, &shape);
    (whole > 0 && picked as u128 >= whole).then_some(shape)
}

/// The shape of an output whose axes are known, for a run of these extents. A guess for graphs that compute their extents in ways
/// that nobody has read: the runtime refuses to write an output of another shape.
fn expected(output: &ValueInfo, extents: Extents) -> Option<Vec<usize>> {
    if output.axes.len() != output.dims.len() || output.axes.is_empty() {
        return None;
    }
    let axes = output.axes.iter().zip(&output.dims);
    axes.map(|(axis, dim)| match (dim, axis) {
        (Some(n), _) => Some(*n),
        (None, Axis::Batch) => Some(extents.batch),
        (None, axis) if axis.is_token() => Some(extents.length).filter(|n| *n > 0),
        (None, _) => None,
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern() -> ValueInfo {
        ValueInfo {
            name: "p".to_owned(),
            dtype: DType::F32,
            axes: vec![Axis::Batch, Axis::Head, Axis::Query, Axis::Key],
            dims: vec![None, Some(2), None, None],
        }
    }

    fn landed(picks: &[Pick]) -> Option<Vec<usize>> {
        let extents = Extents {
            batch: 3,
            length: 4,
        };
        picked_whole(&pattern(), &picks.iter().collect::<Vec<_>>(), extents)
    }

    fn row(row: u32) -> Pick {
        Pick {
            row,
            rows: 1,
            ..Pick::default()
        }
    }

    #[test]
    fn what_is_picked_whole_lands_in_one_pick_or_row_by_row() {
        let all = Pick {
            rows: 3,
            ..Pick::default()
        };
        assert_eq!(landed(&[all]).unwrap(), [3, 2, 4, 4]);
        assert_eq!(landed(&[row(0), row(1), row(2)]).unwrap(), [3, 2, 4, 4]);
        assert_eq!(landed(&[row(0), row(1)]), None, "a row is left over");
    }

    #[test]
    fn parts_do_not_land() {
        let all = |pick: Pick| Pick { rows: 3, ..pick };
        let padded = Pick {
            length: 3,
            ..Pick::default()
        };
        assert_eq!(landed(&[all(padded)]), None);
        let one_head = Pick {
            heads: vec![1],
            ..Pick::default()
        };
        assert_eq!(landed(&[all(one_head)]), None);
    }

    #[test]
    fn an_extent_that_nobody_knows_is_not_expected() {
        let extents = Extents {
            batch: 1,
            length: 0,
        };
        assert_eq!(expected(&pattern(), extents), None, "no tokens");
        let wide = ValueInfo {
            axes: vec![Axis::Batch, Axis::DModel],
            dims: vec![None, None],
            ..pattern()
        };
        assert_eq!(expected(&wide, extents), None);
        let unread = ValueInfo {
            axes: Vec::new(),
            dims: Vec::new(),
            ..pattern()
        };
        assert_eq!(expected(&unread, extents), None);
    }
}
