//! Models of one node, built by hand, to hold a fused operator against what it is unfused into.
#![allow(dead_code)] // every test binary uses a part of it

use introspectd::{
    anatomy::{
        certificate::distance,
        normalise::{Unfused, unfuse},
    },
    onnx::{Attribute, Dim, Limits, Model, NodeSpec, Patch, ValueId},
    tensor::{DType, Tensor},
};

use super::support::run;

/// Other operators, same mathematics.
pub const REWRITTEN: f64 = 1e-4;
/// The domain of ONNX Runtime's operators.
pub const RUNTIME: &str = "com.microsoft";

/// Numbers that look random and are the same in every run.
pub struct Seeded(u64);

impl Seeded {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// In `-1 .. 1`.
    pub fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, shape: &[usize]) -> Tensor {
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| 2.0 * self.next())
            .collect();
        Tensor::from_f32(shape.to_vec(), &values).unwrap()
    }
}

pub fn longs(shape: &[usize], values: &[i64]) -> Tensor {
    Tensor::from_i64(shape.to_vec(), values).unwrap()
}

pub fn ints(shape: &[usize], values: &[i32]) -> Tensor {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    Tensor::new(DType::I32, shape.to_vec(), bytes.into()).unwrap()
}

pub fn bools(shape: &[usize], values: &[u8]) -> Tensor {
    Tensor::new(DType::Bool, shape.to_vec(), values.to_vec().into()).unwrap()
}

/// What goes into the node.
#[derive(Clone)]
pub enum In {
    /// An input of the graph; only its number of axes is declared.
    Fed(Tensor),
    /// A weight of the graph.
    Weight(Tensor),
    /// An optional input that is left out.
    None,
}
pub use In::{Fed, Weight};

/// A node alone in a graph.
#[derive(Clone)]
pub struct Case {
    pub domain: &'static str,
    pub op: &'static str,
    pub inputs: Vec<In>,
    pub attributes: Vec<Attribute>,
    /// Which outputs are read.
    pub outputs: Vec<bool>,
    /// How many of those that are read must be equal.
    pub equal: usize,
}

impl Case {
    pub fn new(domain: &'static str, op: &'static str, inputs: Vec<In>) -> Self {
        Self {
            domain,
            op,
            inputs,
            attributes: Vec::new(),
            outputs: vec![true],
            equal: usize::MAX,
        }
    }

    pub fn with(mut self, attribute: Attribute) -> Self {
        self.attributes.push(attribute);
        self
    }

    pub fn int(self, name: &str, value: i64) -> Self {
        self.with(Attribute::int(name, value))
    }

    pub fn float(self, name: &str, value: f32) -> Self {
        self.with(Attribute::float(name, value))
    }

    /// Which outputs are read, in order.
    pub fn outputs(mut self, read: &[bool]) -> Self {
        self.outputs = read.to_vec();
        self
    }

    /// Only the first output that is read must be equal; the others hold what means nothing.
    pub fn first_equal(mut self) -> Self {
        self.equal = 1;
        self
    }

    /// The model, and what to feed.
    pub fn model(&self, opset: u8) -> (Model, Vec<(String, Tensor)>) {
        let base = empty(opset);
        let mut patch = Patch::new(&base.graph, "made");
        let mut fed = Vec::new();
        let inputs: Vec<Option<ValueId>> = self
            .inputs
            .iter()
            .enumerate()
            .map(|(at, input)| match input {
                In::Fed(tensor) => {
                    let name = format!("in{at}");
                    let dims = vec![Dim::Unknown; tensor.shape().len()];
                    let value = patch.input(&name, tensor.dtype(), dims).unwrap();
                    fed.push((name, tensor.clone()));
                    Some(value)
                }
                In::Weight(tensor) => Some(patch.constant("weight", tensor)),
                In::None => None,
            })
            .collect();
        let made = patch.node(NodeSpec {
            op: self.op,
            domain: self.domain,
            inputs,
            attributes: self.attributes.clone(),
            outputs: self.outputs.len(),
        });
        let read = made.iter().zip(&self.outputs).filter(|(_, read)| **read);
        let read: Vec<ValueId> = read.map(|(value, _)| *value).collect();
        for value in &read {
            patch.output(*value);
        }
        patch.keep_outputs(&read);
        let graph = patch.apply().unwrap();
        (base.with_graph(graph), fed)
    }

    /// Unfuses the node and checks that the model computes what it did. Gives the result.
    pub fn holds(&self, opset: u8) -> Unfused {
        let what = format!("{} at opset {opset}", self.op);
        let (model, fed) = self.model(opset);
        let done = unfuse(&model).unwrap();
        assert_eq!(done.left, [], "{what}");
        assert_eq!(done.replaced.len(), 1, "{what}");
        let same_op = |n: &introspectd::onnx::Node| n.op == self.op && n.domain == self.domain;
        for (_, node) in done.model.graph.nodes() {
            assert!(
                node.domain.is_empty() && !same_op(node),
                "{what}: {} stays",
                node.op
            );
        }
        let fused = run(&model, &fed).unwrap_or_else(|e| panic!("{what}: fused: {e}"));
        let plain = run(&done.model, &fed)
            .unwrap_or_else(|e| panic!("{what}: {e}\n{}", done.model.graph.dump()));
        assert_eq!(
            fused.keys().collect::<Vec<_>>(),
            plain.keys().collect::<Vec<_>>(),
            "{what}"
        );
        assert!(!fused.is_empty(), "{what}");
        for port in model.graph.outputs().iter().take(self.equal) {
            let name = model.graph.name(port.value);
            same(
                &format!("{what}, {name}"),
                &fused[name],
                &plain[name],
                REWRITTEN,
            );
        }
        done
    }

    /// Unfuses the node and runs the result only: for operators without a kernel on this processor.
    pub fn runs(&self, opset: u8) -> Tensor {
        let (model, fed) = self.model(opset);
        let done = unfuse(&model).unwrap();
        assert_eq!(done.left, [], "{} at opset {opset}", self.op);
        let made = run(&done.model, &fed).unwrap();
        assert_eq!(made.len(), 1);
        made.into_values().next().unwrap()
    }

    /// The reason why the node stays.
    pub fn stays(&self, opset: u8) -> String {
        let (model, _) = self.model(opset);
        let done = unfuse(&model).unwrap();
        assert_eq!(done.replaced, [], "{} at opset {opset}", self.op);
        assert_eq!(
            done.model.graph.dump(),
            model.graph.dump(),
            "nothing changes"
        );
        let [left] = &done.left[..] else {
            panic!("{} at opset {opset}: {:?}", self.op, done.left);
        };
        left.reason.clone()
    }
}

/// Same dtype, shape and numbers; integers exactly.
pub fn same(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) {
    assert_eq!((a.dtype(), a.shape()), (b.dtype(), b.shape()), "{what}");
    if !a.dtype().is_float() {
        assert_eq!(a.bytes(), b.bytes(), "{what}");
        return;
    }
    let (x, y) = (a.to_f32().unwrap(), b.to_f32().unwrap());
    // What is left out is minus infinity, or the lowest number there is: kernels differ in it.
    let told = |x: &f32| -> bool { x.is_finite() && x.abs() < 1e30 };
    let finite = |v: &[f32]| v.iter().map(told).collect::<Vec<_>>();
    assert_eq!(finite(&x), finite(&y), "{what}: finite at other places");
    let kept = |v: &[f32]| {
        let v: Vec<f32> = v.iter().copied().filter(told).collect();
        Tensor::from_f32(vec![v.len()], &v).unwrap()
    };
    let off = distance(&kept(&x), &kept(&y));
    assert!(off <= tolerance, "{what}: {off} apart");
}

/// A model of a standard operator set and the runtime's first one whose only output is its input, for a patch to replace.
fn empty(opset: u8) -> Model {
    // ir_version 9; opset_import {version}; opset_import {domain, version 1}
    let mut bytes = vec![0x08, 9, 0x42, 2, 0x10, opset];
    let domain = RUNTIME.as_bytes();
    let length = u8::try_from(domain.len()).unwrap();
    bytes.extend([0x42, length + 4, 0x0a, length]);
    bytes.extend(domain);
    bytes.extend([0x10, 1]);
    // name "x", type {tensor_type {elem_type FLOAT, shape {dim {dim_value 1}}}}
    let x = [
        0x0a, 1, b'x', 0x12, 10, 0x0a, 8, 0x08, 1, 0x12, 4, 0x0a, 2, 0x08, 1,
    ];
    // graph {name "g", input x, output x}
    let mut graph = vec![0x12, 1, b'g'];
    for port in [0x5a, 0x62] {
        graph.extend([port, u8::try_from(x.len()).unwrap()]);
        graph.extend(x);
    }
    bytes.extend([0x3a, u8::try_from(graph.len()).unwrap()]);
    bytes.extend(graph);
    Model::parse(bytes.into(), &Limits::default()).unwrap()
}
