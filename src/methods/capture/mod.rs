//! Captures: run a row, bring back hook points and the prediction.
//!
//! Two steps, so that the caller can announce what comes before it is there: [`start`] checks everything, estimates the answer and
//! puts the row into the queue; [`Started::finish`] waits for it and reduces it. What the selection leaves out is left out as early
//! as possible: layers behind the deepest hook point are not run, heads and positions not brought over from the worker.

mod plan;

use std::time::Instant;

use plan::{Output, Wanted};

use super::{
    input::{self, Input, Prepared},
    predict::{self, Places, Prediction, Scores},
    reduce::{self, Keep, Pooling, Sparse},
    select,
};
use crate::{
    engine::{Ctx, EngineError, Job, Lane, ModelHandle, RowStream, StageTimings},
    ipc::{
        info::{Axis, ModelInfo},
        spec::{Plan, VariantSpec},
    },
    tensor::{DType, Tensor},
};

/// Reductions above so many bytes leave the async threads.
const INLINE_BYTES: usize = 64 << 10;

/// How much of the model's own output comes along.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Logits {
    /// What the prediction is read from.
    #[default]
    Prediction,
    /// The main output as it is.
    All,
    /// Nothing, and what lies behind the deepest hook point is not run.
    None,
}

/// What to bring back of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// See [`select::points`].
    pub hooks: Vec<String>,
    /// Layers; empty keeps all.
    pub layers: Vec<u32>,
    /// Heads, of hook points that have heads; empty keeps all.
    pub heads: Vec<u32>,
    /// Positions (queries of attentions), negative ones from the end; empty keeps all.
    pub positions: Vec<i32>,
    /// Reduces the position axis.
    pub pooling: Option<Pooling>,
    /// Keeps the greatest entries of what is no attention pattern.
    pub top_k: Option<Keep>,
    /// Keeps the greatest entries of attention patterns.
    pub sparse_attention: Option<Keep>,
    /// Type of floats in the answer.
    pub dtype: DType,
    /// The model's own output.
    pub logits: Logits,
    /// Candidates of the prediction.
    pub candidates: usize,
    /// Whether tokens that were given as ids have their text, for which the worker is asked.
    pub spelled: bool,
}

impl Default for Selection {
    fn default() -> Self {
        Self {
            hooks: Vec::new(),
            layers: Vec::new(),
            heads: Vec::new(),
            positions: Vec::new(),
            pooling: None,
            top_k: None,
            sparse_attention: None,
            dtype: DType::F32,
            logits: Logits::Prediction,
            candidates: 5,
            spelled: true,
        }
    }
}

/// A question, validated as far as it can be without the model.
#[derive(Clone, Debug)]
pub struct Question {
    /// What to run on.
    pub input: Input,
    /// What to bring back.
    pub selection: Selection,
}

/// What a capture may cost, and how urgent it is.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Largest capture by its estimate.
    pub max_bytes: usize,
    /// How urgent.
    pub lane: Lane,
}

/// One tensor of an answer.
#[derive(Clone, Debug)]
pub struct Item {
    /// Hook point, value or output.
    pub name: String,
    /// Meaning of each axis, the batch left out; `axis_N` where nobody has read them.
    pub axes: Vec<String>,
    /// What is sent of it.
    pub content: Content,
}

/// What is sent of a tensor.
#[derive(Clone, Debug)]
pub enum Content {
    /// All of it.
    Dense(Tensor),
    /// Its greatest entries, their values to be sent as this type.
    Sparse(Sparse, DType),
}

/// A capture in the queue.
#[derive(Debug)]
pub struct Started {
    /// The row, with its tokens.
    pub prepared: Prepared,
    /// Names of what will come, in order.
    pub names: Vec<String>,
    /// Payload that will come, as far as extents are known.
    pub estimated_bytes: usize,
    handle: ModelHandle,
    wanted: Vec<Wanted>,
    /// The main output: how it is read, and whether it is sent.
    output: Option<Output>,
    dtype: DType,
    candidates: usize,
    rows: RowStream,
}

/// An answer, complete.
#[derive(Debug)]
pub struct Captured {
    /// Hook points in the order of [`Started::names`], the model's output last.
    pub items: Vec<Item>,
    /// What the model predicts, where it was asked for.
    pub prediction: Option<Prediction>,
    /// What it was read from.
    pub scores: Option<Scores>,
    /// Where the time went.
    pub timings: StageTimings,
    /// Tensors with a value that is NaN or infinite and no mask.
    pub non_finite: Vec<String>,
    /// What the caller should know.
    pub notes: Vec<String>,
    /// Holds the permits for the bytes of the answer.
    _rows: RowStream,
}

/// Checks a question, estimates its answer and puts its row into the queue.
///
/// # Errors
/// With paths of fields that begin at the request: `input...`, `selection...`. [`EngineError::ResourceExhausted`] when the
/// answer would be larger than `terms` allow.
pub async fn start(
    handle: &ModelHandle,
    question: Question,
    terms: Terms,
    ctx: &Ctx,
) -> Result<Started, EngineError> {
    let Question { input, selection } = question;
    let info = handle.info().clone();
    // Names first: they cost nothing, the tokenizer does.
    let points = select::points(&info, &selection.hooks, &selection.layers, "selection")?;
    if points.is_empty() && selection.logits == Logits::None {
        return Err(EngineError::invalid(
            "selection",
            "selects nothing: name hook points, or ask for logits",
        ));
    }
    let field = input::field_of(&input);
    let mut prepared = input::unspelled(handle, input, ctx)
        .await
        .map_err(|e| e.beneath("input"))?;
    let length = prepared.group.length.or_else(|| length_of(&prepared));
    let wanted = points
        .iter()
        .map(|p| plan::want(&info, p, &selection, length))
        .collect::<Result<Vec<_>, _>>()?;
    let mut output = plan::output(&info, &selection, &prepared, length);
    if let Some(output) = &mut output {
        output.sent = wanted.iter().all(|w| w.name != output.pick.output);
    }
    let estimate = plan::estimate(&info, &points, &wanted, output.as_ref(), length, &selection);
    if estimate.brought > terms.max_bytes {
        return Err(EngineError::exhausted(
            format!(
                "the capture would take {} bytes, more than the limit of {}: \
                 ask for fewer hook points, layers, heads or positions, or for a shorter input",
                estimate.brought, terms.max_bytes
            ),
            None,
        ));
    }
    let plain = wanted.is_empty();
    let job = Job {
        spec: VariantSpec {
            plan: if plain { Plan::Plain } else { Plan::Rewritten },
            expose: wanted.iter().map(|w| w.name.clone()).collect(),
            keep_outputs: plain || output.is_some(),
            ..VariantSpec::plain()
        },
        // A capture of nothing but the prediction is a predict.
        lane: if plain { Lane::Predict } else { terms.lane },
        groups: vec![crate::engine::RowGroup {
            picks: wanted
                .iter()
                .map(|w| w.pick.clone())
                .chain(output.iter().map(|o| o.pick.clone()))
                .collect(),
            ..prepared.group.clone()
        }],
    };
    if job.groups[0].picks.is_empty() {
        return Err(EngineError::precondition(format!(
            "model \"{}\" predicts nothing (its task is {}): name hook points, or ask for all of its output",
            info.name,
            info.task.name()
        )));
    }
    let rows = handle
        .submit(job, ctx)
        .await
        .map_err(|e| input::at_field(e, field))?;
    if selection.spelled {
        // While the row waits and runs.
        input::spell(handle, &mut prepared, ctx).await?;
    }
    let sends = output.iter().filter(|o| o.sent);
    let sends = sends.map(|o| o.pick.output.clone());
    Ok(Started {
        names: wanted.iter().map(|w| w.name.clone()).chain(sends).collect(),
        estimated_bytes: estimate.sent,
        prepared,
        handle: handle.clone(),
        wanted,
        output,
        dtype: selection.dtype,
        candidates: selection.candidates,
        rows,
    })
}

impl Started {
    /// The model that answers.
    pub fn handle(&self) -> &ModelHandle {
        &self.handle
    }

    /// Waits for the row and reduces it.
    ///
    /// # Errors
    /// Those of the run.
    pub async fn finish(mut self, ctx: &Ctx) -> Result<Captured, EngineError> {
        let Some(done) = self.rows.next().await.transpose()? else {
            return Err(EngineError::internal("a row ended without an answer"));
        };
        let mut timings = done.timings;
        timings.tokenize += self.prepared.tokenize;
        let begun = Instant::now();
        let non_finite = done
            .non_finite
            .iter()
            .filter_map(|at| self.names.get(*at).cloned())
            .collect();
        let mut tensors = done.tensors;
        let scores = match &self.output {
            Some(_) => tensors.pop(),
            None => None,
        };
        let mut items = reduced(self.wanted, tensors, self.dtype).await?;
        let mut prediction = None;
        let mut read_from = None;
        if let (Some(output), Some(scores)) = (self.output, scores) {
            let info = self.handle.info().clone();
            if let Some(places) = &output.places {
                let of_places = if output.whole {
                    cut(&scores, &output.axes, places)?
                } else {
                    scores.clone()
                };
                let mut read = predict::read(&info, &of_places, places, self.candidates)?;
                predict::spell(&self.handle, &mut read, ctx).await?;
                prediction = Some(read);
                read_from = Some(Scores {
                    places: places.clone(),
                    scores: of_places,
                });
            }
            if output.sent {
                items.push(Item {
                    axes: axis_names(&output.axes, scores.shape()),
                    content: Content::Dense(as_asked(scores, self.dtype)?),
                    name: output.pick.output,
                });
            }
        }
        timings.reduce += begun.elapsed();
        Ok(Captured {
            items,
            prediction,
            scores: read_from,
            timings,
            non_finite,
            notes: notes(self.handle.info(), &self.names),
            _rows: self.rows,
        })
    }
}

/// Tokens of a row that was given as tensors.
fn length_of(prepared: &Prepared) -> Option<usize> {
    (!prepared.tokens.is_empty()).then_some(prepared.tokens.len())
}

/// Pools, keeps the greatest, converts. Much work leaves the async threads.
async fn reduced(
    wanted: Vec<Wanted>,
    tensors: Vec<Tensor>,
    dtype: DType,
) -> Result<Vec<Item>, EngineError> {
    let work: usize = wanted
        .iter()
        .zip(&tensors)
        .filter(|(w, t)| {
            let converts = t.dtype().is_float() && t.dtype() != dtype;
            w.pool.is_some() || w.keep.is_some() || converts
        })
        .map(|(_, t)| t.bytes().len())
        .sum();
    let all = move || -> Result<Vec<Item>, EngineError> {
        wanted
            .into_iter()
            .zip(tensors)
            .map(|(w, t)| item(w, t, dtype))
            .collect()
    };
    if work <= INLINE_BYTES {
        return all();
    }
    tokio::task::spawn_blocking(all)
        .await
        .map_err(EngineError::internal)?
}

fn item(wanted: Wanted, mut tensor: Tensor, dtype: DType) -> Result<Item, EngineError> {
    let mut axes = axis_names(&wanted.axes, tensor.shape());
    if let Some((at, pooling)) = wanted.pool
        && tensor.dtype().is_float()
        && at < tensor.shape().len()
    {
        tensor = reduce::pool(&tensor, at, pooling).map_err(EngineError::internal)?;
        axes.remove(at);
    }
    let content = match wanted.keep {
        Some(keep) if tensor.dtype().is_float() && !tensor.shape().is_empty() => Content::Sparse(
            reduce::keep(&tensor, keep).map_err(EngineError::internal)?,
            dtype,
        ),
        Some(_) | None => Content::Dense(as_asked(tensor, dtype)?),
    };
    Ok(Item {
        name: wanted.name,
        axes,
        content,
    })
}

fn as_asked(tensor: Tensor, dtype: DType) -> Result<Tensor, EngineError> {
    if !tensor.dtype().is_float() {
        return Ok(tensor);
    }
    tensor.cast_float(dtype).map_err(EngineError::internal)
}

/// The rows of an output `[pos, label]` at the places of a prediction.
fn cut(scores: &Tensor, axes: &[Axis], places: &Places) -> Result<Tensor, EngineError> {
    let Places::Positions(positions) = places else {
        return Ok(scores.clone());
    };
    let values = scores.to_f32().map_err(EngineError::internal)?;
    let width = scores.shape().last().copied().unwrap_or(1);
    let broken = || EngineError::internal(format!("an output with axes {axes:?} has no positions"));
    let mut rows = Vec::with_capacity(positions.len() * width);
    for p in positions {
        let at = *p as usize * width;
        rows.extend_from_slice(values.get(at..at + width).ok_or_else(broken)?);
    }
    Tensor::from_f32(vec![positions.len(), width], &rows).map_err(EngineError::internal)
}

fn axis_names(axes: &[Axis], shape: &[usize]) -> Vec<String> {
    if axes.len() == shape.len() {
        return axes.iter().map(|a| a.name().to_owned()).collect();
    }
    (0..shape.len()).map(|at| format!("axis_{at}")).collect()
}

/// Checks of the certificate that did not hold for what was asked.
fn notes(info: &ModelInfo, names: &[String]) -> Vec<String> {
    info.certificate
        .failed()
        .filter(|c| names.contains(&c.subject))
        .map(|c| format!("\"{}\" failed its check \"{}\" on load", c.subject, c.name))
        .collect()
}
