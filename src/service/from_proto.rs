//! From wire types to our own, validated once. Errors name the field by its path.

use super::wire::introspect as pb;
use crate::{
    engine::{EngineError, NamedTensor, TextInput, TokenizeOptions},
    methods::{
        capture::{Logits, Question, Selection},
        input::Input,
        reduce::{Keep, Pooling},
    },
    tensor::{DType, Tensor},
};

/// Most tensors of an input.
const MOST_TENSORS: usize = 256;
/// Most axes of a tensor.
const MOST_AXES: usize = 16;
/// Most entries kept of a row.
const MOST_KEPT: u32 = 1024;
/// Most candidates of a prediction.
const MOST_CANDIDATES: u32 = 1000;
/// Keys per query row when a sparse attention does not say.
const DEFAULT_KEYS: u32 = 8;
/// Smallest attention that is kept when a sparse attention does not say.
const DEFAULT_FLOOR: f32 = 0.005;
/// Candidates when nobody says.
const DEFAULT_CANDIDATES: u32 = 5;
/// Longest id that a caller may choose.
const ID_LIMIT: usize = 256;

type Result<T> = std::result::Result<T, EngineError>;

/// The model that a capture asks, and the question.
pub(super) fn capture(request: pb::CaptureRequest) -> Result<(String, Question)> {
    let model = named(request.model)?;
    Ok((
        model,
        Question {
            input: required_input(request.input)?,
            selection: selection(request.selection.unwrap_or_default())?,
        },
    ))
}

/// A model's name; whether there is such a model is the registry's to say.
pub(super) fn named(model: String) -> Result<String> {
    if model.is_empty() {
        return Err(EngineError::invalid("model", "is empty: name a model"));
    }
    Ok(model)
}

/// The caller's id of one input of many.
pub(super) fn id(id: String) -> Result<String> {
    if id.len() > ID_LIMIT {
        return Err(EngineError::invalid(
            "id",
            format!("has {} bytes: give at most {ID_LIMIT}", id.len()),
        ));
    }
    Ok(id)
}

/// A text and how to tokenise it.
pub(super) fn text(text: pb::Text) -> (TextInput, TokenizeOptions) {
    (
        TextInput {
            text: text.text,
            pair: text.pair,
        },
        TokenizeOptions {
            special: !text.no_special_tokens,
            truncate: text.truncate,
        },
    )
}

/// What a model is run on.
pub(super) fn required_input(input: Option<pb::Input>) -> Result<Input> {
    let kind = input.and_then(|i| i.kind);
    input_of(
        kind.ok_or_else(|| {
            EngineError::invalid("input", "is missing: give text, tokens or tensors")
        })?,
    )
}

fn input_of(input: pb::input::Kind) -> Result<Input> {
    Ok(match input {
        pb::input::Kind::Text(given) => {
            let (text, options) = text(given);
            Input::Text { text, options }
        }
        pb::input::Kind::Tokens(t) => Input::Tokens {
            ids: t.ids,
            type_ids: t.type_ids,
        },
        pb::input::Kind::Tensors(t) => {
            if t.tensors.len() > MOST_TENSORS {
                return Err(EngineError::invalid(
                    "input.tensors.tensors",
                    format!(
                        "has {} entries: give at most {MOST_TENSORS}",
                        t.tensors.len()
                    ),
                ));
            }
            let tensors = t.tensors.into_iter().enumerate();
            Input::Tensors(
                tensors
                    .map(|(at, t)| tensor(t, &format!("input.tensors.tensors[{at}]")))
                    .collect::<Result<_>>()?,
            )
        }
    })
}

/// A tensor that comes whole.
pub(super) fn tensor(given: pb::Tensor, field: &str) -> Result<NamedTensor> {
    let dtype = dtype(given.dtype, &format!("{field}.dtype"))?.ok_or_else(|| {
        EngineError::invalid(
            format!("{field}.dtype"),
            "is not said: name the element type",
        )
    })?;
    if given.offset != 0 {
        return Err(EngineError::invalid(
            format!("{field}.offset"),
            "must be 0: in requests a tensor comes whole",
        ));
    }
    let shape = shape(
        given.shape.iter().map(|n| i64::try_from(*n).unwrap_or(-1)),
        &format!("{field}.shape"),
    )?;
    let tensor = Tensor::new(dtype, shape, given.data)
        .map_err(|e| EngineError::invalid(format!("{field}.data"), e.to_string()))?;
    Ok(NamedTensor {
        name: given.name,
        tensor,
    })
}

/// Extents of a tensor that a caller gives. Empty tensors are refused: a row that is not there cannot be run.
pub(super) fn shape(
    extents: impl ExactSizeIterator<Item = i64>,
    field: &str,
) -> Result<Vec<usize>> {
    if extents.len() > MOST_AXES {
        return Err(EngineError::invalid(
            field,
            format!("has {} axes: at most {MOST_AXES} are taken", extents.len()),
        ));
    }
    extents
        .map(|n| {
            usize::try_from(n).ok().filter(|n| *n > 0).ok_or_else(|| {
                EngineError::invalid(
                    field,
                    format!("extent {n} is out of range: it must be at least 1"),
                )
            })
        })
        .collect()
}

fn selection(s: pb::Selection) -> Result<Selection> {
    let top_k = s.top_k.map(top_k).transpose()?;
    let sparse_attention = s.sparse_attention.map(sparse).transpose()?;
    if s.candidates > MOST_CANDIDATES {
        return Err(EngineError::invalid(
            "selection.candidates",
            format!("is {}: at most {MOST_CANDIDATES}", s.candidates),
        ));
    }
    Ok(Selection {
        pooling: pooling(s.pooling, "selection.pooling")?,
        dtype: float(s.dtype)?,
        logits: logits(s.logits)?,
        candidates: or(s.candidates, DEFAULT_CANDIDATES) as usize,
        hooks: s.hooks,
        layers: s.layers,
        heads: s.heads,
        positions: s.positions,
        top_k,
        sparse_attention,
        spelled: true,
    })
}

fn top_k(t: pb::TopK) -> Result<Keep> {
    if !(1..=MOST_KEPT).contains(&t.k) {
        return Err(EngineError::invalid(
            "selection.top_k.k",
            format!("is {}: give 1 to {MOST_KEPT}", t.k),
        ));
    }
    Ok(Keep::TopK {
        k: t.k as usize,
        by_magnitude: t.by_magnitude,
    })
}

fn sparse(s: pb::SparseAttention) -> Result<Keep> {
    if s.top_k > MOST_KEPT {
        return Err(EngineError::invalid(
            "selection.sparse_attention.top_k",
            format!("is {}: at most {MOST_KEPT}", s.top_k),
        ));
    }
    let floor = s.floor.unwrap_or(DEFAULT_FLOOR);
    if !(0.0..=1.0).contains(&floor) {
        return Err(EngineError::invalid(
            "selection.sparse_attention.floor",
            format!("is {floor}: give 0 to 1"),
        ));
    }
    Ok(Keep::Attention {
        k: or(s.top_k, DEFAULT_KEYS) as usize,
        floor,
    })
}

/// How positions become one vector, if at all.
pub(super) fn pooling(value: i32, field: &str) -> Result<Option<Pooling>> {
    let known = pb::Pooling::try_from(value).map_err(|_| unknown(field, value))?;
    Ok(match known {
        pb::Pooling::Unspecified => None,
        pb::Pooling::Mean => Some(Pooling::Mean),
        pb::Pooling::Cls => Some(Pooling::Cls),
        pb::Pooling::Last => Some(Pooling::Last),
        pb::Pooling::Max => Some(Pooling::Max),
    })
}

fn logits(value: i32) -> Result<Logits> {
    let known = pb::Logits::try_from(value).map_err(|_| unknown("selection.logits", value))?;
    Ok(match known {
        pb::Logits::Unspecified => Logits::Prediction,
        pb::Logits::All => Logits::All,
        pb::Logits::None => Logits::None,
    })
}

/// Type of floats in an answer.
fn float(value: i32) -> Result<DType> {
    const FIELD: &str = "selection.dtype";
    match dtype(value, FIELD)? {
        None => Ok(DType::F32),
        Some(known @ (DType::F32 | DType::F16 | DType::Bf16)) => Ok(known),
        Some(
            DType::F64
            | DType::I8
            | DType::I16
            | DType::I32
            | DType::I64
            | DType::U8
            | DType::U16
            | DType::U32
            | DType::U64
            | DType::Bool,
        ) => Err(EngineError::invalid(FIELD, "must be F32, F16 or BF16")),
    }
}

fn dtype(value: i32, field: &str) -> Result<Option<DType>> {
    let known = pb::DType::try_from(value).map_err(|_| unknown(field, value))?;
    Ok(match known {
        pb::DType::Unspecified => None,
        pb::DType::F32 => Some(DType::F32),
        pb::DType::F16 => Some(DType::F16),
        pb::DType::Bf16 => Some(DType::Bf16),
        pb::DType::F64 => Some(DType::F64),
        pb::DType::I8 => Some(DType::I8),
        pb::DType::I16 => Some(DType::I16),
        pb::DType::I32 => Some(DType::I32),
        pb::DType::I64 => Some(DType::I64),
        pb::DType::U8 => Some(DType::U8),
        pb::DType::U16 => Some(DType::U16),
        pb::DType::U32 => Some(DType::U32),
        pb::DType::U64 => Some(DType::U64),
        pb::DType::Bool => Some(DType::Bool),
    })
}

/// Why a number is no value of an enum.
pub(super) fn unknown(field: &str, value: i32) -> EngineError {
    EngineError::invalid(field, format!("{value} is no value of this enum"))
}

/// What is given, or the default for 0.
pub(super) fn or(given: u32, default: u32) -> u32 {
    if given == 0 { default } else { given }
}
