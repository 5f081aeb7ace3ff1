//! Our tensors as the runtime's values, and back, without copying.

use bytes::Bytes;
use half::{bf16, f16};
use ort::value::{DynValue, PrimitiveTensorElementType, TensorElementType, ValueType};

use super::native::Lent;
use crate::tensor::{DType, Tensor};

/// A tensor of the runtime over our bytes; over an aligned copy of them where they are not aligned.
pub(super) fn input(tensor: &Tensor) -> Result<Lent, String> {
    let bytes = tensor.bytes();
    let bytes = if is_aligned(tensor) {
        bytes.clone()
    } else {
        aligned_copy(bytes)
    };
    Lent::new(tensor.dtype(), tensor.shape(), bytes).map_err(|e| e.message().to_owned())
}

/// Whether the elements stand at multiples of their size.
pub(super) fn is_aligned(tensor: &Tensor) -> bool {
    let size = tensor.dtype().size();
    tensor.bytes().as_ptr().addr().is_multiple_of(size)
}

/// A copy that is aligned for every element type.
fn aligned_copy(bytes: &[u8]) -> Bytes {
    struct Words(Vec<u64>);
    impl AsRef<[u8]> for Words {
        fn as_ref(&self) -> &[u8] {
            bytemuck::cast_slice(&self.0)
        }
    }
    let mut words = vec![0u64; bytes.len().div_ceil(8)];
    bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
    Bytes::from_owner(Words(words)).slice(..bytes.len())
}

/// Dtype, shape and bytes of a value that the runtime made.
pub(super) fn output(value: &DynValue) -> Result<(DType, Vec<usize>, &[u8]), String> {
    let ValueType::Tensor { ty, shape, .. } = value.dtype() else {
        return Err("an output that is not a tensor".to_owned());
    };
    let shape: Vec<usize> = shape
        .iter()
        .map(|d| usize::try_from(*d).map_err(|_| "a negative extent".to_owned()))
        .collect::<Result<_, _>>()?;
    let dtype = dtype_of(*ty).ok_or_else(|| format!("an output of type {ty:?}"))?;
    fn bytes<T: PrimitiveTensorElementType + bytemuck::NoUninit>(
        value: &DynValue,
    ) -> Result<&[u8], String> {
        let (_, elements) = value.try_extract_tensor::<T>().map_err(|e| e.to_string())?;
        Ok(bytemuck::cast_slice(elements))
    }
    let bytes = match dtype {
        DType::F32 => bytes::<f32>(value),
        DType::F16 => bytes::<f16>(value),
        DType::Bf16 => bytes::<bf16>(value),
        DType::F64 => bytes::<f64>(value),
        DType::I8 => bytes::<i8>(value),
        DType::I16 => bytes::<i16>(value),
        DType::I32 => bytes::<i32>(value),
        DType::I64 => bytes::<i64>(value),
        DType::U8 => bytes::<u8>(value),
        DType::U16 => bytes::<u16>(value),
        DType::U32 => bytes::<u32>(value),
        DType::U64 => bytes::<u64>(value),
        DType::Bool => bytes::<bool>(value),
    }?;
    Ok((dtype, shape, bytes))
}

/// The runtime's name of a dtype.
pub(super) fn element(dtype: DType) -> TensorElementType {
    match dtype {
        DType::F32 => TensorElementType::Float32,
        DType::F16 => TensorElementType::Float16,
        DType::Bf16 => TensorElementType::Bfloat16,
        DType::F64 => TensorElementType::Float64,
        DType::I8 => TensorElementType::Int8,
        DType::I16 => TensorElementType::Int16,
        DType::I32 => TensorElementType::Int32,
        DType::I64 => TensorElementType::Int64,
        DType::U8 => TensorElementType::Uint8,
        DType::U16 => TensorElementType::Uint16,
        DType::U32 => TensorElementType::Uint32,
        DType::U64 => TensorElementType::Uint64,
        DType::Bool => TensorElementType::Bool,
    }
}

/// Our name of an element type; `None` for strings, complex and packed numbers.
fn dtype_of(found: TensorElementType) -> Option<DType> {
    DType::ALL.into_iter().find(|d| element(*d) == found)
}
