//! The state of a walk backwards: what is wanted, and the gradients that were given so far.

use std::{
    collections::{HashMap, HashSet},
    ops::{Deref, DerefMut},
};

use super::Shapes;
use crate::{
    ipc::spec::Rules,
    onnx::{Node, ValueId, Writer},
    tensor::DType,
};

/// What rules read and write. A gradient has the shape and the type of its value.
pub(super) struct Tape<'a> {
    writer: &'a mut Writer,
    shapes: &'a Shapes,
    rules: Rules,
    types: Vec<Option<DType>>,
    /// Values that depend on a point, points included.
    wanted: HashSet<ValueId>,
    gradients: HashMap<ValueId, ValueId>,
}

impl Deref for Tape<'_> {
    type Target = Writer;

    fn deref(&self) -> &Writer {
        self.writer
    }
}

impl DerefMut for Tape<'_> {
    fn deref_mut(&mut self) -> &mut Writer {
        self.writer
    }
}

impl<'a> Tape<'a> {
    pub(super) fn new(
        writer: &'a mut Writer,
        shapes: &'a Shapes,
        points: &[ValueId],
        rules: Rules,
    ) -> Self {
        Self {
            types: writer.patch.draft().element_types(),
            writer,
            shapes,
            rules,
            wanted: points.iter().copied().collect(),
            gradients: HashMap::new(),
        }
    }

    /// Whether the size that a norm divides by counts as a number, as it does for relevance.
    pub(super) fn sizes_are_fixed(&self) -> bool {
        self.rules == Rules::AttnLrp
    }

    /// Whether a value's gradient is needed.
    pub(super) fn wants(&self, value: ValueId) -> bool {
        self.wanted.contains(&value)
    }

    /// Whether the gradient of an input is needed; then which value it is.
    pub(super) fn wanted_input(&self, node: &Node, slot: usize) -> Option<ValueId> {
        node.input(slot).filter(|v| self.wants(*v))
    }

    /// The outputs of a node depend on a point, as far as they are floats.
    pub(super) fn want_outputs(&mut self, node: &Node) {
        for value in node.outputs.iter().flatten() {
            let dtype = self.types.get(value.index()).copied().flatten();
            if dtype.is_none_or(DType::is_float) {
                self.wanted.insert(*value);
            }
        }
    }

    /// Adds to the gradient of a value.
    pub(super) fn give(&mut self, value: ValueId, gradient: ValueId) {
        let sum = match self.gradients.get(&value).copied() {
            None => gradient,
            Some(before) => self.op("Add", &[before, gradient]),
        };
        self.gradients.insert(value, sum);
    }

    /// What was given to a value so far.
    pub(super) fn gradient(&self, value: ValueId) -> Option<ValueId> {
        self.gradients.get(&value).copied()
    }

    /// Gives an input what was stretched by broadcasting to the shape of the output `of`.
    pub(super) fn give_narrowed(
        &mut self,
        input: ValueId,
        gradient: ValueId,
        of: ValueId,
    ) -> Result<(), String> {
        let narrowed = self.narrowed(input, gradient, of)?;
        self.give(input, narrowed);
        Ok(())
    }

    /// The sum of a gradient of the shape of `of` over the axes along which `input` was stretched to it.
    pub(super) fn narrowed(
        &mut self,
        input: ValueId,
        gradient: ValueId,
        of: ValueId,
    ) -> Result<ValueId, String> {
        let axes = self.shapes.stretched(input, of)?;
        if axes.is_empty() {
            return Ok(gradient);
        }
        let lacks = self.rank(of)? - self.rank(input)?;
        let axes: Vec<i64> = axes.iter().map(|a| *a as i64).collect();
        let summed = self.reduce("ReduceSum", gradient, &axes, true);
        if lacks == 0 {
            return Ok(summed);
        }
        Ok(self.reshape_like(summed, input))
    }

    /// The leading axes of a product along which the matrices of a factor were repeated.
    pub(super) fn stretched_matrices(
        &self,
        factor: ValueId,
        of: ValueId,
    ) -> Result<Vec<i64>, String> {
        let axes = self.shapes.stretched_leading(factor, of)?;
        Ok(axes.into_iter().map(|a| a as i64).collect())
    }

    /// A value in the shape of another.
    pub(super) fn reshape_like(&mut self, value: ValueId, like: ValueId) -> ValueId {
        let shape = self.op("Shape", &[like]);
        self.op("Reshape", &[value, shape])
    }

    /// The type of a value's elements.
    pub(super) fn dtype(&self, value: ValueId) -> Result<DType, String> {
        let known = self.types.get(value.index()).copied().flatten();
        known.ok_or_else(|| "the element type of a value is not known".to_owned())
    }

    /// The number of axes of a value.
    pub(super) fn rank(&self, value: ValueId) -> Result<usize, String> {
        self.shapes.rank(value)
    }

    /// The number of axes, none where nothing was measured: a scalar has no shape to tell.
    pub(super) fn rank_or_scalar(&self, value: ValueId) -> usize {
        self.shapes.rank(value).unwrap_or(0)
    }

    /// Whether two axes have the same extent in all runs.
    pub(super) fn same_extent(&self, a: (ValueId, usize), b: (ValueId, usize)) -> bool {
        self.shapes.same_extent(a, b)
    }

    /// The extent of an axis, where it is always the same.
    pub(super) fn known_extent(
        &self,
        value: ValueId,
        axis: usize,
    ) -> Result<Option<usize>, String> {
        self.shapes.extent(value, axis)
    }

    /// A float in the type of a value.
    pub(super) fn number_like(&mut self, number: f64, like: ValueId) -> Result<ValueId, String> {
        let dtype = self.dtype(like)?;
        Ok(self.number(number as f32, dtype))
    }

    /// The elements of a list of integers, where the graph fixes it: by a constant, or by moving constants about.
    pub(super) fn constant_ints(&self, value: ValueId) -> Option<Vec<i64>> {
        let draft = self.writer.patch.draft();
        if let Some(found) = draft.constant_ints(value) {
            return Some(found);
        }
        let node = draft.node(draft.producer(value)?);
        // These keep the elements of a list as they are.
        const MOVERS: [&str; 5] = ["Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze"];
        if node.is_any(&MOVERS) {
            return self.constant_ints(node.input(0)?);
        }
        if node.is("Concat") {
            let parts: Option<Vec<Vec<i64>>> =
                node.reads().map(|v| self.constant_ints(v)).collect();
            return Some(parts?.concat());
        }
        None
    }

    /// `value * number`.
    pub(super) fn scaled(
        &mut self,
        value: ValueId,
        number: f64,
        like: ValueId,
    ) -> Result<ValueId, String> {
        let number = self.number_like(number, like)?;
        Ok(self.op("Mul", &[value, number]))
    }

    /// An axis counted from the front.
    pub(super) fn axis(&self, axis: i64, rank: usize) -> Result<usize, String> {
        let counted = if axis < 0 { axis + rank as i64 } else { axis };
        usize::try_from(counted)
            .ok()
            .filter(|a| *a < rank)
            .ok_or_else(|| format!("axis {axis} of {rank}"))
    }

    /// The extent of an axis as a list of one integer: a constant where it is known.
    pub(super) fn extent_list(&mut self, value: ValueId, axis: usize) -> Result<ValueId, String> {
        if let Some(n) = self.known_extent(value, axis)? {
            return Ok(self.ints(&[n as i64]));
        }
        let shape = self.op("Shape", &[value]);
        Ok(self.slice(shape, 0, axis as i64, axis as i64 + 1))
    }
}
