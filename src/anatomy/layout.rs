//! How a raw value of the graph becomes the canonical axes of a hook point.
//!
//! Exporters fold heads into the batch axis, merge them into the width, put the sequence first or transpose for the
//! sake of a product. A [`Layout`] is the way back: reshapes and transposes, nothing else, so that it can be applied
//! to measured tensors here and appended to a graph by `rewrite`.
//!
//! [`layouts`] finds every layout that the *measured* extents allow. The trials vary batch and length such that an
//! axis that follows them cannot be mistaken for a fixed one; where two fixed axes have the same extent, several
//! layouts come back and contents decide.

use ndarray::{ArrayD, IxDyn};

/// One extent of a reshape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Extent {
    /// As the axis of this number of the value that is reshaped.
    Axis(usize),
    /// Fixed.
    Known(usize),
    /// What is left (at most one per reshape).
    Rest,
    /// The number of rows of the run.
    Batch,
}

/// One step of a [`Layout`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// New extents, row-major order of elements kept.
    Reshape(Vec<Extent>),
    /// Axis `i` of the result is axis `perm[i]` of the input.
    Transpose(Vec<usize>),
}

/// Steps from a raw value to canonical axes; empty when it has them already.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Layout {
    /// In order of application.
    pub steps: Vec<Step>,
}

impl Layout {
    /// Nothing to do.
    pub fn identity() -> Self {
        Layout::default()
    }

    /// Whether raw and canonical are the same.
    pub fn is_identity(&self) -> bool {
        self.steps.is_empty()
    }

    /// The canonical form of a raw tensor of a run with `batch` rows; nothing when it does not fit.
    pub fn apply(&self, raw: &ArrayD<f32>, batch: usize) -> Option<ArrayD<f32>> {
        let mut at = raw.clone();
        for step in &self.steps {
            at = match step {
                Step::Transpose(perm) => {
                    if perm.len() != at.ndim() {
                        return None;
                    }
                    at.permuted_axes(IxDyn(perm))
                }
                Step::Reshape(extents) => {
                    let shape = reshaped(at.shape(), extents, batch)?;
                    at.as_standard_layout()
                        .into_owned()
                        .into_shape_with_order(IxDyn(&shape))
                        .ok()?
                }
            };
        }
        Some(at.as_standard_layout().into_owned())
    }
}

fn reshaped(shape: &[usize], extents: &[Extent], batch: usize) -> Option<Vec<usize>> {
    let total: usize = shape.iter().product();
    let mut known = 1;
    for extent in extents {
        known *= match extent {
            Extent::Axis(axis) => *shape.get(*axis)?,
            Extent::Known(n) => *n,
            Extent::Batch => batch,
            Extent::Rest => 1,
        };
    }
    if known == 0 || !total.is_multiple_of(known) {
        return None;
    }
    extents
        .iter()
        .map(|extent| match extent {
            Extent::Axis(axis) => shape.get(*axis).copied(),
            Extent::Known(n) => Some(*n),
            Extent::Batch => Some(batch),
            Extent::Rest => Some(total / known),
        })
        .collect()
}

/// One canonical axis as the trials saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// Extent in each trial.
    pub(super) extents: Vec<usize>,
    /// Whether this is the batch axis.
    pub(super) batch: bool,
}

impl Target {
    fn fixed(&self) -> Option<usize> {
        let first = *self.extents.first()?;
        self.extents.iter().all(|e| *e == first).then_some(first)
    }

    fn is_one(&self) -> bool {
        self.extents.iter().all(|e| *e == 1)
    }
}

/// Every layout that leads from raw shapes (one per trial) to the targets in their order, plainest first.
pub(super) fn layouts(shapes: &[&[usize]], targets: &[Target]) -> Vec<Layout> {
    let found = exact(shapes, targets);
    if !found.is_empty() {
        return found;
    }
    // A canonical axis may lie apart as two raw ones (grouped heads): try each fixed one in two factors.
    for (at, target) in targets.iter().enumerate() {
        let Some(size) = target.fixed() else { continue };
        for outer in (2..size).filter(|n| size.is_multiple_of(*n)) {
            let mut halves = targets.to_vec();
            let part = |n: usize| Target {
                extents: vec![n; target.extents.len()],
                batch: false,
            };
            halves.splice(at..=at, [part(outer), part(size / outer)]);
            let mut found = exact(shapes, &halves);
            if found.is_empty() {
                continue;
            }
            let merge: Vec<Extent> = (0..targets.len())
                .map(|i| match i.cmp(&at) {
                    std::cmp::Ordering::Less => Extent::Axis(i),
                    std::cmp::Ordering::Equal => Extent::Known(size),
                    std::cmp::Ordering::Greater => Extent::Axis(i + 1),
                })
                .collect();
            for layout in &mut found {
                layout.steps.push(Step::Reshape(merge.clone()));
            }
            return found;
        }
    }
    Vec::new()
}

fn exact(shapes: &[&[usize]], targets: &[Target]) -> Vec<Layout> {
    let Some(rank) = shapes.first().map(|s| s.len()) else {
        return Vec::new();
    };
    if shapes.iter().any(|s| s.len() != rank) {
        return Vec::new();
    }
    let raw: Vec<Vec<usize>> = (0..rank)
        .map(|axis| shapes.iter().map(|s| s[axis]).collect())
        .collect();
    let mut search = Search {
        raw: &raw,
        targets,
        used: vec![false; targets.len()],
        split: Vec::new(),
        found: Vec::new(),
    };
    search.descend();
    let mut found = search.found;
    found.sort_by_key(|layout| layout.steps.len());
    found
}

struct Search<'a> {
    raw: &'a [Vec<usize>],
    targets: &'a [Target],
    used: Vec<bool>,
    /// Targets within each raw axis so far, outermost first.
    split: Vec<Vec<usize>>,
    found: Vec<Layout>,
}

impl Search<'_> {
    fn descend(&mut self) {
        let Some(extents) = self.raw.get(self.split.len()) else {
            let complete = self
                .used
                .iter()
                .zip(self.targets)
                .all(|(used, target)| *used || target.is_one());
            if complete && let Some(layout) = self.layout() {
                self.found.push(layout);
            }
            return;
        };
        let wanted = extents.clone();
        self.fill(&wanted, &mut Vec::new());
    }

    fn fill(&mut self, left: &[usize], parts: &mut Vec<usize>) {
        if left.iter().all(|e| *e == 1) {
            self.split.push(parts.clone());
            self.descend();
            self.split.pop();
            return;
        }
        for (i, target) in self.targets.iter().enumerate() {
            if self.used[i]
                || target.is_one()
                || !left
                    .iter()
                    .zip(&target.extents)
                    .all(|(l, e)| *e > 0 && l.is_multiple_of(*e))
            {
                continue;
            }
            let rest: Vec<usize> = left
                .iter()
                .zip(&target.extents)
                .map(|(l, e)| l / e)
                .collect();
            self.used[i] = true;
            parts.push(i);
            self.fill(&rest, parts);
            parts.pop();
            self.used[i] = false;
        }
    }

    fn layout(&self) -> Option<Layout> {
        let order: Vec<usize> = self.split.iter().flatten().copied().collect();
        let plain = self.split.iter().all(|parts| parts.len() == 1);
        let mut steps = Vec::new();
        if !plain {
            steps.push(Step::Reshape(self.unfolded()?));
        }
        let sorted = {
            let mut sorted = order.clone();
            sorted.sort_unstable();
            sorted
        };
        let perm: Vec<usize> = sorted
            .iter()
            .map(|t| order.iter().position(|o| o == t))
            .collect::<Option<_>>()?;
        if perm.iter().enumerate().any(|(i, p)| i != *p) {
            steps.push(Step::Transpose(perm));
        }
        if sorted.len() < self.targets.len() {
            let mut at = 0;
            let extents = (0..self.targets.len())
                .map(|i| {
                    if sorted.contains(&i) {
                        at += 1;
                        Extent::Axis(at - 1)
                    } else {
                        Extent::Known(1)
                    }
                })
                .collect();
            steps.push(Step::Reshape(extents));
        }
        Some(Layout { steps })
    }

    /// The extents that pull folded axes apart. Of two that vary, the batch is known by name and the other is the rest.
    fn unfolded(&self) -> Option<Vec<Extent>> {
        let folded = || self.split.iter().filter(|parts| parts.len() > 1).flatten();
        let varying = folded()
            .filter(|i| self.targets[**i].fixed().is_none())
            .count();
        let mut extents = Vec::new();
        for (axis, parts) in self.split.iter().enumerate() {
            if let [_] = parts[..] {
                extents.push(Extent::Axis(axis));
                continue;
            }
            extents.extend(parts.iter().map(|i| {
                let target = &self.targets[*i];
                match target.fixed() {
                    Some(n) => Extent::Known(n),
                    None if varying > 1 && target.batch => Extent::Batch,
                    None => Extent::Rest,
                }
            }));
        }
        let rests = extents.iter().filter(|e| **e == Extent::Rest).count();
        (rests <= 1).then_some(extents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn varying(extents: [usize; 3], batch: bool) -> Target {
        Target {
            extents: extents.to_vec(),
            batch,
        }
    }

    fn heads_targets() -> Vec<Target> {
        vec![
            varying([2, 3, 3], true),
            varying([7, 7, 11], false),
            varying([4, 4, 4], false),
            varying([8, 8, 8], false),
        ]
    }

    fn found(shapes: [&[usize]; 3]) -> Vec<Layout> {
        layouts(&shapes, &heads_targets())
    }

    #[test]
    fn canonical_axes_need_nothing() {
        let l = found([&[2, 7, 4, 8], &[3, 7, 4, 8], &[3, 11, 4, 8]]);
        assert_eq!(l, [Layout::identity()]);
    }

    #[test]
    fn heads_folded_into_the_batch_unfold() {
        let l = found([&[8, 7, 8], &[12, 7, 8], &[12, 11, 8]]);
        let raw = ArrayD::from_shape_fn(IxDyn(&[8, 7, 8]), |i| {
            (i[0] * 100 + i[1] * 10 + i[2]) as f32
        });
        let batch_major = l[0].apply(&raw, 2).unwrap();
        assert_eq!(batch_major.shape(), [2, 7, 4, 8]);
        assert_eq!(
            l.len(),
            2,
            "batch outside or heads outside: contents decide"
        );
        let values: Vec<f32> = l
            .iter()
            .map(|l| l.apply(&raw, 2).unwrap()[[1, 5, 2, 3]])
            .collect();
        assert!(values.contains(&653.0), "row 1*4+2 of a batch-major fold");
        assert!(values.contains(&553.0), "row 2*2+1 of a head-major fold");
    }

    #[test]
    fn merged_heads_split_and_sequence_first_turns() {
        let l = found([&[7, 2, 32], &[7, 3, 32], &[11, 3, 32]]);
        let raw = ArrayD::from_shape_fn(IxDyn(&[7, 2, 32]), |i| {
            (i[0] * 1000 + i[1] * 100 + i[2]) as f32
        });
        assert!(
            l.iter()
                .any(|l| l.apply(&raw, 2).unwrap()[[1, 5, 2, 3]] == 5119.0)
        );
    }

    #[test]
    fn batch_and_length_folded_together_unfold_by_the_batch() {
        let l = found([&[14, 32], &[21, 32], &[33, 32]]);
        let raw = ArrayD::from_shape_fn(IxDyn(&[14, 32]), |i| (i[0] * 100 + i[1]) as f32);
        assert!(
            l.iter()
                .any(|l| l.apply(&raw, 2).unwrap()[[1, 5, 2, 3]] == 1219.0)
        );
    }

    #[test]
    fn grouped_heads_apart_are_merged() {
        let l = found([&[2, 2, 7, 2, 8], &[3, 2, 7, 2, 8], &[3, 2, 11, 2, 8]]);
        assert!(!l.is_empty());
        let raw = ArrayD::zeros(IxDyn(&[2, 2, 7, 2, 8]));
        assert_eq!(l[0].apply(&raw, 2).unwrap().shape(), [2, 7, 4, 8]);
    }

    #[test]
    fn an_axis_that_does_not_follow_the_length_is_not_a_position() {
        assert!(found([&[2, 8, 4, 8], &[3, 8, 4, 8], &[3, 16, 4, 8]]).is_empty());
    }

    #[test]
    fn a_fixed_extent_equal_to_the_batch_of_one_trial_is_not_the_batch() {
        assert!(found([&[2, 7, 4, 8], &[2, 7, 4, 8], &[2, 11, 4, 8]]).is_empty());
    }

    #[test]
    fn a_single_head_needs_no_axis() {
        let mut targets = heads_targets();
        targets[2] = varying([1, 1, 1], false);
        let l = layouts(&[&[2, 7, 8], &[3, 7, 8], &[3, 11, 8]], &targets);
        let raw = ArrayD::zeros(IxDyn(&[2, 7, 8]));
        assert_eq!(l[0].apply(&raw, 2).unwrap().shape(), [2, 7, 1, 8]);
    }
}
