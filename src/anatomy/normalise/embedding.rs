//! `EmbedLayerNormalization`: the embedding of BERT and its norm.
//!
//! ```text
//!   word[ids] + segment[segment ids] + position[position ids] ─┬▶ norm ─▶ output 0
//!                                                              └────────▶ output 2
//!   ones in each row of the mask ─▶ output 1, the lengths that an attention reads
//! ```

use super::{
    emit::{Emit, Needs},
    norm::{self, Norm},
};
use crate::{onnx::Node, tensor::DType};

/// What the schema gives when the attribute is left out.
const EPSILON: f32 = 1e-12;

/// `EmbedLayerNormalization`.
pub(super) fn embed(e: &mut Emit<'_>, node: &Node) -> Result<(), String> {
    let (ids, words, positions) = (node.need(0)?, node.need(2)?, node.need(3)?);
    let dtype = e.dtype(words)?;
    let norm = Norm {
        gamma: node.need(5)?,
        beta: Some(node.need(6)?),
        epsilon: node.float("epsilon").unwrap_or(EPSILON),
        centred: true,
    };
    let mut sum = e.gather(words, ids);
    if let (Some(segments), Some(table)) = (node.input(1), node.input(4)) {
        let segment = e.gather(table, segments);
        sum = e.op("Add", &[sum, segment]);
    }
    let position = if let Some(at) = node.input(8) {
        e.gather(positions, at)
    } else {
        let length = e.extent(ids, 1);
        let count = e.range(length);
        e.gather(positions, count)
    };
    let made = e.wanted(node, 2);
    let sum = e.end(made, "Add", &[sum, position]);
    norm::write(e, e.wanted(node, 0), sum, dtype, &norm);
    if let lengths @ Some(_) = e.wanted(node, 1) {
        match node.input(7) {
            Some(mask) => {
                let mask = e.cast(mask, DType::I64);
                let one = e.int(1);
                let ones = e.op("Equal", &[mask, one]);
                let ones = e.cast(ones, DType::I32);
                e.sum(lengths, ones);
            }
            None => {
                let rows = e.extent(ids, 0);
                e.zeros(lengths, rows, DType::I32);
            }
        }
    }
    Ok(())
}
