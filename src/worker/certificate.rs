//! The parity certificate: what the anatomy verified on the trials, that exposing changes nothing, and what
//! [`differences`] tell of moving and of the gradient.
//!
//! A check that fails is reported and does not fail the load. Hook points that fail theirs were withdrawn by the anatomy already.

use std::collections::BTreeSet;

use ort::session::{RunOptions, Session};

use super::{
    differences,
    session::{Bench, Effort, run},
};
use crate::{
    anatomy::{
        Anatomy, Trials,
        certificate::{LOGITS, same_logits, within},
    },
    ipc::info::Check,
    onnx::Model,
    rewrite::{self, Exposure},
    tensor::Tensor,
};

/// All checks, with notes where the variant with every hook point does not even run, or the model cannot be differentiated. `plain` is the session of the file as it is, `normal` the model that rewrites start from.
pub(super) fn check(
    bench: &Bench,
    normal: &Model,
    anatomy: &Anatomy,
    trials: &Trials,
    plain: &mut Session,
) -> (Vec<Check>, Vec<String>) {
    let mut checks = anatomy.checks.clone();
    let mut notes = Vec::new();
    let Some(inputs) = inputs(trials, anatomy) else {
        return (checks, notes);
    };
    if anatomy.hooks.is_empty() {
        return (checks, notes);
    }
    match exposed(bench, normal, anatomy, &inputs, plain) {
        Ok(pairs) => checks.extend(
            pairs
                .iter()
                .map(|(name, shown, wanted)| same_logits(shown, wanted, name)),
        ),
        Err(why) => {
            notes.push(format!(
                "with every hook point shown the model does not run: {why}"
            ));
            checks.push(within(
                LOGITS,
                f64::INFINITY,
                0.0,
                "Exact",
                "every hook point at once",
            ));
        }
    }
    let runs = trial_inputs(trials, anatomy);
    let (moved, note) = differences::check(bench, normal, anatomy, trials, &runs);
    checks.extend(moved);
    notes.extend(note);
    (checks, notes)
}

/// The inputs that the checks run on; none when no trial ran.
pub(super) fn inputs(trials: &Trials, anatomy: &Anatomy) -> Option<Vec<(String, Tensor)>> {
    let seen = trials.plan.runs.get(Trials::TWINS)?;
    Some(with_head_width(&seen.inputs, anatomy.dims.d_head))
}

/// The inputs of every trial.
pub(super) fn trial_inputs(trials: &Trials, anatomy: &Anatomy) -> Vec<Vec<(String, Tensor)>> {
    let runs = trials.plan.runs.iter();
    runs.map(|run| with_head_width(&run.inputs, anatomy.dims.d_head))
        .collect()
}

/// The inputs of a trial as the file's own operators take them: an empty past has the width of a head, which the trial did not know yet.
fn with_head_width(inputs: &[(String, Tensor)], width: Option<usize>) -> Vec<(String, Tensor)> {
    inputs
        .iter()
        .map(|(name, tensor)| {
            let widened = match (tensor.shape(), width) {
                ([rows, heads, 0, 0], Some(width)) => {
                    let shape = vec![*rows, *heads, 0, width];
                    Tensor::new(tensor.dtype(), shape, tensor.bytes().clone()).ok()
                }
                _ => None,
            };
            (name.clone(), widened.unwrap_or_else(|| tensor.clone()))
        })
        .collect()
}

/// Each output of the file: its name, what the variant with every hook point gives, and what the file gives.
fn exposed(
    bench: &Bench,
    normal: &Model,
    anatomy: &Anatomy,
    inputs: &[(String, Tensor)],
    plain: &mut Session,
) -> Result<Vec<(String, Tensor, Tensor)>, String> {
    let everything = Exposure {
        hooks: anatomy
            .hooks
            .iter()
            .map(|h| h.name.clone())
            .collect::<BTreeSet<_>>(),
        keep_outputs: true,
    };
    let made = rewrite::expose(normal, anatomy, &everything).map_err(|e| e.to_string())?;
    let mut session = bench.session(&made.model, Effort::Full)?;
    let options = RunOptions::new().map_err(|e| e.message().to_owned())?;
    let shown = run(&mut session, inputs, &options)?;
    let wanted = run(plain, inputs, &options)?;
    Ok(wanted
        .into_iter()
        .filter_map(|(name, wanted)| {
            let (_, shown) = shown.iter().find(|(n, _)| *n == name)?;
            wanted
                .dtype()
                .is_float()
                .then(|| (name, shown.clone(), wanted))
        })
        .collect())
}
