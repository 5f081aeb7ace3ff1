//! What a model's output says: the best labels, or the best next tokens.

use std::cmp::Ordering;

use crate::{
    engine::{Ctx, EngineError, ModelHandle},
    ipc::info::{Axis, ModelInfo, Task},
    methods::input::Token,
    tensor::Tensor,
};

/// Where the main output is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Places {
    /// The output is one row of scores.
    Whole,
    /// The scores of these positions.
    Positions(Vec<u32>),
    /// The scores of every position.
    Every,
}

/// Scores of a run, and where they were read.
#[derive(Clone, Debug)]
pub struct Scores {
    /// Where.
    pub places: Places,
    /// `[label]`, or `[place, label]`.
    pub scores: Tensor,
}

/// One thing that the model could have meant.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Label or token.
    pub index: u32,
    /// Its name.
    pub label: String,
    /// The model's output.
    pub logit: f32,
    /// Softmax over all; none when there is only one.
    pub probability: Option<f32>,
}

/// What the model predicts at one place.
#[derive(Clone, Debug, PartialEq)]
pub struct At {
    /// The position; none when the prediction is about the whole input.
    pub position: Option<u32>,
    /// Best first.
    pub candidates: Vec<Candidate>,
}

/// What the model predicts.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// The task as which the output was read.
    pub task: Task,
    /// At one or several places.
    pub at: Vec<At>,
}

/// Where to read the main output of this model for this row; none for a model that predicts nothing.
pub fn places(info: &ModelInfo, tokens: &[Token], length: Option<usize>) -> Option<Places> {
    let output = info.output(&info.main_output)?;
    let by_position = output.axes.contains(&Axis::Pos);
    match info.task {
        Task::SequenceClassification | Task::ImageClassification => {
            (!by_position).then_some(Places::Whole)
        }
        Task::TokenClassification => by_position.then_some(Places::Every),
        Task::CausalLm => {
            let last = u32::try_from(length?.checked_sub(1)?).ok()?;
            by_position.then(|| Places::Positions(vec![last]))
        }
        Task::MaskedLm => {
            let mask = info.tokenizer.as_ref()?.mask_id?;
            let masks = (0u32..)
                .zip(tokens)
                .filter(|(_, t)| t.id == mask)
                .map(|(at, _)| at);
            by_position.then(|| Places::Positions(masks.collect()))
        }
        Task::Encoder | Task::Unknown => None,
    }
}

/// Reads a prediction from scores `[label]` or `[places, label]`. Labels are names of classes, or empty: see [`spell`].
///
/// # Errors
/// When the scores are no floats.
pub fn read(
    info: &ModelInfo,
    scores: &Tensor,
    places: &Places,
    candidates: usize,
) -> Result<Prediction, EngineError> {
    let values = scores.to_f32().map_err(|_| {
        EngineError::precondition(format!(
            "output \"{}\" holds {}, which is no score",
            info.main_output,
            scores.dtype()
        ))
    })?;
    let width = scores.shape().last().copied().unwrap_or(1).max(1);
    let at = values
        .chunks_exact(width)
        .enumerate()
        .map(|(row, scores)| At {
            position: match places {
                Places::Whole => None,
                Places::Every => u32::try_from(row).ok(),
                Places::Positions(p) => p.get(row).copied(),
            },
            candidates: best(scores, candidates)
                .into_iter()
                .map(|(index, probability)| Candidate {
                    index,
                    label: label(info, index),
                    logit: scores[index as usize],
                    probability,
                })
                .collect(),
        })
        .collect();
    Ok(Prediction {
        task: info.task,
        at,
    })
}

/// Fills the labels of a language model's candidates in: tokens as the vocabulary spells them.
///
/// # Errors
/// When the worker cannot be asked.
pub async fn spell(
    handle: &ModelHandle,
    prediction: &mut Prediction,
    ctx: &Ctx,
) -> Result<(), EngineError> {
    let Some(tokenizer) = &handle.info().tokenizer else {
        return Ok(());
    };
    if !matches!(prediction.task, Task::CausalLm | Task::MaskedLm) {
        return Ok(());
    }
    // Scores may run past the vocabulary: tables are padded to round sizes.
    let mut known: Vec<&mut Candidate> = prediction
        .at
        .iter_mut()
        .flat_map(|at| &mut at.candidates)
        .filter(|c| (c.index as usize) < tokenizer.vocab)
        .collect();
    if known.is_empty() {
        return Ok(());
    }
    let ids = known.iter().map(|c| c.index).collect();
    let texts = handle.decode(ids, ctx).await?;
    for (candidate, text) in known.iter_mut().zip(texts) {
        candidate.label = text;
    }
    Ok(())
}

/// The name of a class; empty for tokens, which only the vocabulary spells.
pub fn label(info: &ModelInfo, index: u32) -> String {
    match info.task {
        Task::SequenceClassification | Task::TokenClassification | Task::ImageClassification => {
            // Models without names get those that transformers gives them.
            let named = info.labels.get(index as usize).cloned();
            named.unwrap_or_else(|| format!("LABEL_{index}"))
        }
        Task::CausalLm | Task::MaskedLm | Task::Encoder | Task::Unknown => String::new(),
    }
}

/// Indices of the greatest scores with their softmax probability, greatest first; of equal ones the first.
pub fn best(scores: &[f32], count: usize) -> Vec<(u32, Option<f32>)> {
    let greater = |a: &u32, b: &u32| -> Ordering {
        scores[*b as usize]
            .total_cmp(&scores[*a as usize])
            .then(a.cmp(b))
    };
    let mut order: Vec<u32> = (0u32..).take(scores.len()).collect();
    if count < order.len() {
        order.select_nth_unstable_by(count, greater);
        order.truncate(count);
    }
    order.sort_unstable_by(greater);
    let greatest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponential = |v: f32| f64::from(v - greatest).exp();
    let sum: f64 = scores.iter().map(|v| exponential(*v)).sum();
    order
        .into_iter()
        .map(|at| {
            #[allow(clippy::cast_possible_truncation)] // a probability
            let probability = (exponential(scores[at as usize]) / sum) as f32;
            (at, (scores.len() > 1).then_some(probability))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_a_softmax_over_all_scores() {
        let found = best(&[1.0, 3.0, 2.0], 2);
        let sum = 1.0 + (-1f32).exp() + (-2f32).exp();
        assert_eq!(found[0].0, 1);
        assert!((found[0].1.unwrap() - 1.0 / sum).abs() < 1e-6);
        assert_eq!(found[1].0, 2);
        assert!((found[1].1.unwrap() - (-1f32).exp() / sum).abs() < 1e-6);
    }

    #[test]
    fn great_scores_do_not_overflow_and_one_score_is_no_probability() {
        let found = best(&[1e38, 1e38], 5);
        assert_eq!(found, [(0, Some(0.5)), (1, Some(0.5))]);
        assert_eq!(best(&[0.3], 5), [(0, None)]);
        assert!(best(&[], 5).is_empty());
    }
}
