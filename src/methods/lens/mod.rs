//! Lenses: what would the model say if it ended here? And what of its answer did each part write?
//!
//! ```text
//!   input ──▶ residual stream ──▶ every state through the model's own head     logit lens (nostalgebraist 2020), tuned lens
//!                  │
//!                  ├──▶ what each part wrote, as the target reads it            direct logit attribution
//!                  └──▶ lengths and angles                                      how the stream grows and turns
//! ```
//!
//! Logit lens: the final norm is *recomputed* on every state. Direct logit attribution: the *cached* scale of the final norm. The two are
//! not mixed.
//!
//! Two steps, as for attributions: [`start`] checks everything and reads the stream in one run; [`Started::run`] does the rest.

pub mod direct;
pub(in crate::methods) mod head;
mod residual;
pub(in crate::methods) mod rows;
pub(in crate::methods) mod stream;
pub mod tuned;
mod view;

use tokio::sync::watch;

pub use direct::{Direct, Heads};
pub use residual::Residual;
pub use view::Views;

use self::{
    head::{CHECKED, Head, Own},
    stream::{States, Stream},
    tuned::Tuned,
    view::Asked,
};
use super::{
    input::{self, Input, Token},
    predict::{self, At, Candidate, Places, Prediction},
    subject::{Partial, Spent, Subject},
    target::{self, Objective, Target},
};
use crate::{
    engine::{Ctx, EngineError, Lane, ModelHandle},
    ipc::{
        info::{Axis, ModelInfo},
        spec::Quantity,
    },
};

/// A question, validated as far as it can be without the model.
#[derive(Debug)]
pub struct Question {
    /// What the model is run on.
    pub input: Input,
    /// What to answer.
    pub parts: Parts,
    /// What is followed through the layers, and attributed; none for what the model predicts, where that is one thing.
    pub target: Option<Target>,
    /// Positions that the lens reads, negative ones from the end; empty for all.
    pub positions: Vec<i32>,
    /// Labels kept of each place.
    pub top: usize,
    /// All scores come along.
    pub logits: bool,
    /// Attribute to heads too.
    pub heads: bool,
    /// Maps of a tuned lens.
    pub tuned: Option<Tuned>,
}

/// Parts of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// What every state says.
    pub lens: bool,
    /// What every component contributes.
    pub attribution: bool,
    /// How the stream grows and turns.
    pub residual: bool,
}

/// What a lens may cost, and how urgent it is.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Most rows.
    pub max_rows: usize,
    /// Most bytes: of the stream, and of scores.
    pub max_bytes: usize,
    /// How urgent.
    pub lane: Lane,
}

/// A lens whose question is exact, and whose stream was read.
#[derive(Debug)]
pub struct Started {
    /// Tokens of the row.
    pub tokens: Vec<Token>,
    /// Tokens that truncation cut off.
    pub truncated: u32,
    /// What is followed, if anything.
    pub objective: Option<Objective>,
    /// Hook points of the states.
    pub states: Vec<String>,
    /// Positions of the row.
    pub length: usize,
    /// Positions that the lens reads.
    pub positions: Vec<u32>,
    /// Rows that the rest takes at most.
    pub rows: usize,
    /// Name of the tuned lens.
    pub tuned: Option<String>,
    parts: Parts,
    heads: bool,
    maps: Option<Tuned>,
    asked: Asked,
    own: Own,
    terms: Terms,
    stream: Stream,
    head: Option<Head>,
    stood: States,
    subject: Subject,
    ctx: Ctx,
}

/// An answer.
#[derive(Clone, Debug, Default)]
pub struct Lensed {
    /// What states say: at every position that was asked for.
    pub at: Option<Views>,
    /// What whole states say, of classifiers.
    pub whole: Option<Views>,
    /// Names of the labels that are shown, by their number.
    pub labels: Vec<(u32, String)>,
    /// See [`direct`].
    pub direct: Option<Direct>,
    /// See [`Residual`].
    pub residual: Option<Residual>,
    /// What the caller should know.
    pub notes: Vec<String>,
    /// Names of tensors with a value that is no number.
    pub non_finite: Vec<String>,
    /// What was spent.
    pub spent: Spent,
}

/// Checks a question, and reads the residual stream.
///
/// # Errors
/// With paths of fields that begin at the request. [`EngineError::FailedPrecondition`] for what the model lacks.
pub async fn start(
    handle: &ModelHandle,
    question: Question,
    terms: Terms,
    ctx: &Ctx,
) -> Result<Started, EngineError> {
    let Question {
        input,
        parts,
        target,
        positions,
        top,
        logits,
        heads,
        tuned,
    } = question;
    let info = handle.info().clone();
    let stream = Stream::of(&info)?;
    let scores = parts.lens || parts.attribution;
    let by_position = if scores { reads(&info)? } else { false };
    let backward = if parts.attribution {
        direct::cost(&info, &stream, heads)?
    } else {
        0
    };
    let row_field = input::field_of(&input);
    let mut prepared = input::prepare(handle, input, ctx)
        .await
        .map_err(|e| e.beneath("input"))?;
    let objective = match target {
        Some(target) => Some(followed(handle, &target, &mut prepared, (terms.lane, ctx)).await?),
        // What is predicted is followed where the model predicts one thing.
        None if scores && (parts.attribution || predicts_one(&info, &prepared)) => {
            let target = Target::default();
            Some(followed(handle, &target, &mut prepared, (terms.lane, ctx)).await?)
        }
        None => None,
    };
    let tokenize = prepared.tokenize;
    let mut subject = Subject::new(
        handle.clone(),
        (prepared.group, prepared.tokens),
        objective.clone().unwrap_or_else(nothing),
        (terms.lane, ctx.clone()),
    );
    subject.spent.timings.tokenize = tokenize;
    let length = subject.row.length.or(stream.fixed);
    let positions = if positions.is_empty() {
        None
    } else {
        let each = positions.iter().enumerate();
        let counted = each.map(|(n, p)| target::at(*p, length, &format!("positions[{n}]")));
        let counted = counted.collect::<Result<Vec<u32>, _>>()?;
        if let Some(n) = (1..counted.len()).find(|n| counted[..*n].contains(&counted[*n])) {
            return Err(EngineError::invalid(
                format!("positions[{n}]"),
                format!("names position {} twice", counted[n]),
            ));
        }
        Some(counted)
    };
    let every = |length: usize| (0u32..).take(length).collect::<Vec<u32>>();
    // Where the model's own answer is looked at, by the number of the chosen position.
    let checked: Vec<usize> = match (&positions, length) {
        (Some(chosen), _) => spread(chosen.len()),
        (None, Some(length)) => spread(length),
        (None, None) => vec![0],
    };
    let known = positions.clone().or_else(|| length.map(every));
    let looked: Vec<u32> = match &known {
        Some(known) if by_position => checked.iter().map(|n| known[*n]).collect(),
        Some(_) | None => Vec::new(),
    };
    let stood = stream
        .capture(&mut subject, scores.then_some(&looked), terms)
        .await
        .map_err(|e| input::at_field(e, row_field))?;
    let length = stood.positions;
    let positions = positions.unwrap_or_else(|| every(length));
    if let Some(n) = positions.iter().position(|p| *p as usize >= length) {
        return Err(EngineError::invalid(
            format!("positions[{n}]"),
            format!("is {}, and the row has {length} positions", positions[n]),
        ));
    }
    let count = stream.states.len();
    let labels = match (by_position, looked.len()) {
        // The length was not known: all positions came.
        (true, 0) => stood.scores.len() / length.max(1),
        (true, n) => stood.scores.len() / n,
        (false, _) => stood.scores.len(),
    };
    let own = stood
        .scores
        .chunks_exact(labels.max(1))
        .map(<[f32]>::to_vec);
    let own: Own = if by_position && looked.is_empty() {
        let all: Vec<Vec<f32>> = own.collect();
        let numbered = positions.iter().enumerate();
        numbered
            .filter_map(|(n, p)| Some((n, all.get(*p as usize)?.clone())))
            .take(CHECKED)
            .collect()
    } else if by_position {
        checked.into_iter().zip(own).collect()
    } else {
        own.take(1).enumerate().collect()
    };
    let head = scores.then(|| Head::of(&subject, &stream, &stood, (by_position, labels)));
    let forward = match &head {
        Some(head) if parts.lens => head.cost(count, positions.len()),
        Some(_) | None => 0,
    };
    let nothing = usize::from(parts.attribution);
    let rows = forward + backward + nothing;
    let asked = Asked {
        top: top.min(labels),
        target: objective
            .iter()
            .flat_map(|o| o.terms.iter().map(|t| (t.label, t.weight)))
            .collect(),
        logits,
    };
    if parts.lens {
        bounded(&asked, (count, positions.len(), labels), terms)?;
        let bytes = head.as_ref().map_or(0, |h| h.row_bytes(positions.len()));
        within(bytes, terms, "the scores of a row", "fewer positions")?;
    }
    if rows > terms.max_rows {
        return Err(EngineError::exhausted(
            format!(
                "the lens would take {rows} rows, more than the limit of {}: name fewer positions",
                terms.max_rows
            ),
            None,
        ));
    }
    subject.plan(rows);
    Ok(Started {
        tokens: subject.tokens.clone(),
        truncated: prepared.truncated,
        objective,
        states: stream.states.clone(),
        length,
        positions,
        rows,
        tuned: tuned.as_ref().map(|t| t.name.clone()),
        parts,
        heads,
        maps: tuned,
        asked,
        own,
        terms,
        stream,
        head,
        stood,
        subject,
        ctx: ctx.clone(),
    })
}

impl Started {
    /// The model that answers.
    pub fn handle(&self) -> &ModelHandle {
        &self.subject.handle
    }

    /// How far it is, once it runs. Keeps the latest only.
    pub fn watch(&self) -> watch::Receiver<Partial> {
        self.subject.watch()
    }

    /// Does it.
    ///
    /// # Errors
    /// Those of the runs, and [`EngineError::FailedPrecondition`] for what the model lacks.
    pub async fn run(mut self) -> Result<Lensed, EngineError> {
        let mut lensed = Lensed::default();
        if self.parts.residual {
            let stood = self.stood.clone();
            let all = tokio::task::spawn_blocking(move || residual::residual(&stood));
            lensed.residual = Some(all.await.map_err(EngineError::internal)?);
        }
        if self.parts.attribution {
            lensed.direct = Some(self.direct(&mut lensed.notes).await?);
        }
        if self.parts.lens {
            self.lens(&mut lensed).await?;
        }
        lensed.spent = self.subject.spent;
        Ok(lensed)
    }

    async fn direct(&mut self, notes: &mut Vec<String>) -> Result<Direct, EngineError> {
        let subject = &mut self.subject;
        let mut direct =
            direct::direct(subject, &self.stream, (self.heads, notes), self.terms).await?;
        if let (Some(head), Some(objective)) = (&self.head, &self.objective) {
            let mut at: Vec<u32> = objective.terms.iter().filter_map(|t| t.position).collect();
            at.dedup();
            let scores = head.of_nothing(subject, &at).await?;
            let labels = self.own.values().next().map_or(1, Vec::len).max(1);
            let terms = objective.terms.iter().map(|term| {
                let row = at.iter().position(|p| Some(*p) == term.position);
                let score = scores.get(row.unwrap_or(0) * labels + term.label as usize)?;
                Some(f64::from(term.weight) * f64::from(*score))
            });
            direct.of_nothing = terms.sum();
        }
        match direct.is_affine() {
            Some(true) => {}
            Some(false) => notes.push(
                "the head is not affine in what the norm makes of the end (it has an activation): contributions are shares by the identity rule of AttnLRP"
                    .to_owned(),
            ),
            None => notes.push(
                "what the head says of nothing is no number, so that it is not known whether it is affine".to_owned(),
            ),
        }
        Ok(direct)
    }

    async fn lens(&mut self, lensed: &mut Lensed) -> Result<(), EngineError> {
        let Some(head) = &self.head else {
            return Err(EngineError::internal("a lens without a head"));
        };
        let mut states = self.stood.clone();
        if let Some(tuned) = self.maps.take() {
            let mapped = tokio::task::spawn_blocking(move || {
                tuned.apply(&mut states).map(|mapped| (mapped, states))
            });
            let (mapped, moved) = mapped.await.map_err(EngineError::internal)??;
            states = moved;
            let all = states.values.len().saturating_sub(1);
            if mapped < all {
                lensed.notes.push(format!(
                    "the tuned lens maps {mapped} of {all} states: the others are read as they are"
                ));
            }
        }
        let read = head
            .read(
                &mut self.subject,
                &states,
                &self.positions,
                (&self.asked, &self.own),
            )
            .await?;
        let mut shown = read.at.shown();
        shown.extend(read.whole.iter().flat_map(Views::shown));
        shown.sort_unstable();
        shown.dedup();
        lensed.labels = names(&self.subject.handle, shown, &self.ctx).await?;
        let odd = read.at.non_finite || read.whole.as_ref().is_some_and(|w| w.non_finite);
        lensed
            .non_finite
            .extend(odd.then(|| stream::SCORES.to_owned()));
        lensed.at = Some(read.at);
        lensed.whole = read.whole;
        Ok(())
    }
}

/// Whether a model has scores of labels at every position, or of the whole input.
fn reads(info: &ModelInfo) -> Result<bool, EngineError> {
    let axes = info.output(&info.main_output).map(|o| &o.axes[..]);
    let known = info.hook(stream::SCORES).is_some();
    match axes {
        Some([Axis::Batch, Axis::Pos, Axis::Label | Axis::Vocab]) if known => Ok(true),
        Some([Axis::Batch, Axis::Label | Axis::Vocab]) if known => Ok(false),
        Some(_) | None => Err(EngineError::precondition(format!(
            "model \"{}\" scores no labels (its task is {}), so that its states say nothing: ask for the residual stream alone",
            info.name,
            info.task.name()
        ))),
    }
}

/// Whether there is one place at which the model predicts something.
fn predicts_one(info: &ModelInfo, prepared: &input::Prepared) -> bool {
    let tokens = (!prepared.tokens.is_empty()).then_some(prepared.tokens.len());
    let length = prepared.group.length.or(tokens);
    match predict::places(info, &prepared.tokens, length) {
        Some(Places::Whole) => true,
        Some(Places::Positions(places)) => places.len() == 1,
        Some(Places::Every) | None => false,
    }
}

/// What is followed: logits of a label, or of one less another.
async fn followed(
    handle: &ModelHandle,
    target: &Target,
    prepared: &mut input::Prepared,
    (lane, ctx): (Lane, &Ctx),
) -> Result<Objective, EngineError> {
    let refuse = |field: &str, why: &str| {
        Err(EngineError::invalid(
            format!("target.{field}"),
            format!("{why}: name a label or token, or one against another"),
        ))
    };
    match target.of {
        target::Terms::Choice(_) | target::Terms::Contrast(..) => {}
        target::Terms::Continuation(_) => return refuse("continuation", "is many tokens"),
        target::Terms::Unit { .. } => return refuse("unit", "is no score of the model's head"),
        target::Terms::Readout(_) => return refuse("probe", "is no score of the model's head"),
        target::Terms::Divergence(_) => return refuse("divergence", "is no score of a label"),
    }
    if target.quantity.is_some_and(|q| q != Quantity::Logit) {
        return refuse("quantity", "is none that parts add up to: only logits do");
    }
    target::resolve(handle, target, prepared, lane, ctx)
        .await
        .map_err(|e| e.beneath("target"))
}

/// Of a row in which nothing is followed.
fn nothing() -> Objective {
    Objective {
        quantity: Quantity::Logit,
        at: None,
        terms: Vec::new(),
        asked: 0,
        readout: None,
    }
}

/// At most so many numbers below `n`, the first and the last among them.
fn spread(n: usize) -> Vec<usize> {
    let count = n.min(CHECKED);
    let last = count.saturating_sub(1).max(1);
    (0..count).map(|i| i * (n - 1) / last).collect()
}

/// Refuses an answer that would be too large.
fn bounded(
    asked: &Asked,
    (states, places, labels): (usize, usize, usize),
    terms: Terms,
) -> Result<(), EngineError> {
    let kept = if asked.logits { labels } else { 0 };
    // A label, its score and its probability; entropy and three numbers of the target.
    let numbers = kept.saturating_add(3 * asked.top + 4);
    let all = states.saturating_mul(places).saturating_mul(numbers);
    let what = if asked.logits {
        "fewer positions, or no logits"
    } else {
        "fewer positions"
    };
    within(
        all.saturating_mul(size_of::<f32>()),
        terms,
        "the lens",
        what,
    )
}

fn within(bytes: usize, terms: Terms, what: &str, instead: &str) -> Result<(), EngineError> {
    if bytes <= terms.max_bytes {
        return Ok(());
    }
    Err(EngineError::exhausted(
        format!(
            "{what} would take {bytes} bytes, more than the limit of {}: ask for {instead}",
            terms.max_bytes
        ),
        None,
    ))
}

/// Labels, or tokens as the vocabulary spells them.
async fn names(
    handle: &ModelHandle,
    shown: Vec<u32>,
    ctx: &Ctx,
) -> Result<Vec<(u32, String)>, EngineError> {
    let info = handle.info();
    let candidates = shown.into_iter().map(|index| Candidate {
        index,
        label: predict::label(info, index),
        logit: 0.0,
        probability: None,
    });
    let mut named = Prediction {
        task: info.task,
        at: vec![At {
            position: None,
            candidates: candidates.collect(),
        }],
    };
    predict::spell(handle, &mut named, ctx).await?;
    let all = named.at.into_iter().flat_map(|at| at.candidates);
    Ok(all.map(|c| (c.index, c.label)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_looked_at_begins_at_the_first_and_ends_at_the_last() {
        assert_eq!(spread(0), [0usize; 0]);
        assert_eq!(spread(1), [0]);
        assert_eq!(spread(3), [0, 1, 2]);
        let many = spread(1000);
        assert_eq!((many.len(), many[0], many[15]), (CHECKED, 0, 999));
    }
}
