//! What is differentiated: one number per row, made of the model's output.
//!
//! ```text
//!   objective[row] = sum over terms of weight[row, term] * quantity[row, position[row, term], label[row, term]]
//! ```
//!
//! with the quantity a logit, a log-probability or a probability over the last axis. One term of weight one is the logit of a class;
//! weights of one and minus one are a contrast; a term for each token of a continuation is its log-probability. A read-out, such as a
//! probe, has weights for the last axis in the place of a label, and a bias:
//!
//! ```text
//!   objective[row] = bias[row] + sum over terms of weight[row, term] * sum over j of readout[row, j] * value[row, position[row, term], j]
//! ```
//!
//! A divergence is the read-out of minus the log-probabilities.

use super::RewriteError;
use crate::{
    ipc::spec::{
        OBJECTIVE, Quantity, TARGET_LABEL, TARGET_POSITION, TARGET_READOUT, TARGET_WEIGHT,
    },
    onnx::{Attribute, Dim, ValueId, Writer},
    tensor::DType,
};

/// An objective in the graph, where it is the output [`OBJECTIVE`] of `[row]`.
pub(super) struct Objective {
    /// Its gradient with respect to the output, of the output's shape: where a walk backwards begins.
    pub(super) seed: ValueId,
    /// Inputs that were added, with their types.
    pub(super) inputs: Vec<(&'static str, DType)>,
}

/// The output that an objective is made of.
#[derive(Clone, Copy)]
pub(super) struct Scores {
    /// `[row, label]` or `[row, position, label]`.
    pub(super) value: ValueId,
    /// Number of axes.
    pub(super) rank: usize,
    pub(super) dtype: DType,
}

/// Appends an objective and makes it an output.
pub(super) fn objective(
    w: &mut Writer,
    scores: Scores,
    of: Quantity,
) -> Result<Objective, RewriteError> {
    let has_positions = match scores.rank {
        2 => false,
        3 => true,
        _ => {
            return Err(RewriteError::Graph(
                "its main output has neither the axes of classes nor those of a text".to_owned(),
            ));
        }
    };
    let mut inputs = Vec::new();
    let mut input = |w: &mut Writer, name: &'static str, dtype| {
        inputs.push((name, dtype));
        w.patch.input(name, dtype, vec![Dim::Unknown; 2])
    };
    let reads = of.reads_out();
    let (name, dtype) = if reads {
        (TARGET_READOUT, DType::F32)
    } else {
        (TARGET_LABEL, DType::I64)
    };
    let what = input(w, name, dtype)?;
    let weight = input(w, TARGET_WEIGHT, DType::F32)?;
    let position = if has_positions {
        Some(input(w, TARGET_POSITION, DType::I64)?)
    } else {
        None
    };
    // The weights where they belong: `picked` has the shape of the output.
    let along = if reads {
        let weights = w.slice(what, 1, 0, -1);
        w.unsqueeze(weights, &[1])
    } else {
        one_hot(w, what, scores, scores.rank - 1)
    };
    let weight = w.unsqueeze(weight, &[2]);
    let weighted = w.op("Mul", &[along, weight]);
    let picked = match position {
        None => w.reduce("ReduceSum", weighted, &[1], false),
        Some(position) => {
            let positions = one_hot(w, position, scores, 1);
            let positions = w.transpose(positions, &[0, 2, 1]);
            w.op("MatMul", &[positions, weighted])
        }
    };
    let picked = if scores.dtype == DType::F32 {
        picked
    } else {
        w.cast(picked, scores.dtype)
    };
    let last = || vec![Attribute::int("axis", -1)];
    let (quantity, seed) = match of {
        Quantity::Logit | Quantity::Readout => (scores.value, picked),
        Quantity::LogProbability | Quantity::Divergence => {
            let log = w.with("LogSoftmax", &[scores.value], last());
            let probability = w.op("Exp", &[log]);
            let all = w.reduce("ReduceSum", picked, &[-1], true);
            let share = w.op("Mul", &[probability, all]);
            if of == Quantity::Divergence {
                (w.op("Neg", &[log]), w.op("Sub", &[share, picked]))
            } else {
                (log, w.op("Sub", &[picked, share]))
            }
        }
        Quantity::Probability => {
            let probability = w.with("Softmax", &[scores.value], last());
            let product = w.op("Mul", &[picked, probability]);
            let mean = w.reduce("ReduceSum", product, &[-1], true);
            let away = w.op("Sub", &[picked, mean]);
            (probability, w.op("Mul", &[probability, away]))
        }
    };
    // What no term picks counts for nothing, even where it is infinite.
    let zero = w.number(0.0, scores.dtype);
    let counts = w.cast(picked, DType::Bool);
    let product = w.op("Mul", &[quantity, picked]);
    let terms = w.op("Where", &[counts, product, zero]);
    let axes: Vec<i64> = (1..scores.rank as i64).collect();
    let value = w.reduce("ReduceSum", terms, &axes, false);
    let value = if scores.dtype == DType::F32 {
        value
    } else {
        w.cast(value, DType::F32)
    };
    let value = if reads {
        let bias = w.slice(what, 1, -1, i64::MAX);
        let bias = w.reduce("ReduceSum", bias, &[1], false);
        w.op("Add", &[value, bias])
    } else {
        value
    };
    w.patch.tap(value, OBJECTIVE)?;
    Ok(Objective { seed, inputs })
}

/// `[row, term, extent of an axis]`, one where the term points.
fn one_hot(w: &mut Writer, at: ValueId, scores: Scores, axis: usize) -> ValueId {
    let shape = w.op("Shape", &[scores.value]);
    let depth = w.slice(shape, 0, axis as i64, axis as i64 + 1);
    let off_and_on = w.floats(&[0.0, 1.0]);
    w.op("OneHot", &[at, depth, off_and_on])
}
