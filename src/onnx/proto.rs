//! The messages of the file format, and the numbers of its element types.

#![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)] // generated

use crate::tensor::DType;

include!(concat!(env!("OUT_DIR"), "/onnx.rs"));

/// ONNX number of a dtype.
pub fn number_of(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 1,
        DType::U8 => 2,
        DType::I8 => 3,
        DType::U16 => 4,
        DType::I16 => 5,
        DType::I32 => 6,
        DType::I64 => 7,
        DType::Bool => 9,
        DType::F16 => 10,
        DType::F64 => 11,
        DType::U32 => 12,
        DType::U64 => 13,
        DType::Bf16 => 16,
    }
}

/// The dtype of an ONNX number; `None` for strings, complex numbers and the kinds of 8 and fewer bits that we only pass on.
pub fn dtype_of(number: i32) -> Option<DType> {
    DType::ALL.into_iter().find(|d| number_of(*d) == number)
}
