//! Measured values: shapes and contents of the trials, and the questions asked of them.

use ndarray::{ArrayD, Axis as Nd, IxDyn};

use crate::{
    anatomy::{
        layout::{Layout, Target, layouts},
        trace::Trace,
        trials::Trials,
    },
    onnx::{Model, Node, ValueId},
    tensor::{DType, Tensor},
};

/// Contents are compared on this run: its rows carry known relations.
pub(super) const COMPARED: usize = Trials::TWINS;

/// A value under canonical axes, with what it held in every run.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    pub(super) value: ValueId,
    pub(super) layout: Layout,
    /// Canonical contents of each run.
    pub(super) runs: Vec<ArrayD<f32>>,
    pub(super) dtype: DType,
}

impl Placed {
    /// Contents in the run by which candidates are compared.
    pub(super) fn compared(&self) -> &ArrayD<f32> {
        &self.runs[COMPARED.min(self.runs.len() - 1)]
    }

    /// Extents that are the same in every run.
    pub(super) fn dims(&self) -> Vec<Option<usize>> {
        (0..self.compared().ndim())
            .map(|axis| {
                let first = self.runs[0].shape()[axis];
                self.runs
                    .iter()
                    .all(|r| r.shape()[axis] == first)
                    .then_some(first)
            })
            .collect()
    }
}

/// What was measured of one model.
pub(super) struct Lab<'a> {
    pub(super) model: &'a Model,
    pub(super) trace: &'a Trace,
    pub(super) trials: &'a Trials,
}

impl Lab<'_> {
    /// Rows of each run.
    pub(super) fn batches(&self) -> Vec<usize> {
        self.trials.batches()
    }

    /// The node that makes a value.
    pub(super) fn maker(&self, value: ValueId) -> Option<&Node> {
        let graph = &self.model.graph;
        graph.producer(value).map(|id| graph.node(id))
    }

    /// Shapes of a value in every run: one at least, all of one rank.
    pub(super) fn shapes(&self, value: ValueId) -> Option<Vec<&[usize]>> {
        let shapes: Vec<&[usize]> = self
            .trials
            .all(value)?
            .into_iter()
            .map(Tensor::shape)
            .collect();
        let rank = shapes.first()?.len();
        shapes.iter().all(|s| s.len() == rank).then_some(shapes)
    }

    /// Element type of a value.
    pub(super) fn dtype(&self, value: ValueId) -> Option<DType> {
        self.trials.value(0, value).map(Tensor::dtype)
    }

    /// Contents of a float value in every run.
    pub(super) fn arrays(&self, value: ValueId) -> Option<Vec<ArrayD<f32>>> {
        self.trials.all(value)?.into_iter().map(array).collect()
    }

    /// A value under one layout.
    pub(super) fn place(&self, value: ValueId, layout: Layout) -> Option<Placed> {
        let runs = self
            .arrays(value)?
            .iter()
            .zip(self.batches())
            .map(|(raw, batch)| layout.apply(raw, batch))
            .collect::<Option<Vec<_>>>()?;
        Some(Placed {
            value,
            layout,
            runs,
            dtype: self.dtype(value)?,
        })
    }

    /// Every way to see a value under the targets, plainest first. When the first target is the batch and several ways
    /// remain, those that keep the relations between the rows of the trials come alone.
    pub(super) fn placements(&self, value: ValueId, targets: &[Target]) -> Vec<Placed> {
        let Some(shapes) = self.shapes(value) else {
            return Vec::new();
        };
        let all: Vec<Placed> = layouts(&shapes, targets)
            .into_iter()
            .filter_map(|layout| self.place(value, layout))
            .collect();
        if all.len() < 2 || !targets.first().is_some_and(|t| t.batch) {
            return all;
        }
        let kept: Vec<Placed> = all.iter().filter(|p| self.keeps_rows(p)).cloned().collect();
        if kept.is_empty() { all } else { kept }
    }

    /// Whether the twin rows agree and their neighbour differs, with rows on the first axis.
    pub(super) fn keeps_rows(&self, placed: &Placed) -> bool {
        let Some(run) = placed.runs.get(Trials::TWINS) else {
            return false;
        };
        let rows = run.shape().first().copied().unwrap_or(0);
        if rows < 3 || rows != self.batches()[Trials::TWINS] {
            return true;
        }
        let row = |i: usize| run.index_axis(Nd(0), i).to_owned();
        difference(&row(0), &row(rows - 1)) < 1e-3 && difference(&row(0), &row(1)) > 1e-3
    }

    /// How much numbers of these values may differ from what they should be: storage in halves rounds more.
    pub(super) fn tolerance(&self, placed: &[&Placed]) -> (f64, &'static str) {
        let half = placed
            .iter()
            .any(|p| matches!(p.dtype, DType::F16 | DType::Bf16));
        if half {
            (2e-2, "Half")
        } else {
            (1e-4, "Rewritten")
        }
    }

    /// Follows an axis along a way of values, each made from the one before.
    pub(super) fn follow(&self, way: &[ValueId], axis: usize) -> Option<usize> {
        let run = self.trials.runs() - 1;
        let mut axis = axis;
        for pair in way.windows(2) {
            let (from, to) = (
                self.trials.value(run, pair[0])?.shape(),
                self.trials.value(run, pair[1])?.shape(),
            );
            let node = self.maker(pair[1])?;
            if node.is("Transpose") {
                let perm: Vec<usize> = match node.ints("perm") {
                    Some(p) => p.iter().map(|i| *i as usize).collect(),
                    None => (0..from.len()).rev().collect(),
                };
                axis = perm.iter().position(|p| *p == axis)?;
                continue;
            }
            if from.len() == to.len() && from.get(axis) == to.get(axis) {
                continue;
            }
            let extent = *from.get(axis)?;
            let behind: usize = from[axis + 1..].iter().product();
            axis = (0..to.len())
                .find(|i| to[*i] == extent && to[i + 1..].iter().product::<usize>() == behind)?;
        }
        Some(axis)
    }
}

/// The batch as a target.
pub(super) fn batch_target(extents: Vec<usize>) -> Target {
    Target {
        extents,
        batch: true,
    }
}

/// Any other axis as a target.
pub(super) fn target(extents: Vec<usize>) -> Target {
    Target {
        extents,
        batch: false,
    }
}

/// An axis that is the same in every run.
pub(super) fn fixed(n: usize, runs: usize) -> Target {
    target(vec![n; runs])
}

/// A float tensor as an array.
pub(super) fn array(tensor: &Tensor) -> Option<ArrayD<f32>> {
    let values = tensor.to_f32().ok()?.into_owned();
    ArrayD::from_shape_vec(IxDyn(tensor.shape()), values).ok()
}

/// The largest difference, relative to the largest magnitude; infinite when shapes differ or a number is none.
/// Infinities that both share (masked scores) do not count.
pub(super) fn difference(a: &ArrayD<f32>, b: &ArrayD<f32>) -> f64 {
    if a.shape() != b.shape() {
        return f64::INFINITY;
    }
    let mut largest = 0f64;
    let mut scale = 0f64;
    for (x, y) in a.iter().zip(b) {
        let (x, y) = (f64::from(*x), f64::from(*y));
        if x == y {
            if x.is_finite() {
                scale = scale.max(x.abs());
            }
            continue;
        }
        if !x.is_finite() || !y.is_finite() {
            return f64::INFINITY;
        }
        largest = largest.max((x - y).abs());
        scale = scale.max(x.abs()).max(y.abs());
    }
    if scale == 0.0 { 0.0 } else { largest / scale }
}

/// The factor by which `a` is nearest to `b`, and how far it is from it then.
pub(super) fn proportion(a: &ArrayD<f32>, b: &ArrayD<f32>) -> (f64, f64) {
    if a.shape() != b.shape() {
        return (0.0, f64::INFINITY);
    }
    let dot = |x: &ArrayD<f32>, y: &ArrayD<f32>| -> f64 {
        x.iter()
            .zip(y)
            .map(|(x, y)| f64::from(*x) * f64::from(*y))
            .sum()
    };
    let factor = dot(a, b) / dot(a, a).max(f64::MIN_POSITIVE);
    #[allow(clippy::cast_possible_truncation)] // compared as the singles they are
    let scaled = a.mapv(|x| (f64::from(x) * factor) as f32);
    (factor, difference(&scaled, b))
}
