//! Operands of stages: numbers over the axes of a hook point, as small as what varies, and how edits that follow each other become one.

use super::site::Site;
use crate::{engine::EngineError, ipc::spec::Stage};

/// Numbers over the axes of a hook point behind the batch. Along an axis of extent one, one number stands for all.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Grid {
    pub(super) shape: Vec<usize>,
    pub(super) values: Vec<f32>,
}

impl Grid {
    /// One number everywhere.
    pub(super) fn one(rank: usize, value: f32) -> Self {
        Self {
            shape: vec![1; rank],
            values: vec![value],
        }
    }

    /// Its number at an index.
    pub(super) fn at(&self, index: &[usize]) -> f32 {
        let mut place = 0;
        for (extent, i) in self.shape.iter().zip(index) {
            place = place * extent + if *extent == 1 { 0 } else { *i };
        }
        self.values[place]
    }

    /// Each number times a factor.
    pub(super) fn times(&self, factor: f32) -> Self {
        Self {
            shape: self.shape.clone(),
            values: self.values.iter().map(|v| v * factor).collect(),
        }
    }

    /// The numbers at chosen indices along each axis; an axis of extent one stays.
    pub(super) fn cut(&self, chosen: &[Option<Vec<usize>>]) -> Self {
        let kept: Vec<Option<&Vec<usize>>> = self
            .shape
            .iter()
            .zip(chosen)
            .map(|(extent, chosen)| chosen.as_ref().filter(|_| *extent != 1))
            .collect();
        let extents = self.shape.iter().zip(&kept);
        let shape: Vec<usize> = extents.map(|(n, k)| k.map_or(*n, Vec::len)).collect();
        let mut from = vec![0; shape.len()];
        Self::made(shape, |index| {
            for ((from, kept), i) in from.iter_mut().zip(&kept).zip(index) {
                *from = kept.map_or(*i, |k| k[*i]);
            }
            self.at(&from)
        })
    }

    /// The numbers at each index of an axis, and their shape with that axis of extent one; without an axis, all of them.
    pub(super) fn by(&self, axis: Option<usize>) -> (Vec<usize>, Vec<Vec<f32>>) {
        let Some(axis) = axis else {
            return (self.shape.clone(), vec![self.values.clone()]);
        };
        let mut chosen = vec![None; self.shape.len()];
        let rows = (0..self.shape[axis])
            .map(|at| {
                chosen[axis] = Some(vec![at]);
                self.cut(&chosen).values
            })
            .collect();
        let mut shape = self.shape.clone();
        shape[axis] = 1;
        (shape, rows)
    }

    /// The same with each row of the last axis of length one; none when there is one of length zero.
    pub(super) fn unit(&self, width: usize) -> Option<Self> {
        let mut unit = self.clone();
        for row in unit.values.chunks_exact_mut(width) {
            let length: f64 = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
            let length = length.sqrt();
            if length == 0.0 {
                return None;
            }
            for v in row {
                #[allow(clippy::cast_possible_truncation)] // as precise as it was given
                let scaled = (f64::from(*v) / length) as f32;
                *v = scaled;
            }
        }
        Some(unit)
    }

    /// `f` of the numbers of both.
    pub(super) fn with(&self, other: &Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let extents = self.shape.iter().zip(&other.shape);
        let shape: Vec<usize> = extents.map(|(a, b)| *a.max(b)).collect();
        Self::made(shape, |index| f(self.at(index), other.at(index)))
    }

    /// These numbers where a site is edited, `rest` elsewhere. Their shape broadcasts to what is edited.
    ///
    /// # Errors
    /// What does not fit.
    pub(super) fn spread(&self, site: &Site, rest: f32) -> Result<Self, String> {
        let edited = site.edited();
        let missing = edited.len().checked_sub(self.shape.len());
        let Some(missing) = missing else {
            return Err(format!(
                "has the shape {:?}, and \"{}\" the axes {}",
                self.shape,
                site.hook,
                axes(site)
            ));
        };
        let mut shape = vec![1; missing];
        shape.extend(&self.shape);
        if shape.iter().zip(&edited).any(|(a, b)| *a != 1 && a != b) {
            return Err(format!(
                "has the shape {:?}, which does not broadcast to {edited:?}: what is edited of \"{}\" ({})",
                self.shape,
                site.hook,
                axes(site)
            ));
        }
        let given = Self {
            shape,
            values: self.values.clone(),
        };
        // An axis that is edited as a whole, by one number, stays of extent one.
        let whole = |axis: usize| site.chosen[axis].is_none();
        let shape: Vec<usize> = (0..edited.len())
            .map(|axis| match whole(axis) && given.shape[axis] == 1 {
                true => 1,
                false => site.extents[axis],
            })
            .collect();
        // Where an index along each axis stands among those that are edited.
        let places = site.chosen.iter().zip(&shape).map(|(chosen, extent)| {
            let place = |i| match chosen {
                None => Some(i),
                Some(chosen) => chosen.iter().position(|c| *c == i),
            };
            (0..*extent).map(place).collect::<Vec<_>>()
        });
        let places: Vec<Vec<Option<usize>>> = places.collect();
        let mut within = vec![0; shape.len()];
        Ok(Self::made(shape, |index| {
            for ((within, places), i) in within.iter_mut().zip(&places).zip(index) {
                match places[*i] {
                    Some(at) => *within = at,
                    None => return rest,
                }
            }
            given.at(&within)
        }))
    }

    /// What `value` says of every index, the last axis fastest.
    fn made(shape: Vec<usize>, mut value: impl FnMut(&[usize]) -> f32) -> Self {
        let mut values = Vec::with_capacity(shape.iter().product());
        each_index(&shape, |index| values.push(value(index)));
        Self { shape, values }
    }
}

/// Goes through every index of a shape, the last axis fastest.
pub(super) fn each_index(shape: &[usize], mut each: impl FnMut(&[usize])) {
    let mut index = vec![0; shape.len()];
    for _ in 0..shape.iter().product() {
        each(&index);
        for (at, extent) in index.iter_mut().zip(shape).rev() {
            *at += 1;
            if *at < *extent {
                break;
            }
            *at = 0;
        }
    }
}

fn axes(site: &Site) -> String {
    let names: Vec<&str> = site.axes.iter().map(crate::ipc::info::Axis::name).collect();
    names.join(", ")
}

/// A stage with its operands, in the order of [`Stage::inputs`].
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Staged {
    pub(super) stage: Stage,
    pub(super) operands: Vec<Grid>,
}

impl Staged {
    /// Whether it changes nothing, whatever stands there.
    pub(super) fn is_neutral(&self) -> bool {
        // Which hook point it is at says nothing about its operands.
        let inputs = self.stage.inputs(0, "");
        let mut operands = inputs.iter().zip(&self.operands);
        operands.all(|((_, rest), grid)| grid.values.iter().all(|v| v == rest))
    }

    /// `x * scale + shift`
    pub(super) fn moved(scale: Grid, shift: Grid) -> Self {
        Self {
            stage: Stage::Move,
            operands: vec![scale, shift],
        }
    }
}

/// Whether a stage behind another is one with it.
pub(super) fn joins(before: Stage, next: Stage) -> bool {
    (before, next) == (Stage::Move, Stage::Move)
}

/// Adds a stage to those of a hook point. Moves that follow each other are one: `(x a + b) c + d = x (a c) + (b c + d)`.
pub(super) fn follow(stages: &mut Vec<Staged>, next: Staged) {
    let last = stages.last_mut().filter(|l| joins(l.stage, next.stage));
    match (last, &next.operands[..]) {
        (Some(last), [scale, shift]) => {
            if let [a, b] = &last.operands[..] {
                // A scale of zero replaces, whatever stood there.
                let kept = b.with(scale, |b, c| if c == 0.0 { 0.0 } else { b * c });
                let shifted = kept.with(shift, |b, d| b + d);
                last.operands = vec![a.with(scale, |a, c| a * c), shifted];
            }
        }
        (Some(_) | None, _) => stages.push(next),
    }
}

/// The numbers of a tensor that a caller gives.
///
/// # Errors
/// With the field `field`, for what is no float or not finite.
pub(super) fn given(tensor: &crate::tensor::Tensor, field: &str) -> Result<Grid, EngineError> {
    let values = tensor
        .to_f32()
        .map_err(|_| EngineError::invalid(field, format!("holds {}: give floats", tensor.dtype())))?
        .into_owned();
    if values.iter().any(|v| !v.is_finite()) {
        return Err(EngineError::invalid(
            field,
            "holds a number that is not finite",
        ));
    }
    Ok(Grid {
        shape: tensor.shape().to_vec(),
        values,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipc::info::Axis;

    fn site(chosen: Vec<Option<Vec<usize>>>) -> Site {
        Site {
            hook: "blocks.0.attn.hook_z".into(),
            asked: "blocks.0.attn.hook_z".into(),
            axes: vec![Axis::Pos, Axis::Head, Axis::DHead],
            extents: vec![2, 3, 2],
            chosen,
        }
    }

    #[test]
    fn what_is_edited_as_a_whole_stays_small() {
        let head = site(vec![None, Some(vec![1]), None]);
        let scale = Grid::one(3, 0.0).spread(&head, 1.0).unwrap();
        assert_eq!(
            (scale.shape, scale.values),
            (vec![1, 3, 1], vec![1.0, 0.0, 1.0])
        );
        let place = site(vec![Some(vec![1]), Some(vec![2, 0]), None]);
        let vector = Grid {
            shape: vec![2],
            values: vec![5.0, 6.0],
        };
        let shift = vector.spread(&place, 0.0).unwrap();
        assert_eq!(shift.shape, [2, 3, 2]);
        assert_eq!(shift.values[..6], [0.0; 6]);
        assert_eq!(shift.values[6..], [5.0, 6.0, 0.0, 0.0, 5.0, 6.0]);
    }

    #[test]
    fn a_vector_of_the_wrong_size_is_said() {
        let wrong = Grid {
            shape: vec![3],
            values: vec![0.0; 3],
        };
        let error = wrong
            .spread(&site(vec![None, None, None]), 0.0)
            .unwrap_err();
        assert!(
            error.contains("[3]") && error.contains("[2, 3, 2]"),
            "{error}"
        );
    }

    #[test]
    fn moves_that_follow_each_other_are_one() {
        let mut stages = Vec::new();
        let one = |v| Grid::one(1, v);
        follow(&mut stages, Staged::moved(one(2.0), one(1.0)));
        follow(&mut stages, Staged::moved(one(3.0), one(-1.0)));
        assert_eq!(stages, [Staged::moved(one(6.0), one(2.0))]);
        let clamp = Staged {
            stage: Stage::Clamp,
            operands: vec![one(-1.0), one(1.0)],
        };
        follow(&mut stages, clamp.clone());
        follow(&mut stages, Staged::moved(one(0.0), one(f32::NEG_INFINITY)));
        assert_eq!(stages.len(), 3);
        follow(&mut stages, Staged::moved(one(0.0), one(4.0)));
        assert_eq!(stages[2], Staged::moved(one(0.0), one(4.0)));
    }
}
