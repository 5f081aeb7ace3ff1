//! The writing side of a rule: short names for the standard operators, each in the form that the model's operator set
//! has it in (axes moved from attributes to inputs over the years), and new constants in the right dtype.

use super::facts::{Fact, Facts};
use crate::{
    onnx::{Attribute, Graph, Node, NodeId, NodeSpec, OnnxError, Patch, ValueId, number_of},
    tensor::{DType, Tensor},
};

/// From here on `Squeeze`, `Unsqueeze` and `ReduceSum` take their axes as an input.
const AXES_INPUT: i64 = 13;
/// From here on the other reductions do.
const REDUCE_AXES_INPUT: i64 = 18;
/// The end of an axis, as `Slice` writes it.
pub(super) const END: i64 = i64::MAX;

/// What a rule asks of its node.
pub(super) trait Needs {
    /// An input that the operator cannot be without.
    fn need(&self, slot: usize) -> Result<ValueId, String>;
    /// Refuses an input that the rule does not know how to honour.
    fn without(&self, slot: usize, what: &str) -> Result<(), String>;
}

impl Needs for Node {
    fn need(&self, slot: usize) -> Result<ValueId, String> {
        self.input(slot)
            .ok_or_else(|| format!("its input {slot} is missing"))
    }

    fn without(&self, slot: usize, what: &str) -> Result<(), String> {
        match self.input(slot) {
            Some(_) => Err(format!("its input {slot} ({what}) is fed")),
            None => Ok(()),
        }
    }
}

/// Writes nodes into a patch, for one fused node after the other.
pub(super) struct Emit<'a> {
    graph: &'a Graph,
    facts: Facts,
    patch: Patch,
    opset: i64,
    /// Operators written for the node at hand.
    written: Vec<String>,
}

impl<'a> Emit<'a> {
    pub(super) fn new(graph: &'a Graph, facts: Facts, opset: i64) -> Self {
        Self {
            graph,
            facts,
            patch: Patch::new(graph, "unfused"),
            opset,
            written: Vec::new(),
        }
    }

    /// Begins a node; what is written for it is named after it.
    pub(super) fn begin(&mut self, label: &str) {
        self.patch.name_under(label);
        self.written.clear();
    }

    /// The node is written in full and goes. Gives the operators that stand in its place.
    pub(super) fn commit(&mut self, node: NodeId) -> Vec<String> {
        self.patch.remove(node);
        std::mem::take(&mut self.written)
    }

    pub(super) fn apply(self) -> Result<Graph, OnnxError> {
        self.patch.apply()
    }

    pub(super) fn opset(&self) -> i64 {
        self.opset
    }

    /// The graph as it was.
    pub(super) fn graph(&self) -> &'a Graph {
        self.graph
    }

    /// What is known of a value of the graph as it was.
    pub(super) fn fact(&self, value: ValueId) -> Fact {
        self.facts.get(value)
    }

    /// The dtype of a value, or why a rule cannot go on.
    pub(super) fn dtype(&self, value: ValueId) -> Result<DType, String> {
        self.fact(value)
            .dtype
            .ok_or_else(|| format!("the element type of \"{}\" is not known", self.name(value)))
    }

    /// The number of axes of a value, or why a rule cannot go on.
    pub(super) fn rank(&self, value: ValueId) -> Result<usize, String> {
        self.fact(value).rank.ok_or_else(|| {
            format!(
                "the number of axes of \"{}\" is not known",
                self.name(value)
            )
        })
    }

    pub(super) fn name(&self, value: ValueId) -> &'a str {
        self.graph.name(value)
    }

    /// Output `slot` of the fused node, if anything reads it.
    pub(super) fn wanted(&self, node: &Node, slot: usize) -> Option<ValueId> {
        let value = node.output(slot)?;
        let read = !self.graph.consumers(value).is_empty() || self.graph.is_output(value);
        read.then_some(value)
    }

    /// Refuses a node of which an output is read that has no equal in standard operators.
    pub(super) fn unread(&self, node: &Node, slot: usize, what: &str) -> Result<(), String> {
        match self.wanted(node, slot) {
            Some(_) => Err(format!("its output {slot} ({what}) is read")),
            None => Ok(()),
        }
    }

    /// A standard operator with one output; the output is `made`, a value of the fused node, or new.
    pub(super) fn make(
        &mut self,
        made: Option<ValueId>,
        op: &str,
        inputs: &[Option<ValueId>],
        attributes: Vec<Attribute>,
    ) -> ValueId {
        self.written.push(op.to_owned());
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
    pub(super) fn end(&mut self, made: Option<ValueId>, op: &str, inputs: &[ValueId]) -> ValueId {
        let inputs: Vec<_> = inputs.iter().copied().map(Some).collect();
        self.make(made, op, &inputs, vec![])
    }

    /// An operator without attributes.
    pub(super) fn op(&mut self, op: &str, inputs: &[ValueId]) -> ValueId {
        self.end(None, op, inputs)
    }

    /// An operator with attributes.
    pub(super) fn with(
        &mut self,
        op: &str,
        inputs: &[ValueId],
        attributes: Vec<Attribute>,
    ) -> ValueId {
        let inputs: Vec<_> = inputs.iter().copied().map(Some).collect();
        self.make(None, op, &inputs, attributes)
    }

    /// The fused node's output `made` is the same as `value`.
    pub(super) fn alias(&mut self, made: Option<ValueId>, value: ValueId) {
        if made.is_some() {
            self.end(made, "Identity", &[value]);
        }
    }

    /// A list of integers.
    pub(super) fn ints(&mut self, values: &[i64]) -> ValueId {
        self.patch.ints(values)
    }

    /// An integer without axes.
    pub(super) fn int(&mut self, value: i64) -> ValueId {
        let tensor = Tensor::from_i64(vec![], &[value]).expect("one element for a scalar");
        self.patch.constant("int", &tensor)
    }

    /// A float without axes, in the dtype of what it will meet.
    pub(super) fn number(&mut self, value: f32, dtype: DType) -> ValueId {
        let tensor = Tensor::from_f32(vec![], &[value])
            .and_then(|t| t.cast_float(dtype))
            .expect("callers give float dtypes");
        self.patch.constant("number", &tensor)
    }

    pub(super) fn cast(&mut self, value: ValueId, dtype: DType) -> ValueId {
        let to = Attribute::int("to", i64::from(number_of(dtype)));
        self.with("Cast", &[value], vec![to])
    }

    pub(super) fn reshape(&mut self, value: ValueId, shape: &[i64]) -> ValueId {
        self.reshape_to(None, value, shape)
    }

    pub(super) fn reshape_to(
        &mut self,
        made: Option<ValueId>,
        value: ValueId,
        shape: &[i64],
    ) -> ValueId {
        let shape = self.ints(shape);
        self.end(made, "Reshape", &[value, shape])
    }

    pub(super) fn transpose(&mut self, value: ValueId, perm: &[i64]) -> ValueId {
        self.with("Transpose", &[value], vec![Attribute::ints("perm", perm)])
    }

    pub(super) fn concat(&mut self, values: &[ValueId], axis: i64) -> ValueId {
        self.with("Concat", values, vec![Attribute::int("axis", axis)])
    }

    /// New axes of extent one, at these places of the result.
    pub(super) fn unsqueeze(&mut self, value: ValueId, axes: &[i64]) -> ValueId {
        if self.opset < AXES_INPUT {
            return self.with("Unsqueeze", &[value], vec![Attribute::ints("axes", axes)]);
        }
        let axes = self.ints(axes);
        self.op("Unsqueeze", &[value, axes])
    }

    /// Elements `from..to` of an axis.
    pub(super) fn slice(&mut self, value: ValueId, axis: i64, from: i64, to: i64) -> ValueId {
        let (from, to) = (self.ints(&[from]), self.ints(&[to]));
        self.slice_at(value, axis, from, to)
    }

    /// Elements `from..to` of an axis, both lists of one integer.
    pub(super) fn slice_at(
        &mut self,
        value: ValueId,
        axis: i64,
        from: ValueId,
        to: ValueId,
    ) -> ValueId {
        let axis = self.ints(&[axis]);
        self.op("Slice", &[value, from, to, axis])
    }

    /// Every second element of the last axis, from `from` on.
    pub(super) fn every_second(&mut self, value: ValueId, from: i64) -> ValueId {
        let list = [&[from][..], &[END], &[-1], &[2]].map(|l| self.ints(l));
        self.op("Slice", &[value, list[0], list[1], list[2], list[3]])
    }

    /// Rows of `table`.
    pub(super) fn gather(&mut self, table: ValueId, rows: ValueId) -> ValueId {
        self.with("Gather", &[table, rows], vec![Attribute::int("axis", 0)])
    }

    /// Element `at` of an axis, which goes.
    pub(super) fn pick(&mut self, value: ValueId, axis: i64, at: i64) -> ValueId {
        let at = self.int(at);
        self.with("Gather", &[value, at], vec![Attribute::int("axis", axis)])
    }

    /// The extent of an axis, counted from the front, as an integer without axes.
    pub(super) fn extent(&mut self, value: ValueId, axis: i64) -> ValueId {
        let shape = self.op("Shape", &[value]);
        self.pick(shape, 0, axis)
    }

    /// `0, 1, .. n - 1`.
    pub(super) fn range(&mut self, n: ValueId) -> ValueId {
        let (zero, one) = (self.int(0), self.int(1));
        self.op("Range", &[zero, n, one])
    }

    /// The mean over the last axis, which stays.
    pub(super) fn mean(&mut self, value: ValueId) -> ValueId {
        let keep = Attribute::int("keepdims", 1);
        if self.opset < REDUCE_AXES_INPUT {
            let axes = Attribute::ints("axes", &[-1]);
            return self.with("ReduceMean", &[value], vec![axes, keep]);
        }
        let axes = self.ints(&[-1]);
        self.with("ReduceMean", &[value, axes], vec![keep])
    }

    /// The sum over the last axis, which goes.
    pub(super) fn sum(&mut self, made: Option<ValueId>, value: ValueId) -> ValueId {
        let keep = Attribute::int("keepdims", 0);
        if self.opset < AXES_INPUT {
            let axes = Attribute::ints("axes", &[-1]);
            return self.make(made, "ReduceSum", &[Some(value)], vec![axes, keep]);
        }
        let axes = self.ints(&[-1]);
        self.make(made, "ReduceSum", &[Some(value), Some(axes)], vec![keep])
    }

    /// Zeros of an extent.
    pub(super) fn zeros(&mut self, made: Option<ValueId>, extent: ValueId, dtype: DType) {
        let one = Tensor::new(dtype, vec![1], vec![0; dtype.size()].into())
            .expect("one element has the size of its dtype");
        let shape = self.unsqueeze(extent, &[0]);
        let value = Attribute::tensor("value", &one);
        self.make(made, "ConstantOfShape", &[Some(shape)], vec![value]);
    }
}
