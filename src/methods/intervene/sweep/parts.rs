//! The parts of a hook point that a sweep changes each by itself, and the operands of the row that changes one.

use super::super::{operand::Grid, site::Site};
use crate::{engine::EngineError, ipc::info::Axis};

/// An axis that is swept over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// Heads.
    Head,
    /// Positions, of attentions queries.
    Position,
    /// The last axis of hook points of features: neurons, dimensions.
    Dim,
    /// Keys, of attentions.
    Key,
}

impl By {
    const fn name(self) -> &'static str {
        match self {
            By::Head => "head",
            By::Position => "position",
            By::Dim => "neuron or dimension",
            By::Key => "key",
        }
    }

    fn axis(self, site: &Site) -> Option<usize> {
        match self {
            By::Head => site.axes.iter().position(Axis::is_head),
            By::Position => site.positions(),
            By::Key => site.axes.iter().position(|a| *a == Axis::Key),
            By::Dim => {
                let last = site.axes.len().checked_sub(1)?;
                (!site.axes[last].is_token()).then_some(last)
            }
        }
    }
}

/// A hook point, and the axes along which it is taken apart.
#[derive(Clone, Debug)]
pub(super) struct Parts {
    pub(super) site: Site,
    /// Of the site's axes, ascending.
    along: Vec<usize>,
}

impl Parts {
    /// # Errors
    /// When the hook point has no such axis; the field is `by[number]`.
    pub(super) fn new(site: Site, by: &[By]) -> Result<Self, EngineError> {
        let mut along = Vec::with_capacity(by.len());
        for (n, by) in by.iter().enumerate() {
            let axis = by.axis(&site).ok_or_else(|| {
                let axes: Vec<&str> = site.axes.iter().map(Axis::name).collect();
                EngineError::invalid(
                    format!("by[{n}]"),
                    format!(
                        "\"{}\" has the axes {}, and no {} among them",
                        site.hook,
                        axes.join(", "),
                        by.name()
                    ),
                )
            })?;
            if along.contains(&axis) {
                return Err(EngineError::invalid(
                    format!("by[{n}]"),
                    format!("names an axis of \"{}\" twice", site.hook),
                ));
            }
            along.push(axis);
        }
        along.sort_unstable();
        Ok(Self { site, along })
    }

    /// How many parts there are along each axis that is swept over.
    pub(super) fn shape(&self) -> Vec<usize> {
        if self.along.is_empty() {
            return vec![1];
        }
        self.along.iter().map(|a| self.site.extents[*a]).collect()
    }

    /// Names of these axes.
    pub(super) fn axes(&self) -> Vec<String> {
        if self.along.is_empty() {
            return vec!["all".to_owned()];
        }
        let axes = self.along.iter().map(|a| self.site.axes[*a].name());
        axes.map(str::to_owned).collect()
    }

    /// How many parts there are.
    pub(super) fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// The part that an index of the hook point belongs to.
    pub(super) fn of(&self, index: &[usize]) -> usize {
        let along = self.along.iter();
        along.fold(0, |part, a| part * self.site.extents[*a] + index[*a])
    }

    /// The site of one part.
    fn only(&self, part: usize) -> Site {
        let mut chosen = vec![None; self.site.axes.len()];
        let mut rest = part;
        for axis in self.along.iter().rev() {
            let extent = self.site.extents[*axis];
            chosen[*axis] = Some(vec![rest % extent]);
            rest /= extent;
        }
        Site {
            chosen,
            ..self.site.clone()
        }
    }

    /// Scale and shift of a row in which one part is replaced by what `values` has there, and the others are what `others` has, or
    /// without others what they are.
    pub(super) fn replaced(&self, part: usize, values: &Grid, others: Option<&Grid>) -> [Grid; 2] {
        let rank = self.site.axes.len();
        let only = self.only(part);
        let here = values.cut(&only.chosen);
        let spread = |grid: Grid, rest| {
            // A part lies within its site.
            grid.spread(&only, rest)
                .unwrap_or_else(|_| Grid::one(rank, rest))
        };
        match others {
            None => [spread(Grid::one(rank, 0.0), 1.0), spread(here, 0.0)],
            Some(others) => {
                let inside = spread(Grid::one(rank, 1.0), 0.0);
                let put = spread(here, 0.0).with(&inside, |v, inside| v * inside);
                let kept = others.with(&inside, |v, inside| if inside == 0.0 { v } else { 0.0 });
                [Grid::one(rank, 0.0), kept.with(&put, |a, b| a + b)]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site() -> Site {
        Site {
            hook: "blocks.0.attn.hook_z".into(),
            asked: "blocks.0.attn.hook_z".into(),
            axes: vec![Axis::Pos, Axis::Head, Axis::DHead],
            extents: vec![2, 3, 1],
            chosen: vec![None; 3],
        }
    }

    fn grid(shape: &[usize], values: &[f32]) -> Grid {
        Grid {
            shape: shape.to_vec(),
            values: values.to_vec(),
        }
    }

    #[test]
    fn a_row_replaces_its_part_and_nothing_else() {
        let values = grid(&[1, 3, 1], &[5.0, 6.0, 7.0]);
        let heads = Parts::new(site(), &[By::Head]).unwrap();
        let [scale, shift] = heads.replaced(2, &values, None);
        assert_eq!(scale.values, [1.0, 1.0, 0.0]);
        assert_eq!(shift, grid(&[1, 3, 1], &[0.0, 0.0, 7.0]));
        let whole = Parts::new(site(), &[]).unwrap();
        let [scale, shift] = whole.replaced(0, &values, None);
        assert_eq!((scale.values, shift), (vec![0.0], values));
    }

    #[test]
    fn parts_of_two_axes_are_numbered_as_the_hook_point_lies() {
        let both = Parts::new(site(), &[By::Head, By::Position]).unwrap();
        assert_eq!((both.shape(), both.len()), (vec![2, 3], 6));
        assert_eq!(both.axes(), ["pos", "head"]);
        assert_eq!(both.of(&[1, 2, 0]), 5);
        let values = grid(&[2, 3, 1], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let [scale, shift] = both.replaced(5, &values, None);
        assert_eq!(scale.values, [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]);
        assert_eq!(shift.values, [0.0, 0.0, 0.0, 0.0, 0.0, 6.0]);
        let others = grid(&[2, 3, 1], &[9.0; 6]);
        let [scale, shift] = both.replaced(0, &values, Some(&others));
        assert_eq!(scale.values, [0.0]);
        assert_eq!(shift.values, [1.0, 9.0, 9.0, 9.0, 9.0, 9.0]);
        assert!(Parts::new(site(), &[By::Key]).is_err());
        assert!(Parts::new(site(), &[By::Head, By::Head]).is_err());
    }
}
