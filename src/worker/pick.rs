//! Cutting a row's part out of a batched output: the one copy between the runtime's memory and shared memory.

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
    /// The output as it is.
    pub(super) fn whole(shape: &[usize]) -> Self {
        Self {
            shape: shape.to_vec(),
            keep: shape.iter().map(|n| Keep::Range(0, *n)).collect(),
        }
    }

    /// Plans a pick of an output that came out with this shape.
    ///
    /// # Errors
    /// Names the part of the pick that does not fit the output.
    pub(super) fn plan(pick: &Pick, axes: &[Axis], shape: &[usize]) -> Result<Self, String> {
        if axes.len() != shape.len() {
            return Err(format!(
                "the output came with {} axes instead of {}",
                shape.len(),
                axes.len()
            ));
        }
        let (mut keep, mut out, mut positions_done) = (Vec::new(), Vec::new(), false);
        for (axis, extent) in axes.iter().zip(shape.iter().copied()) {
            let mut whole = extent;
            if axis.is_token() && pick.length > 0 {
                whole = whole.min(pick.length as usize);
            }
            let chosen = if *axis == Axis::Batch {
                let (row, rows) = (pick.row as usize, pick.rows as usize);
                if row + rows > extent {
                    return Err(format!("rows {row} to {} of {extent}", row + rows));
                }
                Keep::Range(row, rows)
            } else if axis.is_head() && !pick.heads.is_empty() {
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
        Ok(Self { shape: out, keep })
    }

    /// Elements of what is cut out.
    pub(super) fn elements(&self) -> usize {
        self.keep.iter().map(Keep::len).product()
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

fn indices(wanted: &[u32], extent: usize, what: &str) -> Result<Keep, String> {
    match wanted.iter().find(|i| **i as usize >= extent) {
        Some(bad) => Err(format!("{what} {bad} of {extent}")),
        None => Ok(Keep::Some(wanted.to_vec())),
    }
}

/// Whether float elements hold a value that is neither finite nor a mask (minus infinity).
pub(super) fn has_stray(dtype: DType, bytes: &[u8]) -> bool {
    match dtype {
        DType::F32 => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .any(|c| stray(f64::from(f32::from_le_bytes(*c)))),
        DType::F64 => bytes
            .as_chunks::<8>()
            .0
            .iter()
            .any(|c| stray(f64::from_le_bytes(*c))),
        DType::F16 => bytes
            .as_chunks::<2>()
            .0
            .iter()
            .any(|c| stray(half::f16::from_le_bytes(*c).to_f64())),
        DType::Bf16 => bytes
            .as_chunks::<2>()
            .0
            .iter()
            .any(|c| stray(half::bf16::from_le_bytes(*c).to_f64())),
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

fn stray(v: f64) -> bool {
    v.is_nan() || v == f64::INFINITY
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
        let cut = Cut::plan(pick, axes, shape).unwrap();
        let mut to = vec![0u8; cut.elements() * 4];
        cut.copy(bytemuck::cast_slice(&from), shape, 4, &mut to);
        (cut.shape, bytemuck::pod_collect_to_vec(&to))
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
        let err = |p| Cut::plan(&p, &ATTENTION, &shape).unwrap_err();
        assert_eq!(err(pick(&[3], 0, 1)), "head 3 of 3");
        assert_eq!(err(pick(&[], 1, 2)), "rows 1 to 3 of 2");
    }

    #[test]
    fn masks_are_no_strays_and_nan_is() {
        let bytes = |v: &[f32]| bytemuck::cast_slice::<f32, u8>(v).to_vec();
        assert!(!has_stray(DType::F32, &bytes(&[1.0, f32::NEG_INFINITY])));
        assert!(has_stray(DType::F32, &bytes(&[1.0, f32::NAN])));
        assert!(has_stray(DType::F32, &bytes(&[f32::INFINITY])));
    }
}
