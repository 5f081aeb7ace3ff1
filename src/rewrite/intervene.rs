//! Values become movable: at a hook point `x := x * scale + shift`, both fed at run time.
//!
//! ```text
//!   x ──▶ canonical axes ──▶ * scale ──▶ + shift ──▶ axes of x ──▶ readers
//! ```
//!
//! A scale of zero puts the shift in the place of whatever stands there, the infinities of masked scores included.
//!
//! Ablation, patching, steering, the steps of a path and those of a finite difference are all this one edit. Both inputs broadcast
//! against the canonical axes, and their first axis is the row, so that every row of a batch is moved in its own way.
//! `scale = 1, shift = 0` changes no bit of an answer (of two zeros, a negative one becomes positive).

use std::collections::{BTreeSet, HashMap};

use super::{RewriteError, canonical::canonical};
use crate::{
    anatomy::Anatomy,
    ipc::info::Axis,
    onnx::{Attribute, Dim, Model, Patch, ValueId, number_of},
    tensor::DType,
};

/// Prefix of the names of everything that intervening adds.
const PREFIX: &str = "intervene";

/// A hook point that can be moved.
#[derive(Clone, Debug, PartialEq)]
pub struct Moved {
    /// Name as it was asked for.
    pub name: String,
    /// Name of the input that the value is multiplied by.
    pub scale: String,
    /// Name of the input that is then added.
    pub shift: String,
    /// Canonical axes, against which both broadcast.
    pub axes: Vec<Axis>,
    /// Extents of the axes that do not vary.
    pub dims: Vec<Option<usize>>,
    /// Element type of both.
    pub dtype: DType,
}

/// A model whose hook points can be moved.
#[derive(Clone, Debug)]
pub struct Intervened {
    /// The new model.
    pub model: Model,
    /// Its anatomy: a hook point that is moved is the value after it, which is what its readers read.
    pub anatomy: Anatomy,
    /// What can be moved, by name.
    pub points: Vec<Moved>,
}

/// Makes hook points movable.
///
/// # Errors
/// For a name that is no hook point, for two that are the same value, and for a value that is no float.
pub fn intervene(
    model: &Model,
    anatomy: &Anatomy,
    hooks: &BTreeSet<String>,
) -> Result<Intervened, RewriteError> {
    let mut patch = Patch::new(&model.graph, PREFIX);
    let mut points = Vec::new();
    let mut after: HashMap<ValueId, ValueId> = HashMap::new();
    for name in hooks {
        let hook = anatomy.resolve(model, name)?;
        if after.contains_key(&hook.value) {
            return Err(RewriteError::Graph(format!(
                "\"{name}\" is the same value as another point that is moved"
            )));
        }
        if !hook.dtype.is_float() {
            return Err(RewriteError::Graph(format!(
                "\"{name}\" holds {}, and only floats can be moved",
                hook.dtype
            )));
        }
        let moved = Moved {
            name: name.clone(),
            scale: format!("scale:{name}"),
            shift: format!("shift:{name}"),
            axes: hook.axes.clone(),
            dims: hook.dims.clone(),
            dtype: hook.dtype,
        };
        let rank = hook.axes.len();
        let mut input = |name: &str| patch.input(name, hook.dtype, vec![Dim::Unknown; rank]);
        let (scale, shift) = (input(&moved.scale)?, input(&moved.shift)?);
        let mut failed = None;
        let mut new = hook.value;
        patch.intercept(hook.value, |patch, value| {
            let there = match canonical(patch, model, anatomy, &hook) {
                Ok(there) => there,
                Err(why) => {
                    failed = Some(why);
                    return value;
                }
            };
            let scaled = patch.op("Mul", &[there.value(), scale], vec![]);
            let shifted = patch.op("Add", &[scaled, shift], vec![]);
            let to = Attribute::int("to", i64::from(number_of(DType::Bool)));
            let stays = patch.op("Cast", &[scale], vec![to]);
            let moved = patch.op("Where", &[stays, shifted, shift], vec![]);
            new = there.back(patch, moved);
            new
        });
        if let Some(why) = failed {
            return Err(why);
        }
        after.insert(hook.value, new);
        points.push(moved);
    }
    let mut anatomy = anatomy.clone();
    for hook in &mut anatomy.hooks {
        hook.value = after.get(&hook.value).copied().unwrap_or(hook.value);
    }
    Ok(Intervened {
        model: model.with_graph(patch.apply()?),
        anatomy,
        points,
    })
}
