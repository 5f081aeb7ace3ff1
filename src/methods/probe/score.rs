//! Scores: one run gives the vectors of every probe that is asked for, and the prediction with them when it is wanted.

use std::collections::BTreeSet;

use super::{
    extract::vectors,
    ready::Ready,
    scorer::{Says, Scorer},
};
use crate::{
    engine::{Ctx, EngineError, Lane, ModelHandle, StageTimings},
    methods::{
        capture::{self, Logits, Question, Selection},
        input::{Input, Token},
        predict::Prediction,
        reduce::{self, Pooling},
        target::Readout,
    },
    tensor::Tensor,
};

/// A probe, and which of its hook points.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The probe.
    pub probe: std::sync::Arc<Ready>,
    /// One of its hook points.
    pub hook: String,
}

impl Asked {
    /// Its score of a class, as what can be explained.
    ///
    /// # Errors
    /// Those of [`Scorer::readout`].
    pub fn readout(&self, label: Option<&str>) -> Result<Readout, EngineError> {
        let (class, weights) = self.scorer()?.readout(label)?;
        Ok(Readout {
            hook: self.hook.clone(),
            pooling: self.probe.card.pooling,
            position: None,
            weights: weights.into(),
            class,
        })
    }

    fn scorer(&self) -> Result<&Scorer, EngineError> {
        let found = self.probe.scorers.get(&self.hook);
        found.ok_or_else(|| EngineError::internal("a probe lost a hook point"))
    }

    /// What it says of a vector.
    fn says(&self, x: &[f32]) -> Result<Says, EngineError> {
        let says = self.scorer()?.score(x);
        if says.is_finite() {
            return Ok(says);
        }
        Err(EngineError::precondition(format!(
            "the score of probe \"{}\" at \"{}\" is not finite: its weights or what they read are too large",
            self.probe.card.name, self.hook
        )))
    }
}

/// What is wanted beside the scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Scores of each token, of probes that pool.
    pub per_token: bool,
    /// The model's prediction.
    pub predict: bool,
    /// Largest capture.
    pub max_bytes: usize,
}

/// Scores of one input.
#[derive(Clone, Debug, Default)]
pub struct Scored {
    /// By the probes, in the order of asking.
    pub scores: Vec<Scores>,
    /// What the model predicts.
    pub prediction: Option<Prediction>,
    /// The tokens of the input.
    pub tokens: Vec<Token>,
    /// Tokens that truncation cut off.
    pub truncated: u32,
    /// Where the time went.
    pub timings: StageTimings,
}

/// Scores by one probe.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// Its name.
    pub name: String,
    /// What was read.
    pub hook: String,
    /// Of the input, by probes that pool.
    pub input: Option<Says>,
    /// Of each token, where they were asked for.
    pub tokens: Vec<Says>,
}

/// Runs an input and scores it.
///
/// # Errors
/// Those of captures; [`EngineError::FailedPrecondition`] for vectors that are not finite, of which no probe says anything, and for scores that
/// are not.
pub async fn score(
    handle: &ModelHandle,
    asked: &[Asked],
    input: Input,
    wanted: Wanted,
    (lane, ctx): (Lane, &Ctx),
) -> Result<Scored, EngineError> {
    let hooks: BTreeSet<&String> = asked.iter().map(|a| &a.hook).collect();
    let question = Question {
        input,
        selection: Selection {
            hooks: hooks.into_iter().cloned().collect(),
            positions: positions(asked, wanted),
            spelled: wanted.per_token || asked.iter().any(|a| a.probe.card.pooling.is_none()),
            logits: if wanted.predict {
                Logits::Prediction
            } else {
                Logits::None
            },
            ..Selection::default()
        },
    };
    let narrowed = !question.selection.positions.is_empty();
    let terms = capture::Terms {
        max_bytes: wanted.max_bytes,
        lane,
    };
    let started = capture::start(handle, question, terms, ctx).await?;
    let (tokens, truncated) = (started.prepared.tokens.clone(), started.prepared.truncated);
    let captured = started.finish(ctx).await?;
    if let Some(name) = captured.non_finite.first() {
        return Err(EngineError::precondition(format!(
            "\"{name}\" holds a number that is not finite for this input: no probe can score it"
        )));
    }
    let scores = asked
        .iter()
        .map(|one| {
            let values = vectors(&captured, &one.hook)?;
            // What was narrowed to one position is that of the pooling.
            let pooling = if narrowed {
                one.probe.card.pooling.map(|_| Pooling::Cls)
            } else {
                one.probe.card.pooling
            };
            said(one, &values, pooling, wanted.per_token)
        })
        .collect::<Result<_, EngineError>>()?;
    Ok(Scored {
        scores,
        prediction: captured.prediction,
        tokens,
        truncated,
        timings: captured.timings,
    })
}

/// Scores a caller's own hidden states, `[pos, width]` or `[width]`.
///
/// # Errors
/// [`EngineError::InvalidArgument`] for `hidden` of another width; [`EngineError::FailedPrecondition`] for a score that is not finite.
pub fn score_hidden(
    asked: &Asked,
    hidden: &Tensor,
    per_token: bool,
) -> Result<Scored, EngineError> {
    let width = asked.scorer()?.width();
    let fits = match hidden.shape() {
        [last] => *last == width,
        [positions, last] => *positions > 0 && *last == width,
        _ => false,
    };
    if !fits || !hidden.dtype().is_float() {
        return Err(EngineError::invalid(
            "hidden.shape",
            format!(
                "is {:?}: \"{}\" of probe \"{}\" takes floats [pos, {width}] or [{width}]",
                hidden.shape(),
                asked.hook,
                asked.probe.card.name
            ),
        ));
    }
    let values = hidden.to_f32().map_err(EngineError::internal)?;
    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
        return Err(EngineError::invalid(
            "hidden.data",
            format!("number {at} is not finite"),
        ));
    }
    let single = hidden.shape().len() == 1;
    let pooling = asked.probe.card.pooling.or(single.then_some(Pooling::Cls));
    Ok(Scored {
        scores: vec![said(asked, &values, pooling, per_token)?],
        ..Scored::default()
    })
}

/// The only position that is read, where all probes read the same one.
fn positions(asked: &[Asked], wanted: Wanted) -> Vec<i32> {
    let only =
        |pooling| !wanted.per_token && asked.iter().all(|a| a.probe.card.pooling == Some(pooling));
    match (only(Pooling::Cls), only(Pooling::Last)) {
        (true, _) => vec![0],
        (_, true) => vec![-1],
        (false, false) => Vec::new(),
    }
}

/// Scores of `[pos, width]`.
fn said(
    asked: &Asked,
    values: &[f32],
    pooling: Option<Pooling>,
    per_token: bool,
) -> Result<Scores, EngineError> {
    let width = asked.scorer()?.width();
    let rows = values.len() / width;
    let input = pooling
        .map(|pooling| {
            let whole = Tensor::from_f32(vec![rows, width], &values[..rows * width]);
            let pooled = whole.and_then(|t| reduce::pool(&t, 0, pooling));
            let pooled = pooled.map_err(EngineError::internal)?;
            let vector = pooled.to_f32().map_err(EngineError::internal)?;
            asked.says(&vector)
        })
        .transpose()?;
    let each = per_token || pooling.is_none();
    Ok(Scores {
        name: asked.probe.card.name.clone(),
        hook: asked.hook.clone(),
        input,
        tokens: if each {
            values
                .chunks_exact(width)
                .map(|x| asked.says(x))
                .collect::<Result<_, EngineError>>()?
        } else {
            Vec::new()
        },
    })
}
