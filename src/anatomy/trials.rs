//! Seeded inputs for the runs that measure a model, and what the runs showed.
//!
//! Every plan has three runs whose batch and length differ such that an axis that follows one of them can be told
//! from every fixed one. The rows carry relations that tell folded axes apart and show what padding does:
//! - run [`Trials::TWINS`]: its last row equals its first, and its second differs;
//! - run [`Trials::PADDED`]: its second row is the second row of the twins, padded at the end under a zero mask.
//!
//! A sequence beside the tokens (an encoder's) has a length of its own, the same in these two runs and another in the first, unless
//! the model wants it as long as the tokens.

use std::collections::BTreeMap;

use super::{
    inputs::{InputTrace, is_integer},
    trace::Trace,
};
use crate::{
    ipc::info::InputRole,
    onnx::{Dim, ValueId},
    tensor::{DType, Tensor},
};

/// Inputs of one run.
#[derive(Clone, Debug)]
pub struct TrialRun {
    /// Rows.
    pub batch: usize,
    /// Tokens per row; for inputs that are no tokens, whatever stands for it.
    pub length: usize,
    /// Named inputs, all that the model has.
    pub inputs: Vec<(String, Tensor)>,
}

/// Three runs to measure a model by. Several plans are offered since a model may refuse some lengths, or a mask may mean
/// the opposite: [`measure`] takes the first that tells something.
#[derive(Clone, Debug)]
pub struct TrialPlan {
    /// The runs.
    pub runs: Vec<TrialRun>,
    /// What the mask inputs hold for tokens: 1 as most, 0 where a mask marks padding.
    pub mask_of_tokens: u8,
}

/// What the runs of a plan showed.
#[derive(Clone, Debug)]
pub struct Trials {
    /// The plan that was run.
    pub plan: TrialPlan,
    values: Vec<BTreeMap<ValueId, Tensor>>,
}

impl Trials {
    /// Run whose last row equals its first.
    pub const TWINS: usize = 1;
    /// Run whose second row is padded.
    pub const PADDED: usize = 2;

    /// Of a model that could not be run.
    pub fn none() -> Self {
        Self::new(TrialPlan {
            runs: Vec::new(),
            mask_of_tokens: 1,
        })
    }

    /// Nothing seen yet.
    pub fn new(plan: TrialPlan) -> Self {
        let values = vec![BTreeMap::new(); plan.runs.len()];
        Trials { plan, values }
    }

    /// Notes what a run showed of a value.
    pub fn record(&mut self, run: usize, value: ValueId, tensor: Tensor) {
        if let Some(values) = self.values.get_mut(run) {
            values.insert(value, tensor);
        }
    }

    /// With the constants of a trace, which every run shows alike.
    fn knowing(mut self, trace: &Trace) -> Self {
        for run in &mut self.values {
            run.extend(trace.constants.iter().cloned());
        }
        self
    }

    /// What a run showed of a value.
    pub fn value(&self, run: usize, value: ValueId) -> Option<&Tensor> {
        self.values.get(run)?.get(&value)
    }

    /// A value in all runs; nothing when one did not show it, or there were none.
    pub fn all(&self, value: ValueId) -> Option<Vec<&Tensor>> {
        let all: Vec<&Tensor> = (0..self.values.len())
            .map(|run| self.value(run, value))
            .collect::<Option<_>>()?;
        (!all.is_empty()).then_some(all)
    }

    /// Whether the runs tell something: the attentions hold numbers and do not look everywhere alike, as they would if
    /// everything were masked.
    pub fn telling(&self, trace: &Trace) -> bool {
        let patterns: Vec<&Tensor> = trace
            .attentions
            .iter()
            .filter_map(|a| self.value(Self::TWINS, a.softmax.output))
            .collect();
        let varied = patterns.iter().any(|p| {
            let seen = p.to_f32().unwrap_or_default();
            let keys = p.shape().last().copied().unwrap_or(1).max(1);
            seen.iter().all(|x| !x.is_nan())
                && seen
                    .chunks(keys)
                    .any(|row| row.iter().any(|x| *x != 0.0 && (x - row[0]).abs() > 1e-6))
        });
        patterns.is_empty() || varied
    }

    /// Rows of each run.
    pub fn batches(&self) -> Vec<usize> {
        self.plan.runs.iter().map(|r| r.batch).collect()
    }

    /// Tokens per row of each run.
    pub fn lengths(&self) -> Vec<usize> {
        self.plan.runs.iter().map(|r| r.length).collect()
    }

    /// Number of runs.
    pub fn runs(&self) -> usize {
        self.plan.runs.len()
    }
}

/// Measures a model: the trials of the first plan that runs and tells something. `run` makes the runs of one plan; an
/// error (the model refuses these sizes) leads to the next plan, and the last error comes back when none is left.
pub fn measure(
    trace: &Trace,
    mut run: impl FnMut(TrialPlan) -> Result<Trials, String>,
) -> Result<Trials, String> {
    let mut last = String::from("no trial input could be made");
    let mut ran: Option<Trials> = None;
    for plan in trial_plans(trace) {
        match run(plan).map(|trials| trials.knowing(trace)) {
            Ok(trials) if trials.telling(trace) => return Ok(trials),
            // Once sizes are found, the other reading of the mask is all there is to try.
            Ok(trials) => match ran {
                Some(first) => return Ok(first),
                None => ran = Some(trials),
            },
            Err(why) => last = why,
        }
    }
    ran.ok_or(last)
}

/// The plans to try, likeliest first: free sizes, then sizes that the graph itself writes down.
pub fn trial_plans(trace: &Trace) -> impl Iterator<Item = TrialPlan> + '_ {
    const MAX_WRITTEN: usize = 24;
    let fixed = Fixed::of(trace);
    let main = main_input(trace);
    let lengths: &[(usize, usize)] = match main {
        _ if fixed.length.is_some() => &[(0, 0)],
        Some(i) if i.role == InputRole::TokenIds && trace.divides => {
            &[(64, 128), (16, 32), (7, 11)]
        }
        Some(i) if i.role == InputRole::TokenIds => &[(7, 11), (16, 32), (64, 128)],
        // Pictures whose size the file leaves open.
        Some(i) if i.dims.len() == 4 => &[(32, 32), (224, 224), (64, 64), (384, 384)],
        // Waves and spectra.
        _ => &[
            (1600, 2400),
            (64, 96),
            (7, 11),
            (400, 656),
            (16000, 24000),
            (3000, 3000),
        ],
    };
    let batches: &[[usize; 3]] = if fixed.batch.is_some() {
        &[[0; 3]]
    } else {
        &[[2, 3, 3], [1, 1, 1]]
    };
    // Behind an input that is no tokens, a token may have been put in front.
    let ahead = usize::from(main.is_some_and(|i| i.role == InputRole::Pixels));
    let written: Vec<usize> = trace
        .written_sizes
        .iter()
        .take(MAX_WRITTEN)
        .flat_map(|n| (0..=ahead).map(move |k| n - k))
        .collect();
    let mut sizes: Vec<([usize; 3], [usize; 3])> = Vec::new();
    for batch in batches {
        sizes.extend(
            lengths
                .iter()
                .map(|(short, long)| (*batch, [*short, *short, *long])),
        );
    }
    if fixed.length.is_none() {
        for batch in batches {
            sizes.extend(written.iter().map(|n| (*batch, [*n; 3])));
        }
    }
    if fixed.batch.is_none() {
        let few = |most: usize| written.iter().copied().filter(move |n| *n < most);
        sizes.extend(few(64).map(|n| ([n; 3], [7, 7, 11])));
        if fixed.length.is_none() {
            sizes.extend(few(16).flat_map(|b| written.iter().map(move |l| ([b; 3], [*l; 3]))));
        }
    }
    let masks: &[u8] = if trace
        .inputs
        .iter()
        .any(|i| i.role == InputRole::AttentionMask)
    {
        &[1, 0]
    } else {
        &[1]
    };
    let apart: &[bool] = if trace.inputs.iter().any(|i| i.apart) {
        &[true, false]
    } else {
        &[false]
    };
    sizes.into_iter().flat_map(move |(batch, length)| {
        let sizes: Vec<(usize, usize)> = batch
            .into_iter()
            .zip(length)
            .map(|(b, l)| (fixed.batch.unwrap_or(b), fixed.length.unwrap_or(l)))
            .collect();
        apart.iter().flat_map(move |apart| {
            let sizes = Sizes::of(&sizes, *apart);
            masks
                .iter()
                .filter_map(move |mask| plan(trace, *mask, &sizes))
        })
    })
}

/// Extents of one run.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    length: usize,
    /// Length of a sequence beside the tokens.
    other: usize,
}

impl Sizes {
    /// Of all runs; a sequence apart is long where the tokens are short and short where they are padded.
    fn of(runs: &[(usize, usize)], apart: bool) -> Vec<Sizes> {
        let shortest = runs.iter().map(|(_, length)| *length).min().unwrap_or(1);
        let longest = runs.iter().map(|(_, length)| *length).max().unwrap_or(1);
        runs.iter()
            .enumerate()
            .map(|(run, (batch, length))| Sizes {
                batch: *batch,
                length: *length,
                other: match (apart, run) {
                    (false, _) => *length,
                    (true, 0) => longest,
                    (true, _) => shortest,
                },
            })
            .collect()
    }
}

fn main_input(trace: &Trace) -> Option<&InputTrace> {
    trace
        .inputs
        .iter()
        .find(|i| matches!(i.role, InputRole::TokenIds | InputRole::Pixels))
}

/// Extents that the inputs leave no choice of.
#[derive(Clone, Copy)]
struct Fixed {
    batch: Option<usize>,
    length: Option<usize>,
}

impl Fixed {
    fn of(trace: &Trace) -> Self {
        let main = main_input(trace);
        let extent = |axis: usize| match main?.dims.get(axis)? {
            Dim::Fixed(n) => usize::try_from(*n).ok(),
            Dim::Named(_) | Dim::Unknown => None,
        };
        let length = match main {
            Some(i) if i.role == InputRole::Pixels => i
                .dims
                .iter()
                .skip(1)
                .all(|d| matches!(d, Dim::Fixed(_)))
                .then_some(1),
            _ => extent(1),
        };
        Fixed {
            batch: extent(0),
            length,
        }
    }
}

/// Most elements of an input in a trial: a file may declare any extent.
const MAX_ELEMENTS: usize = 1 << 25;

/// The plan of one choice of sizes; none when the file declares inputs too large to be tried.
fn plan(trace: &Trace, mask_of_tokens: u8, sizes: &[Sizes]) -> Option<TrialPlan> {
    let mut runs: Vec<TrialRun> = Vec::new();
    for (run, size) in sizes.iter().enumerate() {
        let Sizes { batch, length, .. } = *size;
        let mut inputs = Vec::new();
        for input in &trace.inputs {
            let shape = shape(trace, input, *size);
            shape
                .iter()
                .try_fold(1usize, |n, extent| n.checked_mul(*extent))
                .filter(|n| *n <= MAX_ELEMENTS)?;
            let mut tensor = fill(input, run, mask_of_tokens, &shape);
            if run == Trials::TWINS && batch > 2 && shape.first() == Some(&batch) {
                tensor = copy_row(&tensor, 0, batch - 1);
            }
            if run == Trials::PADDED && batch > 1 && length > sizes[Trials::TWINS].length {
                let twins = &runs[Trials::TWINS];
                if let Some((_, short)) = twins.inputs.iter().find(|(n, _)| *n == input.name) {
                    let mask = input.role == InputRole::AttentionMask;
                    tensor = pad_row(&tensor, short, mask.then_some(1 - mask_of_tokens));
                }
            }
            inputs.push((input.name.clone(), tensor));
        }
        runs.push(TrialRun {
            batch,
            length,
            inputs,
        });
    }
    Some(TrialPlan {
        runs,
        mask_of_tokens,
    })
}

/// Extents of an input: declared numbers as they are, equal names equal extents, the rest by position.
fn shape(trace: &Trace, input: &InputTrace, sizes: Sizes) -> Vec<usize> {
    let Sizes {
        batch,
        length,
        other,
    } = sizes;
    let main = main_input(trace);
    let named = |dim: &Dim| -> Option<usize> {
        let Dim::Named(_) = dim else { return None };
        let main = main?;
        let at = main.dims.iter().position(|d| d == dim)?;
        Some(match at {
            0 => batch,
            _ => length,
        })
    };
    let rank = input.dims.len();
    input
        .dims
        .iter()
        .enumerate()
        .map(|(axis, dim)| match dim {
            Dim::Fixed(n) => usize::try_from(*n).unwrap_or(1),
            Dim::Named(_) | Dim::Unknown => match (input.role, axis) {
                (_, 0) => batch,
                _ if input.past => 0,
                // Channels of pictures.
                (InputRole::Pixels, 1) if rank == 4 => 3,
                _ => named(dim).unwrap_or(if input.apart { other } else { length }),
            },
        })
        .collect()
}

fn fill(input: &InputTrace, run: usize, mask_of_tokens: u8, shape: &[usize]) -> Tensor {
    let count: usize = shape.iter().product();
    let mut random = Random::new(&input.name, run);
    let mut ids = |rows: usize| -> Vec<f64> {
        // Special tokens stand at the front of most vocabularies; keep clear of them.
        let low = (rows / 4).min(1000);
        (0..count)
            .map(|_| (low + random.below(rows - low)) as f64)
            .collect()
    };
    let values: Vec<f64> = match input.role {
        InputRole::TokenIds => ids(input.rows.unwrap_or(2).max(2)),
        InputRole::Other if input.rows.is_some_and(|rows| rows > 0) => ids(input.rows.unwrap_or(1)),
        InputRole::AttentionMask => vec![f64::from(mask_of_tokens); count],
        InputRole::TypeIds => {
            let rows = input.rows.unwrap_or(1).clamp(1, 2);
            (0..count).map(|_| random.below(rows) as f64).collect()
        }
        InputRole::PositionIds => {
            let width = shape.last().copied().unwrap_or(1).max(1);
            (0..count).map(|i| (i % width) as f64).collect()
        }
        InputRole::Pixels => (0..count).map(|_| random.normal()).collect(),
        InputRole::Past => Vec::new(),
        InputRole::Other if is_integer(input.dtype) => vec![1.0; count],
        InputRole::Other => (0..count).map(|_| 1.0).collect(),
    };
    tensor(input.dtype, shape, &values)
}

fn tensor(dtype: DType, shape: &[usize], values: &[f64]) -> Tensor {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    // small numbers by construction
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|v| match dtype {
            DType::F32 => (*v as f32).to_le_bytes().to_vec(),
            DType::F64 => v.to_le_bytes().to_vec(),
            DType::F16 => half::f16::from_f64(*v).to_le_bytes().to_vec(),
            DType::Bf16 => half::bf16::from_f64(*v).to_le_bytes().to_vec(),
            DType::I64 | DType::U64 => (*v as i64).to_le_bytes().to_vec(),
            DType::I32 | DType::U32 => (*v as i32).to_le_bytes().to_vec(),
            DType::I16 | DType::U16 => (*v as i16).to_le_bytes().to_vec(),
            DType::I8 | DType::U8 | DType::Bool => vec![*v as u8],
        })
        .collect();
    Tensor::new(dtype, shape.to_vec(), bytes.into()).expect("one element for every value")
}

/// The tensor with row `to` equal to row `from`.
fn copy_row(tensor: &Tensor, from: usize, to: usize) -> Tensor {
    let rows = tensor.shape()[0];
    let size = tensor.bytes().len() / rows.max(1);
    let mut bytes = tensor.bytes().to_vec();
    bytes.copy_within(from * size..(from + 1) * size, to * size);
    Tensor::new(tensor.dtype(), tensor.shape().to_vec(), bytes.into())
        .expect("the shape is unchanged")
}

/// The tensor with its row 1 begun by row 1 of a shorter one; behind it a mask holds the mark of padding.
fn pad_row(tensor: &Tensor, short: &Tensor, mask: Option<u8>) -> Tensor {
    let (long_shape, short_shape) = (tensor.shape(), short.shape());
    if long_shape.len() != 2 || short_shape.len() != 2 || short_shape[0] < 2 {
        return tensor.clone();
    }
    let size = tensor.dtype().size();
    let (long, short_len) = (long_shape[1] * size, short_shape[1] * size);
    let mut bytes = tensor.bytes().to_vec();
    let kept = short_len.min(long);
    bytes[long..long + kept].copy_from_slice(&short.bytes()[short_len..short_len + kept]);
    if let Some(mark) = mask {
        let marks = self::tensor(
            tensor.dtype(),
            &[long_shape[1]],
            &vec![f64::from(mark); long_shape[1]],
        );
        bytes[long + kept..2 * long].copy_from_slice(&marks.bytes()[kept..]);
    }
    Tensor::new(tensor.dtype(), long_shape.to_vec(), bytes.into()).expect("the shape is unchanged")
}

/// splitmix64: small, seeded, the same on every machine.
struct Random(u64);

impl Random {
    fn new(name: &str, run: usize) -> Self {
        let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
        });
        Random(seed.wrapping_add(run as u64))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % (n.max(1) as u64)) as usize
    }

    /// In [0, 1).
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Normal, by Box and Muller.
    fn normal(&mut self) -> f64 {
        let (u, v) = (self.unit().max(1e-12), self.unit());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }
}
