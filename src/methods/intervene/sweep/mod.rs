//! Sweeps: one edit at every part of hook points, each by itself, and what that does to a number.
//!
//! ```text
//!   ablation:              F(x with the part zeroed, or put to its mean) - F(x)
//!   activation patching:   (F(x, patched from the source) - F(x)) / (F(source) - F(x))      as TransformerLens's `patching`
//!   path patching:         the same by the direct path to receivers                         see `path`
//!   attribution patching:  sum (new - x) dF/dx                                              see `estimate`
//! ```
//!
//! The input is the corrupted one of a patching, the source the clean one. Every part is a row of one variant of the graph, which can move the
//! swept hook points of every layer: nothing is rebuilt, for other layers, heads or positions neither, and the parts of a hook point share
//! runs. Rows that change later layers only begin in the middle of the model, where that is worth another variant: see `late`.

mod estimate;
mod late;
mod parts;
mod path;

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::watch;

pub use parts::By;

use super::{
    Edit, Intervention, Operation, Within,
    operand::{Grid, Staged},
    resolve::{Placed, Run, resolver},
};
use crate::{
    engine::{EngineError, ModelHandle, edits::of_kinds},
    methods::{
        input::{self, Input, Token},
        subject::{Partial, Show, Spent, Subject, first, floats},
        target::{self, Objective, Target, Terms},
    },
    tensor::Tensor,
};
use late::Late;
use parts::Parts;
use path::Paths;
pub(super) use path::of_rows;

/// Name of the source of a patching.
const SOURCE: &str = "source";

/// What is swept, validated as far as it can be without the model.
#[derive(Clone, Debug)]
pub struct Sweep {
    /// What the model is run on.
    pub input: Input,
    /// The number that is watched.
    pub target: Target,
    /// Hook points: kinds, names or patterns.
    pub hooks: Vec<String>,
    /// Layers; empty takes all.
    pub layers: Vec<u32>,
    /// Along which axes; none takes each hook point as a whole.
    pub by: Vec<By>,
    /// What is done with each part.
    pub change: Change,
    /// How effects are found.
    pub way: Way,
}

/// What stands in the place of a part.
#[derive(Clone, Debug)]
pub enum Change {
    /// Zero.
    Zero,
    /// The mean over inputs.
    Mean(Vec<Input>),
    /// What stands there in the run of another input.
    Patch(Input),
}

/// How effects are found.
#[derive(Clone, Debug)]
pub enum Way {
    /// A run for each part.
    Run,
    /// By gradients.
    Estimate,
    /// Both, with runs for so many parts of the greatest estimates; 0 for all.
    Both {
        /// How many.
        most: usize,
    },
    /// Two runs for each part, that patch its path.
    Path(Path),
}

/// Where paths end.
#[derive(Clone, Debug)]
pub struct Path {
    /// Places; their operations do not count.
    pub receivers: Vec<Edit>,
    /// Whether perceptrons are held.
    pub freeze_mlps: bool,
}

/// A sweep, ready to run.
#[derive(Debug)]
pub struct Started {
    /// Tokens of the row.
    pub tokens: Vec<Token>,
    /// Tokens that truncation cut off.
    pub truncated: u32,
    /// What is watched.
    pub objective: Objective,
    /// Its value for the input.
    pub value: f64,
    /// Its value for the source of a patching.
    pub source_value: Option<f64>,
    /// The hook points, in the order of the graph.
    pub swept: Vec<Swept>,
    /// Rows that will be run.
    pub rows: usize,
    subject: Subject,
    way: Ready,
    late: Option<Late>,
    estimated: Option<Vec<Vec<f64>>>,
    /// Parts of each hook point that are run; none for all.
    chosen: Option<Vec<Vec<usize>>>,
    /// Hook points that are done.
    done: usize,
    /// Estimates and effects of these.
    pairs: Vec<(f64, f64)>,
}

/// A hook point and its parts.
#[derive(Debug)]
pub struct Swept {
    parts: Parts,
    /// What stands in the place of a part.
    new: Grid,
}

impl Swept {
    /// Canonical name of the value that is changed.
    pub fn name(&self) -> &str {
        &self.parts.site.hook
    }

    /// The name that was asked for.
    pub fn asked(&self) -> &str {
        &self.parts.site.asked
    }

    /// Names of the axes that are swept over.
    pub fn axes(&self) -> Vec<String> {
        self.parts.axes()
    }

    /// How many parts there are along each.
    pub fn shape(&self) -> Vec<usize> {
        self.parts.shape()
    }
}

/// How effects are found, with what that needs.
#[derive(Debug)]
enum Ready {
    Run(Show),
    Estimate,
    Both(Show, usize),
    Path(Paths),
}

/// What a sweep found at a hook point.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Effects {
    /// The number with each part changed, less the number as it is; NaN for parts that were not run. None when none was.
    pub measured: Option<Vec<f64>>,
    /// By gradients.
    pub estimated: Option<Vec<f64>>,
}

/// Validates a sweep, runs what it needs beside its parts, and tells what will come.
///
/// # Errors
/// With paths of fields that begin at the request. [`EngineError::ResourceExhausted`] when it would take more than `max_rows` rows.
pub async fn start(
    handle: &ModelHandle,
    sweep: Sweep,
    max_rows: usize,
    within: Within<'_>,
) -> Result<Started, EngineError> {
    let Within { lane, ctx, .. } = within;
    let mut prepared = input::prepare(handle, sweep.input.clone(), ctx)
        .await
        .map_err(|e| e.beneath("input"))?;
    let mut clean = match &sweep.change {
        Change::Zero | Change::Mean(_) => None,
        Change::Patch(source) => {
            let clean = input::prepare(handle, source.clone(), ctx).await;
            Some(clean.map_err(|e| e.beneath("patch"))?)
        }
    };
    let of_target = |e: EngineError| e.beneath("target");
    // A divergence is from what is right: of a patching, from the source.
    let diverges = matches!(sweep.target.of, Terms::Divergence(_));
    let right = clean.as_mut().filter(|_| diverges);
    let objective = target::resolve(
        handle,
        &sweep.target,
        right.unwrap_or(&mut prepared),
        lane,
        ctx,
    );
    let objective = objective.await.map_err(of_target)?;
    if let Some(clean) = clean.as_mut().filter(|_| objective.asked > 0) {
        // The continuation belongs to both.
        target::resolve(handle, &sweep.target, clean, lane, ctx)
            .await
            .map_err(of_target)?;
    }
    if let Some(clean) = clean
        .as_ref()
        .filter(|c| c.group.length != prepared.group.length)
    {
        return Err(EngineError::invalid(
            "patch",
            format!(
                "has {} tokens and the input {}: give an input of as many tokens, or map positions by an intervention",
                clean.tokens.len(),
                prepared.tokens.len()
            ),
        ));
    }
    if diverges && clean.is_none() && matches!(sweep.way, Way::Estimate | Way::Both { .. }) {
        return Err(EngineError::invalid(
            "method",
            "estimates by the gradient, and a divergence from the input's own prediction has none there: run the parts",
        ));
    }
    let nothing = Intervention::default();
    let resolver = resolver(handle, &nothing, within);
    let edits = edits(&sweep);
    let sites = resolver.sites(&edits, &prepared).map_err(of_request)?;
    let subject = |row, tokens| {
        let terms = (lane, ctx.clone());
        Subject::new(handle.clone(), (row, tokens), objective.clone(), terms)
    };
    let mut spent = Spent::default();
    let (mut source_value, mut runs) = (None, BTreeMap::new());
    if let Some(clean) = clean {
        let mut subject = subject(clean.group, clean.tokens);
        subject.spent.timings.tokenize = clean.tokenize;
        let hooks = sites.iter().flatten().map(|site| site.hook.clone());
        let (value, run) = seen(&mut subject, hooks.collect()).await?;
        spent = subject.spent;
        source_value = Some(value);
        runs.insert(SOURCE.to_owned(), run);
    }
    let placed = resolver.placed(&edits, sites, &runs, &prepared).await;
    let mut swept = Vec::new();
    for Placed { site, staged } in placed.map_err(of_request)? {
        let parts = Parts::new(site, &sweep.by)?;
        let new = match staged {
            Staged { mut operands, .. } if operands.len() == 2 => operands.remove(1),
            Staged { .. } => return Err(EngineError::internal("a part is replaced by a move")),
        };
        swept.push(Swept { parts, new });
    }
    // A sweep of other layers runs on the same variant.
    let middle = late::middle(handle.info()).map(|(hook, _)| hook.name.clone());
    let show = Show {
        intervene: of_kinds(handle.info(), swept.iter().map(Swept::name)),
        beside: middle.into_iter().collect(),
        ..Show::objective()
    };
    let all: usize = swept.iter().map(|s| s.parts.len()).sum();
    let (way, rows) = match sweep.way {
        Way::Run => (Ready::Run(show), all),
        Way::Estimate => (Ready::Estimate, 1),
        Way::Both { most: 0 } => (Ready::Both(show, all), 1 + all),
        Way::Both { most } => (Ready::Both(show, most.min(all)), 1 + most.min(all)),
        Way::Path(path) => {
            let paths = Paths::new(&path, &prepared, &resolver).await?;
            (Ready::Path(paths), 2 * all)
        }
    };
    if rows > max_rows {
        return Err(EngineError::exhausted(
            format!(
                "the sweep would take {rows} rows, more than the limit of {max_rows}: name fewer layers, or estimate"
            ),
            None,
        ));
    }
    // The variant that runs the parts gives the number as it is too.
    let plain = match &way {
        Ready::Run(show) | Ready::Both(show, _) => show.clone(),
        Ready::Estimate | Ready::Path(_) => Show::objective(),
    };
    let mut subject = subject(prepared.group, prepared.tokens.clone());
    subject.spent = spent;
    subject.spent.timings.tokenize += prepared.tokenize;
    let (value, late, estimated) = if matches!(way, Ready::Estimate) {
        // One run gives the number and its gradients.
        subject.plan(rows);
        let (value, estimated) = estimate::estimates(&mut subject, &swept).await?;
        (finite_number(value)?, None, Some(estimated))
    } else {
        // Nothing is shown beside by the variant of paths, and nothing stands in the middle then.
        let seeing = Show {
            expose: plain.beside.clone(),
            beside: BTreeSet::new(),
            ..plain.clone()
        };
        let (value, state) = value(&mut subject, &seeing).await?;
        subject.plan(rows);
        let late = match state {
            Some(state) => Late::new(handle.info(), &plain, &state)?,
            None => None,
        };
        (value, late, None)
    };
    Ok(Started {
        tokens: prepared.tokens,
        truncated: prepared.truncated,
        objective,
        value,
        source_value,
        swept,
        rows,
        subject,
        way,
        late,
        estimated,
        chosen: None,
        done: 0,
        pairs: Vec::new(),
    })
}

/// The edit that is made at every part.
fn edits(sweep: &Sweep) -> Vec<Edit> {
    let operation = match &sweep.change {
        Change::Zero => Operation::Zero,
        Change::Mean(inputs) => Operation::Mean(inputs.clone()),
        Change::Patch(_) => Operation::Interchange {
            source: SOURCE.to_owned(),
            positions: Vec::new(),
        },
    };
    let edit = |hook: &String| Edit {
        layers: sweep.layers.clone(),
        ..Edit::whole(hook, operation.clone())
    };
    sweep.hooks.iter().map(edit).collect()
}

/// The parts of each hook point among so many of the greatest estimates by magnitude, in their order.
fn greatest(estimated: &[Vec<f64>], most: usize) -> Vec<Vec<usize>> {
    // What is no number goes last.
    let size = |e: f64| if e.is_nan() { -1.0 } else { e.abs() };
    let of_hook = |(hook, parts): (usize, &Vec<f64>)| {
        let parts = parts.iter().enumerate();
        let parts = parts.map(move |(part, e)| (size(*e), hook, part));
        parts.collect::<Vec<_>>()
    };
    let all = estimated.iter().enumerate().flat_map(of_hook);
    let mut ranked: Vec<(f64, usize, usize)> = all.collect();
    ranked.sort_by(|(a, ..), (b, ..)| b.total_cmp(a));
    let mut chosen = vec![Vec::new(); estimated.len()];
    for (_, hook, part) in ranked.into_iter().take(most) {
        chosen[hook].push(part);
    }
    for parts in &mut chosen {
        parts.sort_unstable();
    }
    chosen
}

/// Fields of the edit are those of the request; those of its operation have names of their own there.
fn of_request(error: EngineError) -> EngineError {
    let EngineError::InvalidArgument { field, message } = error else {
        return error;
    };
    let field = match field.starts_with("interchange") {
        true => "patch".to_owned(),
        false => field,
    };
    EngineError::InvalidArgument { field, message }
}

/// The number for a source, and what stands at hook points in its run. Sources of sweeps of other layers are run by the same variant.
async fn seen(subject: &mut Subject, hooks: BTreeSet<String>) -> Result<(f64, Run), EngineError> {
    let all = of_kinds(subject.info(), hooks.iter().map(String::as_str));
    let show = Show {
        beside: &all - &hooks,
        expose: hooks,
        ..Show::objective()
    };
    let (mut value, mut values) = (f64::NAN, BTreeMap::new());
    subject
        .run(
            &show,
            (1, 1),
            |_| Ok(Vec::new()),
            |_, _, tensors| {
                value = first(tensors)?;
                for (at, hook) in (1..).zip(&show.expose) {
                    let shape = tensors.get(at).map_or(&[][..], Tensor::shape);
                    let grid = Grid {
                        shape: shape.to_vec(),
                        values: floats(tensors, at)?,
                    };
                    values.insert(hook.clone(), grid);
                }
                Ok(())
            },
        )
        .await?;
    let length = subject.row.length;
    Ok((finite_number(value)?, Run { values, length }))
}

/// The number for the row as it is, and what the show exposes, if it does.
async fn value(subject: &mut Subject, show: &Show) -> Result<(f64, Option<Tensor>), EngineError> {
    let (mut value, mut exposed) = (f64::NAN, None);
    subject
        .run(
            show,
            (1, 1),
            |_| Ok(Vec::new()),
            |_, _, tensors| {
                value = first(tensors)?;
                exposed = tensors.get(1).cloned();
                Ok(())
            },
        )
        .await?;
    Ok((finite_number(value)?, exposed))
}

fn finite_number(value: f64) -> Result<f64, EngineError> {
    if value.is_finite() {
        return Ok(value);
    }
    Err(EngineError::precondition(format!(
        "the target's value for this input is {value}: there is nothing to compare with"
    )))
}

impl Started {
    /// The model that answers.
    pub fn handle(&self) -> &ModelHandle {
        &self.subject.handle
    }

    /// What was spent so far.
    pub fn spent(&self) -> Spent {
        self.subject.spent
    }

    /// Where progress can be watched.
    pub fn watch(&self) -> watch::Receiver<Partial> {
        self.subject.watch()
    }

    /// What was found at the next hook point, by its place in `swept`; none behind the last.
    ///
    /// # Errors
    /// Those of the runs.
    pub async fn next(&mut self) -> Result<Option<(usize, Effects)>, EngineError> {
        let at = self.done;
        let Some(swept) = self.swept.get(at) else {
            return Ok(None);
        };
        if let (Ready::Both(_, most), None) = (&self.way, &self.estimated) {
            let (_, estimated) = estimate::estimates(&mut self.subject, &self.swept).await?;
            self.chosen = Some(greatest(&estimated, *most));
            self.estimated = Some(estimated);
        }
        let measured = match &self.way {
            Ready::Estimate => None,
            Ready::Path(paths) => {
                let values = paths.values(&mut self.subject, swept).await?;
                Some(values.into_iter().map(|v| v - self.value).collect())
            }
            Ready::Run(_) | Ready::Both(..) => Some(self.measured(at).await?),
        };
        let estimated = self.estimated.as_ref().map(|e| e[at].clone());
        if let (Some(a), Some(b)) = (&estimated, &measured) {
            self.pairs.extend(a.iter().copied().zip(b.iter().copied()));
        }
        self.done += 1;
        let effects = Effects {
            measured,
            estimated,
        };
        Ok(Some((at, effects)))
    }

    /// Pearson's correlation of estimates and effects, and over how many parts.
    pub fn correlation(&self) -> (Option<f64>, usize) {
        estimate::correlation(self.pairs.iter().map(|(a, b)| (a, b)))
    }

    /// How many parts of a hook point are run.
    fn count(&self, at: usize) -> usize {
        match &self.chosen {
            Some(chosen) => chosen[at].len(),
            None => self.swept[at].parts.len(),
        }
    }

    /// What changing each part of a hook point by itself does; NaN for those that are not run.
    async fn measured(&mut self, at: usize) -> Result<Vec<f64>, EngineError> {
        let (Ready::Run(show) | Ready::Both(show, _)) = &self.way else {
            return Err(EngineError::internal("nothing was to be run"));
        };
        let info = self.subject.handle.info().clone();
        let swept = &self.swept[at];
        let chosen = match &self.chosen {
            Some(chosen) => chosen[at].clone(),
            None => (0..swept.parts.len()).collect(),
        };
        let late = self.late.as_ref();
        let behind = |at: &usize| late.is_some_and(|l| l.holds(&info, self.swept[*at].name()));
        // Of this hook point and those to come.
        let later = (at..self.swept.len()).filter(behind);
        let rows: usize = later.map(|at| self.count(at)).sum();
        let begins_late = behind(&at);
        let late = match &mut self.late {
            Some(late) if begins_late => {
                let value = late.value(&mut self.subject, rows, self.value).await?;
                value.map(|value| (&*late, value))
            }
            Some(_) | None => None,
        };
        let operands = |part: usize| {
            let both = swept.parts.replaced(part, &swept.new, None);
            vec![(swept.name(), both)]
        };
        let bytes = chosen.first().map_or(1, |part| {
            let (_, both) = &operands(*part)[0];
            let numbers: usize = both.iter().map(|g| g.values.len()).sum();
            numbers * size_of::<f32>() + late.map_or(0, |(late, _)| late.bytes())
        });
        let (show, value) = late.map_or((show, self.value), |(late, value)| (late.show(), value));
        let mut effects = vec![f64::NAN; swept.parts.len()];
        self.subject
            .values(
                show,
                (chosen.len(), bytes),
                |range| {
                    let state = late.map(|(late, _)| late.state(range.len()));
                    let mut inputs = of_rows(&info, range.map(|at| operands(chosen[at])))?;
                    inputs.extend(state.transpose()?);
                    Ok(inputs)
                },
                |_, at, v| effects[chosen[at]] = v - value,
            )
            .await?;
        Ok(effects)
    }
}
