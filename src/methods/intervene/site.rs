//! The part of a hook point that an edit is about: which hook points, and which indices along each axis.

use super::Edit;
use crate::{
    engine::EngineError,
    ipc::info::{Axis, HookInfo, ModelInfo},
    methods::{
        attribute::features,
        input::Token,
        select::{self, Point},
        target::at,
    },
};

/// A hook point and the indices that are edited along each of its axes behind the batch; none for all.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Site {
    /// Canonical name.
    pub(super) hook: String,
    /// The name that was asked for, where the value has two: what leaves a layer enters the next.
    pub(super) asked: String,
    /// Axes behind the batch.
    pub(super) axes: Vec<Axis>,
    /// Extents of the row.
    pub(super) extents: Vec<usize>,
    /// What is edited.
    pub(super) chosen: Vec<Option<Vec<usize>>>,
}

impl Site {
    /// How many indices are edited along each axis.
    pub(super) fn edited(&self) -> Vec<usize> {
        let chosen = self.chosen.iter().zip(&self.extents);
        chosen
            .map(|(c, extent)| c.as_ref().map_or(*extent, Vec::len))
            .collect()
    }

    /// The axis of positions, or of queries.
    pub(super) fn positions(&self) -> Option<usize> {
        let asks = |a: &Axis| matches!(a, Axis::Pos | Axis::Query);
        self.axes.iter().position(asks)
    }

    /// Whether it is an attention's scores or pattern.
    pub(super) fn is_attention(&self) -> bool {
        self.axes.contains(&Axis::Key)
    }
}

/// The hook points of an edit, each once, for a row of these tokens.
///
/// # Errors
/// With paths of fields that begin at the edit.
pub(super) fn sites(
    info: &ModelInfo,
    edit: &Edit,
    tokens: &[Token],
    length: Option<usize>,
) -> Result<Vec<Site>, EngineError> {
    let named = [edit.hook.clone()];
    let points = select::points(info, &named, &[], "").map_err(|e| renamed(e, "hook"))?;
    if let Some(at) = edit
        .layers
        .iter()
        .position(|l| *l as usize >= info.dims.layers)
    {
        return Err(EngineError::invalid(
            format!("layers[{at}]"),
            format!(
                "layer {} does not exist: the model has {}",
                edit.layers[at], info.dims.layers
            ),
        ));
    }
    let mut sites = Vec::new();
    for point in points {
        let Point::Hook(hook) = point else {
            return Err(EngineError::invalid(
                "hook",
                format!(
                    "\"{}\" is a value of the graph that is no hook point: its axes are not known, so that it can be shown but not edited",
                    edit.hook
                ),
            ));
        };
        // Of two names of one value the first stands for both, so that edits by either follow each other.
        let same = |h: &&HookInfo| h.value == hook.value && h.axes == hook.axes;
        let first = info.hooks.iter().find(same).unwrap_or(hook);
        let layer = hook.layer.and_then(|l| u32::try_from(l).ok());
        if edit.layers.is_empty() || layer.is_some_and(|l| edit.layers.contains(&l)) {
            let site = Site {
                asked: hook.name.clone(),
                ..site(info, first, edit, tokens, length)?
            };
            if !sites.iter().any(|s: &Site| s.hook == site.hook) {
                sites.push(site);
            }
        }
    }
    if sites.is_empty() {
        return Err(EngineError::invalid(
            "layers",
            format!("\"{}\" is no hook point of these layers", edit.hook),
        ));
    }
    Ok(sites)
}

fn site(
    info: &ModelInfo,
    hook: &HookInfo,
    edit: &Edit,
    tokens: &[Token],
    length: Option<usize>,
) -> Result<Site, EngineError> {
    let name = &hook.name;
    if !hook.dtype.is_float() {
        return Err(EngineError::invalid(
            "hook",
            format!(
                "\"{name}\" holds {}, and only floats can be edited",
                hook.dtype
            ),
        ));
    }
    if hook.name == "logits" || info.outputs.iter().any(|o| o.name == hook.value) {
        return Err(EngineError::invalid(
            "hook",
            format!("\"{name}\" is what the model answers: nothing inside reads it"),
        ));
    }
    let [Axis::Batch, axes @ ..] = &hook.axes[..] else {
        return Err(EngineError::precondition(format!(
            "\"{name}\" has no batch axis, and cannot be edited"
        )));
    };
    let mut extents = Vec::with_capacity(axes.len());
    for (axis, fixed) in axes.iter().zip(&hook.dims[1..]) {
        let along = axis.is_token() || *axis == Axis::Key;
        let extent = fixed.or(length.filter(|_| along)).ok_or_else(|| {
            EngineError::precondition(format!(
                "the extent of \"{name}\" along {} is not known before the run, and it cannot be edited",
                axis.name()
            ))
        })?;
        extents.push(extent);
    }
    let mut chosen: Vec<Option<Vec<usize>>> = vec![None; axes.len()];
    let mut choose = |wanted: &dyn Fn(&Axis) -> bool, field: &str, indices: Vec<usize>| {
        if indices.is_empty() {
            return Ok(());
        }
        let Some(at) = axes.iter().position(wanted) else {
            let axes: Vec<&str> = axes.iter().map(Axis::name).collect();
            return Err(EngineError::invalid(
                field,
                format!("\"{name}\" has the axes {}", axes.join(", ")),
            ));
        };
        if let Some(past) = indices.iter().find(|i| **i >= extents[at]) {
            return Err(EngineError::invalid(
                field,
                format!(
                    "{past} does not exist: \"{name}\" has {} along {}",
                    extents[at],
                    axes[at].name()
                ),
            ));
        }
        let mut seen = indices.clone();
        seen.sort_unstable();
        seen.dedup();
        if seen.len() != indices.len() {
            return Err(EngineError::invalid(field, "names an index twice"));
        }
        chosen[at] = Some(indices);
        Ok(())
    };
    let numbers = |given: &[u32]| given.iter().map(|n| *n as usize).collect::<Vec<_>>();
    choose(&|a| a.is_head(), "heads", numbers(&edit.heads))?;
    let counted = |given: &[i32], field: &str| {
        let each = given.iter().enumerate();
        each.map(|(n, p)| Ok(at(*p, length, &format!("{field}[{n}]"))? as usize))
            .collect::<Result<Vec<_>, EngineError>>()
    };
    let mut positions = counted(&edit.positions, "positions")?;
    for feature in features::within(&edit.spans, tokens)? {
        for token in feature.tokens {
            if !positions.contains(&token) {
                positions.push(token);
            }
        }
    }
    choose(
        &|a| matches!(a, Axis::Pos | Axis::Query),
        "positions",
        positions,
    )?;
    choose(&|a| *a == Axis::Key, "keys", counted(&edit.keys, "keys")?)?;
    let last = axes.last().cloned();
    choose(
        &|a| Some(a) == last.as_ref() && !a.is_token() && *a != Axis::Key,
        "dims",
        numbers(&edit.dims),
    )?;
    Ok(Site {
        hook: name.clone(),
        asked: name.clone(),
        axes: axes.to_vec(),
        extents,
        chosen,
    })
}

/// The same error of another field.
fn renamed(error: EngineError, field: &str) -> EngineError {
    crate::methods::input::at_field(error, field)
}
