//! Hook points of one row, brought back in passes that fit into memory.
//!
//! What is reduced to numbers as it comes needs no room for all of it: hook points that would weigh too much together are shown by several
//! runs of the row, each of which ends behind the deepest hook point that it shows.

use std::ops::Range;

use crate::{
    engine::{
        Ctx, EngineError, Job, Lane, ModelHandle, PickSpec, RowGroup, RowStream, StageTimings,
        admission::exposed_bytes,
    },
    ipc::{
        info::{HookInfo, ValueInfo},
        spec::VariantSpec,
    },
    tensor::Tensor,
};

/// What a pass brings back, unless a hook point by itself is more.
const PASS_BYTES: usize = 64 << 20;
/// An extent that only the run tells counts as this.
const UNKNOWN_EXTENT: usize = 1024;

/// What is done when the daemon has no room for a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// The caller is told to come back.
    Refuse,
    /// The row waits: others of its request are under way.
    Wait,
}

/// Hook points of a row. The daemon's room for them is taken until this is dropped.
#[derive(Debug)]
pub struct Shown {
    /// Without the batch, in the order of asking.
    pub tensors: Vec<Tensor>,
    /// Where the time went.
    pub timings: StageTimings,
    _rows: RowStream,
}

/// Which hook points are shown together for a row of this length. The number of them is a power of two, so that rows of many lengths share
/// few variants of the graph.
///
/// # Errors
/// [`EngineError::ResourceExhausted`] for a hook point that is larger than `most` by itself.
pub fn passes(
    hooks: &[&HookInfo],
    length: Option<usize>,
    most: usize,
) -> Result<Vec<Range<usize>>, EngineError> {
    let mut largest = 0;
    for hook in hooks {
        let bytes = bytes(hook, length);
        if bytes > most {
            return Err(EngineError::exhausted(
                format!(
                    "\"{}\" would take {bytes} bytes, more than the limit of {most}: give a shorter input",
                    hook.name
                ),
                None,
            ));
        }
        largest = largest.max(bytes);
    }
    let fits = (PASS_BYTES / largest.max(1)).max(1);
    let each = if fits >= hooks.len() {
        hooks.len().max(1)
    } else {
        1 << fits.ilog2()
    };
    let begins = (0..hooks.len()).step_by(each);
    Ok(begins
        .map(|from| from..hooks.len().min(from + each))
        .collect())
}

fn bytes(hook: &HookInfo, length: Option<usize>) -> usize {
    let value = ValueInfo {
        name: hook.name.clone(),
        dtype: hook.dtype,
        axes: hook.axes.clone(),
        dims: hook.dims.clone(),
    };
    let whole = PickSpec::default();
    exposed_bytes(&value, &whole, length.unwrap_or(0), UNKNOWN_EXTENT)
}

/// Runs a row for some hook points.
///
/// # Errors
/// Those of the run; [`EngineError::FailedPrecondition`] for numbers that are not finite.
pub async fn show(
    handle: &ModelHandle,
    row: &RowGroup,
    hooks: &[&HookInfo],
    room: Room,
    (lane, ctx): (Lane, &Ctx),
) -> Result<Shown, EngineError> {
    let names: Vec<String> = hooks.iter().map(|h| h.name.clone()).collect();
    let picks = names.iter().map(|name| PickSpec {
        output: name.clone(),
        ..PickSpec::default()
    });
    let job = Job {
        spec: VariantSpec {
            keep_outputs: false,
            ..VariantSpec::exposing(&names)
        },
        lane,
        groups: vec![RowGroup {
            picks: picks.collect(),
            ..row.clone()
        }],
    };
    let mut rows = loop {
        match handle.submit(job.clone(), ctx).await {
            Err(EngineError::ResourceExhausted {
                retry_after: Some(after),
                ..
            }) if room == Room::Wait => {
                tokio::select! {
                    () = tokio::time::sleep(after) => {}
                    () = ctx.cancel.cancelled() => return Err(EngineError::Cancelled),
                }
            }
            other => break other?,
        }
    };
    let Some(done) = rows.next().await.transpose()? else {
        return Err(EngineError::internal("a row ended without an answer"));
    };
    if let Some(name) = done.non_finite.first().and_then(|at| names.get(*at)) {
        return Err(EngineError::precondition(format!(
            "\"{name}\" holds a number that is not finite for this input"
        )));
    }
    Ok(Shown {
        tensors: done.tensors,
        timings: done.timings,
        _rows: rows,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::testing::info;

    #[test]
    fn passes_are_as_few_as_fit_and_powers_of_two() {
        let info = info();
        let pattern = info.hooks.iter().find(|h| h.name.ends_with("pattern"));
        let hooks = vec![pattern.unwrap(); 7];
        let most = usize::MAX;
        let together = passes(&hooks, Some(16), most).unwrap();
        assert!(matches!(&together[..], [all] if *all == (0..7)));
        // Four heads of 1024 x 1024 floats are 16 MiB.
        assert_eq!(passes(&hooks, Some(1024), most).unwrap(), [0..4, 4..7]);
        let one_by_one = passes(&hooks, Some(8192), most).unwrap();
        assert_eq!(one_by_one.len(), 7);
        let error = passes(&hooks, Some(8192), 1 << 20).unwrap_err();
        assert!(matches!(error, EngineError::ResourceExhausted { .. }));
        assert!(passes(&[], Some(8), most).unwrap().is_empty());
    }
}
