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

/// Bits of one element of an ONNX number; `None` for strings and numbers that we do not know. Kinds below a byte are packed.
pub fn element_bits(number: i32) -> Option<u128> {
    Some(match number {
        1 | 6 | 12 => 32,
        2 | 3 | 9 => 8,
        4 | 5 | 10 | 16 => 16,
        7 | 11 | 13 | 14 => 64,
        15 => 128,
        // The 8-bit floats and the 8-bit exponent.
        17..=20 | 24 => 8,
        // uint4, int4, float4.
        21..=23 => 4,
        // uint2, int2.
        25 | 26 => 2,
        _ => return None,
    })
}

/// Number of strings.
pub const STRINGS: i32 = 8;
