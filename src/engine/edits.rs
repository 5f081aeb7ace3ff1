//! What is changed inside of a model while its rows run: stages at hook points, and the operands of one row.
//!
//! Edits ride on a [`ModelHandle`](super::ModelHandle): captures, predictions, attributions and probes know nothing of them. Like what is
//! shown, what is edited is widened to its *kind* (the same point of every layer), so that edits of another layer, head, neuron or
//! position run on the variant that is there already.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    error::EngineError,
    request::{Job, NamedTensor},
    widen::kind,
};
use crate::ipc::{
    info::ModelInfo,
    spec::{Plan, Stage},
};

/// See the module.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Edits {
    stages: BTreeMap<String, Vec<Stage>>,
    inputs: Vec<NamedTensor>,
    /// Hook points that are shown wherever the model's output is.
    shown: BTreeSet<String>,
}

impl Edits {
    /// Edits by the canonical name of the hook point, with operands that have a first axis of one; see [`Stage::inputs`] for their names.
    pub fn new(
        info: &ModelInfo,
        stages: BTreeMap<String, Vec<Stage>>,
        inputs: Vec<NamedTensor>,
    ) -> Self {
        Self {
            stages: widened(info, stages),
            inputs,
            shown: BTreeSet::new(),
        }
    }

    /// Runs that give the model's output show these hook points too, whoever asks: operands were taken from a run that did, and a runtime may
    /// round otherwise in a graph that does not.
    #[must_use]
    pub fn showing(self, hooks: BTreeSet<String>) -> Self {
        Self {
            shown: hooks,
            ..self
        }
    }

    /// The same stages with operands that change nothing.
    pub(super) fn neutral(&self) -> Self {
        Self {
            inputs: Vec::new(),
            ..self.clone()
        }
    }

    /// Whether nothing is edited.
    pub fn is_empty(&self) -> bool {
        self.stages.is_empty()
    }

    /// The job on the edited model.
    pub(super) fn applied(&self, mut job: Job) -> Result<Job, EngineError> {
        job.spec.plan = Plan::Rewritten;
        job.spec.edit = self.stages.clone();
        if job.spec.keep_outputs && job.spec.enter.is_empty() && job.spec.gradient.is_none() {
            job.spec.expose.extend(self.shown.iter().cloned());
        }
        for group in &mut job.groups {
            for input in &self.inputs {
                group.inputs.push(NamedTensor {
                    name: input.name.clone(),
                    tensor: input
                        .tensor
                        .repeated(group.rows)
                        .map_err(EngineError::internal)?,
                });
            }
        }
        Ok(job)
    }
}

/// These hook points and their like in every other layer.
pub fn of_kinds<'a>(info: &ModelInfo, hooks: impl Iterator<Item = &'a str>) -> BTreeSet<String> {
    let moves = hooks.map(|hook| (hook.to_owned(), vec![Stage::Move]));
    widened(info, moves.collect()).into_keys().collect()
}

/// The same stages in every layer, where the edited layers of a kind agree on them.
fn widened(info: &ModelInfo, stages: BTreeMap<String, Vec<Stage>>) -> BTreeMap<String, Vec<Stage>> {
    let mut of_kinds: BTreeMap<String, Option<Vec<Stage>>> = BTreeMap::new();
    for (name, stages) in &stages {
        of_kinds
            .entry(kind(name).to_owned())
            .and_modify(|known| {
                if known.as_ref() != Some(stages) {
                    *known = None;
                }
            })
            .or_insert_with(|| Some(stages.clone()));
    }
    let value = |name: &String| info.hook(name).map(|h| h.value.clone());
    let mut taken: Vec<String> = stages.keys().filter_map(value).collect();
    let mut wide = stages;
    for hook in info.hooks.iter().filter(|h| h.dtype.is_float()) {
        let Some(Some(stages)) = of_kinds.get(kind(&hook.name)) else {
            continue;
        };
        if !taken.contains(&hook.value) {
            taken.push(hook.value.clone());
            wide.insert(hook.name.clone(), stages.clone());
        }
    }
    wide
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::testing;

    fn edited(names: &[(&str, Stage)]) -> Vec<String> {
        let stages = names
            .iter()
            .map(|(name, stage)| ((*name).to_owned(), vec![*stage]));
        let edits = Edits::new(&testing::info(), stages.collect(), Vec::new());
        edits.stages.into_keys().collect()
    }

    #[test]
    fn an_edit_of_a_layer_is_possible_in_every_layer() {
        let all = edited(&[("blocks.1.attn.hook_pattern", Stage::Move)]);
        assert!(all.len() > 1, "{all:?}");
        assert!(all.iter().all(|n| n.ends_with("attn.hook_pattern")));
        let other = edited(&[("blocks.0.attn.hook_pattern", Stage::Move)]);
        assert_eq!(other, all);
    }

    #[test]
    fn hook_points_of_any_layer_stand_for_those_of_all() {
        let of = |name: &str| of_kinds(&testing::info(), [name].into_iter());
        let all = of("blocks.1.attn.hook_pattern");
        assert!(all.len() > 1, "{all:?}");
        assert_eq!(of("blocks.0.attn.hook_pattern"), all);
    }

    #[test]
    fn layers_that_disagree_stay_as_they_are() {
        let names = [
            ("blocks.0.attn.hook_pattern", Stage::Move),
            ("blocks.1.attn.hook_pattern", Stage::Clamp),
        ];
        assert_eq!(edited(&names).len(), 2);
    }
}
