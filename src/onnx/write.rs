//! The standard operators by short names, each in the form that the model's operator set has it in (axes moved from attributes to
//! inputs over the years), and constants in the right dtype. What writes more than a node or two into a patch writes by this.

use super::{
    attribute::Attribute,
    graph::ValueId,
    patch::{NodeSpec, Patch},
    proto::number_of,
};
use crate::tensor::{DType, Tensor};

/// From here on `Squeeze`, `Unsqueeze` and `ReduceSum` take their axes as an input.
const AXES_INPUT: i64 = 13;
/// From here on the other reductions do.
const REDUCE_AXES_INPUT: i64 = 18;
/// The end of an axis, as `Slice` writes it.
pub const END: i64 = i64::MAX;

/// Writes operators into a patch.
#[derive(Clone, Debug)]
pub struct Writer {
    /// What is written to.
    pub patch: Patch,
    opset: i64,
}

impl Writer {
    /// Of a patch to a model of this operator set.
    pub fn new(patch: Patch, opset: i64) -> Self {
        Self { patch, opset }
    }

    /// The operator set.
    pub fn opset(&self) -> i64 {
        self.opset
    }

    /// A standard operator with one output; the output is `made`, a value that lost its producer, or new.
    pub fn make(
        &mut self,
        made: Option<ValueId>,
        op: &str,
        inputs: &[Option<ValueId>],
        attributes: Vec<Attribute>,
    ) -> ValueId {
        let spec = NodeSpec {
            op,
            inputs: inputs.to_vec(),
            attributes,
            outputs: 1,
            ..NodeSpec::default()
        };
        match made {
            Some(value) => {
                self.patch.node_making(spec, vec![made]);
                value
            }
            None => self.patch.node(spec)[0],
        }
    }

    /// An operator without attributes whose output is `made` or new.
    pub fn end(&mut self, made: Option<ValueId>, op: &str, inputs: &[ValueId]) -> ValueId {
        let inputs: Vec<_> = inputs.iter().copied().map(Some).collect();
        self.make(made, op, &inputs, vec![])
    }

    /// An operator without attributes.
    pub fn op(&mut self, op: &str, inputs: &[ValueId]) -> ValueId {
        self.end(None, op, inputs)
    }

    /// An operator with attributes.
    pub fn with(&mut self, op: &str, inputs: &[ValueId], attributes: Vec<Attribute>) -> ValueId {
        let inputs: Vec<_> = inputs.iter().copied().map(Some).collect();
        self.make(None, op, &inputs, attributes)
    }

    /// A list of integers.
    pub fn ints(&mut self, values: &[i64]) -> ValueId {
        self.patch.ints(values)
    }

    /// A list of floats.
    pub fn floats(&mut self, values: &[f32]) -> ValueId {
        let tensor = Tensor::from_f32(vec![values.len()], values).expect("as many as the list has");
        self.patch.constant("floats", &tensor)
    }

    /// An integer without axes.
    pub fn int(&mut self, value: i64) -> ValueId {
        let tensor = Tensor::from_i64(vec![], &[value]).expect("one element for a scalar");
        self.patch.constant("int", &tensor)
    }

    /// A float without axes, in the dtype of what it will meet.
    pub fn number(&mut self, value: f32, dtype: DType) -> ValueId {
        let tensor = Tensor::from_f32(vec![], &[value])
            .and_then(|t| t.cast_float(dtype))
            .expect("callers give float dtypes");
        self.patch.constant("number", &tensor)
    }

    /// A value in another element type.
    pub fn cast(&mut self, value: ValueId, dtype: DType) -> ValueId {
        let to = Attribute::int("to", i64::from(number_of(dtype)));
        self.with("Cast", &[value], vec![to])
    }

    /// A value in another shape.
    pub fn reshape(&mut self, value: ValueId, shape: &[i64]) -> ValueId {
        self.reshape_to(None, value, shape)
    }

    /// A value in another shape, as `made` or a new value.
    pub fn reshape_to(&mut self, made: Option<ValueId>, value: ValueId, shape: &[i64]) -> ValueId {
        let shape = self.ints(shape);
        self.end(made, "Reshape", &[value, shape])
    }

    /// A value with its axes in another order.
    pub fn transpose(&mut self, value: ValueId, perm: &[i64]) -> ValueId {
        self.with("Transpose", &[value], vec![Attribute::ints("perm", perm)])
    }

    /// Values one behind the other along an axis.
    pub fn concat(&mut self, values: &[ValueId], axis: i64) -> ValueId {
        self.with("Concat", values, vec![Attribute::int("axis", axis)])
    }

    /// New axes of extent one, at these places of the result.
    pub fn unsqueeze(&mut self, value: ValueId, axes: &[i64]) -> ValueId {
        if self.opset < AXES_INPUT {
            return self.with("Unsqueeze", &[value], vec![Attribute::ints("axes", axes)]);
        }
        let axes = self.ints(axes);
        self.op("Unsqueeze", &[value, axes])
    }

    /// Elements `from..to` of an axis.
    pub fn slice(&mut self, value: ValueId, axis: i64, from: i64, to: i64) -> ValueId {
        let (from, to) = (self.ints(&[from]), self.ints(&[to]));
        self.slice_at(value, axis, from, to)
    }

    /// Elements `from..to` of an axis, both lists of one integer.
    pub fn slice_at(&mut self, value: ValueId, axis: i64, from: ValueId, to: ValueId) -> ValueId {
        let axis = self.ints(&[axis]);
        self.op("Slice", &[value, from, to, axis])
    }

    /// Every second element of the last axis, from `from` on.
    pub fn every_second(&mut self, value: ValueId, from: i64) -> ValueId {
        let list = [&[from][..], &[END], &[-1], &[2]].map(|l| self.ints(l));
        self.op("Slice", &[value, list[0], list[1], list[2], list[3]])
    }

    /// Rows of `table`.
    pub fn gather(&mut self, table: ValueId, rows: ValueId) -> ValueId {
        self.with("Gather", &[table, rows], vec![Attribute::int("axis", 0)])
    }

    /// Element `at` of an axis, which goes.
    pub fn pick(&mut self, value: ValueId, axis: i64, at: i64) -> ValueId {
        let at = self.int(at);
        self.with("Gather", &[value, at], vec![Attribute::int("axis", axis)])
    }

    /// The extent of an axis, counted from the front, as an integer without axes.
    pub fn extent(&mut self, value: ValueId, axis: i64) -> ValueId {
        let shape = self.op("Shape", &[value]);
        self.pick(shape, 0, axis)
    }

    /// `0, 1, .. n - 1`.
    pub fn range(&mut self, n: ValueId) -> ValueId {
        let (zero, one) = (self.int(0), self.int(1));
        self.op("Range", &[zero, n, one])
    }

    /// A reduction over these axes (`ReduceSum`, `ReduceMean`, ...), which stay with an extent of one or go.
    pub fn reduce(&mut self, op: &str, value: ValueId, axes: &[i64], keep: bool) -> ValueId {
        self.reduce_to(None, op, value, axes, keep)
    }

    fn reduce_to(
        &mut self,
        made: Option<ValueId>,
        op: &str,
        value: ValueId,
        axes: &[i64],
        keep: bool,
    ) -> ValueId {
        let keep = Attribute::int("keepdims", i64::from(keep));
        let input_from = match op {
            "ReduceSum" => AXES_INPUT,
            _ => REDUCE_AXES_INPUT,
        };
        if self.opset < input_from {
            let axes = Attribute::ints("axes", axes);
            return self.make(made, op, &[Some(value)], vec![axes, keep]);
        }
        let axes = self.ints(axes);
        self.make(made, op, &[Some(value), Some(axes)], vec![keep])
    }

    /// The mean over the last axis, which stays.
    pub fn mean(&mut self, value: ValueId) -> ValueId {
        self.reduce("ReduceMean", value, &[-1], true)
    }

    /// The sum over the last axis, which goes.
    pub fn sum(&mut self, made: Option<ValueId>, value: ValueId) -> ValueId {
        self.reduce_to(made, "ReduceSum", value, &[-1], false)
    }

    /// Zeros of an extent.
    pub fn zeros(&mut self, made: Option<ValueId>, extent: ValueId, dtype: DType) {
        let one = Tensor::new(dtype, vec![1], vec![0; dtype.size()].into())
            .expect("one element has the size of its dtype");
        let shape = self.unsqueeze(extent, &[0]);
        let value = Attribute::tensor("value", &one);
        self.make(made, "ConstantOfShape", &[Some(shape)], vec![value]);
    }
}
