//! One run: inputs read in place from shared memory, the picked parts of the outputs copied into shared memory.
//!
//! Only the outputs that a pick names are fetched, and what would not fit is refused before it runs.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use bytes::Bytes;
use ort::{
    memory::MemoryInfo,
    session::{RunOptions, Session},
};

use super::{
    native::Lent,
    pick::{Cut, has_stray},
    tidy, value,
};
use crate::{
    ipc::{
        info::{Axis, ValueInfo},
        shm::{Segment, SharedPool, ShmError, aligned},
        wire::{Failure, Pick, Ran, TensorRef},
    },
    tensor::{DType, Tensor},
};

/// Why a run gave nothing.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) kind: Failure,
    pub(super) message: String,
    /// The field concerned, if any.
    pub(super) subject: String,
}

impl Refused {
    fn invalid(subject: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            kind: Failure::InvalidArgument,
            message: message.into(),
            subject: subject.into(),
        }
    }

    fn of(kind: Failure, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            subject: String::new(),
        }
    }

    fn runtime(message: impl Into<String>) -> Self {
        Self::of(Failure::Runtime, message)
    }
}

impl From<ort::Error> for Refused {
    fn from(e: ort::Error) -> Self {
        Self::runtime(tidy(e.message()))
    }
}

/// A run that was asked for, shared with whoever may cancel it.
pub(super) struct Ticket {
    cancelled: AtomicBool,
    options: RunOptions,
}

impl Ticket {
    pub(super) fn new() -> ort::Result<Self> {
        Ok(Self {
            cancelled: AtomicBool::new(false),
            options: RunOptions::new()?,
        })
    }

    /// Stops the run before its next kernel, or before its first.
    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        // It fails for a run options object that is none; ours is.
        let _ = self.options.terminate();
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }
}

/// What to run.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) inputs: Vec<(TensorRef, Bytes)>,
    pub(super) lengths: Vec<u32>,
    pub(super) picks: Vec<Pick>,
}

/// Most bytes that a run may bring back, or hold while it picks.
#[derive(Clone, Copy, Debug)]
pub(super) struct RunLimit(pub(super) u64);

/// Runs an order on a session whose outputs are described by `outputs`. The segment holds the tensors of the answer.
pub(super) fn run(
    session: &mut Session,
    outputs: &[ValueInfo],
    order: &Order,
    ticket: &Ticket,
    pool: &SharedPool,
    limit: RunLimit,
) -> Result<(Ran, Segment), Refused> {
    if ticket.is_cancelled() {
        return Err(cancelled());
    }
    let (inputs, extents) = lend(session, order)?;
    let wanted = wanted(outputs, &order.picks)?;
    extents.refuse_oversized(outputs, &wanted, &order.picks, limit)?;

    let mut binding = session.create_binding()?;
    for (name, lent) in &inputs {
        binding.bind_input(name.as_str(), lent.value())?;
    }
    let host = MemoryInfo::default();
    for output in &wanted {
        binding.bind_output_to_device(outputs[*output].name.as_str(), &host)?;
    }
    let started = Instant::now();
    let found = session
        .run_binding_with_options(&binding, &ticket.options)
        .map_err(|e| {
            if ticket.is_cancelled() {
                cancelled()
            } else if e.code() == ort::ErrorCode::InvalidArgument {
                Refused::invalid("inputs", tidy(e.message()))
            } else {
                Refused::from(e)
            }
        })?;
    let run_micros = micros(started);

    let started = Instant::now();
    let mut parts = Vec::with_capacity(order.picks.len());
    let mut total = 0;
    for (at, pick) in order.picks.iter().enumerate() {
        let info = &outputs[pick.output as usize];
        let found = found
            .get(&info.name)
            .ok_or_else(|| Refused::runtime(format!("output \"{}\" is missing", info.name)))?;
        let (dtype, shape, bytes) = value::output(found).map_err(Refused::runtime)?;
        let cut = Cut::plan(pick, &info.axes, &shape, extents.batch)
            .map_err(|why| Refused::invalid(format!("picks[{at}]"), why))?;
        let length = cut.elements() * dtype.size();
        parts.push((cut, dtype, shape, bytes, total, length));
        total += aligned(length);
    }
    if total as u64 > limit.0 {
        return Err(oversized(total as u64, limit));
    }
    let mut segment = pool.with(|p| p.take(total)).map_err(no_memory)?;
    let mut ran = Ran {
        run_micros,
        ..Ran::default()
    };
    for (at, (cut, dtype, shape, bytes, offset, length)) in parts.into_iter().enumerate() {
        let info = &outputs[order.picks[at].output as usize];
        let to = &mut segment.bytes_mut()[offset..offset + length];
        cut.copy(bytes, &shape, dtype.size(), to);
        if has_stray(dtype, to, info.axes.contains(&Axis::Key)) {
            ran.non_finite_picks.push(at as u32);
        }
        ran.tensors.push(TensorRef {
            name: info.name.clone(),
            dtype: dtype as u32,
            shape: cut.shape.iter().map(|d| *d as u64).collect(),
            span: Some(segment.span(offset, length)),
        });
    }
    ran.copy_micros = micros(started);
    Ok((ran, segment))
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

fn cancelled() -> Refused {
    Refused::of(Failure::Cancelled, "the run was cancelled")
}

fn oversized(bytes: u64, limit: RunLimit) -> Refused {
    Refused::of(
        Failure::ResourceExhausted,
        format!(
            "the run would bring back {bytes} bytes, more than the limit of {}: ask for fewer layers, positions or rows",
            limit.0
        ),
    )
}

fn no_memory(e: ShmError) -> Refused {
    match e {
        ShmError::Exhausted { .. } => Refused::of(Failure::ResourceExhausted, e.to_string()),
        ShmError::System(_) | ShmError::Protocol(_) => Refused::runtime(e.to_string()),
    }
}

// ------------------------------------------------------------------------------------------------ inputs

/// Rows and padded tokens of a run.
#[derive(Clone, Copy, Debug)]
struct Extents {
    batch: usize,
    length: usize,
}

/// The inputs as the runtime reads them, checked against what the session takes.
fn lend(session: &Session, order: &Order) -> Result<(Vec<(String, Lent)>, Extents), Refused> {
    let takes = session.inputs();
    let mut lent: Vec<(String, Lent)> = Vec::with_capacity(order.inputs.len());
    let mut extents = Extents {
        batch: 1,
        length: 0,
    };
    for (tensor, bytes) in &order.inputs {
        let subject = format!("inputs[{}]", tensor.name);
        let refuse = |why: String| Refused::invalid(subject.clone(), why);
        let takes = takes
            .iter()
            .find(|i| i.name() == tensor.name)
            .ok_or_else(|| refuse(format!("the model has no input \"{}\"", tensor.name)))?;
        if lent.iter().any(|(name, _)| *name == tensor.name) {
            return Err(refuse(format!("input \"{}\" is there twice", tensor.name)));
        }
        let dtype = DType::try_from(tensor.dtype).map_err(|e| refuse(e.to_string()))?;
        if takes.dtype().tensor_type() != Some(value::element(dtype)) {
            return Err(refuse(format!(
                "input \"{}\" takes {}, {dtype} was given",
                tensor.name,
                takes.dtype()
            )));
        }
        let shape: Vec<usize> = tensor
            .shape
            .iter()
            .map(|d| usize::try_from(*d))
            .collect::<Result<_, _>>()
            .map_err(|e| refuse(e.to_string()))?;
        let declared = takes.dtype().tensor_shape().map_or(&[][..], |s| &s[..]);
        let fits = declared.len() == shape.len()
            && declared
                .iter()
                .zip(&shape)
                .all(|(d, given)| *d < 0 || *d == *given as i64);
        if !fits {
            return Err(refuse(format!(
                "input \"{}\" has shape {declared:?} (-1 is free), {shape:?} was given",
                tensor.name
            )));
        }
        // A decoder that is given no tokens before these is given an empty past.
        let empty_past = dtype.is_float()
            && matches!(shape[..], [rows, heads, 0, width] if rows * heads * width > 0);
        if shape.contains(&0) && !empty_past {
            return Err(refuse(format!("input \"{}\" is empty", tensor.name)));
        }
        if let [batch, rest @ ..] = &shape[..] {
            extents.batch = extents.batch.max(*batch);
            if let (Some(length), false) = (rest.first(), dtype.is_float()) {
                extents.length = extents.length.max(*length);
            }
        }
        let value = Tensor::new(dtype, shape, bytes.clone())
            .map_err(|e| e.to_string())
            .and_then(|t| value::input(&t))
            .map_err(refuse)?;
        lent.push((tensor.name.clone(), value));
    }
    if let Some(missing) = takes
        .iter()
        .find(|i| lent.iter().all(|(n, _)| n != i.name()))
    {
        return Err(Refused::invalid(
            "inputs",
            format!("input \"{}\" is missing", missing.name()),
        ));
    }
    if !order.lengths.is_empty() && order.lengths.len() != extents.batch {
        return Err(Refused::invalid(
            "lengths",
            format!("{} lengths for {} rows", order.lengths.len(), extents.batch),
        ));
    }
    Ok((lent, extents))
}

/// The outputs that the picks need, each once, in order.
fn wanted(outputs: &[ValueInfo], picks: &[Pick]) -> Result<Vec<usize>, Refused> {
    let mut wanted: Vec<usize> = picks.iter().map(|p| p.output as usize).collect();
    wanted.sort_unstable();
    wanted.dedup();
    match wanted.last() {
        None => Err(Refused::invalid("picks", "nothing is picked")),
        Some(last) if *last >= outputs.len() => Err(Refused::invalid(
            "picks",
            format!("output {last} of {}", outputs.len()),
        )),
        Some(_) => Ok(wanted),
    }
}

// ------------------------------------------------------------------------------------------------ estimate

impl Extents {
    /// Refuses before the run what is known to pass the limit: what the outputs hold, and what the picks bring back. Extents that are not
    /// known count as one, so that nothing is refused by a guess; the exact size is checked after the run.
    fn refuse_oversized(
        self,
        outputs: &[ValueInfo],
        wanted: &[usize],
        picks: &[Pick],
        limit: RunLimit,
    ) -> Result<(), Refused> {
        let whole = Pick {
            rows: u32::try_from(self.batch).unwrap_or(u32::MAX),
            keep_batch: true,
            ..Pick::default()
        };
        let held = total(wanted.iter().map(|o| self.bytes(&outputs[*o], &whole)));
        let picked = total(
            picks
                .iter()
                .map(|p| self.bytes(&outputs[p.output as usize], p)),
        );
        let bytes = held.max(picked);
        if bytes > limit.0 {
            return Err(oversized(bytes, limit));
        }
        Ok(())
    }

    fn bytes(self, output: &ValueInfo, pick: &Pick) -> u64 {
        let positions = |n: &[u32], all: usize| if n.is_empty() { all } else { n.len() };
        let length = match pick.length as usize {
            0 => self.length.max(1),
            n => n,
        };
        output
            .axes
            .iter()
            .zip(&output.dims)
            .map(|(axis, dim)| match axis {
                Axis::Batch => pick.rows as usize,
                Axis::Pos | Axis::Query => positions(&pick.positions, dim.unwrap_or(length)),
                Axis::Key => dim.unwrap_or(length),
                Axis::Head | Axis::KvHead => positions(&pick.heads, dim.unwrap_or(1)),
                Axis::DModel
                | Axis::DHead
                | Axis::DMlp
                | Axis::Vocab
                | Axis::Label
                | Axis::Other(_) => dim.unwrap_or(1),
            })
            .fold(output.dtype.size() as u64, |n, d| {
                n.saturating_mul(d as u64)
            })
    }
}

fn total(parts: impl Iterator<Item = u64>) -> u64 {
    parts.fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_counts_what_is_picked_and_what_the_outputs_hold() {
        let pattern = ValueInfo {
            name: "p".to_owned(),
            dtype: DType::F32,
            axes: vec![Axis::Batch, Axis::Head, Axis::Query, Axis::Key],
            dims: vec![None, Some(12), None, None],
        };
        let extents = Extents {
            batch: 4,
            length: 100,
        };
        let pick = |heads: &[u32]| Pick {
            rows: 1,
            heads: heads.to_vec(),
            ..Pick::default()
        };
        assert_eq!(extents.bytes(&pattern, &pick(&[])), 4 * 12 * 100 * 100);
        assert_eq!(extents.bytes(&pattern, &pick(&[3])), 4 * 100 * 100);
        let whole = 4 * 4 * 12 * 100 * 100;
        let check = |limit| {
            extents.refuse_oversized(
                std::slice::from_ref(&pattern),
                &[0],
                &[pick(&[3])],
                RunLimit(limit),
            )
        };
        assert!(check(whole).is_ok());
        let refused = check(whole - 1).unwrap_err();
        assert_eq!(refused.kind, Failure::ResourceExhausted);
        assert!(
            refused.message.contains(&whole.to_string()),
            "{}",
            refused.message
        );
    }
}
