//! Cutting a row's part out of a batched output.

use std::ops::Range;

use crate::{
    ipc::{info::Axis, wire::Pick},
    tensor::DType,
};

/// The part of an output that a pick asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Shape of what is cut out.
    pub(super) shape: Vec<usize>,
    /// Per axis of the output, which indices stay.
    keep: Vec<Keep>,
}

#[derive(Debug, PartialEq, Eq)]
enum Keep {
    Range(usize, usize),
    Some(Vec<u32>),
}

impl Keep {
    fn len(&self) -> usize {
        match self {
            Keep::Range(_, n) => *n,
            Keep::Some(indices) => indices.len(),
        }
    }
}

impl Cut {
    /// Plans a pick of an output that came out with this shape, of a run of `batch` rows.
    ///
    /// An output whose axes nobody has read (`value:NAME`) has a batch axis if its first extent equals the batch; its other
    /// axes come whole, padding included. A batch axis of one entry is the same for every row.
    ///
    /// # Errors
    /// Names the part of the pick that does not fit the output.
    pub(super) fn plan(
        pick: &Pick,
        axes: &[Axis],
        shape: &[usize],
        batch: usize,
    ) -> Result<Self, String> {
        let unread: Vec<Axis>;
        let axes = if axes.is_empty() && !shape.is_empty() {
            unread = guess(shape, batch);
            &unread
        } else {
            axes
        };
        if axes.len() != shape.len() {
            return Err(format!(
                "the output came with {} axes instead of {}",
                shape.len(),
                axes.len()
            ));
        }
        let mut heads_done = false;
        let (mut keep, mut out, mut positions_done) = (Vec::new(), Vec::new(), false);
        for (axis, extent) in axes.iter().zip(shape.iter().copied()) {
            let mut whole = extent;
            if axis.is_token() && pick.length > 0 {
                whole = whole.min(pick.length as usize);
            }
            let chosen = if *axis == Axis::Batch {
                rows(pick, extent, batch)?
            } else if axis.is_head() && !pick.heads.is_empty() {
                heads_done = true;
                indices(&pick.heads, whole, "head")?
            } else if matches!(axis, Axis::Pos | Axis::Query)
                && !pick.positions.is_empty()
                && !positions_done
            {
                positions_done = true;
                indices(&pick.positions, whole, "position")?
            } else {
                Keep::Range(0, whole)
            };
            let dropped = *axis == Axis::Batch && pick.rows == 1 && !pick.keep_batch;
            if !dropped {
                out.push(chosen.len());
            }
            keep.push(chosen);
        }
        if !pick.positions.is_empty() && !positions_done {
            return Err("positions of an output without positions".to_owned());
        }
        if !pick.heads.is_empty() && !heads_done {
            return Err("heads of an output without heads".to_owned());
        }
        Ok(Self { shape: out, keep })
    }

    /// Elements of what is cut out.
    pub(super) fn elements(&self) -> usize {
        self.keep.iter().map(Keep::len).product()
    }

    /// Where the part stands in an output of `shape`, elements of `size` bytes, if it is one run of bytes there.
    pub(super) fn run(&self, shape: &[usize], size: usize) -> Option<Range<usize>> {
        let (mut start, mut length, mut stride) = (0, size, size);
        let mut whole = true;
        for (keep, extent) in self.keep.iter().zip(shape).rev() {
            let (from, n) = match keep {
                Keep::Range(from, n) => (*from, *n),
                Keep::Some(indices) => match indices[..] {
                    [index] => (index as usize, 1),
                    _ => return None,
                },
            };
            if !whole && n != 1 {
                return None;
            }
            whole &= n == *extent;
            start += from * stride;
            length *= n;
            stride *= extent;
        }
        Some(start..start + length)
    }

    /// Copies the part. `from` holds the whole output of `shape`, elements of `size` bytes; `to` has room for exactly the part.
    pub(super) fn copy(&self, from: &[u8], shape: &[usize], size: usize, to: &mut [u8]) {
        // Axes at the end that stay whole are one run of bytes.
        let mut run = size;
        let mut axes = self.keep.len();
        while axes > 0 && self.keep[axes - 1] == Keep::Range(0, shape[axes - 1]) {
            run *= shape[axes - 1];
            axes -= 1;
        }
        let mut strides = vec![run; axes];
        for axis in (1..axes).rev() {
            strides[axis - 1] = strides[axis] * shape[axis];
        }
        let mut at = 0;
        copy_axis(&self.keep[..axes], &strides, run, from, to, &mut at);
    }
}

fn copy_axis(
    keep: &[Keep],
    strides: &[usize],
    run: usize,
    from: &[u8],
    to: &mut [u8],
    at: &mut usize,
) {
    let Some((first, rest)) = keep.split_first() else {
        to[*at..*at + run].copy_from_slice(&from[..run]);
        *at += run;
        return;
    };
    let stride = strides[0];
    match first {
        // The innermost cut range is one run too.
        Keep::Range(start, n) if rest.is_empty() => {
            let bytes = n * stride;
            to[*at..*at + bytes].copy_from_slice(&from[start * stride..start * stride + bytes]);
            *at += bytes;
        }
        Keep::Range(start, n) => {
            for i in *start..start + n {
                copy_axis(rest, &strides[1..], run, &from[i * stride..], to, at);
            }
        }
        Keep::Some(indices) => {
            for i in indices {
                let from = &from[*i as usize * stride..];
                copy_axis(rest, &strides[1..], run, from, to, at);
            }
        }
    }
}

fn rows(pick: &Pick, extent: usize, batch: usize) -> Result<Keep, String> {
    let (row, rows) = (pick.row as usize, pick.rows as usize);
    let entries = if extent == 1 { batch } else { extent };
    if rows == 0 || row + rows > entries {
        return Err(format!("rows {row} to {} of {entries}", row + rows));
    }
    Ok(if extent == 1 {
        Keep::Some(vec![0; rows])
    } else {
        Keep::Range(row, rows)
    })
}

fn guess(shape: &[usize], batch: usize) -> Vec<Axis> {
    shape
        .iter()
        .enumerate()
        .map(|(at, extent)| match at {
            0 if *extent == batch => Axis::Batch,
            _ => Axis::Other(format!("axis_{at}")),
        })
        .collect()
}

fn indices(wanted: &[u32], extent: usize, what: &str) -> Result<Keep, String> {
    match wanted.iter().find(|i| **i as usize >= extent) {
        Some(bad) => Err(format!("{what} {bad} of {extent}")),
        None => Ok(Keep::Some(wanted.to_vec())),
    }
}

/// Whether a float tensor holds a value that is neither finite nor, where `masked` says that masks may stand, minus infinity.
pub(super) fn has_stray(dtype: DType, bytes: &[u8], masked: bool) -> bool {
    fn any<const N: usize>(bytes: &[u8], bad: impl Fn([u8; N]) -> bool) -> bool {
        // Folding without an early exit lets the compiler use vectors; a bad value is the rare case.
        bytes
            .as_chunks::<N>()
            .0
            .chunks(4096)
            .any(|chunk| chunk.iter().fold(false, |seen, c| seen | bad(*c)))
    }
    match dtype {
        DType::F32 => any(bytes, |c| {
            let bits = u32::from_le_bytes(c);
            bits & 0x7f80_0000 == 0x7f80_0000 && !(masked && bits == 0xff80_0000)
        }),
        DType::F64 => any(bytes, |c| {
            let bits = u64::from_le_bytes(c);
            bits & 0x7ff0 << 48 == 0x7ff0 << 48 && !(masked && bits == 0xfff0 << 48)
        }),
        DType::F16 => any(bytes, |c| {
            let bits = u16::from_le_bytes(c);
            bits & 0x7c00 == 0x7c00 && !(masked && bits == 0xfc00)
        }),
        DType::Bf16 => any(bytes, |c| {
            let bits = u16::from_le_bytes(c);
            bits & 0x7f80 == 0x7f80 && !(masked && bits == 0xff80)
        }),
        DType::I8
        | DType::I16
        | DType::I32
        | DType::I64
        | DType::U8
        | DType::U16
        | DType::U32
        | DType::U64
        | DType::Bool => false,
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{ArrayD, Axis as NdAxis, IxDyn};
    use proptest::prelude::*;

    use super::*;

    const ATTENTION: [Axis; 4] = [Axis::Batch, Axis::Head, Axis::Query, Axis::Key];

    fn numbered(shape: &[usize]) -> Vec<f32> {
        (0..shape.iter().product::<usize>())
            .map(|i| i as f32)
            .collect()
    }

    fn cut(pick: &Pick, axes: &[Axis], shape: &[usize]) -> (Vec<usize>, Vec<f32>) {
        let from = numbered(shape);
        let cut = Cut::plan(pick, axes, shape, shape[0]).unwrap();
        let mut to = vec![0u8; cut.elements() * 4];
        cut.copy(bytemuck::cast_slice(&from), shape, 4, &mut to);
        (
            cut.shape,
            to.as_chunks::<4>()
                .0
                .iter()
                .map(|c| f32::from_le_bytes(*c))
                .collect(),
        )
    }

    proptest! {
        #[test]
        fn a_cut_is_the_selection_that_ndarray_makes(
            (batch, heads, query, key) in (1usize..4, 1usize..4, 1usize..5, 1usize..5),
            row in 0usize..4, length in 0u32..6, chosen in prop::collection::vec(0u32..4, 0..3),
            positions in prop::collection::vec(0u32..5, 0..4),
        ) {
            let shape = [batch, heads, query, key];
            let row = row % batch;
            let (q, k) = if length == 0 { (query, key) } else { (query.min(length as usize), key.min(length as usize)) };
            let chosen: Vec<u32> = chosen.into_iter().map(|h| h % heads as u32).collect();
            let positions: Vec<u32> = positions.into_iter().map(|p| p % q as u32).collect();
            let pick = Pick { row: row as u32, rows: 1, length, heads: chosen.clone(), positions: positions.clone(), ..Pick::default() };
            let (got_shape, got) = cut(&pick, &ATTENTION, &shape);

            let whole = ArrayD::from_shape_vec(IxDyn(&shape), numbered(&shape)).unwrap();
            let list = |v: &[u32], n: usize| -> Vec<usize> { if v.is_empty() { (0..n).collect() } else { v.iter().map(|i| *i as usize).collect() } };
            let wanted = whole
                .select(NdAxis(1), &list(&chosen, heads))
                .select(NdAxis(2), &list(&positions, q))
                .select(NdAxis(3), &list(&[], k))
                .index_axis(NdAxis(0), row).to_owned();
            prop_assert_eq!(&got_shape[..], wanted.shape());

            // What is one run of bytes is the same read in place.
            let plan = Cut::plan(&pick, &ATTENTION, &shape, batch).unwrap();
            if let Some(run) = plan.run(&shape, 4) {
                let all = numbered(&shape);
                let in_place = &bytemuck::cast_slice::<f32, u8>(&all)[run];
                prop_assert_eq!(in_place, bytemuck::cast_slice::<f32, u8>(&got));
            } else if chosen.is_empty() && positions.is_empty() {
                prop_assert!(q < query || k < key, "only padding cuts a row into pieces");
            }
            prop_assert_eq!(got, wanted.iter().copied().collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let pick = |heads: &[u32], row, rows| Pick {
            row,
            rows,
            heads: heads.to_vec(),
            ..Pick::default()
        };
        let shape = [2, 3, 4, 4];
        let err = |p| Cut::plan(&p, &ATTENTION, &shape, 2).unwrap_err();
        assert_eq!(err(pick(&[3], 0, 1)), "head 3 of 3");
        assert_eq!(err(pick(&[], 1, 2)), "rows 1 to 3 of 2");
    }

    #[test]
    fn heads_and_positions_of_an_output_without_them_are_refused() {
        let pick = |heads: &[u32], positions: &[u32]| Pick {
            rows: 1,
            heads: heads.to_vec(),
            positions: positions.to_vec(),
            ..Pick::default()
        };
        let axes = [Axis::Batch, Axis::Label];
        assert!(Cut::plan(&pick(&[0], &[]), &axes, &[2, 3], 2).is_err());
        assert!(Cut::plan(&pick(&[], &[0]), &axes, &[2, 3], 2).is_err());
        assert!(Cut::plan(&pick(&[], &[]), &axes, &[2, 3], 2).is_ok());
    }

    #[test]
    fn one_entry_for_all_rows_is_given_to_each() {
        let pick = Pick {
            row: 1,
            rows: 2,
            ..Pick::default()
        };
        let cut = Cut::plan(&pick, &[Axis::Batch, Axis::Pos], &[1, 2], 4).unwrap();
        let mut to = [0; 4];
        cut.copy(&[7, 8], &[1, 2], 1, &mut to);
        assert_eq!((&cut.shape[..], to), (&[2, 2][..], [7, 8, 7, 8]));
    }

    #[test]
    fn unread_axes_come_whole_but_for_the_rows() {
        let pick = Pick {
            row: 1,
            rows: 1,
            ..Pick::default()
        };
        assert_eq!(Cut::plan(&pick, &[], &[2, 3], 2).unwrap().shape, [3]);
        assert_eq!(Cut::plan(&pick, &[], &[5, 3], 2).unwrap().shape, [5, 3]);
        assert_eq!(Cut::plan(&pick, &[], &[], 2).unwrap().elements(), 1);
    }

    #[test]
    fn masks_are_no_strays_where_masks_stand_and_nan_is_everywhere() {
        let bytes = |v: &[f32]| bytemuck::cast_slice::<f32, u8>(v).to_vec();
        let masked = bytes(&[1.0, f32::NEG_INFINITY, f32::MIN]);
        assert!(!has_stray(DType::F32, &masked, true));
        assert!(has_stray(DType::F32, &masked, false));
        assert!(has_stray(DType::F32, &bytes(&[f32::NAN]), true));
        assert!(has_stray(DType::F32, &bytes(&[f32::INFINITY]), true));
        let half: Vec<u8> = half::f16::NAN.to_le_bytes().to_vec();
        assert!(has_stray(DType::F16, &half, true));
        assert!(!has_stray(DType::I64, &[0xff; 8], false));
    }
}
