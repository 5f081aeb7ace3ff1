//! Values become editable: what stands at a hook point goes through stages whose operands are fed at run time.
//!
//! ```text
//!   x ──▶ canonical axes ──▶ edits, stage by stage ──▶ * scale + shift ──▶ axes of x ──▶ readers
//! ```
//!
//! - *move*: `x * scale + shift`; a scale of zero puts the shift in the place of whatever stands there, the infinities of masked scores
//!   included;
//! - *project*: `x - sum(x * onto) onto` over the last axis;
//! - *clamp*: `min(max(x, low), high)`.
//!
//! Edits are what a request changes of the model: ablation, patching, steering. Behind them stands the move of a method: the steps of a
//! path, those of a finite difference. Operands broadcast against the canonical axes, and their first axis is the row, so that every row
//! of a batch is edited in its own way, and one variant serves all heads, neurons and positions.
//! `scale = 1, shift = 0, onto = 0` and bounds that are infinite change no bit of an answer (of two zeros, a negative one becomes positive).

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{RewriteError, canonical::canonical_like};
use crate::{
    anatomy::{Anatomy, HookPoint},
    ipc::{info::Axis, spec::Stage},
    onnx::{Attribute, Dim, Model, Patch, ValueId, number_of},
    tensor::{DType, Tensor},
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

/// A model whose hook points can be edited and moved.
#[derive(Clone, Debug)]
pub struct Intervened {
    /// The new model.
    pub model: Model,
    /// Its anatomy: a hook point that is edited is the value after it, which is what its readers read.
    pub anatomy: Anatomy,
    /// What can be moved, by name.
    pub points: Vec<Moved>,
    /// Inputs of the edits.
    pub edits: Vec<(String, DType)>,
}

/// Makes hook points editable by stages, and movable behind them.
///
/// # Errors
/// For a name that is no hook point, for two that are the same value, and for a value that is no float.
pub fn intervene(
    model: &Model,
    anatomy: &Anatomy,
    edits: &BTreeMap<String, Vec<Stage>>,
    moves: &BTreeSet<String>,
) -> Result<Intervened, RewriteError> {
    let mut patch = Patch::new(&model.graph, PREFIX);
    let mut points = Vec::new();
    let mut edited = Vec::new();
    // By value: what is edited by one name may be moved by another.
    let mut places: BTreeMap<ValueId, Vec<Place>> = BTreeMap::new();
    for (name, stages) in edits {
        let mut place = Place::at(model, anatomy, name)?;
        let here = places.entry(place.hook.value).or_default();
        if !here.is_empty() {
            return Err(twice(name));
        }
        for (number, stage) in stages.iter().enumerate() {
            let inputs = stage.inputs(number, name);
            place.stage(&mut patch, *stage, inputs.iter().map(|(name, _)| name))?;
            edited.extend(inputs.into_iter().map(|(name, _)| (name, place.hook.dtype)));
        }
        here.push(place);
    }
    let mut moved: BTreeSet<ValueId> = BTreeSet::new();
    for name in moves {
        let mut place = Place::at(model, anatomy, name)?;
        if !moved.insert(place.hook.value) {
            return Err(twice(name));
        }
        let point = Moved {
            name: name.clone(),
            scale: format!("scale:{name}"),
            shift: format!("shift:{name}"),
            axes: place.hook.axes.clone(),
            dims: place.hook.dims.clone(),
            dtype: place.hook.dtype,
        };
        place.stage(&mut patch, Stage::Move, [&point.scale, &point.shift])?;
        places.entry(place.hook.value).or_default().push(place);
        points.push(point);
    }
    let mut after: HashMap<ValueId, ValueId> = HashMap::new();
    for (value, here) in places {
        let mut failed = None;
        let mut new = value;
        patch.intercept(value, |patch, value| {
            match Place::through(patch, (model, anatomy), &here, value) {
                Ok(made) => new = made,
                Err(why) => failed = Some(why),
            }
            new
        });
        if let Some(why) = failed {
            return Err(why);
        }
        after.insert(value, new);
    }
    let mut anatomy = anatomy.clone();
    for hook in &mut anatomy.hooks {
        hook.value = after.get(&hook.value).copied().unwrap_or(hook.value);
    }
    Ok(Intervened {
        model: model.with_graph(patch.apply()?),
        anatomy,
        points,
        edits: edited,
    })
}

fn twice(name: &str) -> RewriteError {
    RewriteError::Graph(format!(
        "\"{name}\" is the same value as another point that is edited or moved"
    ))
}

/// A hook point and the stages that its value goes through, with their operands.
struct Place {
    hook: HookPoint,
    stages: Vec<(Stage, Vec<ValueId>)>,
}

impl Place {
    fn at(model: &Model, anatomy: &Anatomy, name: &str) -> Result<Self, RewriteError> {
        let hook = anatomy.resolve(model, name)?;
        if !hook.dtype.is_float() {
            return Err(RewriteError::Graph(format!(
                "\"{name}\" holds {}, and only floats can be moved",
                hook.dtype
            )));
        }
        Ok(Self {
            hook,
            stages: Vec::new(),
        })
    }

    fn stage<'a>(
        &mut self,
        patch: &mut Patch,
        stage: Stage,
        names: impl IntoIterator<Item = &'a String>,
    ) -> Result<(), RewriteError> {
        let dims = vec![Dim::Unknown; self.hook.axes.len()];
        let mut operands = Vec::new();
        for name in names {
            operands.push(patch.input(name, self.hook.dtype, dims.clone())?);
        }
        self.stages.push((stage, operands));
        Ok(())
    }

    /// Appends the stages of all names of a value, each on its own canonical axes.
    fn through(
        patch: &mut Patch,
        (model, anatomy): (&Model, &Anatomy),
        places: &[Self],
        value: ValueId,
    ) -> Result<ValueId, RewriteError> {
        let mut value = value;
        for place in places {
            let there = canonical_like(patch, (model, anatomy), &place.hook, value)?;
            let mut x = there.value();
            for (stage, operands) in &place.stages {
                x = staged(patch, *stage, x, operands);
            }
            value = there.back(patch, x);
        }
        Ok(value)
    }
}

/// Appends a stage. The operands are those of [`Stage::inputs`], in their order.
fn staged(patch: &mut Patch, stage: Stage, x: ValueId, operands: &[ValueId]) -> ValueId {
    match (stage, operands) {
        (Stage::Move, &[scale, shift]) => {
            let scaled = patch.op("Mul", &[x, scale], vec![]);
            let shifted = patch.op("Add", &[scaled, shift], vec![]);
            let to = Attribute::int("to", i64::from(number_of(DType::Bool)));
            let stays = patch.op("Cast", &[scale], vec![to]);
            patch.op("Where", &[stays, shifted, shift], vec![])
        }
        (Stage::Project, &[onto]) => {
            let along = patch.op("Mul", &[x, onto], vec![]);
            let last = Tensor::from_i64(vec![1], &[-1]).expect("one element for one place");
            let last = patch.constant("last", &last);
            let keep = Attribute::int("keepdims", 1);
            let sum = patch.op("ReduceSum", &[along, last], vec![keep]);
            let part = patch.op("Mul", &[sum, onto], vec![]);
            patch.op("Sub", &[x, part], vec![])
        }
        (Stage::Clamp, &[low, high]) => {
            let under = patch.op("Less", &[x, low], vec![]);
            let raised = patch.op("Where", &[under, low, x], vec![]);
            let over = patch.op("Greater", &[raised, high], vec![]);
            patch.op("Where", &[over, high, raised], vec![])
        }
        (Stage::Move | Stage::Project | Stage::Clamp, _) => {
            unreachable!("a stage has the operands that it names")
        }
    }
}
