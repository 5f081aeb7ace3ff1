//! Parts of later layers. What comes before them is the same in every run: their rows begin in the middle of the model, with what stands
//! there for the input.
//!
//! There is one such place for all sweeps, so that two variants serve all layers, heads, positions and neurons of a kind of hook point. A
//! sweep over all layers then takes three quarters of the time of whole runs, one over the last layers half of it.

use std::collections::BTreeSet;

use crate::{
    engine::{EngineError, NamedTensor},
    ipc::{
        info::{HookInfo, ModelInfo},
        spec::state_input,
    },
    methods::subject::{Show, Subject},
    tensor::Tensor,
};

/// Whole runs that must be spared, before another variant is built for them.
const WORTH: f64 = 32.0;
/// How far the answer of a row that begins late may be from that of the whole, by the greater of it and one.
const CLOSE: f64 = 1e-4;

/// The middle of a model, and what stands there in the run of the input.
#[derive(Debug)]
pub(super) struct Late {
    hook: String,
    layer: usize,
    /// Part of the model that is not run.
    spares: f64,
    /// `[1, position, ...]`
    state: Tensor,
    show: Show,
    start: Start,
}

/// Whether rows may begin late.
#[derive(Clone, Copy, Debug)]
enum Start {
    /// Nobody knows yet.
    Unknown,
    /// With this number for the input as it is.
    Late(f64),
    Whole,
}

/// Where rows may begin: what enters the layer in the middle, of models that have such a hook point; and that layer.
pub(super) fn middle(info: &ModelInfo) -> Option<(&HookInfo, usize)> {
    let layer = info.dims.layers / 2;
    let hook = info.hook(&format!("blocks.{layer}.hook_resid_pre"))?;
    (layer > 0 && hook.dtype.is_float()).then_some((hook, layer))
}

impl Late {
    /// Of a model whose whole runs show this, with what stood in the middle: `[position, ...]`.
    pub(super) fn new(
        info: &ModelInfo,
        whole: &Show,
        state: &Tensor,
    ) -> Result<Option<Self>, EngineError> {
        let Some((hook, layer)) = middle(info) else {
            return Ok(None);
        };
        let shape = [&[1], state.shape()].concat();
        // A copy: what came back is memory of the worker.
        let state = Tensor::new(state.dtype(), shape, state.bytes().to_vec().into());
        let state = state.map_err(EngineError::internal)?;
        let mut late = Self {
            hook: hook.name.clone(),
            layer,
            spares: layer as f64 / info.dims.layers as f64,
            state,
            show: Show {
                enter: [hook.name.clone()].into(),
                beside: BTreeSet::new(),
                ..whole.clone()
            },
            start: Start::Unknown,
        };
        let mut intervene = std::mem::take(&mut late.show.intervene);
        intervene.retain(|name| late.holds(info, name));
        late.show.intervene = intervene;
        Ok(Some(late))
    }

    /// Whether a hook point lies behind the middle.
    pub(super) fn holds(&self, info: &ModelInfo, hook: &str) -> bool {
        let layer = info.hook(hook).and_then(|h| h.layer);
        layer.is_some_and(|layer| layer >= self.layer) && hook != self.hook
    }

    /// What rows show.
    pub(super) fn show(&self) -> &Show {
        &self.show
    }

    /// What stands in the middle, for so many rows.
    pub(super) fn state(&self, rows: usize) -> Result<NamedTensor, EngineError> {
        Ok(NamedTensor {
            name: state_input(&self.hook),
            tensor: self.state.repeated(rows).map_err(EngineError::internal)?,
        })
    }

    /// Bytes of the state of a row.
    pub(super) fn bytes(&self) -> usize {
        self.state.bytes().len()
    }

    /// The number for the input as it is, from a row that begins late; none when so many rows are not worth it, or what lies behind reads
    /// more than the middle. `value` is the number from a whole run.
    ///
    /// # Errors
    /// Those of the run.
    pub(super) async fn value(
        &mut self,
        subject: &mut Subject,
        rows: usize,
        value: f64,
    ) -> Result<Option<f64>, EngineError> {
        if matches!(self.start, Start::Unknown) {
            self.start = if rows as f64 * self.spares < WORTH {
                Start::Whole
            } else {
                self.tried(subject, value).await?
            };
        }
        Ok(match self.start {
            Start::Late(value) => Some(value),
            Start::Unknown | Start::Whole => None,
        })
    }

    async fn tried(&self, subject: &mut Subject, value: f64) -> Result<Start, EngineError> {
        let mut found = f64::NAN;
        let tried = subject.values(
            &self.show,
            (1, self.bytes()),
            |rows| Ok(vec![self.state(rows.len())?]),
            |_, _, v| found = v,
        );
        match tried.await {
            Ok(()) if (found - value).abs() <= CLOSE * value.abs().max(1.0) => {
                Ok(Start::Late(found))
            }
            // Graphs that read the stream in another place as well.
            Ok(()) | Err(EngineError::FailedPrecondition { .. }) => Ok(Start::Whole),
            Err(error) => Err(error),
        }
    }
}
