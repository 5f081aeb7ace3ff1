//! Tensors of the file as tensors of ours.

use bytes::Bytes;
use half::{bf16, f16};

use super::{
    graph::{Graph, ValueId},
    proto::{self, TensorProto, dtype_of, number_of},
};
use crate::tensor::{DType, Tensor, byte_len};

/// Little-endian bytes of a dense tensor whose data stand in the message; `None` when shape and data disagree or the
/// dtype is not one of ours.
pub(super) fn tensor(t: &TensorProto) -> Option<Tensor> {
    let dtype = dtype_of(t.data_type)?;
    let shape = dims(&t.dims)?;
    if byte_len(dtype, &shape) > isize::MAX as u128 {
        return None;
    }
    Tensor::new(dtype, shape, bytes(t, dtype)).ok()
}

/// Extents that fit memory.
pub(super) fn dims(dims: &[i64]) -> Option<Vec<usize>> {
    dims.iter().map(|d| usize::try_from(*d).ok()).collect()
}

fn bytes(t: &TensorProto, dtype: DType) -> Bytes {
    if !t.raw_data.is_empty() {
        return t.raw_data.clone();
    }
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
        if let Some(i) = self.initializer(value) {
            return i.tensor();
        }
        let node = self.node(self.producer(value)?);
        if node.is("Identity") {
            return self.constant(node.input(0)?);
        }
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

    /// The integers of a constant of an integer dtype, in row-major order.
    pub fn constant_ints(&self, value: ValueId) -> Option<Vec<i64>> {
        let t = self.constant(value)?;
        let b = t.bytes();
        match t.dtype() {
            DType::I64 => Some(
                b.as_chunks::<8>()
                    .0
                    .iter()
                    .map(|c| i64::from_le_bytes(*c))
                    .collect(),
            ),
            DType::I32 => Some(
                b.as_chunks::<4>()
                    .0
                    .iter()
                    .map(|c| i64::from(i32::from_le_bytes(*c)))
                    .collect(),
            ),
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

/// Every dense tensor message in an attribute, subgraphs left out.
pub(super) fn attribute_tensors(a: &proto::AttributeProto) -> impl Iterator<Item = &TensorProto> {
    let sparse = a.sparse_tensor.iter().chain(&a.sparse_tensors);
    a.t.iter()
        .chain(&a.tensors)
        .chain(sparse.flat_map(|s| s.values.iter().chain(&s.indices)))
}
