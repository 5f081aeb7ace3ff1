//! The residual stream as a lens reads it: what enters each layer, and what leaves the last.
//!
//! ```text
//!   embeddings ──▶ state 0 ──▶ layer 0 ──▶ state 1 ──▶ ... ──▶ layer L-1 ──▶ state L, the end ──▶ final norm, pooler, head
//! ```
//!
//! In models that normalise the sum of every layer (BERT and its kin) a state is what the norm makes of the sum: that is what the next layer
//! reads, and at the end the head.

use super::Terms;
use crate::{
    engine::{EngineError, PickSpec, RowGroup},
    ipc::{
        info::{Axis, HookInfo, ModelInfo},
        spec::VariantSpec,
    },
    methods::{
        attribute::baseline::no_hook,
        subject::{Subject, floats},
    },
    tensor::DType,
};

/// The hook point of a model's scores.
pub(super) const SCORES: &str = "logits";

/// Where the states are.
#[derive(Clone, Debug)]
pub(in crate::methods) struct Stream {
    /// Hook points, in the order of the layers.
    pub(in crate::methods) states: Vec<String>,
    /// Numbers of a position.
    pub(in crate::methods) width: usize,
    /// Positions, where the model fixes them.
    pub(in crate::methods) fixed: Option<usize>,
    /// Type of the arithmetic at the end.
    pub(in crate::methods) dtype: DType,
    /// Whether every layer normalises its own sum.
    pub(super) normalised: bool,
}

/// What stands at the states for a row.
#[derive(Clone, Debug)]
pub(super) struct States {
    /// Positions of the row.
    pub(super) positions: usize,
    /// Numbers of a position.
    pub(super) width: usize,
    /// `[state][position, width]`
    pub(super) values: Vec<Vec<f32>>,
    /// The model's own scores where they were asked for: `[place, label]`, or `[label]`.
    pub(super) scores: Vec<f32>,
}

impl Stream {
    /// Finds the states of a model.
    ///
    /// # Errors
    /// [`EngineError::FailedPrecondition`] for a model whose stream is not known from end to end, or changes its width.
    pub(in crate::methods) fn of(info: &ModelInfo) -> Result<Self, EngineError> {
        let last = info
            .dims
            .layers
            .checked_sub(1)
            .ok_or_else(|| no_hook(info, "blocks.0.hook_resid_pre"))?;
        let normed = format!("blocks.{last}.hook_normalized_resid_post");
        let normalised = info.hook(&normed).is_some();
        let end = if normalised {
            normed
        } else {
            format!("blocks.{last}.hook_resid_post")
        };
        let names = (0..=last)
            .map(|layer| format!("blocks.{layer}.hook_resid_pre"))
            .chain([end]);
        let hooks = names
            .map(|name| info.hook(&name).ok_or_else(|| no_hook(info, &name)))
            .collect::<Result<Vec<&HookInfo>, _>>()?;
        let mut width = None;
        for hook in &hooks {
            let fits = matches!(hook.axes[..], [Axis::Batch, Axis::Pos, _]);
            let here = hook.dims.last().copied().flatten();
            if !fits || !hook.dtype.is_float() || here.is_none() {
                let axes: Vec<&str> = hook.axes.iter().map(Axis::name).collect();
                return Err(EngineError::precondition(format!(
                    "\"{}\" of model \"{}\" is {} of the axes {}: a lens reads floats with batch, position and a width",
                    hook.name,
                    info.name,
                    hook.dtype,
                    axes.join(", ")
                )));
            }
            if width.is_some_and(|w| Some(w) != here) {
                return Err(EngineError::precondition(format!(
                    "the stream of model \"{}\" changes its width at \"{}\": what its head reads at the end stands nowhere before",
                    info.name, hook.name
                )));
            }
            width = here;
        }
        let end = hooks
            .last()
            .ok_or_else(|| EngineError::internal("a stream without an end"))?;
        Ok(Self {
            width: width.unwrap_or_default(),
            fixed: end.dims[1],
            dtype: end.dtype,
            normalised,
            states: hooks.iter().map(|h| h.name.clone()).collect(),
        })
    }

    /// The last state, which the head reads.
    pub(in crate::methods) fn end(&self) -> &str {
        self.states.last().map_or("", String::as_str)
    }

    /// Reads the states of a row in one run, and the model's own scores at these positions if they are wanted.
    ///
    /// # Errors
    /// [`EngineError::ResourceExhausted`] when that is more than `terms` allow; those of the run.
    pub(super) async fn capture(
        &self,
        subject: &mut Subject,
        scores: Option<&[u32]>,
        terms: Terms,
    ) -> Result<States, EngineError> {
        if let Some(length) = subject.row.length.or(self.fixed) {
            let bytes = [self.states.len(), length, self.width, size_of::<f32>()];
            let bytes = bytes.into_iter().fold(1, usize::saturating_mul);
            if bytes > terms.max_bytes {
                return Err(EngineError::exhausted(
                    format!(
                        "the residual stream would take {bytes} bytes, more than the limit of {}: give a shorter input",
                        terms.max_bytes
                    ),
                    None,
                ));
            }
        }
        let mut expose = self.states.clone();
        expose.extend(scores.map(|_| SCORES.to_owned()));
        let picks = expose.iter().map(|name| PickSpec {
            output: name.clone(),
            positions: match scores {
                Some(positions) if name == SCORES => positions.to_vec(),
                Some(_) | None => Vec::new(),
            },
            ..PickSpec::default()
        });
        let group = RowGroup {
            picks: picks.collect(),
            ..subject.row.clone()
        };
        let spec = VariantSpec {
            keep_outputs: false,
            ..VariantSpec::exposing(expose)
        };
        let mut queued = subject.submit(spec, vec![group], false).await?;
        let mut found = None;
        while let Some(done) = subject.next(&mut queued).await? {
            let values = (0..self.states.len())
                .map(|at| floats(&done.tensors, at))
                .collect::<Result<Vec<_>, _>>()?;
            let positions = values.last().map_or(0, Vec::len) / self.width.max(1);
            if values.iter().any(|v| v.len() != positions * self.width) {
                return Err(EngineError::precondition(
                    "the stream changes its length between layers: what its head reads at the end stands nowhere before",
                ));
            }
            if let Some(at) = values.iter().position(|v| v.iter().any(|x| !x.is_finite())) {
                return Err(EngineError::precondition(format!(
                    "\"{}\" holds a number that is not finite for this input",
                    self.states[at]
                )));
            }
            found = Some(States {
                positions,
                width: self.width,
                values,
                scores: match scores {
                    Some(_) => floats(&done.tensors, self.states.len())?,
                    None => Vec::new(),
                },
            });
        }
        found.ok_or_else(|| EngineError::internal("a row ended without its states"))
    }
}
