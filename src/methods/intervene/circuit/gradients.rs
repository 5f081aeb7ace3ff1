//! The gradient of the number by what each node reads, through that node alone.
//!
//! ```text
//!   stream ──┬──▶ branch ──▶ + ──▶        dF/d stream through the branch = dF/d stream - dF/d (what the branch writes)
//!            └───────────────┘
//! ```
//!
//! What the branch writes is added to the rest of the stream, so that the gradient by it is the gradient by the rest. Where several nodes
//! branch off the same stream, the others are held at what they are, so that nothing flows through them.

use std::collections::BTreeSet;

use super::{
    super::{operand::Grid, sweep::of_rows},
    Block, Plan, Seen, gradients_at,
    graph::{Node, Part},
    less, of,
};
use crate::{
    engine::{EngineError, PickSpec, RowGroup},
    ipc::spec::Reduction,
    methods::subject::{Show, Subject, floats},
};

/// By node `[position, width]`; none of the embedding, which reads nothing of the stream.
///
/// # Errors
/// Those of the runs.
pub(super) async fn through(
    subject: &mut Subject,
    plan: &Plan,
    corrupted: &Seen,
    nodes: &[Node],
) -> Result<Vec<Option<Vec<f32>>>, EngineError> {
    let mut names: BTreeSet<String> = plan.stream.states.iter().cloned().collect();
    for block in &plan.blocks {
        names.extend(block.attention.clone());
        if let Some((reads, writes)) = &block.perceptron {
            names.extend([reads.clone(), writes.clone()]);
        }
    }
    let whole = gradients_at(subject, &names).await?;
    let mut found = Vec::with_capacity(nodes.len());
    for block in &plan.blocks {
        for (node, gradient) in branches(subject, plan, block, corrupted, &whole).await? {
            found.push((node, Some(block.layer), gradient));
        }
    }
    Ok(nodes
        .iter()
        .map(|node| match node.part {
            Part::Embedding => None,
            Part::Output => whole.get(plan.stream.end()).cloned(),
            Part::Head(_) | Part::Attention | Part::Perceptron => {
                let here = |(part, layer, _): &&(Part, Option<u32>, Vec<f32>)| {
                    *part == node.part && *layer == node.layer
                };
                found.iter().find(here).map(|(.., g)| g.clone())
            }
        })
        .collect())
}

/// What is held in a row, and the node that is not.
struct Alone<'a> {
    part: Part,
    reads: &'a str,
    writes: &'a str,
    /// Hook points with scale and shift.
    held: Vec<(&'a str, [Grid; 2])>,
}

/// The gradients of the nodes of a block.
async fn branches(
    subject: &mut Subject,
    plan: &Plan,
    block: &Block,
    corrupted: &Seen,
    whole: &Seen,
) -> Result<Vec<(Part, Vec<f32>)>, EngineError> {
    let mut found = Vec::new();
    let mut rows: Vec<Alone<'_>> = Vec::new();
    let heads = plan.heads(block);
    let parallel = block.is_parallel();
    let perceptron = block.perceptron.as_ref();
    let hold = |name: &str| -> Result<[Grid; 2], EngineError> {
        let values = of(corrupted, name)?.to_vec();
        let grid = Grid {
            shape: vec![plan.positions, values.len() / plan.positions.max(1)],
            values,
        };
        Ok([Grid::one(2, 0.0), grid])
    };
    if let Some(attention) = &block.attention {
        match heads {
            None if !parallel => {
                let through = less(of(whole, &block.before)?, of(whole, attention)?);
                found.push((Part::Attention, through));
            }
            None => {
                let mut held = Vec::new();
                if let Some((_, writes)) = perceptron {
                    held.push((writes.as_str(), hold(writes)?));
                }
                rows.push(Alone {
                    part: Part::Attention,
                    reads: &block.before,
                    writes: attention,
                    held,
                });
            }
            Some(layer) => {
                let z = of(corrupted, &layer.z)?;
                let width = z.len() / (plan.positions * layer.heads).max(1);
                for head in 0..layer.heads {
                    let free: Vec<f32> = (0..layer.heads)
                        .map(|h| if h == head { 1.0 } else { 0.0 })
                        .collect();
                    let mut values = z.to_vec();
                    for position in values.chunks_exact_mut((layer.heads * width).max(1)) {
                        position[head * width..][..width].fill(0.0);
                    }
                    let scale = Grid {
                        shape: vec![1, layer.heads, 1],
                        values: free,
                    };
                    let shift = Grid {
                        shape: vec![plan.positions, layer.heads, width],
                        values,
                    };
                    let mut held = vec![(layer.z.as_str(), [scale, shift])];
                    if let Some((_, writes)) = perceptron.filter(|_| parallel) {
                        held.push((writes.as_str(), hold(writes)?));
                    }
                    rows.push(Alone {
                        part: Part::Head(u32::try_from(head).unwrap_or(u32::MAX)),
                        reads: &block.before,
                        writes: attention,
                        held,
                    });
                }
            }
        }
    }
    if let Some((reads, writes)) = perceptron {
        if parallel && let Some(attention) = &block.attention {
            let mut held = vec![(attention.as_str(), hold(attention)?)];
            held.sort_by_key(|(name, _)| *name);
            rows.push(Alone {
                part: Part::Perceptron,
                reads,
                writes,
                held,
            });
        } else {
            let through = less(of(whole, reads)?, of(whole, writes)?);
            found.push((Part::Perceptron, through));
        }
    }
    // Rows that hold the same hook points share a variant.
    while let Some(first) = rows.first() {
        let held = |row: &Alone<'_>| row.held.iter().map(|(n, _)| (*n).to_owned()).collect();
        let names: BTreeSet<String> = held(first);
        let (alike, rest): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| {
            let theirs: BTreeSet<String> = held(row);
            theirs == names
        });
        rows = rest;
        found.extend(alone(subject, alike).await?);
    }
    Ok(found)
}

/// Runs rows that hold the same hook points forward and backward.
async fn alone(
    subject: &mut Subject,
    rows: Vec<Alone<'_>>,
) -> Result<Vec<(Part, Vec<f32>)>, EngineError> {
    let Some(first) = rows.first() else {
        return Ok(Vec::new());
    };
    let info = subject.handle.info().clone();
    let (reads, writes) = (first.reads.to_owned(), first.writes.to_owned());
    let show = Show {
        intervene: first.held.iter().map(|(n, _)| (*n).to_owned()).collect(),
        points: [reads.clone(), writes.clone()]
            .map(|n| (n, Reduction::Whole))
            .into(),
        ..Show::objective()
    };
    let pick = |name: &str| PickSpec {
        output: format!("gradient:{name}"),
        ..PickSpec::default()
    };
    let picks = vec![pick(&reads), pick(&writes)];
    // A row at a time: what is held differs, and a gradient weighs as much as a row's activations.
    let mut found = Vec::with_capacity(rows.len());
    for row in rows {
        let inputs = of_rows(&info, std::iter::once(row.held))?;
        let group = RowGroup {
            picks: picks.clone(),
            ..subject.group(&show, 1, inputs)?
        };
        let spec = subject.spec(&show);
        let mut queued = subject.submit(spec, vec![group], true).await?;
        while let Some(done) = subject.next(&mut queued).await? {
            let both = (floats(&done.tensors, 0)?, floats(&done.tensors, 1)?);
            found.push((row.part, less(&both.0, &both.1)));
        }
    }
    Ok(found)
}
