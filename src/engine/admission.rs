//! Permits: what may be in the house at once, in tokens and in bytes.
//!
//! Bytes are counted before anything runs, from the extents that the outputs will have ([`exposed_bytes`]). Two things
//! draw on the one byte budget of the daemon: results that the engine holds until the caller takes them (at most a
//! request's window), and whatever a caller buffers beyond that, for which it takes a [`Permit`] itself. Tokens are counted per
//! model, so that a flooded model does not shut out the others.
//!
//! Lower lanes may fill only a part of a budget, so that a sweep leaves room for predicts: [`SHARE`].

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use super::request::{Lane, PickSpec};
use crate::ipc::info::{Axis, ValueInfo};

/// Share of a budget that each lane may fill, in sixteenths.
pub const SHARE: [usize; 3] = [16, 14, 12];

/// A quantity of which at most `limit` is given out.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    used: AtomicUsize,
}

/// Gives its part of the budget back when it is dropped.
#[derive(Debug)]
#[must_use = "a permit that is dropped at once permits nothing"]
pub struct Permit {
    budget: Arc<Budget>,
    amount: usize,
}

/// Why there is no permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Too much is out now.
    Now,
    /// The amount is above what this lane may ever have.
    Ever,
}

impl Budget {
    /// A budget of which nothing is used.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: AtomicUsize::new(0),
        })
    }

    /// Takes a part of the budget.
    pub fn take(self: &Arc<Self>, amount: usize, lane: Lane) -> Result<Permit, Refused> {
        let share = self.share(lane);
        if amount > share {
            return Err(Refused::Ever);
        }
        self.used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
                used.checked_add(amount).filter(|sum| *sum <= share)
            })
            .map_err(|_| Refused::Now)?;
        Ok(Permit {
            budget: self.clone(),
            amount,
        })
    }

    /// What a lane may have at most.
    pub fn share(&self, lane: Lane) -> usize {
        self.limit / 16 * SHARE[lane.index()] + self.limit % 16 * SHARE[lane.index()] / 16
    }

    /// What is out now.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Acquire)
    }
}

impl Permit {
    /// How much it permits.
    pub fn amount(&self) -> usize {
        self.amount
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.amount, Ordering::AcqRel);
    }
}

/// Bytes that one row of `length` tokens brings back for one pick. Extents that only the run will tell count as
/// `unknown`.
pub fn exposed_bytes(value: &ValueInfo, pick: &PickSpec, length: usize, unknown: usize) -> usize {
    let positions = if pick.positions.is_empty() {
        length
    } else {
        pick.positions.len()
    };
    let mut bytes = value.dtype.size();
    for (axis, dim) in value.axes.iter().zip(&value.dims) {
        let extent = match axis {
            Axis::Batch => 1,
            Axis::Pos | Axis::Query => {
                if length == 0 {
                    dim.unwrap_or(unknown)
                } else {
                    positions
                }
            }
            Axis::Key => {
                if length == 0 {
                    dim.unwrap_or(unknown)
                } else {
                    length
                }
            }
            Axis::Head | Axis::KvHead if !pick.heads.is_empty() => pick.heads.len(),
            Axis::Head
            | Axis::KvHead
            | Axis::DModel
            | Axis::DHead
            | Axis::DMlp
            | Axis::Vocab
            | Axis::Label
            | Axis::Other(_) => dim.unwrap_or(unknown),
        };
        bytes = bytes.saturating_mul(extent);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    #[test]
    fn permits_come_back_and_never_pass_the_limit() {
        let budget = Budget::new(160);
        let first = budget.take(100, Lane::Predict).unwrap();
        assert_eq!(budget.take(61, Lane::Predict).unwrap_err(), Refused::Now);
        assert_eq!(budget.take(161, Lane::Predict).unwrap_err(), Refused::Ever);
        drop(first);
        assert_eq!(budget.used(), 0);
        assert_eq!(
            budget.take(usize::MAX, Lane::Predict).unwrap_err(),
            Refused::Ever
        );
    }

    #[test]
    fn a_sweep_leaves_room_for_predicts() {
        let budget = Budget::new(160);
        let _sweep = budget.take(120, Lane::Bulk).unwrap();
        assert_eq!(budget.take(1, Lane::Bulk).unwrap_err(), Refused::Now);
        let _explained = budget.take(20, Lane::Interactive).unwrap();
        let _predicted = budget.take(20, Lane::Predict).unwrap();
        assert_eq!(budget.used(), 160);
    }

    #[test]
    fn concurrent_takers_keep_the_limit() {
        let budget = Budget::new(100);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for amount in 0..5000 {
                        if let Ok(_permit) = budget.take(amount % 60, Lane::Predict) {
                            assert!(budget.used() <= 100);
                        }
                    }
                });
            }
        });
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_pattern_costs_heads_times_length_squared() {
        let pattern = ValueInfo {
            name: "blocks.0.attn.hook_pattern".into(),
            dtype: DType::F32,
            axes: vec![Axis::Batch, Axis::Head, Axis::Query, Axis::Key],
            dims: vec![None, Some(12), None, None],
        };
        let all = PickSpec::default();
        assert_eq!(exposed_bytes(&pattern, &all, 128, 1), 12 * 128 * 128 * 4);
        let some = PickSpec {
            heads: vec![0, 5],
            positions: vec![7],
            ..all
        };
        assert_eq!(exposed_bytes(&pattern, &some, 128, 1), 2 * 128 * 4);
    }
}
