//! The number that is explained: from what a caller names to terms of the model's scores.
//!
//! ```text
//!   F = sum over terms of weight * quantity(position, label)
//! ```

use std::sync::Arc;

use crate::{
    engine::{
        Ctx, EngineError, Job, Lane, ModelHandle, PickSpec, RowGroup, TextInput, TokenizeOptions,
    },
    ipc::{
        info::{Axis, ModelInfo, Task},
        spec::{Quantity, VariantSpec},
    },
    methods::{
        input::{self, Prepared},
        predict,
        reduce::Pooling,
    },
};

/// What a caller wants explained.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Target {
    /// What a term is; by default the logit, of a continuation the log-probability.
    pub quantity: Option<Quantity>,
    /// Which terms.
    pub of: Terms,
}

/// Which scores count.
#[derive(Clone, Debug, PartialEq)]
pub enum Terms {
    /// One.
    Choice(Choice),
    /// One against another.
    Contrast(Choice, Choice),
    /// Those of the tokens that follow.
    Continuation(Continuation),
    /// A number inside of the model.
    Unit {
        /// Hook point of the axes batch, position, one more.
        hook: String,
        /// Position, from the end if negative.
        position: i32,
        /// Along the last axis.
        index: u32,
    },
    /// What a linear probe says of a hook point.
    Readout(Readout),
    /// How far the prediction at a position is from that for the row as it is, in nats: the divergence `sum p (ln p - ln q)` of what is
    /// predicted, `q`, from what was, `p` (Kullback and Leibler 1951).
    Divergence(Option<i32>),
}

impl Default for Terms {
    fn default() -> Self {
        Terms::Choice(Choice::default())
    }
}

/// A linear function of hidden states.
#[derive(Clone, Debug, PartialEq)]
pub struct Readout {
    /// Of which hook point.
    pub hook: String,
    /// How positions become one vector; none to read one of them.
    pub pooling: Option<Pooling>,
    /// Which, from the end if negative; of a function that does not pool.
    pub position: Option<i32>,
    /// A weight for each number of a position, and the bias.
    pub weights: Arc<[f32]>,
    /// Number and name of the class whose score it is.
    pub class: (u32, String),
}

/// A class or a token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choice {
    /// Which.
    pub what: What,
    /// Where its score is read, from the end if negative.
    pub position: Option<i32>,
}

/// How a class or a token is named.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum What {
    /// The one of the greatest score.
    #[default]
    Predicted,
    /// By its number.
    Index(u32),
    /// By the name of the label.
    Label(String),
    /// By a text that is one token.
    Token(String),
}

/// Tokens after the input.
#[derive(Clone, Debug, PartialEq)]
pub enum Continuation {
    /// Text.
    Text(String),
    /// Ids.
    Ids(Vec<u32>),
}

/// A term, found.
#[derive(Clone, Debug, PartialEq)]
pub struct Term {
    /// Number of the label.
    pub label: u32,
    /// Its name, or how the vocabulary spells it.
    pub name: String,
    /// Position of the score, where scores have positions.
    pub position: Option<u32>,
    /// Factor.
    pub weight: f32,
}

/// A target, found.
#[derive(Clone, Debug, PartialEq)]
pub struct Objective {
    /// What a term is.
    pub quantity: Quantity,
    /// Hook point of the scores; the main output unless said.
    pub at: Option<String>,
    /// At least one.
    pub terms: Vec<Term>,
    /// Tokens of the row that belong to the question and not to its input: the continuation.
    pub asked: usize,
    /// Of quantities that [read out](Quantity::reads_out): weights and bias.
    pub readout: Option<Arc<[f32]>>,
}

/// Finds the terms of a target. A continuation is appended to the row.
///
/// # Errors
/// With paths of fields that begin at the target. [`EngineError::FailedPrecondition`] for a model without scores of labels.
pub(in crate::methods) async fn resolve(
    handle: &ModelHandle,
    target: &Target,
    prepared: &mut Prepared,
    lane: Lane,
    ctx: &Ctx,
) -> Result<Objective, EngineError> {
    let info = handle.info().clone();
    let quantity = target.quantity.unwrap_or(match target.of {
        Terms::Continuation(_) => Quantity::LogProbability,
        Terms::Choice(_) | Terms::Contrast(..) | Terms::Unit { .. } => Quantity::Logit,
        Terms::Readout(_) => Quantity::Readout,
        Terms::Divergence(_) => Quantity::Divergence,
    });
    let found = |terms, asked| Objective {
        quantity,
        at: None,
        terms,
        asked,
        readout: None,
    };
    let (handle, row) = (handle, &*prepared);
    match &target.of {
        Terms::Unit {
            hook,
            position,
            index,
        } => unit(&info, quantity, (hook, *position, *index), length(prepared)),
        Terms::Readout(readout) => reads(&info, target.quantity, readout, length(prepared)),
        Terms::Divergence(position) => {
            has_scores(&info)?;
            if target.quantity.is_some() {
                return Err(EngineError::invalid(
                    "quantity",
                    "says how a score is read, and the target is a divergence of all of them: leave it out",
                ));
            }
            Reader {
                handle,
                row,
                lane,
                ctx,
            }
            .divergence(*position)
            .await
        }
        Terms::Choice(choice) => {
            has_scores(&info)?;
            let run = Reader {
                handle,
                row,
                lane,
                ctx,
            };
            let mut term = run.choice(choice, "choice").await?;
            spell(handle, std::slice::from_mut(&mut term), ctx).await?;
            Ok(found(vec![term], 0))
        }
        Terms::Contrast(choice, against) => {
            has_scores(&info)?;
            let run = Reader {
                handle,
                row,
                lane,
                ctx,
            };
            let mut terms = vec![
                run.choice(choice, "contrast.choice").await?,
                Term {
                    weight: -1.0,
                    ..run.choice(against, "contrast.against").await?
                },
            ];
            if terms[0].label == terms[1].label && terms[0].position == terms[1].position {
                return Err(EngineError::invalid(
                    "contrast.against",
                    "is what it is to be contrasted with: name another class or token",
                ));
            }
            spell(handle, &mut terms, ctx).await?;
            Ok(found(terms, 0))
        }
        Terms::Continuation(continuation) => {
            has_scores(&info)?;
            let (mut terms, asked) = follow(handle, continuation, prepared, ctx).await?;
            spell(handle, &mut terms, ctx).await?;
            Ok(found(terms, asked))
        }
    }
}

/// A number inside of the model.
fn unit(
    info: &ModelInfo,
    quantity: Quantity,
    (name, position, index): (&str, i32, u32),
    length: Option<usize>,
) -> Result<Objective, EngineError> {
    let hook = info.hook(name).ok_or_else(|| {
        let missing = info.missing.iter().find(|m| m.hook == name);
        match missing {
            Some(m) => EngineError::precondition(format!(
                "model \"{}\" has no \"{name}\": {}",
                info.name, m.reason
            )),
            None => EngineError::invalid(
                "unit.hook",
                format!("\"{name}\" is no hook point of model \"{}\"", info.name),
            ),
        }
    })?;
    let [Axis::Batch, Axis::Pos, _] = hook.axes[..] else {
        let axes: Vec<&str> = hook.axes.iter().map(Axis::name).collect();
        return Err(EngineError::invalid(
            "unit.hook",
            format!(
                "\"{name}\" has the axes {}: a unit needs batch, position and one more",
                axes.join(", ")
            ),
        ));
    };
    if hook.dims[2].is_some_and(|n| index as usize >= n) {
        return Err(EngineError::invalid(
            "unit.index",
            format!(
                "is {index}, and \"{name}\" has {} numbers at each position",
                hook.dims[2].unwrap_or_default()
            ),
        ));
    }
    let length = length.or(hook.dims[1]);
    Ok(Objective {
        quantity,
        at: Some(hook.name.clone()),
        terms: vec![Term {
            label: index,
            name: String::new(),
            position: Some(at(position, length, "unit.position")?),
            weight: 1.0,
        }],
        asked: 0,
        readout: None,
    })
}

/// What a probe says, as a sum over the positions that it pools.
fn reads(
    info: &ModelInfo,
    quantity: Option<Quantity>,
    readout: &Readout,
    length: Option<usize>,
) -> Result<Objective, EngineError> {
    if quantity.is_some() {
        return Err(EngineError::invalid(
            "quantity",
            "says how a model's scores are read, and the target is a probe: leave it out",
        ));
    }
    let dims = info.hook(&readout.hook).map(|h| &h.dims[..]);
    let length = length.or(dims.and_then(|d| *d.get(1)?));
    let one = |position, field| Ok::<_, EngineError>(vec![at(position, length, field)?]);
    let positions = match (readout.pooling, readout.position) {
        (None, Some(position)) => one(position, "probe.position")?,
        (None, None) => {
            return Err(EngineError::invalid(
                "probe.position",
                "is needed: the probe scores every token",
            ));
        }
        (Some(_), Some(_)) => {
            return Err(EngineError::invalid(
                "probe.position",
                "is one token, and the probe scores the whole input: leave it out",
            ));
        }
        (Some(Pooling::Cls), None) => one(0, "probe")?,
        (Some(Pooling::Last), None) => one(-1, "probe")?,
        (Some(Pooling::Mean), None) => {
            let length = length.and_then(|l| u32::try_from(l).ok());
            let length = length.filter(|l| *l > 0).ok_or_else(|| {
                EngineError::invalid(
                    "probe",
                    "is of a mean over a row whose length is not known: give tokens",
                )
            })?;
            (0..length).collect()
        }
        (Some(Pooling::Max), None) => {
            return Err(EngineError::precondition(
                "the probe reads the greatest value over positions, which is not linear: explain one that pools by mean, first or last position",
            ));
        }
    };
    #[allow(clippy::cast_precision_loss)] // a number of tokens
    let weight = (positions.len() as f32).recip();
    let (label, name) = &readout.class;
    let term = |position| Term {
        label: *label,
        name: name.clone(),
        position: Some(position),
        weight,
    };
    Ok(Objective {
        quantity: Quantity::Readout,
        at: Some(readout.hook.clone()),
        terms: positions.into_iter().map(term).collect(),
        asked: 0,
        readout: Some(readout.weights.clone()),
    })
}

/// Reads choices for one row.
struct Reader<'a> {
    handle: &'a ModelHandle,
    row: &'a Prepared,
    lane: Lane,
    ctx: &'a Ctx,
}

impl Reader<'_> {
    async fn choice(&self, choice: &Choice, field: &str) -> Result<Term, EngineError> {
        let info = self.handle.info();
        let position = self.position(choice.position, field)?;
        let label = match &choice.what {
            What::Predicted => self.predicted(position).await?,
            What::Index(index) => *index,
            What::Label(label) => by_name(info, label, field)?,
            What::Token(text) => self.token(text, field).await?,
        };
        if let Some(labels) = labels(info)
            && label as usize >= labels
        {
            return Err(EngineError::invalid(
                format!("{field}.index"),
                format!(
                    "is {label}, and model \"{}\" has {labels} labels",
                    info.name
                ),
            ));
        }
        Ok(Term {
            label,
            name: String::new(),
            position,
            weight: 1.0,
        })
    }

    /// Where the scores are read, for models that have scores at every position.
    fn position(&self, given: Option<i32>, field: &str) -> Result<Option<u32>, EngineError> {
        let info = self.handle.info();
        let field = format!("{field}.position");
        if !info.main_output_has_positions() {
            return match given {
                None => Ok(None),
                Some(_) => Err(EngineError::invalid(
                    field,
                    format!(
                        "model \"{}\" gives one answer for the whole input: leave this out",
                        info.name
                    ),
                )),
            };
        }
        let length = length(self.row);
        if let Some(given) = given {
            return at(given, length, &field).map(Some);
        }
        match predict::places(info, &self.row.tokens, length) {
            Some(predict::Places::Positions(places)) if places.len() == 1 => Ok(Some(places[0])),
            Some(predict::Places::Positions(places)) if info.task == Task::MaskedLm => {
                Err(EngineError::invalid(
                    field,
                    format!("is needed: the input has {} masks", places.len()),
                ))
            }
            Some(_) | None => Err(EngineError::invalid(
                field,
                "is needed: the model has scores at every position",
            )),
        }
    }

    /// The label of the greatest score.
    async fn predicted(&self, position: Option<u32>) -> Result<u32, EngineError> {
        let best = predict::best(&self.scores(position).await?, 1);
        best.first()
            .map(|(label, _)| *label)
            .ok_or_else(|| EngineError::precondition("the model gave no scores"))
    }

    /// The divergence from what is predicted for the row: its probabilities are the weights, minus their entropy the bias.
    async fn divergence(&self, position: Option<i32>) -> Result<Objective, EngineError> {
        let position = self.position(position, "divergence")?;
        let scores = self.scores(position).await?;
        let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let of = |score: &f32| (f64::from(*score) - f64::from(most)).exp();
        let sum: f64 = scores.iter().map(of).sum();
        #[allow(clippy::cast_possible_truncation)] // as the graph takes them
        let mut readout: Vec<f32> = scores.iter().map(|s| (of(s) / sum) as f32).collect();
        if readout.iter().any(|p| !p.is_finite()) {
            return Err(EngineError::precondition(
                "the model's scores for this input are not finite: there is nothing to diverge from",
            ));
        }
        let positive = readout.iter().map(|p| f64::from(*p)).filter(|p| *p > 0.0);
        #[allow(clippy::cast_possible_truncation)]
        let entropy = positive.map(|p| p * p.ln()).sum::<f64>() as f32;
        readout.push(entropy);
        Ok(Objective {
            quantity: Quantity::Divergence,
            at: None,
            terms: vec![Term {
                label: 0,
                name: String::new(),
                position,
                weight: 1.0,
            }],
            asked: 0,
            readout: Some(readout.into()),
        })
    }

    /// The scores at a position, of every label.
    async fn scores(&self, position: Option<u32>) -> Result<Vec<f32>, EngineError> {
        let info = self.handle.info();
        let pick = PickSpec {
            output: info.main_output.clone(),
            positions: position.into_iter().collect(),
            ..PickSpec::default()
        };
        let job = Job {
            spec: VariantSpec::plain(),
            lane: self.lane,
            groups: vec![RowGroup {
                picks: vec![pick],
                ..self.row.group.clone()
            }],
        };
        let rows = self.handle.submit(job, self.ctx).await?;
        let done = rows.collect().await?;
        let scores = done
            .first()
            .and_then(|d| d.tensors.first())
            .ok_or_else(|| EngineError::internal("a row ended without its scores"))?;
        let scores = scores.to_f32().map_err(EngineError::internal)?;
        Ok(scores.into_owned())
    }

    /// The id of a text that is one token.
    async fn token(&self, text: &str, field: &str) -> Result<u32, EngineError> {
        let field = format!("{field}.token");
        let ids = ids_of(self.handle, text, self.ctx)
            .await
            .map_err(|e| input::at_field(e, &field))?;
        match ids[..] {
            [id] => Ok(id),
            _ => Err(EngineError::invalid(
                field,
                format!(
                    "{text:?} is {} tokens: give a text that is one, or its id as index",
                    ids.len()
                ),
            )),
        }
    }
}

/// Appends a continuation to the row: the terms are the scores that foretell each of its tokens.
async fn follow(
    handle: &ModelHandle,
    continuation: &Continuation,
    prepared: &mut Prepared,
    ctx: &Ctx,
) -> Result<(Vec<Term>, usize), EngineError> {
    const FIELD: &str = "continuation";
    let info = handle.info().clone();
    if info.task != Task::CausalLm {
        return Err(EngineError::precondition(format!(
            "model \"{}\" continues no text (its task is {}): explain a choice",
            info.name,
            info.task.name()
        )));
    }
    let more = match continuation {
        Continuation::Ids(ids) => ids.clone(),
        Continuation::Text(text) => ids_of(handle, text, ctx)
            .await
            .map_err(|e| input::at_field(e, "continuation.text"))?,
    };
    if more.is_empty() || prepared.tokens.is_empty() {
        return Err(EngineError::invalid(
            FIELD,
            "has no tokens, or follows none: give text before and after",
        ));
    }
    let before = prepared.tokens.len();
    let mut ids: Vec<u32> = prepared.tokens.iter().map(|t| t.id).collect();
    ids.extend(&more);
    let whole = input::prepare(
        handle,
        input::Input::Tokens {
            ids,
            type_ids: Vec::new(),
        },
        ctx,
    )
    .await
    .map_err(|e| input::at_field(e, FIELD))?;
    prepared.group = whole.group;
    prepared.tokens.extend_from_slice(&whole.tokens[before..]);
    let terms = (0u32..)
        .zip(&more)
        .map(|(i, id)| Term {
            label: *id,
            name: String::new(),
            position: u32::try_from(before - 1).ok().map(|p| p + i),
            weight: 1.0,
        })
        .collect();
    Ok((terms, more.len()))
}

async fn ids_of(handle: &ModelHandle, text: &str, ctx: &Ctx) -> Result<Vec<u32>, EngineError> {
    let text = TextInput {
        text: text.to_owned(),
        pair: None,
    };
    let options = TokenizeOptions {
        special: false,
        truncate: false,
    };
    let mut encodings = handle.tokenize(vec![text], options, ctx).await?;
    let encoding = encodings
        .pop()
        .ok_or_else(|| EngineError::internal("the tokenizer answered no encoding"))?;
    Ok(encoding.ids)
}

/// Names of the terms.
async fn spell(handle: &ModelHandle, terms: &mut [Term], ctx: &Ctx) -> Result<(), EngineError> {
    let info = handle.info();
    if matches!(info.task, Task::CausalLm | Task::MaskedLm) {
        let Some(tokenizer) = &info.tokenizer else {
            return Ok(());
        };
        // Scores may run past the vocabulary: tables are padded to round sizes.
        let mut known: Vec<&mut Term> = terms
            .iter_mut()
            .filter(|t| (t.label as usize) < tokenizer.vocab)
            .collect();
        let ids: Vec<u32> = known.iter().map(|t| t.label).collect();
        if ids.is_empty() {
            return Ok(());
        }
        let names = handle.decode(ids, ctx).await?;
        for (term, name) in known.iter_mut().zip(names) {
            term.name = name;
        }
        return Ok(());
    }
    for term in terms {
        term.name = predict::label(info, term.label);
    }
    Ok(())
}

fn by_name(info: &ModelInfo, label: &str, field: &str) -> Result<u32, EngineError> {
    let named = (0u32..).zip(&info.labels).find(|(_, l)| *l == label);
    named.map(|(at, _)| at).ok_or_else(|| {
        EngineError::invalid(
            format!("{field}.label"),
            if info.labels.is_empty() {
                format!(
                    "the labels of model \"{}\" have no names: give an index",
                    info.name
                )
            } else {
                format!(
                    "\"{label}\" is none of the labels: {}",
                    info.labels.join(", ")
                )
            },
        )
    })
}

/// How many labels the scores have, where the file says so.
fn labels(info: &ModelInfo) -> Option<usize> {
    *info.output(&info.main_output)?.dims.last()?
}

/// Refuses a model whose main output holds no scores of labels.
fn has_scores(info: &ModelInfo) -> Result<(), EngineError> {
    let last = info.output(&info.main_output).and_then(|o| o.axes.last());
    match last {
        Some(Axis::Label | Axis::Vocab) => Ok(()),
        Some(_) | None => Err(EngineError::precondition(format!(
            "model \"{}\" scores no labels (its task is {}): explain a unit of a hook point",
            info.name,
            info.task.name()
        ))),
    }
}

fn length(prepared: &Prepared) -> Option<usize> {
    let tokens = (!prepared.tokens.is_empty()).then_some(prepared.tokens.len());
    prepared.group.length.or(tokens)
}

/// A position counted from the front.
pub(in crate::methods) fn at(
    position: i32,
    length: Option<usize>,
    field: &str,
) -> Result<u32, EngineError> {
    let Some(length) = length else {
        return u32::try_from(position).map_err(|_| {
            EngineError::invalid(
                field,
                "counts from the end of a row whose length is not known",
            )
        });
    };
    let counted = if position < 0 {
        i64::from(position) + length as i64
    } else {
        i64::from(position)
    };
    u32::try_from(counted)
        .ok()
        .filter(|p| (*p as usize) < length)
        .ok_or_else(|| {
            EngineError::invalid(
                field,
                format!("is {position}, and the row has {length} tokens"),
            )
        })
}
