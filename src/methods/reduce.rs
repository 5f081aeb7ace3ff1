//! What is done to a tensor before it is sent: pooling over positions, the greatest entries of each row.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use crate::tensor::{Tensor, TensorError};

/// How the position axis goes away. Rows come without padding, so padding takes no part; special tokens do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// Arithmetic mean.
    Mean,
    /// First position.
    Cls,
    /// Last position.
    Last,
    /// Greatest value.
    Max,
}

/// Which entries of a row are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Keep {
    /// The `k` greatest, or greatest in magnitude.
    TopK {
        /// How many.
        k: usize,
        /// Compare absolute values.
        by_magnitude: bool,
    },
    /// The `k` greatest that are at least `floor`, rounded to four decimals.
    Attention {
        /// How many.
        k: usize,
        /// Smaller ones are dropped.
        floor: f32,
    },
}

/// The kept entries of each row along the last axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Sparse {
    /// Extents of the dense tensor.
    pub shape: Vec<usize>,
    /// Entries of each row.
    pub counts: Vec<u32>,
    /// Where each stands along the last axis; in each row the greatest first.
    pub indices: Vec<u32>,
    /// The entries.
    pub values: Vec<f32>,
}

/// Removes axis `axis` of a float tensor. Sums run in double precision.
///
/// # Errors
/// For a tensor of integers, or one that has no such axis.
pub fn pool(tensor: &Tensor, axis: usize, pooling: Pooling) -> Result<Tensor, TensorError> {
    let values = tensor.to_f32()?;
    let shape = tensor.shape();
    let positions = shape.get(axis).copied().unwrap_or(1);
    let after: usize = shape.iter().skip(axis + 1).product();
    let before: usize = shape.iter().take(axis).product();
    let mut pooled = Vec::with_capacity(before * after);
    if positions > 0 && after > 0 {
        for block in values.chunks_exact(positions * after) {
            let rows = || block.chunks_exact(after);
            match pooling {
                Pooling::Cls => pooled.extend_from_slice(&block[..after]),
                Pooling::Last => pooled.extend_from_slice(&block[(positions - 1) * after..]),
                Pooling::Max => {
                    let mut greatest = block[..after].to_vec();
                    for row in rows().skip(1) {
                        for (g, v) in greatest.iter_mut().zip(row) {
                            // A NaN stays visible.
                            *g = if v.is_nan() || *v > *g { *v } else { *g };
                        }
                    }
                    pooled.extend(greatest);
                }
                Pooling::Mean => {
                    let mut sums = vec![0f64; after];
                    for row in rows() {
                        for (s, v) in sums.iter_mut().zip(row) {
                            *s += f64::from(*v);
                        }
                    }
                    #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)]
                    pooled.extend(sums.iter().map(|s| (s / positions as f64) as f32));
                }
            }
        }
    }
    let mut left = shape.to_vec();
    left.remove(axis);
    Tensor::from_f32(left, &pooled)
}

/// Keeps the greatest entries of each row along the last axis. Of equal entries the first wins.
///
/// # Errors
/// For a tensor of integers.
pub fn keep(tensor: &Tensor, what: Keep) -> Result<Sparse, TensorError> {
    let values = tensor.to_f32()?;
    let shape = tensor.shape().to_vec();
    let width = shape.last().copied().unwrap_or(1);
    let rows = values.len().checked_div(width).unwrap_or(0);
    let mut sparse = Sparse {
        shape,
        counts: Vec::with_capacity(rows),
        indices: Vec::new(),
        values: Vec::new(),
    };
    let mut order: Vec<u32> = Vec::with_capacity(width);
    for row in values.chunks_exact(width.max(1)) {
        let (k, size): (usize, fn(f32) -> f32) = match what {
            Keep::TopK { k, by_magnitude } => (k, if by_magnitude { f32::abs } else { |v| v }),
            Keep::Attention { k, .. } => (k, |v| v),
        };
        let greater = |a: &u32, b: &u32| -> Ordering {
            let (x, y) = (size(row[*a as usize]), size(row[*b as usize]));
            y.total_cmp(&x).then(a.cmp(b))
        };
        order.clear();
        order.extend((0u32..).take(width));
        if k < order.len() {
            order.select_nth_unstable_by(k, greater);
            order.truncate(k);
        }
        order.sort_unstable_by(greater);
        let before = sparse.values.len();
        for at in &order {
            let value = row[*at as usize];
            match what {
                Keep::TopK { .. } => sparse.values.push(value),
                Keep::Attention { floor, .. } if value < floor => break,
                Keep::Attention { .. } => sparse.values.push(four_decimals(value)),
            }
            sparse.indices.push(*at);
        }
        let kept = sparse.values.len() - before;
        sparse.counts.push(u32::try_from(kept).unwrap_or(u32::MAX));
    }
    Ok(sparse)
}

fn four_decimals(value: f32) -> f32 {
    (value * 1e4).round() / 1e4
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(t: &Tensor) -> Vec<f32> {
        t.to_f32().unwrap().into_owned()
    }

    #[test]
    fn pooling_removes_the_axis_that_is_named() {
        let t = Tensor::from_f32(
            vec![2, 3, 2],
            &[1., 2., 3., 4., 5., 9., 0., 0., 6., 3., 0., -3.],
        )
        .unwrap();
        let of = |p| {
            let pooled = pool(&t, 1, p).unwrap();
            assert_eq!(pooled.shape(), [2, 2]);
            values(&pooled)
        };
        assert_eq!(of(Pooling::Mean), [3., 5., 2., 0.]);
        assert_eq!(of(Pooling::Max), [5., 9., 6., 3.]);
        assert_eq!(of(Pooling::Cls), [1., 2., 0., 0.]);
        assert_eq!(of(Pooling::Last), [5., 9., 0., -3.]);
    }

    #[test]
    fn a_nan_shows_in_what_is_pooled() {
        let t = Tensor::from_f32(vec![2, 1], &[1., f32::NAN]).unwrap();
        for p in [Pooling::Mean, Pooling::Max] {
            assert!(values(&pool(&t, 0, p).unwrap())[0].is_nan(), "{p:?}");
        }
    }

    #[test]
    fn sparse_attention_drops_what_is_small_and_rescales_nothing() {
        let t = Tensor::from_f32(
            vec![2, 4],
            &[0.5, 0.12344, 0.37256, 0.004, 0.25, 0.25, 0.25, 0.25],
        )
        .unwrap();
        let s = keep(&t, Keep::Attention { k: 3, floor: 0.005 }).unwrap();
        assert_eq!(s.counts, [3, 3]);
        assert_eq!(s.indices, [0, 2, 1, 0, 1, 2]);
        assert_eq!(s.values, [0.5, 0.3726, 0.1234, 0.25, 0.25, 0.25]);
    }

    #[test]
    fn magnitude_compares_without_sign_and_keeps_it() {
        let t = Tensor::from_f32(vec![3], &[1., -5., 2.]).unwrap();
        let what = |by_magnitude| Keep::TopK { k: 2, by_magnitude };
        assert_eq!(keep(&t, what(true)).unwrap().values, [-5., 2.]);
        assert_eq!(keep(&t, what(false)).unwrap().values, [2., 1.]);
    }

    proptest! {
        #[test]
        fn the_kept_are_the_greatest_in_order(row in prop::collection::vec(-1e3f32..1e3, 1..40), k in 1usize..50) {
            let t = Tensor::from_f32(vec![row.len()], &row).unwrap();
            let s = keep(&t, Keep::TopK { k, by_magnitude: false }).unwrap();
            let mut sorted = row.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            sorted.truncate(k);
            prop_assert_eq!(&s.values, &sorted);
            for (i, v) in s.indices.iter().zip(&s.values) {
                prop_assert_eq!(row[*i as usize], *v);
            }
        }
    }
}
