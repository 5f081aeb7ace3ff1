//! From what was run to the outputs of a response: parts joined along the batch axis.

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Write as _,
};

use bytes::{BufMut as _, Bytes, BytesMut};

use super::rows::datatype;
use crate::{
    engine::{
        EngineError, ModelHandle, NamedTensor, PickSpec, RowGroup, RowsDone,
        admission::exposed_bytes,
    },
    ipc::{
        info::{Axis, ModelInfo, ValueInfo},
        spec::VALUE_PREFIX,
    },
    methods::predict::best,
    service::wire::inference::{
        self as pb, InferParameter, infer_parameter::ParameterChoice,
        model_infer_request::InferRequestedOutputTensor, model_infer_response::InferOutputTensor,
    },
    tensor::Tensor,
};

/// Most outputs of a request.
const MOST_OUTPUTS: usize = 4096;
/// Parameter that asks for the greatest entries with their labels.
const CLASSIFICATION: &str = "classification";

type Result<T> = std::result::Result<T, EngineError>;

/// An output that was asked for.
pub(super) struct Asked {
    /// As it was asked for.
    name: String,
    pub(super) pick: PickSpec,
    pub(super) is_hook: bool,
    axes: Vec<Axis>,
    /// How many of the greatest entries, in place of all.
    classes: Option<usize>,
}

impl Asked {
    /// The outputs of a request; all of the model's when it names none.
    pub(super) fn of(
        info: &ModelInfo,
        requested: &[InferRequestedOutputTensor],
    ) -> Result<Vec<Self>> {
        if requested.len() > MOST_OUTPUTS {
            return Err(EngineError::invalid(
                "outputs",
                format!(
                    "has {} entries: give at most {MOST_OUTPUTS}",
                    requested.len()
                ),
            ));
        }
        if requested.is_empty() {
            return Ok(info
                .outputs
                .iter()
                .map(|o| Self::new(&o.name, &o.name, false, &o.axes, None))
                .collect());
        }
        let mut seen = BTreeSet::new();
        let mut asked = Vec::with_capacity(requested.len());
        for (at, output) in requested.iter().enumerate() {
            let field = format!("outputs[{at}]");
            let name = output.name.as_str();
            if !seen.insert(name) {
                return Err(EngineError::invalid(
                    format!("{field}.name"),
                    format!("output \"{name}\" is asked for twice"),
                ));
            }
            let classes = classes(&output.parameters, &field)?;
            asked.push(if let Some(own) = info.output(name) {
                Self::new(name, name, false, &own.axes, classes)
            } else if let Some(hook) = info.hook(name) {
                Self::new(name, &hook.name, true, &hook.axes, classes)
            } else if name.starts_with(VALUE_PREFIX) {
                Self::new(name, name, true, &[], classes)
            } else {
                return Err(EngineError::invalid(
                    format!("{field}.name"),
                    format!(
                        "\"{name}\" is neither an output ({}) nor a hook point of model \"{}\"",
                        info.outputs
                            .iter()
                            .map(|o| o.name.as_str())
                            .collect::<Vec<_>>()
                            .join(", "),
                        info.name
                    ),
                ));
            });
        }
        Ok(asked)
    }

    fn new(name: &str, output: &str, is_hook: bool, axes: &[Axis], classes: Option<usize>) -> Self {
        Self {
            name: name.to_owned(),
            pick: PickSpec {
                output: output.to_owned(),
                keep_batch: true,
                ..PickSpec::default()
            },
            is_hook,
            axes: axes.to_vec(),
            classes,
        }
    }
}

/// Bytes of the answer, as far as extents are known.
pub(super) fn estimate(info: &ModelInfo, asked: &[Asked], groups: &[RowGroup]) -> usize {
    /// An extent that only the run tells.
    const UNKNOWN: usize = 1;
    let of = |name: &str| {
        let own = info.output(name).cloned();
        own.or_else(|| {
            info.hook(name).map(|h| ValueInfo {
                name: h.name.clone(),
                dtype: h.dtype,
                axes: h.axes.clone(),
                dims: h.dims.clone(),
            })
        })
    };
    let values: Vec<(ValueInfo, &PickSpec)> = asked
        .iter()
        .filter_map(|a| Some((of(&a.pick.output)?, &a.pick)))
        .collect();
    groups
        .iter()
        .map(|group| {
            let length = group.length.unwrap_or_else(|| longest(info, group));
            let row = |(value, pick): &(ValueInfo, &PickSpec)| {
                exposed_bytes(value, pick, length, UNKNOWN)
            };
            values
                .iter()
                .map(row)
                .fold(0usize, usize::saturating_add)
                .saturating_mul(group.rows)
        })
        .fold(0, usize::saturating_add)
}

/// Tokens of the rows of a group that came as tensors.
fn longest(info: &ModelInfo, group: &RowGroup) -> usize {
    let tokens = |i: &NamedTensor| {
        let known = info.inputs.iter().find(|k| k.name == i.name)?;
        let axis = known.axes.iter().position(Axis::is_token)?;
        i.tensor.shape().get(axis).copied()
    };
    group.inputs.iter().filter_map(tokens).max().unwrap_or(0)
}

/// Hook points among the outputs.
pub(super) fn hooks(asked: &[Asked]) -> BTreeSet<String> {
    asked
        .iter()
        .filter(|a| a.is_hook)
        .map(|a| a.pick.output.clone())
        .collect()
}

/// The response. `done` is in the order of groups and rows.
pub(super) fn response(
    handle: &ModelHandle,
    request: &pb::ModelInferRequest,
    asked: Vec<Asked>,
    done: Vec<RowsDone>,
) -> Result<pb::ModelInferResponse> {
    let info = handle.info();
    let mut response = pb::ModelInferResponse {
        model_name: info.name.clone(),
        model_version: handle.generation().to_string(),
        id: request.id.clone(),
        parameters: HashMap::from([text("fingerprint", &info.fingerprint)]),
        ..pb::ModelInferResponse::default()
    };
    for (at, asked) in asked.into_iter().enumerate() {
        let parts: Vec<&Tensor> = done.iter().filter_map(|d| d.tensors.get(at)).collect();
        let tensor = joined(&asked, &parts, at)?;
        let mut parameters = HashMap::new();
        if asked.is_hook {
            parameters.extend([text("hook", &asked.pick.output)]);
        }
        if !asked.axes.is_empty() {
            let names: Vec<&str> = asked.axes.iter().map(Axis::name).collect();
            parameters.extend([text("axes", &names.join(","))]);
        }
        let (datatype, shape, bytes) = match asked.classes {
            None => (
                datatype(tensor.dtype()),
                tensor.shape().to_vec(),
                tensor.into_bytes(),
            ),
            Some(n) => classified(info, &tensor, n, at)?,
        };
        response.outputs.push(InferOutputTensor {
            name: asked.name,
            datatype: datatype.to_owned(),
            shape: shape
                .iter()
                .map(|d| i64::try_from(*d).unwrap_or(i64::MAX))
                .collect(),
            parameters,
            contents: None,
        });
        response.raw_output_contents.push(bytes);
    }
    Ok(response)
}

/// Parts of an output, one after the other along the batch axis.
fn joined(asked: &Asked, parts: &[&Tensor], at: usize) -> Result<Tensor> {
    let [first, others @ ..] = parts else {
        return Err(EngineError::internal("rows ended without an answer"));
    };
    if others.is_empty() {
        return Ok((*first).clone());
    }
    if asked.axes.first() != Some(&Axis::Batch) {
        // Nothing of it depends on the row, or nobody has read how.
        return if parts.iter().all(|p| p == first) {
            Ok((*first).clone())
        } else {
            Err(EngineError::invalid(
                format!("outputs[{at}]"),
                format!(
                    "\"{}\" has no batch axis: ask for it one row at a time",
                    asked.name
                ),
            ))
        };
    }
    let inner = |t: &Tensor| t.shape().get(1..).unwrap_or_default().to_vec();
    if let Some(other) = parts.iter().find(|p| inner(p) != inner(first)) {
        return Err(EngineError::invalid(
            format!("outputs[{at}]"),
            format!(
                "\"{}\" has shape {:?} for one row and {:?} for another, as they differ in tokens: \
                 send texts of equal length in tokens, one text per request, or use introspect.v1.CaptureService",
                asked.name,
                first.shape(),
                other.shape()
            ),
        ));
    }
    let mut shape = first.shape().to_vec();
    shape[0] = parts.iter().map(|p| p.shape()[0]).sum();
    let mut bytes = BytesMut::with_capacity(parts.iter().map(|p| p.bytes().len()).sum());
    for part in parts {
        bytes.put_slice(part.bytes());
    }
    Tensor::new(first.dtype(), shape, bytes.freeze()).map_err(EngineError::internal)
}

fn classes(parameters: &HashMap<String, InferParameter>, field: &str) -> Result<Option<usize>> {
    let Some(parameter) = parameters.get(CLASSIFICATION) else {
        return Ok(None);
    };
    let count = match parameter.parameter_choice {
        Some(ParameterChoice::Int64Param(n)) => usize::try_from(n).ok(),
        Some(ParameterChoice::Uint64Param(n)) => usize::try_from(n).ok(),
        Some(
            ParameterChoice::BoolParam(_)
            | ParameterChoice::StringParam(_)
            | ParameterChoice::DoubleParam(_),
        )
        | None => None,
    };
    match count {
        // Triton sends 0 for "no classification".
        Some(0) => Ok(None),
        Some(n) => Ok(Some(n)),
        None => Err(EngineError::invalid(
            format!("{field}.parameters.{CLASSIFICATION}"),
            "must be a number of classes, not negative",
        )),
    }
}

/// The greatest entries along the last axis as `value:index:label`.
fn classified(
    info: &ModelInfo,
    tensor: &Tensor,
    n: usize,
    at: usize,
) -> Result<(&'static str, Vec<usize>, Bytes)> {
    let values = tensor.to_f32().map_err(|_| {
        EngineError::invalid(
            format!("outputs[{at}].parameters.{CLASSIFICATION}"),
            format!("the output holds {}, which is no score", tensor.dtype()),
        )
    })?;
    let width = tensor.shape().last().copied().unwrap_or(1).max(1);
    let n = n.min(width);
    let mut bytes = BytesMut::new();
    for row in values.chunks_exact(width) {
        for (index, _) in best(row, n) {
            let mut entry = String::new();
            // Writing to a string cannot fail.
            let _ = write!(entry, "{:.6}:{index}", row[index as usize]);
            if let Some(label) = info
                .labels
                .get(index as usize)
                .filter(|_| info.labels.len() == width)
            {
                let _ = write!(entry, ":{label}");
            }
            bytes.put_u32_le(u32::try_from(entry.len()).unwrap_or(u32::MAX));
            bytes.put_slice(entry.as_bytes());
        }
    }
    let mut shape = tensor.shape().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = n;
    }
    Ok(("BYTES", shape, bytes.freeze()))
}

fn text(key: &str, value: &str) -> (String, InferParameter) {
    let choice = ParameterChoice::StringParam(value.to_owned());
    (
        key.to_owned(),
        InferParameter {
            parameter_choice: Some(choice),
        },
    )
}
