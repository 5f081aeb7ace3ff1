//! Attributes of nodes. A decoded message of the format takes hundreds of bytes for one integer; this does not.

use bytes::Bytes;

use super::{
    constant,
    proto::{AttributeProto, GraphProto, dtype_of},
};
use crate::tensor::Tensor;

/// Numbers of the attribute kinds, as the format gives them.
pub(super) mod kind {
    pub(in crate::onnx) const FLOAT: i32 = 1;
    pub(in crate::onnx) const INT: i32 = 2;
    pub(in crate::onnx) const STRING: i32 = 3;
    pub(in crate::onnx) const TENSOR: i32 = 4;
    pub(in crate::onnx) const GRAPH: i32 = 5;
    pub(in crate::onnx) const FLOATS: i32 = 6;
    pub(in crate::onnx) const INTS: i32 = 7;
    pub(in crate::onnx) const STRINGS: i32 = 8;
    pub(in crate::onnx) const TENSORS: i32 = 9;
    pub(in crate::onnx) const GRAPHS: i32 = 10;
    pub(in crate::onnx) const SPARSE_TENSOR: i32 = 11;
    pub(in crate::onnx) const SPARSE_TENSORS: i32 = 12;
    pub(in crate::onnx) const TYPE: i32 = 13;
    pub(in crate::onnx) const TYPES: i32 = 14;
}

/// An attribute of a node.
#[derive(Clone, Debug, PartialEq)]
pub struct Attribute {
    pub(super) name: Box<str>,
    pub(super) payload: Payload,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Payload {
    Float(f32),
    Int(i64),
    String(Bytes),
    Tensor(Tensor),
    Floats(Box<[f32]>),
    Ints(Box<[i64]>),
    /// Graphs, types and tensors of other element types: passed on as they are.
    Other(Box<AttributeProto>),
}

impl Attribute {
    fn new(name: &str, payload: Payload) -> Self {
        Self {
            name: name.into(),
            payload,
        }
    }

    /// An integer.
    pub fn int(name: &str, value: i64) -> Self {
        Self::new(name, Payload::Int(value))
    }

    /// A float.
    pub fn float(name: &str, value: f32) -> Self {
        Self::new(name, Payload::Float(value))
    }

    /// A list of integers.
    pub fn ints(name: &str, values: &[i64]) -> Self {
        Self::new(name, Payload::Ints(values.into()))
    }

    /// A list of floats.
    pub fn floats(name: &str, values: &[f32]) -> Self {
        Self::new(name, Payload::Floats(values.into()))
    }

    /// A string.
    pub fn string(name: &str, value: &str) -> Self {
        let bytes = Bytes::copy_from_slice(value.as_bytes());
        Self::new(name, Payload::String(bytes))
    }

    /// A tensor.
    pub fn tensor(name: &str, value: &Tensor) -> Self {
        Self::new(name, Payload::Tensor(value.clone()))
    }

    /// Name of the attribute.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The graphs that it carries.
    pub(super) fn graphs(&self) -> impl Iterator<Item = &GraphProto> {
        let message = if let Payload::Other(a) = &self.payload {
            Some(a)
        } else {
            None
        };
        message
            .into_iter()
            .flat_map(|a| a.g.iter().chain(&a.graphs))
    }

    /// From a message that [`super::check::attributes`] has passed.
    pub(super) fn from_proto(mut a: AttributeProto) -> Self {
        let name = std::mem::take(&mut a.name).into_boxed_str();
        let tensor = |a: &AttributeProto| {
            let t = a.t.as_ref().filter(|t| dtype_of(t.data_type).is_some())?;
            constant::tensor(t)
        };
        let payload = match a.r#type {
            kind::FLOAT => Payload::Float(a.f),
            kind::INT => Payload::Int(a.i),
            kind::STRING => Payload::String(a.s),
            kind::FLOATS => Payload::Floats(a.floats.into()),
            kind::INTS => Payload::Ints(a.ints.into()),
            kind::TENSOR => match tensor(&a) {
                Some(tensor) => Payload::Tensor(tensor),
                None => Payload::Other(Box::new(a)),
            },
            _ => Payload::Other(Box::new(a)),
        };
        Self { name, payload }
    }

    pub(super) fn to_proto(&self) -> AttributeProto {
        let of_kind = |kind: i32| AttributeProto {
            r#type: kind,
            ..AttributeProto::default()
        };
        let mut a = match &self.payload {
            Payload::Float(v) => AttributeProto {
                f: *v,
                ..of_kind(kind::FLOAT)
            },
            Payload::Int(v) => AttributeProto {
                i: *v,
                ..of_kind(kind::INT)
            },
            Payload::String(v) => AttributeProto {
                s: v.clone(),
                ..of_kind(kind::STRING)
            },
            Payload::Floats(v) => AttributeProto {
                floats: v.to_vec(),
                ..of_kind(kind::FLOATS)
            },
            Payload::Ints(v) => AttributeProto {
                ints: v.to_vec(),
                ..of_kind(kind::INTS)
            },
            Payload::Tensor(v) => AttributeProto {
                t: Some(constant::message("", v)),
                ..of_kind(kind::TENSOR)
            },
            Payload::Other(a) => a.as_ref().clone(),
        };
        a.name = self.name.to_string();
        a
    }
}
