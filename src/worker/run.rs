//! One run: inputs read in place from shared memory, outputs written or copied into shared memory.
//!
//! Only the outputs that a pick names are fetched, and what would not fit is refused before it runs.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use bytes::Bytes;
use ort::{
    memory::MemoryInfo,
    session::{RunOptions, Session, SessionOutputs},
};

use super::{
    landing::Landing,
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

impl From<ShmError> for Refused {
    fn from(e: ShmError) -> Self {
        match e {
            ShmError::Exhausted { .. } => Self::of(Failure::ResourceExhausted, e.to_string()),
            ShmError::System(_) | ShmError::Protocol(_) => Self::runtime(e.to_string()),
        }
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

/// Runs an order on a session whose outputs are described by `outputs`. The segments hold the tensors of the answer, in the order in
/// which it first names them.
pub(super) fn run(
    session: &mut Session,
    outputs: &[ValueInfo],
    order: &Order,
    ticket: &Ticket,
    pool: &SharedPool,
    limit: RunLimit,
) -> Result<(Ran, Vec<Segment>), Refused> {
    if ticket.is_cancelled() {
        return Err(cancelled());
    }
    let (inputs, extents) = lend(session, order)?;
    let wanted = wanted(outputs, &order.picks)?;
    extents.refuse_oversized(outputs, &wanted, limit)?;
    let work = Work {
        outputs,
        picks: &order.picks,
        wanted,
        extents,
        inputs,
        ticket,
        pool,
        limit,
    };
    let landing = Landing::plan(outputs, &work.wanted, extents, pool)?;
    let landed = landing.is_some();
    match work.run(session, landing) {
        // An output of another shape than expected cannot land; then the runtime finds room for all of them.
        Err(refused) if landed && refused.kind != Failure::Cancelled => work.run(session, None),
        done => done,
    }
}

/// A run that is to be made.
struct Work<'a> {
    outputs: &'a [ValueInfo],
    picks: &'a [Pick],
    wanted: Wanted<'a>,
    extents: Extents,
    inputs: Vec<(String, Lent)>,
    ticket: &'a Ticket,
    pool: &'a SharedPool,
    limit: RunLimit,
}

impl Work<'_> {
    fn run(
        &self,
        session: &mut Session,
        mut landing: Option<Landing>,
    ) -> Result<(Ran, Vec<Segment>), Refused> {
        let done = self.run_into(session, landing.as_mut());
        // The binding and what the run gave are gone: the landing is ours alone again.
        match done {
            Ok((ran, copies)) => {
                let landing = landing.map(|l| l.segment);
                let mut segments: Vec<Segment> = landing.into_iter().chain(copies).collect();
                segments.sort_by_key(|s| {
                    let of_this = |t: &TensorRef| t.span.is_some_and(|span| s.holds(&span));
                    ran.tensors.iter().position(of_this)
                });
                Ok((ran, segments))
            }
            Err(refused) => {
                if let Some(landing) = landing {
                    self.pool.with(|p| p.give_back(landing.segment));
                }
                Err(refused)
            }
        }
    }

    /// Runs, and copies into a segment what has not landed.
    fn run_into(
        &self,
        session: &mut Session,
        mut landing: Option<&mut Landing>,
    ) -> Result<(Ran, Option<Segment>), Refused> {
        let mut binding = session.create_binding()?;
        for (name, lent) in &self.inputs {
            binding.bind_input(name.as_str(), lent.value())?;
        }
        let host = MemoryInfo::default();
        for name in self.wanted.keys().copied() {
            let landed = match &mut landing {
                Some(landing) => landing.bind(name, &mut binding)?,
                None => false,
            };
            if !landed {
                binding.bind_output_to_device(name, &host)?;
            }
        }
        let started = Instant::now();
        let found = session
            .run_binding_with_options(&binding, &self.ticket.options)
            .map_err(|e| {
                if self.ticket.is_cancelled() {
                    cancelled()
                } else if e.code() == ort::ErrorCode::InvalidArgument {
                    Refused::invalid("inputs", tidy(e.message()))
                } else {
                    Refused::from(e)
                }
            })?;
        let run_micros = micros(started);
        let started = Instant::now();
        let (ran, copies) = self.pick(&found, landing)?;
        let ran = Ran {
            run_micros,
            copy_micros: micros(started),
            ..ran
        };
        Ok((ran, copies))
    }

    /// What the picks ask for: where it landed, or copied.
    fn pick(
        &self,
        found: &SessionOutputs<'_>,
        mut landing: Option<&mut Landing>,
    ) -> Result<(Ran, Option<Segment>), Refused> {
        let parts = self.parts(found, landing.as_deref())?;
        let copied = parts.iter().filter(|p| p.copy.is_some());
        let end = copied.map(|p| aligned(p.offset + p.length)).max();
        let copies = end.map(|end| self.pool.with(|p| p.take(end)));
        let mut copies = copies.transpose()?;
        let mut ran = Ran::default();
        for (at, part) in parts.into_iter().enumerate() {
            let info = &self.outputs[self.picks[at].output as usize];
            let segment = match part.copy {
                None => landing.as_deref_mut().map(|l| &mut l.segment),
                Some(_) => copies.as_mut(),
            };
            let segment = segment.ok_or_else(|| Refused::runtime("a pick without a segment"))?;
            let bytes = &mut segment.bytes_mut()[part.offset..part.offset + part.length];
            if let Some((from, shape)) = part.copy {
                part.cut.copy(from, &shape, part.dtype.size(), bytes);
            }
            if has_stray(part.dtype, bytes, info.axes.contains(&Axis::Query)) {
                ran.non_finite_picks.push(at as u32);
            }
            ran.tensors.push(TensorRef {
                name: info.name.clone(),
                dtype: part.dtype as u32,
                shape: part.cut.shape.iter().map(|d| *d as u64).collect(),
                span: Some(segment.span(part.offset, part.length)),
            });
        }
        Ok((ran, copies))
    }

    fn parts<'f>(
        &self,
        found: &'f SessionOutputs<'_>,
        landing: Option<&Landing>,
    ) -> Result<Vec<Part<'f>>, Refused> {
        let mut parts = Vec::with_capacity(self.picks.len());
        let (mut copied, mut total) = (0, 0);
        for (at, pick) in self.picks.iter().enumerate() {
            let info = &self.outputs[pick.output as usize];
            let cut = |shape: &[usize]| {
                Cut::plan(pick, &info.axes, shape, self.extents.batch)
                    .map_err(|why| Refused::invalid(format!("picks[{at}]"), why))
            };
            let part = if let Some(place) = landing.and_then(|l| l.place(&info.name)) {
                let cut = cut(&place.shape)?;
                let run = cut.run(&place.shape, place.dtype.size());
                let run = run.ok_or_else(|| Refused::runtime("a landed output in pieces"))?;
                Part {
                    cut,
                    dtype: place.dtype,
                    offset: place.offset + run.start,
                    length: run.len(),
                    copy: None,
                }
            } else {
                let value = found.get(&info.name).ok_or_else(|| {
                    Refused::runtime(format!("output \"{}\" is missing", info.name))
                })?;
                let (dtype, shape, bytes) = value::output(value).map_err(Refused::runtime)?;
                let cut = cut(&shape)?;
                let part = Part {
                    length: cut.elements() * dtype.size(),
                    cut,
                    dtype,
                    offset: copied,
                    copy: Some((bytes, shape)),
                };
                copied += aligned(part.length);
                part
            };
            total += aligned(part.length);
            parts.push(part);
        }
        if total as u64 > self.limit.0 {
            return Err(oversized(total as u64, self.limit));
        }
        Ok(parts)
    }
}

/// What a pick brings back.
struct Part<'f> {
    cut: Cut,
    dtype: DType,
    /// In its segment: the one of the copies, or the landing.
    offset: usize,
    length: usize,
    /// An output in the runtime's memory, with its shape.
    copy: Option<(&'f [u8], Vec<usize>)>,
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

// ------------------------------------------------------------------------------------------------ inputs

/// Rows and padded tokens of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extents {
    pub(super) batch: usize,
    pub(super) length: usize,
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

/// The outputs that are needed, by the runtime's name, and what is picked of each. Several descriptions may share an output: the logits
/// are an output and a hook point.
pub(super) type Wanted<'a> = BTreeMap<&'a str, Vec<&'a Pick>>;

fn wanted<'a>(outputs: &'a [ValueInfo], picks: &'a [Pick]) -> Result<Wanted<'a>, Refused> {
    let mut wanted = Wanted::new();
    for pick in picks {
        let output = outputs.get(pick.output as usize).ok_or_else(|| {
            let what = format!("output {} of {}", pick.output, outputs.len());
            Refused::invalid("picks", what)
        })?;
        wanted.entry(&output.name).or_default().push(pick);
    }
    if wanted.is_empty() {
        return Err(Refused::invalid("picks", "nothing is picked"));
    }
    Ok(wanted)
}

// ------------------------------------------------------------------------------------------------ estimate

impl Extents {
    /// Refuses before the run what is known to pass the limit: what the outputs hold, and what the picks bring back. Extents that are not
    /// known count as one, so that nothing is refused by a guess; the exact size is checked after the run.
    fn refuse_oversized(
        self,
        outputs: &[ValueInfo],
        wanted: &Wanted<'_>,
        limit: RunLimit,
    ) -> Result<(), Refused> {
        let whole = Pick {
            rows: u32::try_from(self.batch).unwrap_or(u32::MAX),
            keep_batch: true,
            ..Pick::default()
        };
        let of = |pick: &Pick| &outputs[pick.output as usize];
        let held = total(wanted.values().map(|p| self.bytes(of(p[0]), &whole)));
        let picks = wanted.values().flatten();
        let picked = total(picks.map(|p| self.bytes(of(p), p)));
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
    use ort::environment::Environment;

    use super::*;
    use crate::onnx::{Attribute, Folder, Limits, Model, Patch, Weights};

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
            let (outputs, picks) = ([pattern.clone()], [pick(&[3])]);
            let wanted = wanted(&outputs, &picks)?;
            extents.refuse_oversized(&outputs, &wanted, RunLimit(limit))
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

    fn environment() -> Environment {
        let library = crate::worker::runtime::probe(None).unwrap().library;
        let environment = ort::init_from(library).unwrap().with_telemetry(false);
        environment.build().unwrap()
    }

    /// A session of a fixture whose logits come out twice as wide as the description says, or as it says.
    fn classifier(environment: &Environment, twice: bool) -> (Session, ValueInfo) {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
        let folder = Folder::open(&root.join("bert.legacy14")).unwrap();
        let model = Model::open(&folder, "model.onnx", &Limits::default()).unwrap();
        let mut patch = Patch::new(&model.graph, "test");
        let logits = model.graph.outputs()[0].value;
        if twice {
            let wide = patch.op("Concat", &[logits, logits], vec![Attribute::int("axis", 1)]);
            patch.output(wide);
            patch.keep_outputs(&[wide]);
        }
        let model = model.with_graph(patch.apply().unwrap());
        let session = Session::builder(environment)
            .and_then(|mut b| b.commit_from_memory(&model.encode(Weights::Inline)))
            .unwrap();
        let info = ValueInfo {
            name: session.outputs()[0].name().to_owned(),
            dtype: DType::F32,
            axes: vec![Axis::Batch, Axis::Label],
            dims: vec![None, Some(3)],
        };
        (session, info)
    }

    fn run_of_two_rows((mut session, info): (Session, ValueInfo)) -> (Vec<u64>, Vec<f32>) {
        let inputs = session.inputs().iter().map(|input| {
            let cells: Vec<i64> = vec![1; 8];
            let tensor = TensorRef {
                name: input.name().to_owned(),
                dtype: DType::I64 as u32,
                shape: vec![2, 4],
                span: None,
            };
            (tensor, Bytes::copy_from_slice(bytemuck::cast_slice(&cells)))
        });
        let order = Order {
            inputs: inputs.collect(),
            lengths: Vec::new(),
            picks: vec![Pick {
                rows: 2,
                ..Pick::default()
            }],
        };
        let pool = SharedPool::new(1 << 20);
        let ticket = Ticket::new().unwrap();
        let limit = RunLimit(1 << 20);
        let (ran, mut segments) =
            run(&mut session, &[info], &order, &ticket, &pool, limit).unwrap();
        let mut segment = segments.pop().unwrap();
        assert!(segments.is_empty());
        let span = ran.tensors[0].span.unwrap();
        let at = span.offset as usize..(span.offset + span.length) as usize;
        let values = bytemuck::cast_slice(&segment.bytes_mut()[at]).to_vec();
        (ran.tensors[0].shape.clone(), values)
    }

    #[test]
    fn an_output_lands_and_one_of_an_unexpected_shape_is_copied() {
        let environment = environment();
        let (shape, landed) = run_of_two_rows(classifier(&environment, false));
        assert_eq!(shape, [2, 3]);
        let (shape, copied) = run_of_two_rows(classifier(&environment, true));
        assert_eq!(shape, [2, 6]);
        assert_eq!(landed[..3], copied[..3]);
        assert_eq!(landed[3..], copied[6..9]);
        assert!(landed.iter().all(|v| v.is_finite() && *v != 0.0));
    }
}
