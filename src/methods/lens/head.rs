//! States through the head of the model: its own final norm, pooler and unembedding, recomputed on every state.
//!
//! ```text
//!   state of layer l ──▶ in the place of the end ──▶ final norm, pooler, head ──▶ scores
//! ```
//!
//! A model with scores at every position reads every position of a state. A classifier reads a text: each position's vector is read as if it
//! were all of the text's last state, which for poolers that take the first, the last or the mean position is that vector through the pooler;
//! and the whole state is read once more as it is.
//!
//! What is read at the end is held against the model's own answer: a head that reads anything else has no lens.

use std::{collections::BTreeMap, ops::Range};

use super::{
    rows::Rows,
    stream::{SCORES, States, Stream},
    view::{Asked, View, Views, view},
};
use crate::{
    engine::{EngineError, PickSpec, RowGroup, RowsDone},
    ipc::spec::{VariantSpec, state_input},
    methods::{
        attribute::baseline::named,
        subject::{Queued, Subject, floats},
    },
    tensor::DType,
};

/// Most bytes of scores that one row brings, where rows can be made shorter.
const SCORES_AT_A_TIME: usize = 8 << 20;
/// Most bytes of inputs and scores of a job. Two jobs are there at a time: one runs while the next is made.
const BYTES_AT_A_TIME: usize = 32 << 20;
/// Most rows of a job.
const ROWS_AT_A_TIME: usize = 256;
/// Scores above so many bytes are read off the async threads.
const INLINE_BYTES: usize = 64 << 10;
/// Positions at which a head that reads every position is held against the model's own answer.
pub(super) const CHECKED: usize = 16;

/// The head of a model, and how it is fed.
#[derive(Clone, Debug)]
pub(super) struct Head {
    end: String,
    dtype: DType,
    width: usize,
    /// Positions of the row.
    length: usize,
    /// Whether it has scores at every position.
    by_position: bool,
    labels: usize,
    rows: Rows,
}

/// What the head says.
#[derive(Clone, Debug, Default)]
pub(super) struct Read {
    /// Of every position.
    pub(super) at: Views,
    /// Of whole states, for classifiers.
    pub(super) whole: Option<Views>,
}

/// A part of the work: one group of rows.
#[derive(Clone, Debug)]
struct Piece {
    state: usize,
    /// Which of the chosen positions; none for the whole state.
    places: Option<Range<usize>>,
}

/// The model's own scores, by the number of the chosen position; of classifiers under 0.
pub(super) type Own = BTreeMap<usize, Vec<f32>>;

impl Head {
    pub(super) fn of(
        subject: &Subject,
        stream: &Stream,
        states: &States,
        (by_position, labels): (bool, usize),
    ) -> Self {
        Self {
            end: stream.end().to_owned(),
            dtype: stream.dtype,
            width: stream.width,
            length: states.positions,
            by_position,
            labels,
            rows: Rows::of(subject, states.positions, stream.fixed),
        }
    }

    fn spec(&self) -> VariantSpec {
        VariantSpec {
            keep_outputs: false,
            enter: [self.end.clone()].into(),
            ..VariantSpec::exposing([SCORES])
        }
    }

    /// The work for so many states at so many positions.
    fn pieces(&self, states: usize, positions: usize) -> Vec<Piece> {
        let of_scores = self.labels.max(1) * size_of::<f32>();
        let of_state = self.length.max(1) * self.width.max(1) * size_of::<f32>();
        let chunk = match (self.by_position, self.rows) {
            (true, rows) if rows.short => SCORES_AT_A_TIME / of_scores,
            (true, _) => positions,
            (false, rows) if rows.alone => 1,
            (false, rows) if rows.short => ROWS_AT_A_TIME,
            (false, _) => BYTES_AT_A_TIME / of_state,
        };
        let chunk = chunk.clamp(1, positions.max(1));
        let mut pieces = Vec::new();
        for state in 0..states {
            for from in (0..positions).step_by(chunk) {
                pieces.push(Piece {
                    state,
                    places: Some(from..positions.min(from + chunk)),
                });
            }
            if !self.by_position {
                pieces.push(Piece {
                    state,
                    places: None,
                });
            }
        }
        pieces
    }

    /// Rows that reading so many states at so many positions takes.
    pub(super) fn cost(&self, states: usize, positions: usize) -> usize {
        let pieces = self.pieces(states, positions);
        let rows = |piece: &Piece| match &piece.places {
            Some(places) if !self.by_position => places.len(),
            Some(_) | None => 1,
        };
        pieces.iter().map(rows).sum()
    }

    /// Most bytes of scores that a row brings.
    pub(super) fn row_bytes(&self, positions: usize) -> usize {
        let places = match (self.by_position, self.rows.short) {
            (true, false) => positions,
            (true, true) | (false, _) => 1,
        };
        places
            .saturating_mul(self.labels)
            .saturating_mul(size_of::<f32>())
    }

    /// A group of rows whose end is a state, or a part of it.
    fn group(
        &self,
        subject: &Subject,
        state: &[f32],
        at: Option<&[u32]>,
    ) -> Result<RowGroup, EngineError> {
        let vector = |position: u32| {
            let from = position as usize * self.width;
            state
                .get(from..from + self.width)
                .ok_or_else(|| EngineError::internal(format!("a state has no position {position}")))
        };
        let short = self.rows.short;
        let mut picked = Vec::new();
        let (rows, length, values) = match at {
            None => (1, self.length, state.to_vec()),
            Some(at) if self.by_position => {
                if short {
                    let vectors = at
                        .iter()
                        .map(|p| vector(*p))
                        .collect::<Result<Vec<_>, _>>()?;
                    (1, at.len(), vectors.concat())
                } else {
                    picked = at.to_vec();
                    (1, self.length, state.to_vec())
                }
            }
            Some(at) => {
                let length = if short { 1 } else { self.length };
                let mut values = Vec::with_capacity(at.len() * length * self.width);
                for position in at {
                    values.extend(vector(*position)?.repeat(length));
                }
                (at.len(), length, values)
            }
        };
        let input = named(
            &state_input(&self.end),
            vec![rows, length, self.width],
            &values,
            self.dtype,
        )?;
        let pick = PickSpec {
            output: SCORES.to_owned(),
            positions: picked,
            ..PickSpec::default()
        };
        let rows_of = Rows {
            // A whole state comes with the inputs of the row.
            short: short && at.is_some(),
            ..self.rows
        };
        rows_of.group(subject, (rows, length), vec![input], vec![pick])
    }

    /// Reads states at these positions. `own` is what the model itself says there of the last one.
    ///
    /// # Errors
    /// [`EngineError::FailedPrecondition`] when the last state does not give the model's own answer; those of the runs.
    pub(super) async fn read(
        &self,
        subject: &mut Subject,
        states: &States,
        positions: &[u32],
        (asked, own): (&Asked, &Own),
    ) -> Result<Read, EngineError> {
        let count = states.values.len();
        let mut read = Read {
            at: Views::new(count, positions.len(), self.labels, asked),
            whole: (!self.by_position).then(|| Views::new(count, 1, self.labels, asked)),
        };
        let pieces = self.pieces(count, positions.len());
        let mut left = &pieces[..];
        let mut ahead: Option<(Queued, &[Piece])> = None;
        loop {
            let (now, rest) = left.split_at(self.at_a_time(left));
            left = rest;
            let next = if now.is_empty() {
                None
            } else {
                let groups = now.iter().map(|piece| {
                    let at = piece.places.clone().map(|places| &positions[places]);
                    self.group(subject, &states.values[piece.state], at)
                });
                let groups = groups.collect::<Result<Vec<_>, _>>()?;
                let queued = subject.submit(self.spec(), groups, ahead.is_some()).await?;
                Some((queued, now))
            };
            let ended = next.is_none();
            if let Some((mut queued, pieces)) = std::mem::replace(&mut ahead, next) {
                while let Some(done) = subject.next(&mut queued).await? {
                    let piece = &pieces[done.group];
                    let own = (piece.state + 1 == count).then_some(own);
                    self.take(&mut read, (piece, &done), (asked, own)).await?;
                }
            }
            if ended {
                return Ok(read);
            }
        }
    }

    /// How many pieces go into a job: at least one, if there is any.
    fn at_a_time(&self, pieces: &[Piece]) -> usize {
        let (mut rows, mut bytes) = (0, 0);
        for (count, piece) in pieces.iter().enumerate() {
            let places = piece.places.as_ref().map_or(1, Range::len);
            let each = !self.by_position && piece.places.is_some();
            let vectors = match (self.rows.short, each) {
                (true, _) if piece.places.is_some() => places,
                (true, _) | (false, false) => self.length,
                (false, true) => places * self.length,
            };
            rows += if each { places } else { 1 };
            bytes += (places * self.labels + vectors * self.width) * size_of::<f32>();
            if count > 0 && (rows > ROWS_AT_A_TIME || bytes > BYTES_AT_A_TIME) {
                return count;
            }
        }
        pieces.len()
    }

    /// Takes what came back for some rows of a piece.
    async fn take(
        &self,
        read: &mut Read,
        (piece, done): (&Piece, &RowsDone),
        (asked, own): (&Asked, Option<&Own>),
    ) -> Result<(), EngineError> {
        let scores = floats(&done.tensors, 0)?;
        let labels = self.labels.max(1);
        if scores.len() % labels != 0 {
            return Err(EngineError::internal("scores of another width"));
        }
        let first = match &piece.places {
            None => 0,
            Some(places) if self.by_position => places.start,
            Some(places) => places.start + done.rows.start,
        };
        let held = self.by_position || piece.places.is_none();
        for (row, mine) in scores.chunks_exact(labels).enumerate() {
            if let Some(own) = own.filter(|_| held).and_then(|own| own.get(&(first + row))) {
                self.same(mine, own)?;
            }
        }
        let views = views(scores, labels, asked).await?;
        let into = match (&piece.places, &mut read.whole) {
            (None, Some(whole)) => whole,
            (Some(_) | None, _) => &mut read.at,
        };
        for (row, view) in views.iter().enumerate() {
            into.put(piece.state, first + row, view);
        }
        Ok(())
    }

    /// Holds what the head says of the end against what the model says.
    fn same(&self, scores: &[f32], own: &[f32]) -> Result<(), EngineError> {
        let off = distance(scores, own);
        let allowed = tolerance(self.dtype);
        if off <= allowed {
            return Ok(());
        }
        Err(EngineError::precondition(format!(
            "the model's answer is no function of \"{}\" alone: put back there, it gives scores that are {off:.1e} off where \
             {allowed:.0e} is allowed, and there is no lens",
            self.end
        )))
    }

    /// What the head says of nothing: the scores of a state of zeros at these positions, `[position, label]` or `[label]`.
    ///
    /// # Errors
    /// Those of the run.
    pub(super) async fn of_nothing(
        &self,
        subject: &mut Subject,
        positions: &[u32],
    ) -> Result<Vec<f32>, EngineError> {
        let state = vec![0.0; self.length * self.width];
        let at = self.by_position.then_some(positions);
        let group = self.group(subject, &state, at)?;
        let mut queued = subject.submit(self.spec(), vec![group], true).await?;
        let mut scores = Vec::new();
        while let Some(done) = subject.next(&mut queued).await? {
            scores = floats(&done.tensors, 0)?;
        }
        Ok(scores)
    }
}

/// Reads many scores.
async fn views(scores: Vec<f32>, labels: usize, asked: &Asked) -> Result<Vec<View>, EngineError> {
    let small = scores.len() * size_of::<f32>() <= INLINE_BYTES;
    let asked = asked.clone();
    let all = move || -> Vec<View> {
        let rows = scores.chunks_exact(labels);
        rows.map(|row| view(row, &asked)).collect()
    };
    if small {
        return Ok(all());
    }
    tokio::task::spawn_blocking(all)
        .await
        .map_err(EngineError::internal)
}

/// Largest difference, relative to the largest magnitude. What is the same infinity is the same.
pub(in crate::methods) fn distance(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    let (mut off, mut size) = (0f64, f64::MIN_POSITIVE);
    for (x, y) in a.iter().zip(b) {
        if x == y || (x.is_nan() && y.is_nan()) {
            if y.is_finite() {
                size = size.max(f64::from(y.abs()));
            }
            continue;
        }
        let apart = (f64::from(*x) - f64::from(*y)).abs();
        if !apart.is_finite() {
            return f64::INFINITY;
        }
        off = off.max(apart);
        size = size.max(f64::from(y.abs()));
    }
    off / size
}

/// How far the same mathematics by other operators may be apart, in this arithmetic: `Rewritten`, or `Half`.
pub(in crate::methods) fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 | DType::Bf16 => 2e-2,
        DType::F32
        | DType::F64
        | DType::I8
        | DType::I16
        | DType::I32
        | DType::I64
        | DType::U8
        | DType::U16
        | DType::U32
        | DType::U64
        | DType::Bool => 1e-4,
    }
}
