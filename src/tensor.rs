//! A dense tensor as it travels: dtype, shape and little-endian row-major bytes.
//!
//! The bytes may live in a shared memory segment, in a mapped file or on the heap; cloning never copies them.
//! Only what the wire and the methods need is here: no arithmetic, no broadcasting (that is `ndarray`'s work).

use std::borrow::Cow;

use bytes::Bytes;
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// Element types that cross our boundaries. The numbers are ours (private wire), the names the field's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u32)]
#[allow(missing_docs)] // the names say it
pub enum DType {
    F32 = 1,
    F16 = 2,
    Bf16 = 3,
    F64 = 4,
    I8 = 5,
    I16 = 6,
    I32 = 7,
    I64 = 8,
    U8 = 9,
    U16 = 10,
    U32 = 11,
    U64 = 12,
    Bool = 13,
}

impl DType {
    /// Every dtype, in the order of their numbers.
    pub const ALL: [DType; 13] = [
        DType::F32,
        DType::F16,
        DType::Bf16,
        DType::F64,
        DType::I8,
        DType::I16,
        DType::I32,
        DType::I64,
        DType::U8,
        DType::U16,
        DType::U32,
        DType::U64,
        DType::Bool,
    ];

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 | DType::U64 => 8,
            DType::F32 | DType::I32 | DType::U32 => 4,
            DType::F16 | DType::Bf16 | DType::I16 | DType::U16 => 2,
            DType::I8 | DType::U8 | DType::Bool => 1,
        }
    }

    /// Whether the elements are floating-point numbers.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::Bf16 | DType::F64)
    }

    /// Lower-case name, as in `f32`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
            DType::F64 => "f64",
            DType::I8 => "i8",
            DType::I16 => "i16",
            DType::I32 => "i32",
            DType::I64 => "i64",
            DType::U8 => "u8",
            DType::U16 => "u16",
            DType::U32 => "u32",
            DType::U64 => "u64",
            DType::Bool => "bool",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl TryFrom<u32> for DType {
    type Error = TensorError;

    fn try_from(number: u32) -> Result<Self, TensorError> {
        DType::ALL
            .into_iter()
            .find(|d| *d as u32 == number)
            .ok_or(TensorError::UnknownDType(number))
    }
}

/// Why bytes are not a tensor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// The number names no dtype.
    #[error("dtype number {0} is not known")]
    UnknownDType(u32),
    /// Shape and bytes disagree.
    #[error("shape {shape:?} of {dtype} needs {needed} bytes, {given} were given")]
    Length {
        /// Dtype of the elements.
        dtype: DType,
        /// Shape as given.
        shape: Vec<usize>,
        /// Bytes that the shape needs.
        needed: u128,
        /// Bytes that were given.
        given: usize,
    },
    /// The tensor holds another dtype than the operation needs.
    #[error("a {given} tensor cannot be read as {wanted}")]
    WrongDType {
        /// What was asked.
        wanted: &'static str,
        /// What it is.
        given: DType,
    },
}

/// A dense tensor. The invariant `bytes.len() == product(shape) * dtype.size()` holds for every value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Bytes,
}

/// Bytes that a tensor of this shape takes; wide, so that it cannot overflow for shapes of rank up to 64 that fit in memory.
pub fn byte_len(dtype: DType, shape: &[usize]) -> u128 {
    shape
        .iter()
        .fold(dtype.size() as u128, |n, d| n.saturating_mul(*d as u128))
}

impl Tensor {
    /// Joins bytes to a shape, if they fit.
    pub fn new(dtype: DType, shape: Vec<usize>, bytes: Bytes) -> Result<Self, TensorError> {
        let needed = byte_len(dtype, &shape);
        if needed != bytes.len() as u128 {
            return Err(TensorError::Length {
                dtype,
                shape,
                needed,
                given: bytes.len(),
            });
        }
        Ok(Self {
            dtype,
            shape,
            bytes,
        })
    }

    /// A tensor of `f32` values, row-major.
    pub fn from_f32(shape: Vec<usize>, values: &[f32]) -> Result<Self, TensorError> {
        Self::new(
            DType::F32,
            shape,
            Bytes::copy_from_slice(bytemuck::cast_slice(values)),
        )
    }

    /// A tensor of `i64` values, row-major.
    pub fn from_i64(shape: Vec<usize>, values: &[i64]) -> Result<Self, TensorError> {
        Self::new(
            DType::I64,
            shape,
            Bytes::copy_from_slice(bytemuck::cast_slice(values)),
        )
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Little-endian row-major elements.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Gives the bytes away.
    pub fn into_bytes(self) -> Bytes {
        self.bytes
    }

    /// The same row so many times: the first axis, of extent one, gets another extent.
    pub fn repeated(&self, rows: usize) -> Result<Tensor, TensorError> {
        let mut shape = self.shape.clone();
        if let Some(first) = shape.first_mut() {
            *first = rows;
        }
        Tensor::new(self.dtype, shape, self.bytes.repeat(rows).into())
    }

    /// The first of the rows along the first axis, which keeps an extent of one; what has no rows is left as it is.
    pub fn first_row(&self) -> Tensor {
        match self.shape[..] {
            [rows, ref rest @ ..] if rows > 0 => Tensor {
                dtype: self.dtype,
                shape: [&[1], rest].concat(),
                bytes: self.bytes.slice(..self.bytes.len() / rows),
            },
            _ => self.clone(),
        }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// The elements as `f32`: borrowed when they already are (and are aligned), converted from other floats otherwise.
    pub fn to_f32(&self) -> Result<Cow<'_, [f32]>, TensorError> {
        let b = &self.bytes[..];
        Ok(match self.dtype {
            DType::F32 => match bytemuck::try_cast_slice(b) {
                Ok(values) => Cow::Borrowed(values),
                Err(_) => Cow::Owned(chunks(b, f32::from_le_bytes)),
            },
            DType::F16 => Cow::Owned(chunks(b, |c| f16::from_le_bytes(c).to_f32())),
            DType::Bf16 => Cow::Owned(chunks(b, |c| bf16::from_le_bytes(c).to_f32())),
            #[allow(clippy::cast_possible_truncation)] // narrowing is what was asked
            DType::F64 => Cow::Owned(chunks(b, |c| f64::from_le_bytes(c) as f32)),
            DType::I8
            | DType::I16
            | DType::I32
            | DType::I64
            | DType::U8
            | DType::U16
            | DType::U32
            | DType::U64
            | DType::Bool => {
                return Err(TensorError::WrongDType {
                    wanted: "f32",
                    given: self.dtype,
                });
            }
        })
    }

    /// A float tensor in another float dtype (rounded to nearest even); itself when nothing changes.
    pub fn cast_float(&self, dtype: DType) -> Result<Tensor, TensorError> {
        if dtype == self.dtype {
            return Ok(self.clone());
        }
        let values = self.to_f32()?;
        let bytes: Vec<u8> = match dtype {
            DType::F32 => bytemuck::cast_slice(&values).to_vec(),
            DType::F16 => values
                .iter()
                .flat_map(|v| f16::from_f32(*v).to_le_bytes())
                .collect(),
            DType::Bf16 => values
                .iter()
                .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
                .collect(),
            DType::F64 => values
                .iter()
                .flat_map(|v| f64::from(*v).to_le_bytes())
                .collect(),
            DType::I8
            | DType::I16
            | DType::I32
            | DType::I64
            | DType::U8
            | DType::U16
            | DType::U32
            | DType::U64
            | DType::Bool => {
                return Err(TensorError::WrongDType {
                    wanted: dtype.name(),
                    given: self.dtype,
                });
            }
        };
        Tensor::new(dtype, self.shape.clone(), bytes.into())
    }
}

fn chunks<const N: usize, T>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|c| read(*c)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_must_fit_the_shape() {
        let err = Tensor::new(DType::F32, vec![2, 3], Bytes::from_static(&[0; 20])).unwrap_err();
        assert_eq!(
            err.to_string(),
            "shape [2, 3] of f32 needs 24 bytes, 20 were given"
        );
    }

    #[test]
    fn a_shape_too_large_for_memory_is_an_error_not_an_overflow() {
        assert!(Tensor::new(DType::F64, vec![usize::MAX; 64], Bytes::new()).is_err());
    }

    #[test]
    fn halves_come_back_as_the_nearest_float() {
        let t = Tensor::from_f32(vec![3], &[1.0, -2.5, 0.1]).unwrap();
        let back = t.cast_float(DType::F16).unwrap();
        assert_eq!(
            back.to_f32().unwrap()[..2],
            [1.0, -2.5],
            "exact in half precision"
        );
        assert!((back.to_f32().unwrap()[2] - 0.1).abs() < 1e-4);
    }

    #[test]
    fn unaligned_bytes_are_read_all_the_same() {
        let whole = Bytes::from([&[7u8][..], &1.5f32.to_le_bytes()].concat());
        let t = Tensor::new(DType::F32, vec![1], whole.slice(1..)).unwrap();
        assert_eq!(t.to_f32().unwrap()[..], [1.5]);
    }

    #[test]
    fn every_dtype_number_comes_back() {
        for d in DType::ALL {
            assert_eq!(DType::try_from(d as u32), Ok(d));
        }
        assert!(DType::try_from(0).is_err());
    }
}
