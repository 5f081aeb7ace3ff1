//! From what a caller gives (text, token ids, tensors) to the row that a model runs on.

use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::{
    engine::{
        Ctx, Encoding, EngineError, ModelHandle, NamedTensor, RowGroup, TextInput, TokenizeOptions,
    },
    ipc::info::{Axis, InputInfo, InputRole, ModelInfo},
    tensor::{DType, Tensor},
};

/// What a model is run on: one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A text, tokenised here.
    Text {
        /// The text, perhaps with its pair.
        text: TextInput,
        /// Special tokens, truncation.
        options: TokenizeOptions,
    },
    /// Tokens, special ones included.
    Tokens {
        /// Indices in the vocabulary.
        ids: Vec<u32>,
        /// Segments; empty for all 0.
        type_ids: Vec<u32>,
    },
    /// The model's inputs by name, each with a batch axis of extent 1.
    Tensors(Vec<NamedTensor>),
}

/// A token of the row, as answers show it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Token {
    /// Index in the vocabulary.
    pub id: u32,
    /// As the vocabulary spells it.
    pub text: String,
    /// First byte in the text.
    pub start: u32,
    /// One past the last byte.
    pub end: u32,
    /// Added by the template.
    pub special: bool,
    /// 0 for the text, 1 for its pair.
    pub sequence: u32,
    /// Number of the word.
    pub word: Option<u32>,
    /// Segment.
    pub type_id: u32,
}

/// A row, ready but for its picks.
#[derive(Clone, Debug, Default)]
pub struct Prepared {
    /// One row.
    pub group: RowGroup,
    /// Its tokens, where it has any.
    pub tokens: Vec<Token>,
    /// Tokens that truncation cut off.
    pub truncated: u32,
    /// Time that the tokenizer took, with the way to it.
    pub tokenize: Duration,
}

/// Makes the row of an input. Paths of fields in errors begin at the input: `text.text`, `tokens.ids`, `tensors`.
///
/// # Errors
/// [`EngineError::InvalidArgument`] for what cannot be a row of this model, [`EngineError::FailedPrecondition`] for a model that takes
/// no tokens or has no tokenizer.
pub async fn prepare(
    handle: &ModelHandle,
    input: Input,
    ctx: &Ctx,
) -> Result<Prepared, EngineError> {
    let mut prepared = unspelled(handle, input, ctx).await?;
    let begun = Instant::now();
    spell(handle, &mut prepared, ctx).await?;
    prepared.tokenize += begun.elapsed();
    Ok(prepared)
}

/// The same, but that tokens of ids and tensors have no text yet: nothing that runs waits for it. [`spell`] asks for it.
///
/// # Errors
/// As [`prepare`].
pub async fn unspelled(
    handle: &ModelHandle,
    input: Input,
    ctx: &Ctx,
) -> Result<Prepared, EngineError> {
    let begun = Instant::now();
    let mut prepared = match input {
        Input::Text { text, options } => {
            let mut encodings = handle
                .tokenize(vec![text], options, ctx)
                .await
                .map_err(|e| at_field(e, "text.text"))?;
            let encoding = encodings
                .pop()
                .ok_or_else(|| EngineError::internal("the tokenizer answered no encoding"))?;
            Prepared {
                group: row(handle.info(), &encoding.ids, &encoding.type_ids)?,
                truncated: encoding.truncated,
                tokens: tokens(encoding),
                ..Prepared::default()
            }
        }
        Input::Tokens { ids, type_ids } => {
            check_ids(handle.info(), &ids, &type_ids)?;
            Prepared {
                group: row(handle.info(), &ids, &type_ids)?,
                tokens: of_ids(handle.info(), ids, &type_ids),
                ..Prepared::default()
            }
        }
        Input::Tensors(inputs) => {
            let group = one_row(handle.info(), inputs)?;
            let ids = ids_of(handle.info(), &group).unwrap_or_default();
            Prepared {
                tokens: of_ids(handle.info(), ids, &[]),
                group,
                ..Prepared::default()
            }
        }
    };
    prepared.tokenize = begun.elapsed();
    Ok(prepared)
}

/// The tokens of an encoding, one after the other.
pub fn tokens(encoding: Encoding) -> Vec<Token> {
    let Encoding {
        ids,
        type_ids,
        tokens,
        offsets,
        special,
        sequence,
        words,
        truncated: _,
    } = encoding;
    let mut texts = tokens.into_iter();
    ids.into_iter()
        .enumerate()
        .map(|(at, id)| {
            let offset = offsets.get(at).cloned().unwrap_or_default();
            Token {
                id,
                text: texts.next().unwrap_or_default(),
                start: offset.start,
                end: offset.end,
                special: special.get(at).copied().unwrap_or_default(),
                sequence: sequence.get(at).copied().unwrap_or_default(),
                word: words.get(at).copied().flatten(),
                type_id: type_ids.get(at).copied().unwrap_or_default(),
            }
        })
        .collect()
}

/// The field of a request that the engine finds fault with, when it does.
pub fn field_of(input: &Input) -> &'static str {
    match input {
        Input::Text { .. } => "input.text.text",
        Input::Tokens { .. } => "input.tokens.ids",
        Input::Tensors(_) => "input.tensors",
    }
}

/// The row of token ids. Mask, positions and (where none are given) segments are the engine's to fill in.
///
/// # Errors
/// [`EngineError::FailedPrecondition`] for a model without an input for token ids.
pub fn row(info: &ModelInfo, ids: &[u32], type_ids: &[u32]) -> Result<RowGroup, EngineError> {
    let input = info.input(InputRole::TokenIds).ok_or_else(|| {
        EngineError::precondition(format!(
            "model \"{}\" takes no token ids: send its inputs as tensors ({})",
            info.name,
            names(&info.inputs)
        ))
    })?;
    let mut inputs = vec![rows_of_ids(input, 1, ids)?];
    if let Some(segments) = info.input(InputRole::TypeIds)
        && type_ids.len() == ids.len()
    {
        inputs.push(rows_of_ids(segments, 1, type_ids)?);
    }
    Ok(RowGroup {
        inputs,
        rows: 1,
        length: Some(ids.len()),
        picks: Vec::new(),
    })
}

/// Puts an error's field beneath another: `ids` and `tokens` give `tokens.ids`. What the engine says of a row's inputs is said of
/// `input`, the field that the row came from.
pub fn at_field(error: EngineError, input: &str) -> EngineError {
    match error {
        EngineError::InvalidArgument { message, .. } => EngineError::InvalidArgument {
            field: input.to_owned(),
            message,
        },
        EngineError::NotFound { .. }
        | EngineError::AlreadyExists { .. }
        | EngineError::FailedPrecondition { .. }
        | EngineError::Storage { .. }
        | EngineError::ResourceExhausted { .. }
        | EngineError::Unavailable { .. }
        | EngineError::DeadlineExceeded
        | EngineError::Cancelled
        | EngineError::DataLoss { .. }
        | EngineError::WorkerDied { .. }
        | EngineError::Internal { .. } => error,
    }
}

/// Ids as an input takes them, `[rows, ids of a row]`.
///
/// # Errors
/// [`EngineError::FailedPrecondition`] for an input that takes something else than integers of 32 or 64 bits.
pub fn rows_of_ids(
    input: &InputInfo,
    rows: usize,
    ids: &[u32],
) -> Result<NamedTensor, EngineError> {
    let bytes: Vec<u8> = match input.dtype {
        DType::I64 => ids
            .iter()
            .flat_map(|id| i64::from(*id).to_le_bytes())
            .collect(),
        DType::I32 => ids
            .iter()
            .flat_map(|id| id.cast_signed().to_le_bytes())
            .collect(),
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
        | DType::Bool => {
            return Err(EngineError::precondition(format!(
                "input \"{}\" takes ids as {}: send it as a tensor",
                input.name, input.dtype
            )));
        }
    };
    let tensor = Tensor::new(
        input.dtype,
        vec![rows, ids.len() / rows.max(1)],
        Bytes::from(bytes),
    )
    .map_err(EngineError::internal)?;
    Ok(NamedTensor {
        name: input.name.clone(),
        tensor,
    })
}

fn check_ids(info: &ModelInfo, ids: &[u32], type_ids: &[u32]) -> Result<(), EngineError> {
    if ids.is_empty() {
        return Err(EngineError::invalid(
            "tokens.ids",
            "there are no tokens: give at least one id",
        ));
    }
    if !type_ids.is_empty() && type_ids.len() != ids.len() {
        return Err(EngineError::invalid(
            "tokens.type_ids",
            format!("has {} entries for {} ids", type_ids.len(), ids.len()),
        ));
    }
    if type_ids.iter().any(|t| *t > 0) && info.input(InputRole::TypeIds).is_none() {
        return Err(EngineError::invalid(
            "tokens.type_ids",
            "the model has no input for segments: leave this empty",
        ));
    }
    let vocab = info.dims.vocab;
    let outside = |id: &&u32| match vocab {
        Some(vocab) => **id as usize >= vocab,
        None => **id > i32::MAX.cast_unsigned(),
    };
    match ids.iter().position(|id| outside(&id)) {
        Some(at) => Err(EngineError::invalid(
            format!("tokens.ids[{at}]"),
            format!(
                "id {} is not in the vocabulary of {}",
                ids[at],
                vocab.unwrap_or_default()
            ),
        )),
        None => Ok(()),
    }
}

/// Whether the input of this name is batched; what the model does not have counts as such, and is refused by the engine.
pub fn is_batched(info: &ModelInfo, name: &str) -> bool {
    let input = info.inputs.iter().find(|i| i.name == name);
    input.is_none_or(InputInfo::is_batched)
}

/// Tensors of one row. What fits them to the model is checked by the engine.
fn one_row(info: &ModelInfo, inputs: Vec<NamedTensor>) -> Result<RowGroup, EngineError> {
    if inputs.is_empty() {
        return Err(EngineError::invalid(
            "tensors.tensors",
            format!(
                "is empty: give the model's inputs ({})",
                names(&info.inputs)
            ),
        ));
    }
    for (at, input) in inputs.iter().enumerate() {
        if is_batched(info, &input.name) && input.tensor.shape().first() != Some(&1) {
            return Err(EngineError::invalid(
                format!("tensors.tensors[{at}].shape"),
                format!(
                    "\"{}\" must have a batch axis of extent 1 in front: a call runs one row",
                    input.name
                ),
            ));
        }
    }
    Ok(RowGroup {
        length: length(info, &inputs),
        inputs,
        rows: 1,
        picks: Vec::new(),
    })
}

/// Positions of a row, where one of its tensors has them.
fn length(info: &ModelInfo, inputs: &[NamedTensor]) -> Option<usize> {
    inputs.iter().find_map(|given| {
        let input = info.inputs.iter().find(|i| i.name == given.name)?;
        let axis = input.axes.iter().position(Axis::is_token)?;
        given.tensor.shape().get(axis).copied()
    })
}

/// The token ids among a row's tensors.
fn ids_of(info: &ModelInfo, group: &RowGroup) -> Option<Vec<u32>> {
    let name = &info.input(InputRole::TokenIds)?.name;
    let tensor = &group.inputs.iter().find(|i| i.name == *name)?.tensor;
    let bytes = &tensor.bytes()[..];
    match tensor.dtype() {
        DType::I64 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| u32::try_from(i64::from_le_bytes(*b)).ok())
            .collect(),
        DType::I32 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| u32::try_from(i32::from_le_bytes(*b)).ok())
            .collect(),
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
    }
}

/// Tokens by their ids, without text.
fn of_ids(info: &ModelInfo, ids: Vec<u32>, type_ids: &[u32]) -> Vec<Token> {
    let special = info.tokenizer.as_ref().map(|t| &t.special_ids[..]);
    let special = special.unwrap_or_default();
    ids.into_iter()
        .enumerate()
        .map(|(at, id)| Token {
            id,
            special: special.contains(&id),
            type_id: type_ids.get(at).copied().unwrap_or_default(),
            ..Token::default()
        })
        .collect()
}

/// Gives the tokens that have none their text, if the model has a vocabulary.
///
/// # Errors
/// Those of the worker.
pub async fn spell(
    handle: &ModelHandle,
    prepared: &mut Prepared,
    ctx: &Ctx,
) -> Result<(), EngineError> {
    let spelled = prepared.tokens.iter().any(|t| !t.text.is_empty());
    if spelled || prepared.tokens.is_empty() || handle.info().tokenizer.is_none() {
        return Ok(());
    }
    let ids = prepared.tokens.iter().map(|t| t.id).collect();
    let texts = handle.decode(ids, ctx).await?;
    for (token, text) in prepared.tokens.iter_mut().zip(texts) {
        token.text = text;
    }
    Ok(())
}

fn names(inputs: &[InputInfo]) -> String {
    let names: Vec<&str> = inputs.iter().map(|i| i.name.as_str()).collect();
    names.join(", ")
}
