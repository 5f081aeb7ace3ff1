//! Our tensors as the runtime's values, and back, without copying.

use bytemuck::checked;
use half::{bf16, f16};
use ort::value::{
    DynValue, PrimitiveTensorElementType, SessionInputValue, TensorElementType,
    TensorRef, ValueType,
};

use crate::tensor::{DType, Tensor};

/// A tensor of the runtime over our bytes. The bytes must be aligned for their elements and, for booleans, 0 or 1.
pub(super) fn input(tensor: &Tensor) -> Result<SessionInputValue<'_>, String> {
    match tensor.dtype() {
        DType::F32 => typed::<f32>(tensor),
        DType::F16 => typed::<f16>(tensor),
        DType::Bf16 => typed::<bf16>(tensor),
        DType::F64 => typed::<f64>(tensor),
        DType::I8 => typed::<i8>(tensor),
        DType::I16 => typed::<i16>(tensor),
        DType::I32 => typed::<i32>(tensor),
        DType::I64 => typed::<i64>(tensor),
        DType::U8 => typed::<u8>(tensor),
        DType::U16 => typed::<u16>(tensor),
        DType::U32 => typed::<u32>(tensor),
        DType::U64 => typed::<u64>(tensor),
        DType::Bool => typed::<bool>(tensor),
    }
}

fn typed<T>(tensor: &Tensor) -> Result<SessionInputValue<'_>, String>
where
    T: PrimitiveTensorElementType + bytemuck::CheckedBitPattern + std::fmt::Debug,
{
    let elements: &[T] = checked::try_cast_slice(tensor.bytes())
        .map_err(|e| format!("bytes of {} cannot be used: {e}", tensor.dtype()))?;
    let view = TensorRef::from_array_view((tensor.shape(), elements)).map_err(|e| e.to_string())?;
    Ok(view.into_dyn().into())
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
        let (_, elements) = value
            .try_extract_tensor::<T>()
            .map_err(|e| e.to_string())?;
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

/// Our dtype of the runtime's.
pub(super) fn dtype_of(ty: TensorElementType) -> Option<DType> {
    Some(match ty {
        TensorElementType::Float32 => DType::F32,
        TensorElementType::Float16 => DType::F16,
        TensorElementType::Bfloat16 => DType::Bf16,
        TensorElementType::Float64 => DType::F64,
        TensorElementType::Int8 => DType::I8,
        TensorElementType::Int16 => DType::I16,
        TensorElementType::Int32 => DType::I32,
        TensorElementType::Int64 => DType::I64,
        TensorElementType::Uint8 => DType::U8,
        TensorElementType::Uint16 => DType::U16,
        TensorElementType::Uint32 => DType::U32,
        TensorElementType::Uint64 => DType::U64,
        TensorElementType::Bool => DType::Bool,
        _ => return None,
    })
}

