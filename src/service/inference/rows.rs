//! From a request's inputs to rows: tensors as they are, texts tokenised, each at its own length.

use std::time::{Duration, Instant};

use bytes::{BufMut as _, Bytes, BytesMut};

use crate::{
    engine::{Ctx, EngineError, ModelHandle, NamedTensor, RowGroup, TextInput, TokenizeOptions},
    ipc::info::ModelInfo,
    methods::input::{self, Input},
    service::{
        from_proto,
        wire::inference::{
            self as pb, infer_parameter::ParameterChoice, model_infer_request::InferInputTensor,
        },
    },
    tensor::{DType, Tensor},
};

/// Input of texts.
const TEXT: &str = "text";
/// Input of second texts.
const PAIR: &str = "text_pair";
/// Type of elements that are strings of bytes.
const BYTES: &str = "BYTES";
/// Most rows of a request.
const MOST_ROWS: usize = 4096;
/// Most inputs of a request.
const MOST_INPUTS: usize = 256;

type Result<T> = std::result::Result<T, EngineError>;

/// What an input holds.
enum Given {
    Tensor(Tensor),
    Texts(Vec<String>),
}

/// The rows of a request, without picks, and the time that tokenising took.
pub(super) async fn groups(
    handle: &ModelHandle,
    request: &pb::ModelInferRequest,
    ctx: &Ctx,
) -> Result<(Vec<RowGroup>, Duration)> {
    let inputs = &request.inputs;
    let raw = &request.raw_input_contents;
    if inputs.is_empty() || inputs.len() > MOST_INPUTS {
        return Err(EngineError::invalid(
            "inputs",
            format!("has {} entries: give 1 to {MOST_INPUTS}", inputs.len()),
        ));
    }
    if !raw.is_empty() && raw.len() != inputs.len() {
        return Err(EngineError::invalid(
            "raw_input_contents",
            format!("has {} entries for {} inputs", raw.len(), inputs.len()),
        ));
    }
    let mut tensors = Vec::new();
    let (mut texts, mut pairs) = (None, None);
    for (at, input) in inputs.iter().enumerate() {
        let field = format!("inputs[{at}]");
        match given(input, raw.get(at), &field)? {
            Given::Tensor(tensor) => tensors.push(NamedTensor {
                name: input.name.clone(),
                tensor,
            }),
            Given::Texts(given) => {
                let place = match input.name.as_str() {
                    TEXT => &mut texts,
                    PAIR => &mut pairs,
                    other => {
                        return Err(EngineError::invalid(
                            format!("{field}.name"),
                            format!(
                                "\"{other}\" takes no BYTES: texts go to \"{TEXT}\" and \"{PAIR}\""
                            ),
                        ));
                    }
                };
                if place.replace(given).is_some() {
                    return Err(EngineError::invalid(
                        format!("{field}.name"),
                        format!("input \"{}\" is given twice", input.name),
                    ));
                }
            }
        }
    }
    match (texts, pairs, tensors.is_empty()) {
        (None, None, _) => Ok((vec![of_tensors(handle, tensors)?], Duration::ZERO)),
        (Some(texts), pairs, true) => of_texts(handle, request, texts, pairs, ctx).await,
        (None, Some(_), _) => Err(EngineError::invalid(
            "inputs",
            format!("\"{PAIR}\" is given without \"{TEXT}\""),
        )),
        (Some(_), _, false) => Err(EngineError::invalid(
            "inputs",
            format!("\"{TEXT}\" and tensors exclude each other: give one or the other"),
        )),
    }
}

fn of_tensors(handle: &ModelHandle, inputs: Vec<NamedTensor>) -> Result<RowGroup> {
    let info = handle.info();
    let batched = inputs.iter().find(|i| input::is_batched(info, &i.name));
    let rows = batched
        .and_then(|i| i.tensor.shape().first().copied())
        .unwrap_or(1);
    if rows > MOST_ROWS {
        return Err(EngineError::invalid(
            "inputs",
            format!("has {rows} rows: give at most {MOST_ROWS}"),
        ));
    }
    Ok(RowGroup {
        inputs,
        rows,
        length: None,
        picks: Vec::new(),
    })
}

/// The first row of a group as an input of its own; the others have the same extents.
pub(super) fn first(info: &ModelInfo, group: &RowGroup) -> Input {
    let alone = group.inputs.iter().map(|given| NamedTensor {
        name: given.name.clone(),
        tensor: match input::is_batched(info, &given.name) {
            true => given.tensor.first_row(),
            false => given.tensor.clone(),
        },
    });
    Input::Tensors(alone.collect())
}

async fn of_texts(
    handle: &ModelHandle,
    request: &pb::ModelInferRequest,
    texts: Vec<String>,
    pairs: Option<Vec<String>>,
    ctx: &Ctx,
) -> Result<(Vec<RowGroup>, Duration)> {
    let begun = Instant::now();
    if texts.len() > MOST_ROWS {
        return Err(EngineError::invalid(
            "inputs",
            format!("has {} texts: give at most {MOST_ROWS}", texts.len()),
        ));
    }
    if let Some(pairs) = &pairs
        && pairs.len() != texts.len()
    {
        return Err(EngineError::invalid(
            "inputs",
            format!("has {} texts and {} pairs", texts.len(), pairs.len()),
        ));
    }
    let mut pairs = pairs.into_iter().flatten();
    let texts = texts
        .into_iter()
        .map(|text| TextInput {
            text,
            pair: pairs.next(),
        })
        .collect();
    let options = TokenizeOptions {
        truncate: truncate(request)?,
        ..TokenizeOptions::default()
    };
    let encodings = handle
        .tokenize(texts, options, ctx)
        .await
        .map_err(|e| at_inputs(e, request))?;
    let groups = encodings
        .iter()
        .map(|e| input::row(handle.info(), &e.ids, &e.type_ids))
        .collect::<Result<_>>()?;
    Ok((groups, begun.elapsed()))
}

fn truncate(request: &pb::ModelInferRequest) -> Result<bool> {
    let Some(parameter) = request.parameters.get("truncate") else {
        return Ok(false);
    };
    match parameter.parameter_choice {
        Some(ParameterChoice::BoolParam(truncate)) => Ok(truncate),
        Some(
            ParameterChoice::Int64Param(_)
            | ParameterChoice::StringParam(_)
            | ParameterChoice::DoubleParam(_)
            | ParameterChoice::Uint64Param(_),
        )
        | None => Err(EngineError::invalid(
            "parameters.truncate",
            "must be a truth value",
        )),
    }
}

/// What the engine finds fault with is an input of the request; its name leads to its place.
pub(super) fn at_inputs(error: EngineError, request: &pb::ModelInferRequest) -> EngineError {
    let field = match &error {
        EngineError::InvalidArgument { field, .. } => request
            .inputs
            .iter()
            .position(|i| field.ends_with(&format!(".{}", i.name)))
            .map_or_else(|| "inputs".to_owned(), |at| format!("inputs[{at}]")),
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
        | EngineError::Internal { .. } => return error,
    };
    input::at_field(error, &field)
}

/// The protocol's name of an element type.
pub(super) const fn datatype(dtype: DType) -> &'static str {
    match dtype {
        DType::Bool => "BOOL",
        DType::U8 => "UINT8",
        DType::U16 => "UINT16",
        DType::U32 => "UINT32",
        DType::U64 => "UINT64",
        DType::I8 => "INT8",
        DType::I16 => "INT16",
        DType::I32 => "INT32",
        DType::I64 => "INT64",
        DType::F16 => "FP16",
        DType::Bf16 => "BF16",
        DType::F32 => "FP32",
        DType::F64 => "FP64",
    }
}

fn given(input: &InferInputTensor, raw: Option<&Bytes>, field: &str) -> Result<Given> {
    if input
        .parameters
        .keys()
        .any(|k| k.starts_with("shared_memory"))
    {
        return Err(EngineError::invalid(
            format!("{field}.parameters"),
            "shared memory is not served: send the contents",
        ));
    }
    let shape = from_proto::shape(input.shape.iter().copied(), &format!("{field}.shape"))?;
    if input.datatype == BYTES {
        let strings = match raw {
            Some(raw) => split(raw, field)?,
            None => {
                let contents = contents(input, field, "bytes_contents")?;
                contents.bytes_contents.to_vec()
            }
        };
        let wanted = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        if wanted != Some(strings.len()) {
            return Err(EngineError::invalid(
                format!("{field}.shape"),
                format!(
                    "{shape:?} does not fit the {} elements given",
                    strings.len()
                ),
            ));
        }
        let texts = strings.iter().enumerate().map(|(at, s)| {
            std::str::from_utf8(s)
                .map(str::to_owned)
                .map_err(|_| EngineError::invalid(format!("{field}[{at}]"), "is not UTF-8"))
        });
        return Ok(Given::Texts(texts.collect::<Result<_>>()?));
    }
    let dtype = DType::ALL
        .into_iter()
        .find(|d| datatype(*d) == input.datatype)
        .ok_or_else(|| {
            EngineError::invalid(
                format!("{field}.datatype"),
                format!("\"{}\" is no datatype of the protocol", input.datatype),
            )
        })?;
    let bytes = match raw {
        Some(raw) => {
            if input.contents.is_some() {
                return Err(EngineError::invalid(
                    format!("{field}.contents"),
                    "excludes raw_input_contents: give one or the other",
                ));
            }
            raw.clone()
        }
        None => typed(input, dtype, field)?,
    };
    Tensor::new(dtype, shape, bytes)
        .map(Given::Tensor)
        .map_err(|e| EngineError::invalid(format!("{field}.contents"), e.to_string()))
}

/// The contents of an input, if no other field than `wanted` is set.
fn contents<'a>(
    input: &'a InferInputTensor,
    field: &str,
    wanted: &str,
) -> Result<&'a pb::InferTensorContents> {
    let Some(c) = &input.contents else {
        return Err(EngineError::invalid(
            format!("{field}.contents"),
            format!("is missing: give {wanted} or raw_input_contents"),
        ));
    };
    let set = [
        ("bool_contents", c.bool_contents.is_empty()),
        ("int_contents", c.int_contents.is_empty()),
        ("int64_contents", c.int64_contents.is_empty()),
        ("uint_contents", c.uint_contents.is_empty()),
        ("uint64_contents", c.uint64_contents.is_empty()),
        ("fp32_contents", c.fp32_contents.is_empty()),
        ("fp64_contents", c.fp64_contents.is_empty()),
        ("bytes_contents", c.bytes_contents.is_empty()),
    ];
    match set.iter().find(|(name, empty)| !empty && *name != wanted) {
        Some((name, _)) => Err(EngineError::invalid(
            format!("{field}.contents.{name}"),
            format!("does not fit datatype {}: use {wanted}", input.datatype),
        )),
        None => Ok(c),
    }
}

/// Typed contents as little-endian bytes.
fn typed(input: &InferInputTensor, dtype: DType, field: &str) -> Result<Bytes> {
    macro_rules! plain {
        ($name:ident) => {{
            let c = contents(input, field, stringify!($name))?;
            c.$name.iter().flat_map(|v| v.to_le_bytes()).collect()
        }};
    }
    macro_rules! narrow {
        ($name:ident, $to:ty) => {{
            let c = contents(input, field, stringify!($name))?;
            let mut bytes = BytesMut::with_capacity(c.$name.len() * size_of::<$to>());
            for (at, v) in c.$name.iter().enumerate() {
                let value = <$to>::try_from(*v).map_err(|_| {
                    EngineError::invalid(
                        format!("{field}.contents.{}[{at}]", stringify!($name)),
                        format!("{v} does not fit {}", input.datatype),
                    )
                })?;
                bytes.put_slice(&value.to_le_bytes());
            }
            bytes.freeze()
        }};
    }
    Ok(match dtype {
        DType::Bool => {
            let c = contents(input, field, "bool_contents")?;
            c.bool_contents.iter().map(|b| u8::from(*b)).collect()
        }
        DType::I8 => narrow!(int_contents, i8),
        DType::I16 => narrow!(int_contents, i16),
        DType::I32 => plain!(int_contents),
        DType::I64 => plain!(int64_contents),
        DType::U8 => narrow!(uint_contents, u8),
        DType::U16 => narrow!(uint_contents, u16),
        DType::U32 => plain!(uint_contents),
        DType::U64 => plain!(uint64_contents),
        DType::F32 => plain!(fp32_contents),
        DType::F64 => plain!(fp64_contents),
        DType::F16 | DType::Bf16 => {
            return Err(EngineError::invalid(
                format!("{field}.contents"),
                format!("{} travels in raw_input_contents only", input.datatype),
            ));
        }
    })
}

/// Raw BYTES: each element behind its length as u32.
fn split(raw: &Bytes, field: &str) -> Result<Vec<Bytes>> {
    let mut rest = raw.clone();
    let mut elements = Vec::new();
    while !rest.is_empty() {
        let length = rest
            .first_chunk()
            .map(|l| u32::from_le_bytes(*l) as usize)
            .filter(|length| rest.len() - 4 >= *length)
            .ok_or_else(|| {
                EngineError::invalid(
                    format!("{field}.contents"),
                    "raw BYTES end within an element: each stands behind its length as u32, little-endian",
                )
            })?;
        elements.push(rest.slice(4..4 + length));
        rest = rest.slice(4 + length..);
        if elements.len() > MOST_ROWS {
            return Err(EngineError::invalid(
                field,
                format!("has more than {MOST_ROWS} elements"),
            ));
        }
    }
    Ok(elements)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn raw_strings_never_panic_and_come_back(raw in prop::collection::vec(any::<u8>(), 0..64), texts in prop::collection::vec(".{0,9}", 0..5)) {
            let _ = split(&Bytes::from(raw), "x");
            let mut joined = BytesMut::new();
            for t in &texts {
                joined.put_u32_le(t.len() as u32);
                joined.put_slice(t.as_bytes());
            }
            let back = split(&joined.freeze(), "x").unwrap();
            prop_assert_eq!(back, texts.iter().map(|t| Bytes::from(t.clone())).collect::<Vec<_>>());
        }
    }

    fn input(datatype: &str, shape: &[i64], contents: pb::InferTensorContents) -> InferInputTensor {
        InferInputTensor {
            name: "x".into(),
            datatype: datatype.into(),
            shape: shape.to_vec(),
            contents: Some(contents),
            ..InferInputTensor::default()
        }
    }

    fn field(input: &InferInputTensor, raw: Option<&Bytes>) -> String {
        match given(input, raw, "inputs[0]") {
            Err(EngineError::InvalidArgument { field, .. }) => field,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("was taken"),
        }
    }

    #[test]
    fn typed_contents_must_fit_their_datatype() {
        let ints = |values: &[i32]| pb::InferTensorContents {
            int_contents: values.to_vec(),
            ..Default::default()
        };
        let ok = given(&input("INT8", &[2], ints(&[1, -2])), None, "inputs[0]");
        assert!(matches!(ok, Ok(Given::Tensor(t)) if t.bytes()[..] == [1, 254]));
        assert_eq!(
            field(&input("INT8", &[1], ints(&[200])), None),
            "inputs[0].contents.int_contents[0]"
        );
        assert_eq!(
            field(&input("INT64", &[1], ints(&[1])), None),
            "inputs[0].contents.int_contents"
        );
        assert_eq!(
            field(&input("FP16", &[1], ints(&[])), None),
            "inputs[0].contents"
        );
        assert_eq!(
            field(&input("INT32", &[3], ints(&[1])), None),
            "inputs[0].contents"
        );
        assert_eq!(
            field(&input("INT32", &[0], ints(&[])), None),
            "inputs[0].shape"
        );
        assert_eq!(
            field(&input("INT32", &[-1], ints(&[])), None),
            "inputs[0].shape"
        );
        assert_eq!(
            field(&input("INT4", &[1], ints(&[1])), None),
            "inputs[0].datatype"
        );
        let raw = Bytes::from_static(&[0; 4]);
        assert_eq!(
            field(&input("INT32", &[1], ints(&[1])), Some(&raw)),
            "inputs[0].contents"
        );
    }
}
