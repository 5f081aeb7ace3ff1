//! The model that rewrites start from, and whether the file's own operators run at all.

use std::collections::BTreeMap;

use ort::session::{RunOptions, Session};

use super::session::run;
use crate::{anatomy::normalise, onnx::Model, tensor::Tensor};

/// A model in standard operators.
pub(super) struct Normal {
    pub(super) model: Model,
    /// Whether any operator was replaced.
    pub(super) changed: bool,
    /// What there is to say about it.
    pub(super) notes: Vec<String>,
}

/// The model that rewrites start from: without the fusions that can be undone, and what there is to say about them. One whose fusions
/// cannot be undone at all stays as it is.
pub(super) fn of(plain: &Model) -> Normal {
    let unfused = match normalise::unfuse(plain) {
        Ok(unfused) => unfused,
        Err(why) => {
            return Normal {
                model: plain.clone(),
                changed: false,
                notes: vec![format!("fused operators stay as they are: {why}")],
            };
        }
    };
    let mut notes = Vec::new();
    if !unfused.replaced.is_empty() {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for replaced in &unfused.replaced {
            *counts.entry(&replaced.op).or_default() += 1;
        }
        let counts: Vec<String> = counts.iter().map(|(op, n)| format!("{n} {op}")).collect();
        notes.push(format!("unfused for looking inside: {}", counts.join(", ")));
    }
    // One line for all nodes that stay for the same reason.
    let mut left: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for stays in &unfused.left {
        left.entry((&stays.op, &stays.reason))
            .or_default()
            .push(&stays.node);
    }
    for ((op, reason), nodes) in left {
        let Some(first) = nodes.first() else { continue };
        let others = match nodes.len() - 1 {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        notes.push(format!("{op} \"{first}\"{others} stays fused: {reason}"));
    }
    Normal {
        changed: !unfused.replaced.is_empty(),
        model: unfused.model,
        notes,
    }
}

/// Why the file as it is does not run on inputs that its unfused graph takes: kernels of fused operators accept less than
/// their standard defines (a mask that is the same for all queries, for one).
pub(super) fn refused(plain: &mut Session, inputs: &[(String, Tensor)]) -> Option<String> {
    let options = RunOptions::new().ok()?;
    run(plain, inputs, &options).err()
}
