//! Tensors of single precision, put together from the pieces of a stream and checked against its summary.

use std::collections::BTreeMap;

use ndarray::{ArrayD, ArrayView2, IxDyn};

use super::{assemble::Tally, error::CliError};
use crate::service::wire::introspect as pb;

/// A tensor of single precision.
#[derive(Clone, Debug, Default)]
pub(super) struct Array {
    pub(super) axes: Vec<String>,
    pub(super) shape: Vec<usize>,
    pub(super) values: Vec<f32>,
}

impl Array {
    /// The same for other libraries.
    pub(super) fn dense(&self) -> ArrayD<f32> {
        // As many numbers as the shape says: that was checked when it was put together.
        ArrayD::from_shape_vec(IxDyn(&self.shape), self.values.clone()).unwrap_or_default()
    }

    /// As a matrix, where it has two axes.
    pub(super) fn matrix(&self) -> Option<ArrayView2<'_, f32>> {
        let [rows, columns] = self.shape[..] else {
            return None;
        };
        ArrayView2::from_shape((rows, columns), &self.values).ok()
    }
}

/// The messages of a stream, as they come.
#[derive(Debug, Default)]
pub(super) struct Arrays {
    tally: Tally,
    parts: BTreeMap<String, (pb::Tensor, Vec<u8>)>,
    ended: bool,
}

fn broken(why: &str) -> CliError {
    CliError::new(format!("the answer is broken: {why}"))
}

impl Arrays {
    /// A message that carries no tensor, or one that is no part of the answer.
    pub(super) fn other(&mut self, payload: &[&[u8]]) -> Result<(), CliError> {
        if self.ended {
            return Err(broken("it goes on after its summary"));
        }
        self.tally.count(payload);
        Ok(())
    }

    /// A tensor, or a piece of one.
    pub(super) fn piece(&mut self, piece: pb::Tensor) -> Result<(), CliError> {
        self.other(&[&piece.data])?;
        let data = piece.data.clone();
        let (_, whole) = self
            .parts
            .entry(piece.name.clone())
            .or_insert((piece, Vec::new()));
        whole.extend_from_slice(&data);
        Ok(())
    }

    /// The last message.
    pub(super) fn summary(&mut self, summary: &pb::Summary) -> Result<(), CliError> {
        self.ended = true;
        self.tally
            .check(summary.messages, summary.bytes, summary.crc32c)?;
        Ok(())
    }

    /// The tensors, by name.
    ///
    /// # Errors
    /// When there was no summary, or a tensor is not as long as it says.
    pub(super) fn finish(self) -> Result<BTreeMap<String, Array>, CliError> {
        if !self.ended {
            return Err(CliError::new(
                "the answer is incomplete: the stream ended without its summary",
            )
            .advise("ask again"));
        }
        let arrays = self.parts.into_iter().map(|(name, (tensor, bytes))| {
            let numbers = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
            let extents = tensor.shape.iter().filter_map(|n| usize::try_from(*n).ok());
            let array = Array {
                axes: tensor.axes,
                shape: extents.collect(),
                values: numbers.collect(),
            };
            if array.shape.iter().product::<usize>() != array.values.len() {
                return Err(broken("a tensor is not as long as it says"));
            }
            Ok((name, array))
        });
        arrays.collect()
    }
}
