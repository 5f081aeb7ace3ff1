//! How much a circuit does by itself: the source is run with every edge but those of the circuit as it is for the input.
//!
//! ```text
//!   in_v  = in_v(input) + sum over edges u -> v of the circuit of (out_u - out_u(input))
//!   out_v = v(in_v)
//! ```
//!
//! from the embedding (which is the source's) up. A node that no edge of the circuit reaches writes what it writes for the input. Runs begin at what a
//! node reads and end at what it writes.

use super::{
    super::operand::Grid,
    Plan, Seen,
    graph::{Graph, Node, Part},
    less, of,
};
use crate::{
    engine::{EngineError, PickSpec},
    ipc::spec::{VariantSpec, state_input},
    methods::{
        attribute::baseline::named,
        intervene::sweep::of_rows,
        lens::{direct::written, rows::Rows},
        subject::{Show, Subject, floats},
    },
};

/// The number for the source, by the circuit alone.
///
/// # Errors
/// Those of the runs.
pub(super) async fn value(
    subject: &mut Subject,
    plan: &Plan,
    corrupted: &Seen,
    (graph, embedding): (&Graph, Vec<f32>),
) -> Result<f64, EngineError> {
    let mut changes: Vec<Option<Vec<f32>>> = vec![None; graph.nodes.len()];
    changes[0] = Some(embedding);
    // What a node reads, when something reaches it.
    let reads = |to: usize, stream: &str, changes: &[Option<Vec<f32>>]| {
        let writers: Vec<&Vec<f32>> = graph
            .writers(to)
            .filter_map(|from| changes[from].as_ref())
            .collect();
        if writers.is_empty() {
            return Ok(None);
        }
        let mut sum = of(corrupted, stream)?.to_vec();
        for writer in writers {
            sum.iter_mut().zip(writer).for_each(|(s, w)| *s += w);
        }
        Ok::<_, EngineError>(Some(sum))
    };
    for block in &plan.blocks {
        let here = |part: &dyn Fn(Part) -> bool| -> Vec<usize> {
            let nodes = graph.nodes.iter().enumerate();
            let found = nodes
                .filter(|(_, n): &(usize, &Node)| n.layer == Some(block.layer) && part(n.part));
            found.map(|(at, _)| at).collect()
        };
        let attending = here(&|p| matches!(p, Part::Head(_) | Part::Attention));
        let mut inputs = Vec::new();
        for node in attending {
            if let Some(read) = reads(node, &block.before, &changes)? {
                inputs.push((node, read));
            }
        }
        // Of a parallel block, the perceptron reads what was there before attention wrote.
        let before = changes.clone();
        if let (Some(attention), false) = (&block.attention, inputs.is_empty()) {
            match plan.heads(block) {
                None => {
                    let (node, read) = inputs.swap_remove(0);
                    let out = passed(subject, plan, &block.before, attention, &[read]).await?;
                    let out = out.into_iter().next().unwrap_or_default();
                    changes[node] = Some(less(&out, of(corrupted, attention)?));
                }
                Some(layer) => {
                    let states: Vec<Vec<f32>> = inputs.iter().map(|(_, r)| r.clone()).collect();
                    let seen = passed(subject, plan, &block.before, &layer.z, &states).await?;
                    let was = of(corrupted, &layer.z)?;
                    let width = was.len() / (plan.positions * layer.heads).max(1);
                    let mut z = vec![0f32; was.len()];
                    for ((node, _), now) in inputs.iter().zip(&seen) {
                        let Part::Head(head) = graph.nodes[*node].part else {
                            continue;
                        };
                        for position in 0..plan.positions {
                            let at = (position * layer.heads + head as usize) * width;
                            for i in at..at + width {
                                z[i] = now[i] - was[i];
                            }
                        }
                    }
                    let z = [(layer.z.clone(), z)].into();
                    let everywhere: Vec<usize> = (0..plan.positions).collect();
                    let layers = std::slice::from_ref(layer);
                    let stream = &plan.stream;
                    let positions = plan.positions;
                    let rows = written(subject, stream, layers, (&z, positions), &everywhere);
                    let rows = rows.await?.into_iter().next().unwrap_or_default();
                    let none = rows.last().cloned().unwrap_or_default();
                    for (node, _) in &inputs {
                        if let Part::Head(head) = graph.nodes[*node].part {
                            changes[*node] = rows.get(head as usize).map(|row| less(row, &none));
                        }
                    }
                }
            }
        }
        if let Some((stream, writes)) = &block.perceptron {
            for node in here(&|p| p == Part::Perceptron) {
                let known = if block.is_parallel() {
                    &before
                } else {
                    &changes
                };
                if let Some(read) = reads(node, stream, known)? {
                    let out = passed(subject, plan, stream, writes, &[read]).await?;
                    let out = out.into_iter().next().unwrap_or_default();
                    changes[node] = Some(less(&out, of(corrupted, writes)?));
                }
            }
        }
    }
    let end = plan.stream.end();
    let last = graph.nodes.len() - 1;
    let state = match reads(last, end, &changes)? {
        Some(state) => state,
        None => of(corrupted, end)?.to_vec(),
    };
    let info = subject.handle.info().clone();
    let state = Grid {
        shape: vec![plan.positions, plan.stream.width],
        values: state,
    };
    let show = Show::objective().moving(end);
    let mut value = f64::NAN;
    subject
        .values(
            &show,
            (1, 1),
            |range| {
                let row = || vec![(end, [Grid::one(2, 0.0), state.clone()])];
                of_rows(&info, range.map(|_| row()))
            },
            |_, _, v| value = v,
        )
        .await?;
    Ok(value)
}

/// What stands at a hook point when the stream is so at another before it, by row.
async fn passed(
    subject: &mut Subject,
    plan: &Plan,
    from: &str,
    to: &str,
    states: &[Vec<f32>],
) -> Result<Vec<Vec<f32>>, EngineError> {
    let spec = VariantSpec {
        keep_outputs: false,
        enter: [from.to_owned()].into(),
        ..VariantSpec::exposing([to])
    };
    let picks = vec![PickSpec {
        output: to.to_owned(),
        ..PickSpec::default()
    }];
    let rows = Rows::of(subject, plan.positions, plan.stream.fixed);
    let dtype = subject.handle.info().hook(from).map(|h| h.dtype);
    let dtype = dtype.unwrap_or(plan.stream.dtype);
    let mut found = Vec::with_capacity(states.len());
    for state in states {
        let shape = vec![1, plan.positions, plan.stream.width];
        let given = named(&state_input(from), shape, state, dtype)?;
        let group = rows.group(subject, (1, plan.positions), vec![given], picks.clone())?;
        let mut queued = subject.submit(spec.clone(), vec![group], true).await?;
        while let Some(done) = subject.next(&mut queued).await? {
            found.push(floats(&done.tensors, 0)?);
        }
    }
    Ok(found)
}
