//! Shapes of values as runs measured them.

use std::collections::HashMap;

use crate::onnx::{Graph, ValueId};

/// What runs of different extents say of the shapes of values.
///
/// The runs must differ in batch and length, and have more than one row and more than one token, so that an extent that is one in all of
/// them is one always, and extents that are equal in all of them are equal always.
#[derive(Clone, Debug, Default)]
pub struct Shapes {
    runs: Vec<HashMap<ValueId, Vec<usize>>>,
}

impl Shapes {
    /// Of runs of a graph, each with the shape of every value that was looked at. Those of its weights are added.
    pub fn measured(graph: &Graph, mut runs: Vec<HashMap<ValueId, Vec<usize>>>) -> Self {
        for run in &mut runs {
            for (name, weight) in graph.initializers() {
                run.extend(graph.value(name).map(|v| (v, weight.dims().to_vec())));
            }
        }
        Self { runs }
    }

    /// The shape of a value in each run.
    fn of(&self, value: ValueId) -> Result<Vec<&[usize]>, String> {
        let shapes: Option<Vec<&[usize]>> = self
            .runs
            .iter()
            .map(|run| run.get(&value).map(Vec::as_slice))
            .collect();
        let shapes = shapes.filter(|s| !s.is_empty());
        let shapes = shapes.ok_or_else(|| "the shape of a value was not measured".to_owned())?;
        if shapes.iter().any(|s| s.len() != shapes[0].len()) {
            return Err("the number of axes of a value changes".to_owned());
        }
        Ok(shapes)
    }

    /// The number of axes.
    pub(super) fn rank(&self, value: ValueId) -> Result<usize, String> {
        Ok(self.of(value)?[0].len())
    }

    /// The extent of an axis if it is the same in all runs.
    pub(super) fn extent(&self, value: ValueId, axis: usize) -> Result<Option<usize>, String> {
        let shapes = self.of(value)?;
        let first = shapes[0][axis];
        Ok(shapes.iter().all(|s| s[axis] == first).then_some(first))
    }

    /// Whether two axes have the same extent in all runs.
    pub(super) fn same_extent(&self, a: (ValueId, usize), b: (ValueId, usize)) -> bool {
        let (Ok(of_a), Ok(of_b)) = (self.of(a.0), self.of(b.0)) else {
            return false;
        };
        of_a.iter().zip(&of_b).all(|(x, y)| x[a.1] == y[b.1])
    }

    /// The axes of `wide` along which `narrow` was stretched to it: those that it lacks, and those where it has an extent of one.
    pub(super) fn stretched(&self, narrow: ValueId, wide: ValueId) -> Result<Vec<usize>, String> {
        stretched(&self.of(narrow)?, &self.of(wide)?)
    }

    /// The same of all axes but the last two, which belong to the matrices of a product.
    pub(super) fn stretched_leading(
        &self,
        narrow: ValueId,
        wide: ValueId,
    ) -> Result<Vec<usize>, String> {
        let (mut narrow, mut wide) = (self.of(narrow)?, self.of(wide)?);
        for shape in narrow.iter_mut().chain(&mut wide) {
            *shape = &shape[..shape.len().saturating_sub(2)];
        }
        stretched(&narrow, &wide)
    }
}

fn stretched(narrow: &[&[usize]], wide: &[&[usize]]) -> Result<Vec<usize>, String> {
    let (Some(first), Some(last)) = (narrow.first(), wide.first()) else {
        return Ok(Vec::new());
    };
    let rank = last.len();
    let lacks = rank
        .checked_sub(first.len())
        .ok_or("a result has fewer axes than an input")?;
    let mut axes: Vec<usize> = (0..lacks).collect();
    for axis in lacks..rank {
        let pairs = || {
            narrow
                .iter()
                .zip(wide)
                .map(|(n, w)| (n[axis - lacks], w[axis]))
        };
        if pairs().all(|(n, w)| n == w) {
            continue;
        }
        if !pairs().all(|(n, _)| n == 1) {
            return Err("two extents are neither equal nor one".to_owned());
        }
        axes.push(axis);
    }
    Ok(axes)
}
