//! Heads: what each attends to, as numbers.
//!
//! ```text
//!   inputs ─────────────┐                         ┌─▶ measures, detectors     [layer, head], mean over rows
//!                       ├─▶ rows ─▶ patterns ─────┼─▶ attention by offset     [layer, head, offset]
//!   repeated sequences ─┘           one at a time └─▶ similarity of positions [pos, pos], from what is added for each
//! ```
//!
//! A pattern is reduced as it comes and dropped: what is held grows with layers, heads and the longest input, not with the inputs. Measures
//! are those of `CONVENTIONS` (TransformerLens where it has them); the reduction knows neither engine nor wire.

mod detect;
mod measure;
mod repeated;
mod sums;

use std::{sync::Arc, time::Instant};

use futures::{StreamExt as _, stream};
use tokio::sync::watch;

pub use detect::{Detector, Similarity, Sought};
pub use repeated::Repeated;

use super::{
    input::{self, Input, Token},
    intervene::Editor,
    rows::{self, Room},
};
use crate::{
    engine::{Ctx, EngineError, Lane, ModelHandle, RowGroup, StageTimings},
    ipc::info::{Axis, HookInfo, ModelInfo},
    tensor::Tensor,
};
use measure::Facts;
use sums::{Reduction, Sums};

/// Where the kind of hook point that is measured ends.
const PATTERN: &str = ".attn.hook_pattern";
/// What a model adds for each position.
const POSITIONS: &str = "hook_pos_embed";
/// Rows that are worked on at a time.
const AHEAD: usize = 16;
/// Patterns above so many bytes are reduced off the async threads.
const INLINE_BYTES: usize = 64 << 10;

/// A number of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// In nats.
    Entropy,
    /// In tokens.
    Distance,
    /// On the token itself.
    Current,
    /// On the token before.
    PreviousToken,
    /// On the first token.
    FirstToken,
    /// On special tokens.
    SpecialTokens,
    /// On the same token, the first time.
    DuplicateToken,
    /// On what came next the first time.
    Induction,
}

impl Measure {
    /// Every measure.
    pub const ALL: [Measure; 8] = [
        Measure::Entropy,
        Measure::Distance,
        Measure::Current,
        Measure::PreviousToken,
        Measure::FirstToken,
        Measure::SpecialTokens,
        Measure::DuplicateToken,
        Measure::Induction,
    ];

    /// Name in answers.
    pub const fn name(self) -> &'static str {
        match self {
            Measure::Entropy => "entropy",
            Measure::Distance => "distance",
            Measure::Current => "self",
            Measure::PreviousToken => "previous_token",
            Measure::FirstToken => "first_token",
            Measure::SpecialTokens => "special_tokens",
            Measure::DuplicateToken => "duplicate_token",
            Measure::Induction => "induction",
        }
    }

    /// Whether it is measured on repeated sequences, whatever the inputs.
    const fn repeats(self) -> bool {
        matches!(self, Measure::DuplicateToken | Measure::Induction)
    }
}

/// What is wanted of the heads.
#[derive(Clone, Debug, Default)]
pub struct Heads {
    /// What they are measured on.
    pub inputs: Vec<Input>,
    /// Layers; empty takes all.
    pub layers: Vec<u32>,
    /// Measures; empty takes all that can be measured.
    pub measures: Vec<Measure>,
    /// Patterns that are looked for.
    pub detect: Vec<Detector>,
    /// Sequences.
    pub repeated: Repeated,
    /// Attention by relative offset.
    pub offsets: bool,
    /// Similarity of positions.
    pub similarity: bool,
    /// What is changed of the model.
    pub editor: Option<Editor>,
}

/// What it may cost, and how urgent it is.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Largest pattern of a layer.
    pub max_bytes: usize,
    /// How urgent.
    pub lane: Lane,
}

/// Measurements, ready to run.
#[derive(Debug)]
pub struct Started {
    /// Numbers of the layers that are measured.
    pub layers: Vec<u32>,
    /// Heads of the layer that has most.
    pub heads: usize,
    /// Tokens of each input.
    pub inputs: Vec<Vec<Token>>,
    /// Sequences that are run.
    pub sequences: Vec<Vec<u32>>,
    /// Tokens that they repeat.
    pub repeated_length: Option<usize>,
    /// Tokens that truncation cut off.
    pub truncated: u32,
    /// Names of the tensors that will come.
    pub names: Vec<String>,
    handle: ModelHandle,
    editor: Option<Editor>,
    rows: Vec<Row>,
    measures: Vec<Measure>,
    detect: Arc<Vec<Detector>>,
    offsets: bool,
    similarity: Option<usize>,
    terms: Terms,
    timings: StageTimings,
    notes: Vec<String>,
    progress: watch::Sender<Progress>,
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Rows that were measured.
    pub done: u64,
    /// All rows.
    pub planned: u64,
}

/// A row that is run.
#[derive(Clone, Debug)]
struct Row {
    /// The model as it is for this row.
    handle: ModelHandle,
    group: RowGroup,
    /// Positions, where they are known before the run.
    length: Option<usize>,
    facts: Arc<Facts>,
    /// Of the text measures, detectors and offsets.
    counts: bool,
    /// Field that errors of the row are about.
    field: String,
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// In the order of [`Started::names`].
    pub tensors: Vec<Named>,
    /// Rows that were run.
    pub rows: u64,
    /// Where the time went.
    pub timings: StageTimings,
    /// What the caller should know.
    pub notes: Vec<String>,
}

/// A tensor of an answer.
#[derive(Clone, Debug)]
pub struct Named {
    /// Its name.
    pub name: String,
    /// Meaning of each axis.
    pub axes: Vec<&'static str>,
    /// Its numbers.
    pub tensor: Tensor,
}

/// Checks what is wanted, makes the rows, and measures nothing yet.
///
/// # Errors
/// With paths of fields that begin at the request.
pub async fn start(
    handle: &ModelHandle,
    wanted: Heads,
    terms: Terms,
    ctx: &Ctx,
) -> Result<Started, EngineError> {
    let info = handle.info().clone();
    let mut notes = Vec::new();
    let hooks = patterns(&info, &wanted.layers, &mut notes)?;
    for (at, detector) in wanted.detect.iter().enumerate() {
        let checked = detector.pattern.check();
        checked.map_err(|e| e.beneath(&format!("detect[{at}]")))?;
    }
    if wanted.similarity && info.hook(POSITIONS).is_none() {
        return Err(no_positions(&info));
    }
    let mut started = Started {
        layers: hooks.iter().map(|(layer, _)| *layer).collect(),
        heads: hooks
            .iter()
            .filter_map(|(_, h)| heads(h))
            .max()
            .unwrap_or(0),
        inputs: Vec::with_capacity(wanted.inputs.len()),
        sequences: Vec::new(),
        repeated_length: None,
        truncated: 0,
        names: Vec::new(),
        handle: handle.clone(),
        editor: wanted.editor,
        rows: Vec::new(),
        measures: wanted.measures.clone(),
        detect: Arc::new(wanted.detect),
        offsets: wanted.offsets,
        similarity: None,
        terms,
        timings: StageTimings::default(),
        notes,
        progress: watch::channel(Progress::default()).0,
    };
    for (at, input) in wanted.inputs.into_iter().enumerate() {
        let field = format!("inputs[{at}]");
        let prepared = input::prepare(handle, input.clone(), ctx).await;
        let prepared = prepared.map_err(|e| e.beneath(&field))?;
        started.timings.tokenize += prepared.tokenize;
        started.truncated = started.truncated.saturating_add(prepared.truncated);
        started.rows.push(Row {
            handle: started.edited(&input, ctx).await?,
            length: prepared.group.length.or(known(prepared.tokens.len())),
            group: prepared.group,
            facts: Arc::new(Facts {
                ids: prepared.tokens.iter().map(|t| t.id).collect(),
                special: prepared.tokens.iter().map(|t| t.special).collect(),
                repeated: None,
            }),
            counts: true,
            field,
        });
        started.inputs.push(prepared.tokens);
    }
    started.repeat(&wanted.repeated, ctx).await?;
    started.choose()?;
    if wanted.similarity {
        let longest = started.rows.iter().enumerate().filter(|(_, r)| r.counts);
        started.similarity = longest.max_by_key(|(_, r)| r.length).map(|(at, _)| at);
    }
    started.names = started.named();
    let planned = started.rows.len() as u64;
    started.progress.send_modify(|p| p.planned = planned);
    Ok(started)
}

/// The patterns of the layers; a note for each layer that has none.
fn patterns<'a>(
    info: &'a ModelInfo,
    layers: &[u32],
    notes: &mut Vec<String>,
) -> Result<Vec<(u32, &'a HookInfo)>, EngineError> {
    if let Some(at) = layers.iter().position(|l| *l as usize >= info.dims.layers) {
        return Err(EngineError::invalid(
            format!("layers[{at}]"),
            format!(
                "layer {} does not exist: the model has {}",
                layers[at], info.dims.layers
            ),
        ));
    }
    let mut found = Vec::new();
    let mut lacking = Vec::new();
    for layer in (0u32..).take(info.dims.layers) {
        if !layers.is_empty() && !layers.contains(&layer) {
            continue;
        }
        let name = format!("blocks.{layer}{PATTERN}");
        match info.hook(&name) {
            Some(hook)
                if hook.axes == [Axis::Batch, Axis::Head, Axis::Query, Axis::Key]
                    && hook.dtype.is_float() =>
            {
                found.push((layer, hook));
            }
            Some(_) => lacking.push(format!(
                "layer {layer} is left out: it attends within windows of the input"
            )),
            None => {
                let why = info.missing.iter().find(|m| m.hook == name);
                let why = why.map_or("it has no attention pattern", |m| &m.reason);
                lacking.push(format!("layer {layer} is left out: {why}"));
            }
        }
    }
    if found.is_empty() {
        let missing = info.missing.iter().find(|m| m.hook.ends_with(PATTERN));
        let why = lacking
            .first()
            .cloned()
            .or(missing.map(|m| m.reason.clone()))
            .unwrap_or_else(|| "no attention was found in it".to_owned());
        return Err(EngineError::precondition(format!(
            "model \"{}\" has no attention patterns to measure: {why}",
            info.name
        )));
    }
    notes.append(&mut lacking);
    Ok(found)
}

fn heads(hook: &HookInfo) -> Option<usize> {
    hook.dims.get(1).copied().flatten()
}

fn known(tokens: usize) -> Option<usize> {
    (tokens > 0).then_some(tokens)
}

/// Why positions cannot be compared.
fn no_positions(info: &ModelInfo) -> EngineError {
    let missing = info.missing.iter().find(|m| m.hook == POSITIONS);
    let why = missing.map_or("it adds nothing to the tokens for their positions", |m| {
        &m.reason
    });
    EngineError::precondition(format!(
        "model \"{}\" has no \"{POSITIONS}\" to compare: {why}",
        info.name
    ))
}

impl Started {
    /// The model as it is for an input.
    async fn edited(&self, input: &Input, ctx: &Ctx) -> Result<ModelHandle, EngineError> {
        match &self.editor {
            Some(editor) => {
                editor
                    .edited(&self.handle, input, (self.terms.lane, ctx))
                    .await
            }
            None => Ok(self.handle.clone()),
        }
    }

    /// Adds the repeated sequences, when something is measured on them.
    async fn repeat(&mut self, repeated: &Repeated, ctx: &Ctx) -> Result<(), EngineError> {
        let alone = self.rows.is_empty();
        let asked = self.measures.iter().any(|m| m.repeats());
        if !alone && !asked && !self.measures.is_empty() {
            return Ok(());
        }
        let made = repeated::sequences(&self.handle, repeated, ctx).await;
        let made = match made {
            // Nobody asked for them by name.
            Err(EngineError::FailedPrecondition { message, .. }) if !alone && !asked => {
                self.notes.push(format!(
                    "duplicate tokens and induction are not measured: {message}"
                ));
                return Ok(());
            }
            other => other.map_err(|e| e.beneath("repeated"))?,
        };
        let info = self.handle.info().clone();
        let special = info.tokenizer.as_ref().map(|t| &t.special_ids[..]);
        let special = special.unwrap_or_default();
        for (at, sequence) in made.into_iter().enumerate() {
            self.repeated_length = Some(sequence.length);
            let spell = |id: &u32| Token {
                id: *id,
                special: special.contains(id),
                ..Token::default()
            };
            let tokens: Vec<Token> = sequence.ids.iter().map(spell).collect();
            let input = Input::Tokens {
                ids: sequence.ids.clone(),
                type_ids: Vec::new(),
            };
            self.rows.push(Row {
                handle: self.edited(&input, ctx).await?,
                group: input::row(&info, &sequence.ids, &[])?,
                length: Some(sequence.ids.len()),
                facts: Arc::new(Facts {
                    ids: sequence.ids.clone(),
                    special: tokens.iter().map(|t| t.special).collect(),
                    repeated: Some((sequence.start, sequence.length)),
                }),
                counts: alone,
                field: if repeated.given.is_empty() {
                    "repeated.length".to_owned()
                } else {
                    format!("repeated.given[{at}].ids")
                },
            });
            self.sequences.push(sequence.ids);
        }
        Ok(())
    }

    /// Which measures are taken, and whether what is wanted can be.
    fn choose(&mut self) -> Result<(), EngineError> {
        let without = |row: &&Row| row.counts && row.facts.ids.is_empty();
        let nameless = self.rows.iter().find(without);
        if self.measures.is_empty() {
            let repeats = !self.sequences.is_empty();
            let can = |m: &&Measure| match m {
                Measure::DuplicateToken | Measure::Induction => repeats,
                Measure::SpecialTokens => nameless.is_none(),
                Measure::Entropy
                | Measure::Distance
                | Measure::Current
                | Measure::PreviousToken
                | Measure::FirstToken => true,
            };
            self.measures = Measure::ALL.iter().filter(can).copied().collect();
        }
        if let Some(row) = nameless {
            let needs = |what: &str| {
                EngineError::precondition(format!(
                    "\"{}\" has no tokens, and {what} is about tokens",
                    row.field
                ))
            };
            if self.measures.contains(&Measure::SpecialTokens) {
                return Err(needs(Measure::SpecialTokens.name()));
            }
            if let Some(d) = self.detect.iter().find(|d| d.pattern.needs_ids()) {
                return Err(needs(d.pattern.name()));
            }
        }
        for (at, detector) in self.detect.iter().enumerate() {
            let Sought::Given(given) = &detector.pattern else {
                continue;
            };
            let n = given.shape().first().copied();
            let other = self.rows.iter().filter(|r| r.counts && r.length.is_some());
            if let Some(row) = other.into_iter().find(|r| r.length != n) {
                return Err(EngineError::invalid(
                    format!("detect[{at}].given.shape"),
                    format!(
                        "is {:?}, and {} has {} tokens: a pattern is as long as every input",
                        given.shape(),
                        row.field,
                        row.length.unwrap_or_default()
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Names of the tensors, in order.
    fn named(&self) -> Vec<String> {
        let measures = self.measures.iter().map(|m| m.name().to_owned());
        let mut names: Vec<String> = measures.collect();
        let detectors = self.detect.iter().enumerate();
        names.extend(detectors.map(|(at, d)| format!("detect.{at}.{}", d.pattern.name())));
        if self.offsets {
            names.extend(["offsets".to_owned(), "offsets.entries".to_owned()]);
        }
        if self.similarity.is_some() {
            names.push("position_similarity".to_owned());
        }
        names
    }

    /// The model that is asked.
    pub fn handle(&self) -> &ModelHandle {
        &self.handle
    }

    /// Where progress can be watched.
    pub fn watch(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Runs the rows and measures their patterns.
    ///
    /// # Errors
    /// Those of the runs.
    pub async fn run(mut self, ctx: &Ctx) -> Result<Found, EngineError> {
        let rows = std::mem::take(&mut self.rows);
        let mut sums = Sums::new(&self, &rows);
        let mut timings = self.timings;
        let mut rows_run = 0;
        // The first row is told to come back when there is no room; the others wait.
        let (first, others) = rows.split_at(rows.len().min(1));
        for (some, room) in [(first, Room::Refuse), (others, Room::Wait)] {
            let waiting = some.iter().map(|row| self.measured(row, room, ctx));
            let waiting: Vec<_> = waiting.collect();
            let mut measured = stream::iter(waiting).buffered(AHEAD);
            while let Some(found) = measured.next().await {
                let (reduction, runs, spent) = found?;
                timings += spent;
                rows_run += runs;
                sums.add(reduction);
                self.progress.send_modify(|p| p.done += 1);
            }
        }
        let mut tensors = sums.tensors(&self)?;
        if let Some(row) = self.similarity.and_then(|at| rows.get(at)) {
            let (similar, spent) = self.similar(row, ctx).await?;
            timings += spent;
            rows_run += 1;
            tensors.push(similar);
        }
        let mut notes = self.notes;
        notes.extend(sums.notes());
        Ok(Found {
            tensors,
            rows: rows_run,
            timings,
            notes,
        })
    }

    /// What the patterns of a row come to, and how often it was run.
    async fn measured(
        &self,
        row: &Row,
        room: Room,
        ctx: &Ctx,
    ) -> Result<(Reduction, u64, StageTimings), EngineError> {
        let info = self.handle.info().clone();
        let hooks: Vec<&HookInfo> = self
            .layers
            .iter()
            .filter_map(|layer| info.hook(&format!("blocks.{layer}{PATTERN}")))
            .collect();
        let mut reduction = Reduction::new(self, row);
        let mut timings = StageTimings::default();
        let mut runs = 0;
        for pass in rows::passes(&hooks, row.length, self.terms.max_bytes)? {
            let urgency = (self.terms.lane, ctx);
            let shown = rows::show(&row.handle, &row.group, &hooks[pass.clone()], room, urgency);
            let mut shown = shown.await.map_err(|e| input::at_field(e, &row.field))?;
            timings += shown.timings;
            runs += 1;
            let begun = Instant::now();
            let tensors = std::mem::take(&mut shown.tensors);
            let bytes: usize = tensors.iter().map(|t| t.bytes().len()).sum();
            let reduce = move || {
                let mut reduction = reduction;
                for (layer, tensor) in pass.zip(&tensors) {
                    reduction.take(layer, tensor)?;
                }
                Ok::<_, EngineError>(reduction)
            };
            reduction = if bytes <= INLINE_BYTES {
                reduce()?
            } else {
                let done = tokio::task::spawn_blocking(reduce).await;
                done.map_err(EngineError::internal)??
            };
            timings.reduce += begun.elapsed();
        }
        Ok((reduction, runs, timings))
    }

    /// The cosine of what is added for each position with what is added for each other.
    async fn similar(&self, row: &Row, ctx: &Ctx) -> Result<(Named, StageTimings), EngineError> {
        let info = self.handle.info().clone();
        let hook = info.hook(POSITIONS).ok_or_else(|| no_positions(&info))?;
        let urgency = (self.terms.lane, ctx);
        let hooks = [hook];
        let shown = rows::show(&row.handle, &row.group, &hooks, Room::Wait, urgency);
        let shown = shown.await.map_err(|e| input::at_field(e, &row.field))?;
        let added = shown.tensors.first();
        let added = added.ok_or_else(|| EngineError::internal("no positions came back"))?;
        let values = added.to_f32().map_err(EngineError::internal)?;
        let [n, width] = added.shape() else {
            return Err(EngineError::internal(format!(
                "positions came back as {:?}",
                added.shape()
            )));
        };
        let tensor = Tensor::from_f32(vec![*n, *n], &sums::cosines(&values, *width));
        let named = Named {
            name: "position_similarity".to_owned(),
            axes: vec!["pos", "pos"],
            tensor: tensor.map_err(EngineError::internal)?,
        };
        Ok((named, shown.timings))
    }
}
