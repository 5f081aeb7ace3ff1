//! Arrays of an answer, put together from their pieces.

use std::collections::BTreeMap;

use ndarray::{ArrayD, ArrayView2, IxDyn};
use serde_json::{Value, json};

use super::{
    assemble::Broken,
    capture::json::{nested, shortest},
};
use crate::service::wire::introspect as pb;

/// Tensors that come.
#[derive(Debug, Default)]
pub(super) struct Arrays(Vec<(pb::Tensor, Vec<u8>)>);

/// A tensor that is there.
#[derive(Clone, Debug)]
pub(super) struct Array {
    pub(super) name: String,
    pub(super) axes: Vec<String>,
    pub(super) values: ArrayD<f32>,
}

impl Arrays {
    /// Takes a piece.
    pub(super) fn take(&mut self, piece: pb::Tensor) -> Result<(), Broken> {
        let joins = |(first, bytes): &&mut (pb::Tensor, Vec<u8>)| {
            first.name == piece.name && bytes.len() as u64 == piece.offset
        };
        match self.0.last_mut().filter(joins) {
            Some((_, bytes)) if piece.offset > 0 => bytes.extend_from_slice(&piece.data),
            Some(_) | None if piece.offset == 0 => {
                let bytes = piece.data.to_vec();
                self.0.push((piece, bytes));
            }
            Some(_) | None => {
                return Err(Broken::new(format!(
                    "a piece of tensor \"{}\" does not join",
                    piece.name
                )));
            }
        }
        Ok(())
    }

    /// All of them by name.
    pub(super) fn by_name(self) -> Result<BTreeMap<String, Array>, Broken> {
        let all = self.finish()?.into_iter();
        Ok(all.map(|a| (a.name.clone(), a)).collect())
    }

    /// All of them, in the order of their arrival.
    pub(super) fn finish(self) -> Result<Vec<Array>, Broken> {
        self.0.into_iter().map(array).collect()
    }
}

/// A tensor that came whole.
pub(super) fn whole(tensor: pb::Tensor) -> Result<Array, Broken> {
    let bytes = tensor.data.to_vec();
    array((tensor, bytes))
}

fn array((tensor, bytes): (pb::Tensor, Vec<u8>)) -> Result<Array, Broken> {
    let values = numbers(tensor.dtype(), &bytes);
    let values =
        values.ok_or_else(|| Broken::new(format!("tensor \"{}\" has no type", tensor.name)))?;
    let shape = tensor.shape.iter().map(|n| usize::try_from(*n).ok());
    let shape = shape.collect::<Option<Vec<usize>>>().unwrap_or_default();
    let values = ArrayD::from_shape_vec(IxDyn(&shape), values);
    let values = values.map_err(|_| {
        Broken::new(format!(
            "tensor \"{}\" is not as long as it says",
            tensor.name
        ))
    })?;
    Ok(Array {
        name: tensor.name,
        axes: tensor.axes,
        values,
    })
}

/// Elements as f32, whatever they are; nothing without a type.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // for people, as files hold them
fn numbers(dtype: pb::DType, bytes: &[u8]) -> Option<Vec<f32>> {
    Some(match dtype {
        pb::DType::F32 => each(bytes, f32::from_le_bytes),
        pb::DType::F16 => each(bytes, |b| half::f16::from_le_bytes(b).to_f32()),
        pb::DType::Bf16 => each(bytes, |b| half::bf16::from_le_bytes(b).to_f32()),
        pb::DType::F64 => each(bytes, |b| f64::from_le_bytes(b) as f32),
        pb::DType::I8 => each(bytes, |b| f32::from(i8::from_le_bytes(b))),
        pb::DType::I16 => each(bytes, |b| f32::from(i16::from_le_bytes(b))),
        pb::DType::I32 => each(bytes, |b| i32::from_le_bytes(b) as f32),
        pb::DType::I64 => each(bytes, |b| i64::from_le_bytes(b) as f32),
        pb::DType::U8 | pb::DType::Bool => each(bytes, |b| f32::from(u8::from_le_bytes(b))),
        pb::DType::U16 => each(bytes, |b| f32::from(u16::from_le_bytes(b))),
        pb::DType::U32 => each(bytes, |b| u32::from_le_bytes(b) as f32),
        pb::DType::U64 => each(bytes, |b| u64::from_le_bytes(b) as f32),
        pb::DType::Unspecified => return None,
    })
}

fn each<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| number(*b)).collect()
}

impl Array {
    /// Extents.
    pub(super) fn shape(&self) -> &[usize] {
        self.values.shape()
    }

    /// All numbers, the last axis fastest.
    pub(super) fn flat(&self) -> &[f32] {
        self.values.as_slice().unwrap_or_default()
    }

    /// As a matrix, where it has two axes.
    pub(super) fn matrix(&self) -> Option<ArrayView2<'_, f32>> {
        self.values.view().into_dimensionality().ok()
    }

    /// Axes and nested lists.
    pub(super) fn json(&self) -> Value {
        let mut flat = self.values.iter().map(|v| shortest(*v));
        json!({
            "axes": self.axes,
            "shape": self.values.shape(),
            "data": nested(self.values.shape(), &mut flat),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(offset: u64, values: &[f32]) -> pb::Tensor {
        pb::Tensor {
            name: "x".into(),
            dtype: pb::DType::F32.into(),
            shape: vec![3],
            offset,
            data: values
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect::<Vec<u8>>()
                .into(),
            ..pb::Tensor::default()
        }
    }

    #[test]
    fn every_type_is_read() {
        let half = half::f16::from_f32(-1.5).to_le_bytes();
        assert_eq!(numbers(pb::DType::F16, &half), Some(vec![-1.5]));
        assert_eq!(numbers(pb::DType::Bool, &[0, 1]), Some(vec![0.0, 1.0]));
        assert_eq!(numbers(pb::DType::I32, &[0xff; 4]), Some(vec![-1.0]));
        assert_eq!(numbers(pb::DType::Unspecified, &[0]), None);
    }

    #[test]
    fn pieces_join_or_are_refused() {
        let mut arrays = Arrays::default();
        arrays.take(piece(0, &[1.0, f32::NAN])).unwrap();
        arrays.take(piece(8, &[0.1])).unwrap();
        let found = arrays.finish().unwrap();
        assert_eq!(found[0].json()["data"], json!([1.0, null, 0.1]));
        let mut arrays = Arrays::default();
        arrays.take(piece(0, &[1.0])).unwrap();
        assert!(arrays.take(piece(8, &[2.0])).is_err());
        assert!(arrays.finish().is_err(), "too short");
    }
}
