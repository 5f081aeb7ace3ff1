//! Tensors of the file as tensors of ours.

use bytes::Bytes;
use half::{bf16, f16};

use super::{
    check,
    graph::{Graph, ValueId},
    proto::{TensorProto, dtype_of, number_of},
};
use crate::tensor::{DType, Tensor};

/// A dense tensor whose data stand in the message; `None` when shape and data disagree or the dtype is not one of ours.
pub(super) fn tensor(t: &TensorProto) -> Option<Tensor> {
    let dims = check::dims(t).ok()?;
    let bytes = if t.raw_data.is_empty() {
        listed(t)
    } else {
        t.raw_data.clone()
    };
    Tensor::new(dtype_of(t.data_type)?, dims, bytes).ok()
}

/// Little-endian bytes of the numbers that a tensor message lists one by one; empty for dtypes that are not ours.
pub(super) fn listed(t: &TensorProto) -> Bytes {
    let Some(dtype) = dtype_of(t.data_type) else {
        return Bytes::new();
    };
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    // the format stores narrow kinds in wide fields; the upper bits carry nothing
    let listed: Vec<u8> = match dtype {
        DType::F32 => t.float_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F64 => t.double_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::I64 => t.int64_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::I32 => t.int32_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::U64 => t.uint64_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::U32 => t
            .uint64_data
            .iter()
            .flat_map(|v| (*v as u32).to_le_bytes())
            .collect(),
        DType::I16 | DType::U16 | DType::F16 | DType::Bf16 => t
            .int32_data
            .iter()
            .flat_map(|v| (*v as u16).to_le_bytes())
            .collect(),
        DType::I8 | DType::U8 | DType::Bool => t.int32_data.iter().map(|v| *v as u8).collect(),
    };
    listed.into()
}

/// The elements of a tensor of type `i64` or `i32`.
pub(super) fn ints(t: &Tensor) -> Option<Vec<i64>> {
    let b = t.bytes();
    match t.dtype() {
        DType::I64 => {
            let elements = b.as_chunks::<8>().0;
            Some(elements.iter().map(|c| i64::from_le_bytes(*c)).collect())
        }
        DType::I32 => {
            let elements = b.as_chunks::<4>().0;
            let read = |c: &[u8; 4]| i64::from(i32::from_le_bytes(*c));
            Some(elements.iter().map(read).collect())
        }
        DType::F32
        | DType::F16
        | DType::Bf16
        | DType::F64
        | DType::I8
        | DType::I16
        | DType::U8
        | DType::U16
        | DType::U32
        | DType::U64
        | DType::Bool => None,
    }
}

/// The message of a tensor, its data inside.
pub(super) fn message(name: &str, tensor: &Tensor) -> TensorProto {
    TensorProto {
        name: name.to_owned(),
        dims: tensor.shape().iter().map(|d| *d as i64).collect(),
        data_type: number_of(tensor.dtype()),
        raw_data: tensor.bytes().clone(),
        ..TensorProto::default()
    }
}

impl Graph {
    /// The constant that a value is: an initializer or the output of a `Constant` node, looked for through `Identity`.
    pub fn constant(&self, value: ValueId) -> Option<Tensor> {
        let mut value = value;
        // Ends: the graph has no cycle.
        let node = loop {
            if let Some(i) = self.initializer(value) {
                return i.tensor();
            }
            let node = self.node(self.producer(value)?);
            if !node.is("Identity") {
                break node;
            }
            value = node.input(0)?;
        };
        if !node.is("Constant") {
            return None;
        }
        let list = |n: usize| vec![n];
        node.tensor("value")
            .or_else(|| Tensor::from_f32(vec![], &[node.float("value_float")?]).ok())
            .or_else(|| Tensor::from_i64(vec![], &[node.int("value_int")?]).ok())
            .or_else(|| {
                let v = node.floats("value_floats")?;
                Tensor::from_f32(list(v.len()), v).ok()
            })
            .or_else(|| {
                let v = node.ints("value_ints")?;
                Tensor::from_i64(list(v.len()), v).ok()
            })
    }

    /// The integers of a constant of type `i64` or `i32`, in row-major order.
    pub fn constant_ints(&self, value: ValueId) -> Option<Vec<i64>> {
        ints(&self.constant(value)?)
    }

    /// The one number of a constant float tensor with a single element.
    pub fn constant_scalar(&self, value: ValueId) -> Option<f64> {
        let t = self.constant(value)?;
        if t.elements() != 1 {
            return None;
        }
        let b = t.bytes();
        match t.dtype() {
            DType::F32 => Some(f64::from(f32::from_le_bytes(b[..].try_into().ok()?))),
            DType::F64 => Some(f64::from_le_bytes(b[..].try_into().ok()?)),
            DType::F16 => Some(f16::from_le_bytes(b[..].try_into().ok()?).to_f64()),
            DType::Bf16 => Some(bf16::from_le_bytes(b[..].try_into().ok()?).to_f64()),
            DType::I8
            | DType::I16
            | DType::I32
            | DType::I64
            | DType::U8
            | DType::U16
            | DType::U32
            | DType::U64
            | DType::Bool => None,
        }
    }
}
