//! The row that is explained, and the one way to run variations of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    time::Instant,
};

use tokio::sync::watch;

use super::target::Objective;
use crate::{
    engine::{
        Ctx, EngineError, Job, Lane, ModelHandle, NamedTensor, PickSpec, RowGroup, RowStream,
        RowsDone, StageTimings,
    },
    ipc::{
        info::{InputInfo, InputRole, ModelInfo},
        spec::{
            GradientSpec, OBJECTIVE, Reduction, Rules, TARGET_LABEL, TARGET_POSITION,
            TARGET_READOUT, TARGET_WEIGHT, VariantSpec,
        },
    },
    methods::input::Token,
    tensor::{Tensor, TensorError},
};

/// Most rows of a job: enough to fill runs, few enough that their inputs are made as they are needed.
const ROWS_AT_A_TIME: usize = 256;
/// Most bytes of the inputs of a job. Two jobs are there at a time: one runs while the next is made.
const BYTES_AT_A_TIME: usize = 16 << 20;

/// A row, the number that is explained, and what was spent on it so far.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) handle: ModelHandle,
    pub(super) ctx: Ctx,
    pub(super) lane: Lane,
    pub(super) row: RowGroup,
    pub(super) tokens: Vec<Token>,
    pub(super) objective: Objective,
    /// Moves the site of a gradient before anything else does: see [`super::attribute`].
    pub(super) nudge: Option<Vec<f32>>,
    pub(super) spent: Spent,
    progress: watch::Sender<Partial>,
}

/// What was spent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spent {
    /// Rows run forward.
    pub forward_rows: u64,
    /// Rows run forward and backward.
    pub gradient_rows: u64,
    /// Tokens of both.
    pub tokens: u64,
    /// Where the time went.
    pub timings: StageTimings,
}

/// How far an explanation is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Partial {
    /// Rows that were run.
    pub rows_done: u64,
    /// Rows that will be run, as far as known.
    pub rows_planned: u64,
    /// The scores as they look now; empty as long as nothing can be said.
    pub scores: Vec<f64>,
    /// How wrong they may be, where it can be told.
    pub error: Option<f64>,
}

/// Rows that were put into the queue.
pub(super) struct Queued {
    stream: RowStream,
    /// Tokens of a row of each group.
    lengths: Vec<usize>,
    gradient: bool,
    /// Whether some of them are done.
    begun: bool,
}

/// What runs are to show of a row. The tensors of an answer come in this order: the objective, gradients, hook points by name.
#[derive(Clone, Debug, Default)]
pub(super) struct Show {
    /// Hook points that the inputs move.
    pub(super) intervene: BTreeSet<String>,
    /// The number that is explained.
    pub(super) objective: bool,
    /// Gradients of it.
    pub(super) points: BTreeMap<String, Reduction>,
    /// Gradients, or relevance.
    pub(super) rules: Rules,
    /// Hook points as they are.
    pub(super) expose: BTreeSet<String>,
    /// Hook points that the variant can show and these rows do not: others share it that do.
    pub(super) beside: BTreeSet<String>,
    /// Hook points that the rows begin at: what stands there is among their inputs.
    pub(super) enter: BTreeSet<String>,
}

impl Show {
    /// The objective alone.
    pub(super) fn objective() -> Self {
        Self {
            objective: true,
            ..Self::default()
        }
    }

    /// The same with a hook point moved.
    pub(super) fn moving(mut self, hook: &str) -> Self {
        self.intervene.insert(hook.to_owned());
        self
    }
}

impl Subject {
    pub(super) fn new(
        handle: ModelHandle,
        (row, tokens): (RowGroup, Vec<Token>),
        objective: Objective,
        (lane, ctx): (Lane, Ctx),
    ) -> Self {
        Self {
            handle,
            ctx,
            lane,
            row,
            tokens,
            objective,
            nudge: None,
            spent: Spent::default(),
            progress: watch::channel(Partial::default()).0,
        }
    }

    pub(super) fn info(&self) -> &ModelInfo {
        self.handle.info()
    }

    /// Where progress can be watched.
    pub(super) fn watch(&self) -> watch::Receiver<Partial> {
        self.progress.subscribe()
    }

    /// More rows will be run.
    pub(super) fn plan(&self, rows: usize) {
        self.progress
            .send_modify(|p| p.rows_planned = self.done() + rows as u64);
    }

    /// The scores as they look now.
    pub(super) fn report(&self, scores: Vec<f64>, error: Option<f64>) {
        self.progress.send_modify(|p| {
            p.scores = scores;
            p.error = error;
        });
    }

    fn done(&self) -> u64 {
        self.spent.forward_rows + self.spent.gradient_rows
    }

    /// Tokens of the row, or what counts for them where there are none.
    pub(super) fn length(&self) -> usize {
        self.tokens.len()
    }

    /// Runs `rows` variations. `inputs` makes those of some of them, `[rows, ...]`, beside or in place of those of the row itself, which
    /// are repeated; `row_bytes` is about what they weigh for one row. `each` takes what came back for some rows, in any order.
    ///
    /// # Errors
    /// Those of the run, and what `inputs` or `each` say.
    pub(super) async fn run(
        &mut self,
        show: &Show,
        (rows, row_bytes): (usize, usize),
        inputs: impl Fn(Range<usize>) -> Result<Vec<NamedTensor>, EngineError>,
        mut each: impl FnMut(&Self, Range<usize>, &[Tensor]) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let at_a_time = (BYTES_AT_A_TIME / row_bytes.max(1)).clamp(1, ROWS_AT_A_TIME);
        // What shares a run with others must not depend on them.
        let alone = self.info().rows_interact || self.info().inputs.iter().any(|i| !i.is_batched());
        let per_group = if alone { 1 } else { at_a_time };
        let mut ahead: Option<(Queued, Vec<Range<usize>>)> = None;
        let mut each = |subject: &Self, ranges: &[Range<usize>], done: RowsDone| {
            let first = ranges[done.group].start;
            let range = first + done.rows.start..first + done.rows.end;
            each(subject, range, &done.tensors)
        };
        for begin in (0..rows).step_by(at_a_time) {
            let chunk = begin..rows.min(begin + at_a_time);
            let ranges: Vec<Range<usize>> = chunk
                .clone()
                .step_by(per_group)
                .map(|from| from..chunk.end.min(from + per_group))
                .collect();
            let groups = ranges
                .iter()
                .map(|range| self.group(show, range.len(), inputs(range.clone())?))
                .collect::<Result<Vec<_>, _>>()?;
            let queued = self.queue(show, groups, ahead.is_some()).await?;
            if let Some((queued, ranges)) = ahead.replace((queued, ranges)) {
                self.take(queued, |subject, done| each(subject, &ranges, done))
                    .await?;
            }
        }
        if let Some((queued, ranges)) = ahead {
            self.take(queued, |subject, done| each(subject, &ranges, done))
                .await?;
        }
        Ok(())
    }

    /// Runs rows of their own lengths, each a group, and gives the objective of each, read at positions of its own.
    pub(super) async fn values_of(
        &mut self,
        rows: Vec<(RowGroup, Vec<u32>)>,
        mut each: impl FnMut(&Self, usize, f64),
    ) -> Result<(), EngineError> {
        let show = Show::objective();
        let mut groups = Vec::with_capacity(rows.len());
        for (row, positions) in rows {
            let inputs = self.terms_at(1, &positions)?;
            groups.push(RowGroup {
                inputs: row.inputs.into_iter().chain(inputs).collect(),
                picks: picks(&show),
                ..row
            });
        }
        for (chunk, groups) in groups.chunks(ROWS_AT_A_TIME).enumerate() {
            let queued = self.queue(&show, groups.to_vec(), false).await?;
            self.take(queued, |subject, done| {
                let value = first(&done.tensors)?;
                each(subject, chunk * ROWS_AT_A_TIME + done.group, value);
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    /// A number for each of `rows` variations: the objective.
    pub(super) async fn values(
        &mut self,
        show: &Show,
        extent: (usize, usize),
        inputs: impl Fn(Range<usize>) -> Result<Vec<NamedTensor>, EngineError>,
        mut each: impl FnMut(&Self, usize, f64),
    ) -> Result<(), EngineError> {
        self.run(show, extent, inputs, |subject, range, tensors| {
            let values = floats(tensors, 0)?;
            for (row, value) in range.zip(values) {
                each(subject, row, f64::from(value));
            }
            Ok(())
        })
        .await
    }

    /// Takes the answers to some rows.
    async fn take(
        &mut self,
        mut queued: Queued,
        mut each: impl FnMut(&Self, RowsDone) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        while let Some(done) = self.next(&mut queued).await? {
            let reducing = Instant::now();
            each(self, done)?;
            self.spent.timings.reduce += reducing.elapsed();
        }
        Ok(())
    }

    /// The answer to some of the rows that were queued; none when all are answered.
    ///
    /// # Errors
    /// Those of the run.
    pub(super) async fn next(
        &mut self,
        queued: &mut Queued,
    ) -> Result<Option<RowsDone>, EngineError> {
        let Some(done) = queued.stream.next().await.transpose()? else {
            return Ok(None);
        };
        if !queued.begun {
            queued.begun = true;
            self.spent.timings.queue += done.timings.queue;
            self.spent.timings.build += done.timings.build;
        }
        self.spent.timings.run += done.timings.run;
        let rows = done.rows.len() as u64;
        self.spent.tokens += rows * queued.lengths[done.group] as u64;
        if queued.gradient {
            self.spent.gradient_rows += rows;
        } else {
            self.spent.forward_rows += rows;
        }
        let rows_done = self.done();
        self.progress.send_modify(|p| {
            p.rows_done = rows_done;
            p.rows_planned = p.rows_planned.max(rows_done);
        });
        Ok(Some(done))
    }

    async fn queue(
        &self,
        show: &Show,
        groups: Vec<RowGroup>,
        begun: bool,
    ) -> Result<Queued, EngineError> {
        self.submit(self.spec(show), groups, begun).await
    }

    /// Puts rows into the queue. Work that has begun waits for room; the first rows of a request are told to come back.
    ///
    /// # Errors
    /// What the engine says of them.
    pub(super) async fn submit(
        &self,
        spec: VariantSpec,
        groups: Vec<RowGroup>,
        begun: bool,
    ) -> Result<Queued, EngineError> {
        let lengths = groups.iter().map(|g| g.length.unwrap_or(1)).collect();
        let gradient = spec.gradient.as_ref().is_some_and(|g| !g.points.is_empty());
        let job = Job {
            spec,
            lane: self.lane,
            groups,
        };
        let begun = begun || self.done() > 0;
        let stream = loop {
            match self.handle.submit(job.clone(), &self.ctx).await {
                Err(EngineError::ResourceExhausted {
                    retry_after: Some(after),
                    ..
                }) if begun => {
                    tokio::select! {
                        () = tokio::time::sleep(after) => {}
                        () = self.ctx.cancel.cancelled() => return Err(EngineError::Cancelled),
                    }
                }
                other => break other?,
            }
        };
        Ok(Queued {
            stream,
            lengths,
            gradient,
            begun: false,
        })
    }

    pub(super) fn spec(&self, show: &Show) -> VariantSpec {
        VariantSpec {
            expose: &show.expose | &show.beside,
            intervene: show.intervene.clone(),
            enter: show.enter.clone(),
            keep_outputs: false,
            gradient: (show.objective || !show.points.is_empty()).then(|| GradientSpec {
                of: self.objective.quantity,
                at: self.objective.at.clone(),
                rules: show.rules,
                points: show.points.clone(),
            }),
            ..VariantSpec::rewritten()
        }
    }

    /// Some variations as a group.
    pub(super) fn group(
        &self,
        show: &Show,
        rows: usize,
        mut inputs: Vec<NamedTensor>,
    ) -> Result<RowGroup, EngineError> {
        for given in &self.row.inputs {
            if inputs.iter().all(|i| i.name != given.name) {
                let info = self.info().inputs.iter().find(|i| i.name == given.name);
                let tensor = if info.is_none_or(InputInfo::is_batched) {
                    given.tensor.repeated(rows).map_err(EngineError::internal)?
                } else {
                    given.tensor.clone()
                };
                inputs.push(NamedTensor {
                    name: given.name.clone(),
                    tensor,
                });
            }
        }
        if show.objective || !show.points.is_empty() {
            inputs.extend(self.terms(rows)?);
        }
        Ok(RowGroup {
            inputs,
            rows,
            length: self.row.length,
            picks: picks(show),
        })
    }

    /// The terms of the objective, for so many rows.
    fn terms(&self, rows: usize) -> Result<Vec<NamedTensor>, EngineError> {
        let positions = self.objective.terms.iter().filter_map(|t| t.position);
        self.terms_at(rows, &positions.collect::<Vec<u32>>())
    }

    /// The terms, read at other positions.
    fn terms_at(&self, rows: usize, positions: &[u32]) -> Result<Vec<NamedTensor>, EngineError> {
        let terms = &self.objective.terms;
        let shape = vec![rows, terms.len()];
        let what = if let Some(readout) = &self.objective.readout {
            let tensor = Tensor::from_f32(vec![rows, readout.len()], &readout.repeat(rows));
            (TARGET_READOUT, tensor)
        } else {
            let labels: Vec<i64> = terms.iter().map(|t| i64::from(t.label)).collect();
            let tensor = Tensor::from_i64(shape.clone(), &labels.repeat(rows));
            (TARGET_LABEL, tensor)
        };
        let weights: Vec<f32> = terms.iter().map(|t| t.weight).collect();
        let named = |name: &str, tensor: Result<Tensor, TensorError>| -> Result<_, EngineError> {
            Ok(NamedTensor {
                name: name.to_owned(),
                tensor: tensor.map_err(EngineError::internal)?,
            })
        };
        let mut inputs = vec![
            named(what.0, what.1)?,
            named(
                TARGET_WEIGHT,
                Tensor::from_f32(shape.clone(), &weights.repeat(rows)),
            )?,
        ];
        if self.objective.at.is_some() || self.info().main_output_has_positions() {
            let positions: Vec<i64> = positions.iter().map(|p| i64::from(*p)).collect();
            inputs.push(named(
                TARGET_POSITION,
                Tensor::from_i64(shape, &positions.repeat(rows)),
            )?);
        }
        Ok(inputs)
    }

    /// The input that holds token ids.
    pub(super) fn ids_input(&self) -> Option<&InputInfo> {
        self.info().input(InputRole::TokenIds)
    }
}

fn picks(show: &Show) -> Vec<PickSpec> {
    let pick = |output: String| PickSpec {
        output,
        ..PickSpec::default()
    };
    let mut picks = Vec::new();
    if show.objective {
        picks.push(pick(OBJECTIVE.to_owned()));
    }
    picks.extend(
        show.points
            .keys()
            .map(|name| pick(format!("gradient:{name}"))),
    );
    picks.extend(show.expose.iter().map(|name| pick(name.clone())));
    picks
}

/// The floats of an answer's tensor.
pub(super) fn floats(tensors: &[Tensor], at: usize) -> Result<Vec<f32>, EngineError> {
    let tensor = tensors
        .get(at)
        .ok_or_else(|| EngineError::internal(format!("an answer has no tensor {at}")))?;
    let values = tensor.to_f32().map_err(EngineError::internal)?;
    Ok(values.into_owned())
}

/// The first float of an answer: the number that is explained, of a single row.
pub(super) fn first(tensors: &[Tensor]) -> Result<f64, EngineError> {
    let values = floats(tensors, 0)?;
    let value = values.first().copied();
    value
        .map(f64::from)
        .ok_or_else(|| EngineError::internal("an answer is empty"))
}
