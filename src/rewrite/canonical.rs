//! The steps between a raw value and its canonical axes, there and back.

use super::RewriteError;
use crate::{
    anatomy::{Anatomy, Extent, HookPoint, InputTrace, Step},
    ipc::info::InputRole,
    onnx::{Attribute, Model, Patch, ValueId},
    tensor::Tensor,
};

/// A value under canonical axes, with the steps that lead there.
pub(super) struct Canonical<'a> {
    raw: ValueId,
    /// Each step, and what it makes of the value before it.
    steps: Vec<(&'a Step, ValueId)>,
}

/// Appends the steps of a hook point's layout.
pub(super) fn canonical<'a>(
    patch: &mut Patch,
    model: &Model,
    anatomy: &Anatomy,
    hook: &'a HookPoint,
) -> Result<Canonical<'a>, RewriteError> {
    canonical_like(patch, (model, anatomy), hook, hook.value)
}

/// Appends the same steps to a value that is laid out as the hook point's is: its gradient.
pub(super) fn canonical_like<'a>(
    patch: &mut Patch,
    (model, anatomy): (&Model, &Anatomy),
    hook: &'a HookPoint,
    value: ValueId,
) -> Result<Canonical<'a>, RewriteError> {
    let batch =
        || batch_of(model, &anatomy.inputs).ok_or_else(|| RewriteError::NoBatch(hook.name.clone()));
    let mut there = Canonical {
        raw: value,
        steps: Vec::new(),
    };
    for step in &hook.layout.steps {
        let at = there.value();
        let made = match step {
            Step::Transpose(perm) => transposed(patch, at, perm),
            Step::Reshape(extents) => {
                let shape = shape(patch, extents, at, batch)?;
                patch.op("Reshape", &[at, shape], vec![])
            }
        };
        there.steps.push((step, made));
    }
    Ok(there)
}

impl Canonical<'_> {
    /// The value under canonical axes.
    pub(super) fn value(&self) -> ValueId {
        self.steps.last().map_or(self.raw, |(_, made)| *made)
    }

    /// Appends the way back: from a value under canonical axes to one that is laid out as the raw value is.
    pub(super) fn back(&self, patch: &mut Patch, value: ValueId) -> ValueId {
        let mut at = value;
        for (place, (step, _)) in self.steps.iter().enumerate().rev() {
            let before = match place {
                0 => self.raw,
                n => self.steps[n - 1].1,
            };
            at = match step {
                Step::Transpose(perm) => {
                    let mut inverse = vec![0; perm.len()];
                    for (to, from) in perm.iter().enumerate() {
                        inverse[*from] = to;
                    }
                    transposed(patch, at, &inverse)
                }
                Step::Reshape(_) => {
                    let shape = patch.op("Shape", &[before], vec![]);
                    patch.op("Reshape", &[at, shape], vec![])
                }
            };
        }
        at
    }
}

fn transposed(patch: &mut Patch, value: ValueId, perm: &[usize]) -> ValueId {
    let perm: Vec<i64> = perm.iter().map(|p| *p as i64).collect();
    patch.op("Transpose", &[value], vec![Attribute::ints("perm", &perm)])
}

/// The input whose first axis is the batch.
fn batch_of(model: &Model, inputs: &[InputTrace]) -> Option<ValueId> {
    inputs
        .iter()
        .find(|i| matches!(i.role, InputRole::TokenIds | InputRole::Pixels))
        .and_then(|i| model.graph.value(&i.name))
}

/// The shape operand of a reshape: constants where all is known, pieces of measured shapes otherwise.
fn shape(
    patch: &mut Patch,
    extents: &[Extent],
    value: ValueId,
    batch: impl Fn() -> Result<ValueId, RewriteError>,
) -> Result<ValueId, RewriteError> {
    let one = |patch: &mut Patch, n: i64| {
        let tensor = Tensor::from_i64(vec![1], &[n]).expect("one element for one place");
        patch.constant("extent", &tensor)
    };
    let mut parts = Vec::new();
    for extent in extents {
        let part = match extent {
            Extent::Known(n) => one(patch, *n as i64),
            Extent::Rest => one(patch, -1),
            Extent::Axis(axis) => {
                let of = patch.op("Shape", &[value], vec![]);
                let at = one(patch, *axis as i64);
                patch.op("Gather", &[of, at], vec![Attribute::int("axis", 0)])
            }
            Extent::Batch => {
                let of = patch.op("Shape", &[batch()?], vec![]);
                let at = one(patch, 0);
                patch.op("Gather", &[of, at], vec![Attribute::int("axis", 0)])
            }
        };
        parts.push(part);
    }
    Ok(match parts[..] {
        [only] => only,
        _ => patch.op("Concat", &parts, vec![Attribute::int("axis", 0)]),
    })
}
