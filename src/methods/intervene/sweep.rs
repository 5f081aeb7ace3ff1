//! Sweeps: one edit at every layer and every head, position or neuron, each by itself, and what that does to a number.
//!
//! ```text
//!   ablation:              F(x with the part zeroed, or put to its mean) - F(x)
//!   activation patching:   (F(x, patched from the source) - F(x)) / (F(source) - F(x))      as TransformerLens's `patching`
//! ```
//!
//! The input is the corrupted one of a patching, the source the clean one. Every part is a row of one variant of the graph: nothing is
//! rebuilt, and rows of a layer share runs.

use std::{collections::BTreeMap, ops::Range};

use super::{
    Edit, Intervention, Operation, Source,
    operand::{Grid, Staged},
    resolve::{Placed, resolver},
    site::Site,
};
use crate::{
    engine::{Ctx, EngineError, Lane, ModelHandle, NamedTensor},
    ipc::info::Axis,
    methods::{
        attribute::{
            Spent,
            baseline::moved,
            subject::{Show, Subject},
            target::{self, Objective, Target},
        },
        input::{self, Input, Token},
    },
};

/// Name of the source of a patching.
const SOURCE: &str = "source";

/// What is swept, validated as far as it can be without the model.
#[derive(Clone, Debug)]
pub struct Sweep {
    /// What the model is run on.
    pub input: Input,
    /// The number that is watched.
    pub target: Target,
    /// Hook point: a kind or a pattern.
    pub hook: String,
    /// Layers; empty takes all.
    pub layers: Vec<u32>,
    /// Along which axis.
    pub by: By,
    /// What is done with each part.
    pub change: Change,
}

/// What a part is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum By {
    /// A whole hook point.
    #[default]
    Layer,
    /// A head.
    Head,
    /// A position, or a query of an attention.
    Position,
    /// An index along the last axis: a neuron, a dimension.
    Dim,
}

impl By {
    /// Name of the axis in answers.
    pub const fn name(self) -> &'static str {
        match self {
            By::Layer => "all",
            By::Head => "head",
            By::Position => "pos",
            By::Dim => "dim",
        }
    }
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
    /// The hook points, in the order of the graph, and how many parts each has.
    pub hooks: Vec<(String, usize)>,
    /// What a part is.
    pub by: By,
    subject: Subject,
    placed: Vec<(Site, Option<usize>, Grid)>,
    show: Show,
}

/// Checks a sweep, and runs the input and the source once.
///
/// # Errors
/// With paths of fields that begin at the request.
pub async fn start(
    handle: &ModelHandle,
    sweep: Sweep,
    (max_rows, lane): (usize, Lane),
    ctx: &Ctx,
) -> Result<Started, EngineError> {
    let Sweep {
        input,
        target,
        hook,
        layers,
        by,
        change,
    } = sweep;
    let mut prepared = input::prepare(handle, input, ctx)
        .await
        .map_err(|e| e.beneath("input"))?;
    let objective = target::resolve(handle, &target, &mut prepared, lane, ctx)
        .await
        .map_err(|e| e.beneath("target"))?;
    let (operation, source) = match change {
        Change::Zero => (Operation::Zero, None),
        Change::Mean(inputs) => (Operation::Mean(inputs), None),
        Change::Patch(source) => {
            let operation = Operation::Interchange {
                source: SOURCE.to_owned(),
                positions: Vec::new(),
            };
            (operation, Some(source))
        }
    };
    let edit = Edit {
        hook,
        layers,
        heads: Vec::new(),
        positions: Vec::new(),
        spans: Vec::new(),
        keys: Vec::new(),
        dims: Vec::new(),
        operation,
    };
    let sources = source.iter().map(|input| {
        let source = Source {
            input: input.clone(),
            edits: Vec::new(),
        };
        (SOURCE.to_owned(), source)
    });
    let intervention = Intervention {
        edits: Vec::new(),
        sources: sources.collect::<BTreeMap<_, _>>(),
    };
    let places = resolver(handle, &intervention, (lane, ctx))
        .places(&edit, &prepared)
        .await
        .map_err(of_request)?;
    let mut placed = Vec::with_capacity(places.len());
    for Placed { site, staged } in places {
        let axis = axis(&site, by)?;
        let shift = match staged {
            Staged { mut operands, .. } if operands.len() == 2 => operands.remove(1),
            Staged { .. } => return Err(EngineError::internal("a part is replaced by a move")),
        };
        placed.push((site, axis, shift));
    }
    let parts = |site: &Site, axis: Option<usize>| axis.map_or(1, |axis| site.extents[axis]);
    let hooks: Vec<(String, usize)> = placed
        .iter()
        .map(|(site, axis, _)| (site.hook.clone(), parts(site, *axis)))
        .collect();
    let rows: usize = hooks.iter().map(|(_, n)| n).sum();
    if rows > max_rows {
        return Err(EngineError::exhausted(
            format!(
                "the sweep would take {rows} rows, more than the limit of {max_rows}: name fewer layers"
            ),
            None,
        ));
    }
    let mut show = Show::objective();
    for (name, _) in &hooks {
        show = show.moving(name);
    }
    let source_value = match source {
        Some(input) => {
            let clean = input::prepare(handle, input, ctx).await;
            let clean = clean.map_err(|e| e.beneath("patch"))?;
            let row = (clean.group, clean.tokens);
            let mut subject =
                Subject::new(handle.clone(), row, objective.clone(), (lane, ctx.clone()));
            Some(value(&mut subject, &show).await?)
        }
        None => None,
    };
    let mut subject = Subject::new(
        handle.clone(),
        (prepared.group, prepared.tokens.clone()),
        objective.clone(),
        (lane, ctx.clone()),
    );
    subject.spent.timings.tokenize = prepared.tokenize;
    let value = value(&mut subject, &show).await?;
    Ok(Started {
        tokens: prepared.tokens,
        truncated: prepared.truncated,
        objective,
        value,
        source_value,
        hooks,
        by,
        subject,
        placed,
        show,
    })
}

/// Fields of the edit are those of the request; those of its operation have names of their own there.
fn of_request(error: EngineError) -> EngineError {
    let EngineError::InvalidArgument { field, message } = error else {
        return error;
    };
    let field = if field.starts_with("interchange") || field.contains("sources[") {
        "patch".to_owned()
    } else {
        field
    };
    EngineError::InvalidArgument { field, message }
}

/// The number for the row as it is.
async fn value(subject: &mut Subject, show: &Show) -> Result<f64, EngineError> {
    let mut value = f64::NAN;
    subject
        .values(show, (1, 1), |_| Ok(Vec::new()), |_, _, v| value = v)
        .await?;
    if !value.is_finite() {
        return Err(EngineError::precondition(format!(
            "the target's value for this input is {value}: there is nothing to compare with"
        )));
    }
    Ok(value)
}

/// The axis of the parts.
fn axis(site: &Site, by: By) -> Result<Option<usize>, EngineError> {
    let found = match by {
        By::Layer => return Ok(None),
        By::Head => site.axes.iter().position(Axis::is_head),
        By::Position => site.positions(),
        By::Dim => site
            .axes
            .len()
            .checked_sub(1)
            .filter(|a| !site.axes[*a].is_token()),
    };
    found.map(Some).ok_or_else(|| {
        let axes: Vec<&str> = site.axes.iter().map(Axis::name).collect();
        EngineError::invalid(
            "by",
            format!(
                "\"{}\" has the axes {}, and no {} among them",
                site.hook,
                axes.join(", "),
                by.name()
            ),
        )
    })
}

impl Started {
    /// What was spent so far.
    pub fn spent(&self) -> Spent {
        self.subject.spent
    }

    /// The number with each part of a hook point changed by itself.
    ///
    /// # Errors
    /// Those of the run.
    pub async fn hook(&mut self, at: usize) -> Result<Vec<f64>, EngineError> {
        let (site, axis, shift) = self
            .placed
            .get(at)
            .ok_or_else(|| EngineError::internal(format!("a sweep has no hook point {at}")))?;
        let parts = self.hooks[at].1;
        let info = self.subject.handle.info().clone();
        let row = operands(site, *axis, shift, 0);
        let bytes = (row.0.values.len() + row.1.values.len()) * size_of::<f32>();
        let mut values = vec![f64::NAN; parts];
        let inputs = |range: Range<usize>| -> Result<Vec<NamedTensor>, EngineError> {
            let mut scale = (Vec::new(), Vec::new());
            let mut added = (Vec::new(), Vec::new());
            for part in range.clone() {
                let (gone, put) = operands(site, *axis, shift, part);
                (scale.0, added.0) = (gone.shape, put.shape);
                scale.1.extend(gone.values);
                added.1.extend(put.values);
            }
            let shaped = |shape: Vec<usize>| [vec![range.len()], shape].concat();
            moved(
                &info,
                &site.hook,
                (shaped(scale.0), &scale.1),
                (shaped(added.0), &added.1),
            )
        };
        self.subject
            .values(&self.show, (parts, bytes), inputs, |_, part, value| {
                values[part] = value;
            })
            .await?;
        Ok(values)
    }
}

/// Scale and shift of a row in which one part is replaced by what `values` has there.
fn operands(site: &Site, axis: Option<usize>, values: &Grid, part: usize) -> (Grid, Grid) {
    let rank = site.axes.len();
    let mut only = Site {
        chosen: vec![None; rank],
        ..site.clone()
    };
    let mut here = values.clone();
    if let Some(axis) = axis {
        only.chosen[axis] = Some(vec![part]);
        here = values.cut(&only.chosen);
    }
    let spread = |grid: Grid, rest| {
        grid.spread(&only, rest)
            .unwrap_or_else(|_| Grid::one(rank, rest))
    };
    (spread(Grid::one(rank, 0.0), 1.0), spread(here, 0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_replaces_its_part_and_nothing_else() {
        let site = Site {
            hook: "blocks.0.attn.hook_z".into(),
            axes: vec![Axis::Pos, Axis::Head, Axis::DHead],
            extents: vec![2, 3, 1],
            chosen: vec![None; 3],
        };
        let values = Grid {
            shape: vec![1, 3, 1],
            values: vec![5.0, 6.0, 7.0],
        };
        let (scale, shift) = operands(&site, Some(1), &values, 2);
        assert_eq!(scale.values, [1.0, 1.0, 0.0]);
        assert_eq!(
            (shift.shape, shift.values),
            (vec![1, 3, 1], vec![0.0, 0.0, 7.0])
        );
        let (scale, shift) = operands(&site, None, &values, 0);
        assert_eq!(scale.values, [0.0]);
        assert_eq!(shift, values);
    }
}
