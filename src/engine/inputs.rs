//! A model's inputs: what a row group must bring, what is filled in, and how rows of many groups become one padded tensor.
//!
//! [`ModelInputs`] is read off a [`ModelInfo`] once per loaded model. [`ModelInputs::check`] turns a [`RowGroup`] into [`Rows`]: every input
//! present, of the right dtype and extents, token ids inside the vocabulary. Only [`Rows`] can be queued. [`ModelInputs::assemble`]
//! plans the tensors of a run; their bytes are written straight into the memory that the worker reads (one copy).
//!
//! A variant may have inputs beside those of the model: [`ModelInputs::of_variant`]. Those that move a hook point broadcast: along any axis
//! but the batch they may have an extent of one. Left out, they move nothing. Those at which a run begins are whole, and must be given.
//!
//! Padding: token ids with the pad id, operands of edits with what changes nothing, everything else with zeros, so that the mask hides it. Rows that a model of
//! fixed batch size wants beyond those that are there repeat the last row (a row of zeros would have nothing to attend to).

use std::{ops::Range, sync::Arc};

use super::{
    error::EngineError,
    request::{NamedTensor, RowGroup},
};
use crate::{
    ipc::{
        info::{Axis, HookInfo, InputInfo, InputRole, ModelInfo},
        spec::{
            Reduction, TARGET_LABEL, TARGET_POSITION, TARGET_READOUT, TARGET_WEIGHT, VariantSpec,
            state_input,
        },
    },
    tensor::{DType, Tensor},
};

/// See the module.
#[derive(Clone, Debug)]
pub struct ModelInputs {
    inputs: Arc<[Input]>,
    pads: bool,
    pad_id: i64,
    vocab: Option<usize>,
    max_tokens: Option<usize>,
    fixed_batch: Option<usize>,
    rows_interact: bool,
    fixed_length: Option<usize>,
    /// Tokens that a row without token axis counts for.
    row_tokens: usize,
}

#[derive(Clone, Debug)]
struct Input {
    name: String,
    dtype: DType,
    role: InputRole,
    /// Axis 0 is the batch.
    batched: bool,
    token_axis: Option<usize>,
    /// Extent that the model demands of each axis.
    fixed: Vec<Option<usize>>,
    /// Along any axis but the batch an extent of one stands for all.
    broadcasts: bool,
    /// What stands everywhere when it is left out, and in the padding; without it, the role decides.
    rest: Option<f32>,
}

/// A checked row group: one tensor per input, in the order of the inputs.
#[derive(Clone, Debug)]
pub struct Rows {
    inputs: Arc<[Input]>,
    tensors: Vec<Tensor>,
    /// How many.
    pub rows: usize,
    /// Tokens of each, before padding; 0 without token axis.
    pub length: usize,
    /// What a row costs, in tokens.
    pub cost: usize,
    /// Rows with the same signature may share a run.
    pub signature: Arc<[u64]>,
    /// The whole group is one run.
    pub alone: bool,
}

/// Rows of a checked group that take part in a run.
#[derive(Clone, Debug)]
pub struct Slice<'a> {
    /// The group.
    pub rows: &'a Rows,
    /// Which of its rows.
    pub range: Range<usize>,
}

/// A tensor of a run, to be written.
#[derive(Debug)]
pub struct Planned<'a> {
    /// Name of the input.
    pub name: &'a str,
    /// Its dtype.
    pub dtype: DType,
    /// Its padded shape.
    pub shape: Vec<usize>,
    index: usize,
    input: &'a Input,
    slices: &'a [Slice<'a>],
    longest: usize,
    /// What stands in the padding, in the bytes of the dtype; the first `dtype.size()` of eight.
    pad: [u8; 8],
}

impl ModelInputs {
    /// Reads the inputs off the model's info.
    pub fn new(info: &ModelInfo) -> Self {
        let inputs = info.inputs.iter().map(Input::new).collect();
        let vocab = info.dims.vocab;
        // Without a token axis a row counts as many tokens as positions inside the model, as far as they are fixed.
        let row_tokens = info
            .hooks
            .iter()
            .filter_map(|h| {
                let at = h.axes.iter().position(|a| *a == Axis::Pos)?;
                *h.dims.get(at)?
            })
            .max()
            .unwrap_or(1);
        Self {
            inputs,
            pads: info.pads,
            pad_id: info.tokenizer.as_ref().map_or(0, |t| i64::from(t.pad_id)),
            vocab,
            max_tokens: info.max_tokens,
            fixed_batch: info.fixed_batch,
            rows_interact: info.rows_interact,
            fixed_length: info.fixed_length,
            row_tokens,
        }
    }

    /// The inputs of a variant: those of the model, those that move hook points, those that say what is differentiated.
    ///
    /// # Errors
    /// [`EngineError::FailedPrecondition`] for a hook point whose axes nobody knows.
    pub fn of_variant(&self, spec: &VariantSpec, info: &ModelInfo) -> Result<Self, EngineError> {
        if spec.edit.is_empty()
            && spec.intervene.is_empty()
            && spec.enter.is_empty()
            && spec.gradient.is_none()
        {
            return Ok(self.clone());
        }
        let mut inputs = self.inputs.to_vec();
        let hook = |name: &str| {
            info.hook(name).ok_or_else(|| {
                EngineError::precondition(format!(
                    "\"{name}\" cannot be moved, entered at or differentiated by: it is no hook point of model \"{}\"",
                    info.name
                ))
            })
        };
        for (name, stages) in &spec.edit {
            let hook = hook(name)?;
            for (number, stage) in stages.iter().enumerate() {
                for (input, rest) in stage.inputs(number, name) {
                    inputs.push(Input::moving(input, hook, Some(rest)));
                }
            }
        }
        for name in &spec.intervene {
            let hook = hook(name)?;
            inputs.push(Input::moving(format!("scale:{name}"), hook, Some(1.0)));
            inputs.push(Input::moving(format!("shift:{name}"), hook, Some(0.0)));
        }
        for name in &spec.enter {
            inputs.push(Input {
                broadcasts: false,
                ..Input::moving(state_input(name), hook(name)?, None)
            });
        }
        if let Some(gradient) = &spec.gradient {
            inputs.push(if gradient.of.reads_out() {
                Input::of_terms(TARGET_READOUT, DType::F32)
            } else {
                Input::of_terms(TARGET_LABEL, DType::I64)
            });
            inputs.push(Input::of_terms(TARGET_WEIGHT, DType::F32));
            if gradient.at.is_some() || info.main_output_has_positions() {
                inputs.push(Input::of_terms(TARGET_POSITION, DType::I64));
            }
            for (name, reduction) in &gradient.points {
                if *reduction == Reduction::Dot {
                    let direction = format!("direction:{name}");
                    inputs.push(Input::moving(direction, hook(name)?, None));
                }
            }
        }
        Ok(Self {
            inputs: inputs.into(),
            ..self.clone()
        })
    }

    /// Rows that every run of this model must have, where its graph fixes them.
    pub fn fixed_batch(&self) -> Option<usize> {
        self.fixed_batch
    }

    /// Whether rows of different lengths may share a run.
    pub fn pads(&self) -> bool {
        self.pads
    }

    /// Checks a group and fills in what may be left out. `field` is the path of the group in messages.
    pub fn check(&self, group: &RowGroup, field: &str) -> Result<Rows, EngineError> {
        if group.rows == 0 {
            return Err(EngineError::invalid(
                field,
                "has no rows: give at least one",
            ));
        }
        let mut given: Vec<Option<&NamedTensor>> = vec![None; self.inputs.len()];
        for named in &group.inputs {
            let Some(at) = self.inputs.iter().position(|i| i.name == named.name) else {
                return Err(EngineError::invalid(
                    format!("{field}.{}", named.name),
                    format!(
                        "the model has no input \"{}\": it has {}",
                        named.name,
                        self.names()
                    ),
                ));
            };
            if given[at].replace(named).is_some() {
                return Err(EngineError::invalid(
                    format!("{field}.{}", named.name),
                    format!("input \"{}\" is given twice", named.name),
                ));
            }
        }
        let mut length = group.length;
        for (input, named) in self.inputs.iter().zip(&given) {
            if let Some(named) = named {
                input
                    .check(&named.tensor, group.rows, &mut length)
                    .map_err(|message| {
                        EngineError::invalid(format!("{field}.{}", input.name), message)
                    })?;
            }
        }
        self.check_length(length, field)?;
        let mut tensors = Vec::with_capacity(given.len());
        for (input, named) in self.inputs.iter().zip(&given) {
            tensors.push(match named {
                Some(named) => {
                    if input.role == InputRole::TokenIds {
                        self.check_ids(&named.tensor).map_err(|message| {
                            EngineError::invalid(format!("{field}.{}", input.name), message)
                        })?;
                    }
                    named.tensor.clone()
                }
                None => input.fill(group.rows, length).ok_or_else(|| {
                    EngineError::invalid(
                        format!("{field}.{}", input.name),
                        format!(
                            "input \"{}\" ({}) is missing and cannot be filled in: give it as a tensor, beside the other inputs",
                            input.name, input.dtype
                        ),
                    )
                })?,
            });
        }
        let alone = self.inputs.iter().any(|i| !i.batched);
        if let Some(fixed) = self.fixed_batch
            && alone
            && group.rows != fixed
        {
            return Err(EngineError::invalid(
                field,
                format!(
                    "the model takes exactly {fixed} rows at a time, {} were given",
                    group.rows
                ),
            ));
        }
        let length = length.unwrap_or(0);
        let cost = match (length, self.fixed_length) {
            (0, _) => self.row_tokens,
            (_, Some(fixed)) => fixed,
            (length, None) => length,
        };
        let signature = self
            .inputs
            .iter()
            .zip(&tensors)
            .flat_map(|(input, tensor)| input.signature(tensor))
            .collect();
        Ok(Rows {
            inputs: self.inputs.clone(),
            tensors,
            rows: group.rows,
            length,
            cost,
            signature,
            alone: alone || self.rows_interact,
        })
    }

    /// Plans the tensors of a run. Every slice must have the same signature.
    pub fn assemble<'a>(&'a self, slices: &'a [Slice<'a>]) -> Vec<Planned<'a>> {
        let rows: usize = slices.iter().map(|s| s.range.len()).sum();
        let rows = self.fixed_batch.map_or(rows, |fixed| fixed.max(rows));
        let longest = slices.iter().map(|s| s.rows.length).max().unwrap_or(0);
        let longest = self
            .fixed_length
            .map_or(longest, |fixed| fixed.max(longest));
        let Some(first) = slices.first() else {
            return Vec::new();
        };
        let inputs = first.rows.inputs.iter().enumerate();
        inputs
            .map(|(index, input)| {
                let mut shape = first.rows.tensors[index].shape().to_vec();
                if let Some(axis) = input.padded_axis(&shape) {
                    shape[axis] = longest;
                }
                if input.batched && !shape.is_empty() {
                    shape[0] = rows;
                }
                Planned {
                    name: &input.name,
                    dtype: input.dtype,
                    shape,
                    index,
                    input,
                    slices,
                    longest,
                    pad: match (input.role, input.rest) {
                        (InputRole::TokenIds, _) => encode(self.pad_id, input.dtype),
                        (_, Some(rest)) => encode_float(rest, input.dtype),
                        (_, None) => None,
                    }
                    .unwrap_or_default(),
                }
            })
            .collect()
    }

    fn names(&self) -> String {
        let names: Vec<String> = self
            .inputs
            .iter()
            .map(|i| format!("\"{}\"", i.name))
            .collect();
        names.join(", ")
    }

    fn check_length(&self, length: Option<usize>, field: &str) -> Result<(), EngineError> {
        let Some(length) = length else {
            return Ok(());
        };
        let refuse =
            |message: String| Err(EngineError::invalid(format!("{field}.length"), message));
        if length == 0 {
            return refuse("a row needs at least one token".into());
        }
        match (self.fixed_length, self.max_tokens) {
            (Some(fixed), _) if length > fixed || (length < fixed && !self.pads) => {
                refuse(format!(
                    "the model takes exactly {fixed} tokens{}, {length} were given",
                    if self.pads {
                        " (shorter rows are padded)"
                    } else {
                        " and has no mask to pad with"
                    }
                ))
            }
            (None, Some(max)) if length > max => refuse(format!(
                "the model takes at most {max} tokens, {length} were given: shorten the text or ask for truncation"
            )),
            (Some(_) | None, Some(_) | None) => Ok(()),
        }
    }

    fn check_ids(&self, tensor: &Tensor) -> Result<(), String> {
        let Some(vocab) = self.vocab else {
            return Ok(());
        };
        let inside = |id: i64| usize::try_from(id).is_ok_and(|id| id < vocab);
        let outside = match tensor.dtype() {
            DType::I64 => tensor
                .bytes()
                .as_chunks()
                .0
                .iter()
                .map(|b| i64::from_le_bytes(*b))
                .find(|id| !inside(*id)),
            DType::I32 => tensor
                .bytes()
                .as_chunks()
                .0
                .iter()
                .map(|b| i64::from(i32::from_le_bytes(*b)))
                .find(|id| !inside(*id)),
            DType::F32
            | DType::F16
            | DType::Bf16
            | DType::F64
            | DType::I8
            | DType::I16
            | DType::U8
            | DType::U16
            | DType::U32
            | DType::U64
            | DType::Bool => None,
        };
        match outside {
            Some(id) => Err(format!(
                "token id {id} is outside of the vocabulary of {vocab}"
            )),
            None => Ok(()),
        }
    }
}

impl Rows {
    /// Bytes of the tensors.
    pub fn bytes(&self) -> usize {
        self.tensors.iter().map(|t| t.bytes().len()).sum()
    }
}

impl Input {
    fn new(info: &InputInfo) -> Self {
        let batched = info.is_batched();
        let token_axis = info.axes.iter().position(Axis::is_token);
        let fixed = info
            .dims
            .iter()
            .enumerate()
            .map(|(axis, dim)| dim.filter(|_| !(axis == 0 && batched) && Some(axis) != token_axis))
            .collect();
        Self {
            name: info.name.clone(),
            dtype: info.dtype,
            role: info.role,
            batched,
            token_axis,
            fixed,
            broadcasts: false,
            rest: None,
        }
    }

    /// One that is set against the value of a hook point.
    fn moving(name: String, hook: &HookInfo, rest: Option<f32>) -> Self {
        Self {
            name,
            dtype: hook.dtype,
            role: InputRole::Other,
            batched: true,
            token_axis: hook.axes.iter().position(Axis::is_token),
            fixed: std::iter::once(None)
                .chain(hook.dims.iter().skip(1).copied())
                .collect(),
            broadcasts: true,
            rest,
        }
    }

    /// One with an entry for each term of an objective.
    fn of_terms(name: &str, dtype: DType) -> Self {
        Self {
            name: name.to_owned(),
            dtype,
            role: InputRole::Other,
            batched: true,
            token_axis: None,
            fixed: vec![None, None],
            broadcasts: false,
            rest: None,
        }
    }

    /// The token axis of a tensor of this shape, unless one entry stands for all tokens.
    fn padded_axis(&self, shape: &[usize]) -> Option<usize> {
        self.token_axis
            .filter(|axis| !(self.broadcasts && shape[*axis] == 1))
    }

    /// Checks a given tensor; the first one with a token axis tells the length.
    fn check(
        &self,
        tensor: &Tensor,
        rows: usize,
        length: &mut Option<usize>,
    ) -> Result<(), String> {
        let name = &self.name;
        if tensor.dtype() != self.dtype {
            return Err(format!(
                "input \"{name}\" is {}, {} was given",
                self.dtype,
                tensor.dtype()
            ));
        }
        let shape = tensor.shape();
        if shape.len() != self.fixed.len() {
            return Err(format!(
                "input \"{name}\" has {} axes, a tensor of shape {shape:?} was given",
                self.fixed.len()
            ));
        }
        for (axis, extent) in shape.iter().enumerate() {
            let wanted = if axis == 0 && self.batched {
                Some(rows)
            } else if self.broadcasts && *extent == 1 {
                None
            } else if Some(axis) == self.token_axis {
                Some(*length.get_or_insert(*extent))
            } else {
                self.fixed[axis]
            };
            if wanted.is_some_and(|wanted| wanted != *extent) {
                return Err(format!(
                    "input \"{name}\" has {extent} along axis {axis} where {} belong (shape {shape:?})",
                    wanted.unwrap_or_default()
                ));
            }
            let empty_past = self.role == InputRole::Past && axis == 2;
            if *extent == 0 && !empty_past {
                return Err(format!("input \"{name}\" is empty along axis {axis}"));
            }
        }
        Ok(())
    }

    /// What stands for this input when it is left out; nothing when only the caller can know.
    fn fill(&self, rows: usize, length: Option<usize>) -> Option<Tensor> {
        if let (InputRole::Past, [_, Some(heads), _, Some(width)]) = (self.role, &self.fixed[..]) {
            let shape = vec![rows, *heads, 0, *width];
            return Tensor::new(self.dtype, shape, bytes::Bytes::new()).ok();
        }
        if let Some(rest) = self.rest {
            let mut shape = vec![1; self.fixed.len()];
            shape[0] = rows;
            let filled = Tensor::from_f32(shape, &vec![rest; rows]).ok()?;
            return filled.cast_float(self.dtype).ok();
        }
        let length = length?;
        if self.token_axis != Some(1) || !self.batched || self.fixed.len() != 2 {
            return None;
        }
        let row: Vec<i64> = match self.role {
            InputRole::AttentionMask => vec![1; length],
            InputRole::TypeIds => vec![0; length],
            InputRole::PositionIds => (0..i64::try_from(length).ok()?).collect(),
            InputRole::TokenIds | InputRole::Pixels | InputRole::Past | InputRole::Other => {
                return None;
            }
        };
        let mut bytes = Vec::with_capacity(rows * length * self.dtype.size());
        for _ in 0..rows {
            for value in &row {
                bytes.extend_from_slice(encode(*value, self.dtype)?.get(..self.dtype.size())?);
            }
        }
        Tensor::new(self.dtype, vec![rows, length], bytes.into()).ok()
    }

    /// Everything about a tensor's shape that rows of a run must share.
    fn signature<'a>(&'a self, tensor: &'a Tensor) -> impl Iterator<Item = u64> + 'a {
        let padded = self.padded_axis(tensor.shape());
        tensor
            .shape()
            .iter()
            .enumerate()
            .map(move |(axis, extent)| {
                if (axis == 0 && self.batched) || Some(axis) == padded {
                    0
                } else {
                    *extent as u64
                }
            })
    }
}

impl Planned<'_> {
    /// Bytes of the tensor.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }

    /// Writes the tensor; `out` has [`Planned::bytes`] bytes.
    pub fn write(&self, out: &mut [u8]) {
        let pad = &self.pad[..self.dtype.size()];
        if !self.input.batched {
            if let Some(slice) = self.slices.first() {
                let tensor = &slice.rows.tensors[self.index];
                self.pad_to(tensor.bytes(), tensor.shape(), out, pad);
            }
            return;
        }
        let row_bytes = out.len() / self.shape[0].max(1);
        let mut rows = out.chunks_exact_mut(row_bytes.max(1));
        for slice in self.slices {
            let tensor = &slice.rows.tensors[self.index];
            let source_row = tensor.bytes().len() / slice.rows.rows;
            let bytes =
                &tensor.bytes()[slice.range.start * source_row..slice.range.end * source_row];
            for source in bytes.chunks_exact(source_row.max(1)) {
                let Some(target) = rows.next() else { return };
                self.pad_to(source, tensor.shape(), target, pad);
            }
        }
        let written = self.slices.iter().map(|s| s.range.len()).sum::<usize>();
        for extra in written..self.shape[0] {
            out.copy_within(
                (written - 1) * row_bytes..written * row_bytes,
                extra * row_bytes,
            );
        }
    }

    /// Copies a row (or a tensor without rows), padding its token axis up to the longest of the run.
    fn pad_to(&self, source: &[u8], shape: &[usize], target: &mut [u8], pad: &[u8]) {
        let axis = self.input.padded_axis(shape);
        let Some(axis) = axis.filter(|a| shape[*a] != self.longest) else {
            target.copy_from_slice(source);
            return;
        };
        let inner: usize = shape[axis + 1..].iter().product::<usize>() * pad.len();
        let (have, want) = (shape[axis] * inner, self.longest * inner);
        for (from, to) in source.chunks_exact(have).zip(target.chunks_exact_mut(want)) {
            to[..have].copy_from_slice(from);
            for element in to[have..].chunks_exact_mut(pad.len()) {
                element.copy_from_slice(pad);
            }
        }
    }
}

/// A small integer in the bytes of a dtype; the first `dtype.size()` of eight.
fn encode(value: i64, dtype: DType) -> Option<[u8; 8]> {
    let mut bytes = [0; 8];
    #[allow(clippy::cast_precision_loss)] // small integers
    match dtype {
        DType::I64 => bytes = value.to_le_bytes(),
        DType::U64 => bytes = u64::try_from(value).ok()?.to_le_bytes(),
        DType::F64 => bytes = (value as f64).to_le_bytes(),
        DType::I32 => bytes[..4].copy_from_slice(&i32::try_from(value).ok()?.to_le_bytes()),
        DType::U32 => bytes[..4].copy_from_slice(&u32::try_from(value).ok()?.to_le_bytes()),
        DType::F32 => bytes[..4].copy_from_slice(&(value as f32).to_le_bytes()),
        DType::I16 => bytes[..2].copy_from_slice(&i16::try_from(value).ok()?.to_le_bytes()),
        DType::U16 => bytes[..2].copy_from_slice(&u16::try_from(value).ok()?.to_le_bytes()),
        DType::F16 => bytes[..2].copy_from_slice(&half::f16::from_f32(value as f32).to_le_bytes()),
        DType::Bf16 => {
            bytes[..2].copy_from_slice(&half::bf16::from_f32(value as f32).to_le_bytes())
        }
        DType::I8 => bytes[..1].copy_from_slice(&i8::try_from(value).ok()?.to_le_bytes()),
        DType::U8 => bytes[..1].copy_from_slice(&u8::try_from(value).ok()?.to_le_bytes()),
        DType::Bool => bytes[0] = u8::from(value != 0),
    }
    Some(bytes)
}

/// A number in the bytes of a float's dtype; the first `dtype.size()` of eight.
fn encode_float(value: f32, dtype: DType) -> Option<[u8; 8]> {
    let one = Tensor::from_f32(vec![1], &[value]).ok()?;
    let one = one.cast_float(dtype).ok()?;
    let mut bytes = [0; 8];
    bytes[..dtype.size()].copy_from_slice(one.bytes());
    Some(bytes)
}

#[cfg(test)]
#[path = "inputs_tests.rs"]
mod tests;
