//! A capture as JSON: facts, then tensors as nested lists. What is not finite is null: JSON has no word for it.

use serde_json::{Value, json};

use crate::{
    cli::{
        assemble::{Captured, Data, Named},
        error::CliError,
    },
    service::wire::introspect::{Prediction, Summary, Timings, Token},
    tensor::{DType, Tensor},
};

/// Everything.
pub(super) fn whole(captured: &Captured) -> Result<Value, CliError> {
    let mut value = facts(captured);
    let mut tensors = serde_json::Map::new();
    for named in &captured.tensors {
        let tensor = tensor(named)
            .map_err(|why| CliError::new(format!("tensor \"{}\": {why}", named.name)))?;
        tensors.insert(named.name.clone(), tensor);
    }
    value["tensors"] = tensors.into();
    Ok(value)
}

/// Everything but the tensors.
pub(super) fn facts(captured: &Captured) -> Value {
    let header = &captured.header;
    json!({
        "model": header.model,
        "fingerprint": header.fingerprint,
        "generation": header.generation,
        "task": header.task,
        "provider": header.provider,
        "tokens": header.tokens.iter().map(token).collect::<Vec<_>>(),
        "prediction": captured.prediction.as_ref().map(prediction),
        "summary": summary(&captured.summary),
    })
}

/// A token.
pub(in crate::cli) fn token(t: &Token) -> Value {
    json!({
        "id": t.id, "text": t.text, "start": t.start, "end": t.end, "special": t.special,
        "sequence": t.sequence, "word": t.word, "type_id": t.type_id,
    })
}

/// A prediction.
pub(in crate::cli) fn prediction(p: &Prediction) -> Value {
    let at: Vec<Value> =
        p.at.iter()
            .map(|at| {
                let candidates: Vec<Value> = at
                    .candidates
                    .iter()
                    .map(|c| {
                        json!({
                            "index": c.index, "label": c.label, "logit": shortest(c.logit),
                            "probability": c.probability.map(shortest),
                        })
                    })
                    .collect();
                json!({ "position": at.position, "candidates": candidates })
            })
            .collect();
    json!({ "task": p.task, "at": at })
}

pub(in crate::cli) fn summary(s: &Summary) -> Value {
    json!({
        "rows": s.rows,
        "bytes": s.bytes,
        "truncated_tokens": s.truncated_tokens,
        "non_finite": s.non_finite,
        "notes": s.notes,
        "seconds": s.timings.as_ref().map(timings),
    })
}

fn timings(t: &Timings) -> Value {
    json!({
        "tokenize": t.tokenize_seconds, "queue": t.queue_seconds, "build": t.build_seconds,
        "run": t.run_seconds, "reduce": t.reduce_seconds, "encode": t.encode_seconds,
        "total": t.total_seconds,
    })
}

fn tensor(named: &Named) -> Result<Value, String> {
    let mut value = json!({
        "axes": named.axes,
        "dtype": named.dtype().name(),
        "shape": named.shape(),
    });
    match &named.data {
        Data::Dense(tensor) => {
            let mut flat = numbers(tensor)?.into_iter();
            value["data"] = nested(tensor.shape(), &mut flat);
        }
        Data::Sparse(sparse) => {
            value["counts"] = sparse.counts.clone().into();
            value["indices"] = sparse.indices.clone().into();
            value["values"] = numbers(&sparse.values)?.into();
        }
    }
    Ok(value)
}

pub(in crate::cli) fn nested(shape: &[usize], flat: &mut impl Iterator<Item = Value>) -> Value {
    match shape.split_first() {
        None => flat.next().unwrap_or(Value::Null),
        // Without elements the outer extents alone may be huge; the shape stands beside the list.
        Some(_) if shape.contains(&0) => Value::Array(Vec::new()),
        Some((extent, inner)) => (0..*extent).map(|_| nested(inner, flat)).collect(),
    }
}

/// The shortest decimal that reads back as this f32: `0.1`, not `0.10000000149011612`.
pub(in crate::cli) fn shortest(v: f32) -> Value {
    v.to_string()
        .parse::<f64>()
        .map_or(Value::Null, Value::from)
}

fn numbers(tensor: &Tensor) -> Result<Vec<Value>, String> {
    if tensor.dtype().is_float() {
        let values = tensor.to_f32().map_err(|e| e.to_string())?;
        return Ok(values.iter().map(|v| shortest(*v)).collect());
    }
    let size = tensor.dtype().size();
    let signed = matches!(
        tensor.dtype(),
        DType::I8 | DType::I16 | DType::I32 | DType::I64
    );
    Ok(tensor
        .bytes()
        .chunks_exact(size)
        .map(|chunk| {
            let negative = signed && chunk.last().is_some_and(|b| b & 0x80 != 0);
            let mut wide = [if negative { 0xff } else { 0 }; 8];
            wide[..size].copy_from_slice(chunk);
            if signed {
                i64::from_le_bytes(wide).into()
            } else {
                u64::from_le_bytes(wide).into()
            }
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn named(tensor: Tensor) -> Named {
        Named {
            name: "t".into(),
            axes: Vec::new(),
            data: Data::Dense(tensor),
        }
    }

    #[test]
    fn lists_nest_as_the_shape_does() {
        let t = Tensor::from_f32(vec![2, 1, 2], &[1.0, 0.1, 3.0, f32::NEG_INFINITY]).unwrap();
        let value = super::tensor(&named(t)).unwrap();
        assert_eq!(value["data"], json!([[[1.0, 0.1]], [[3.0, null]]]));
        let single = Tensor::from_f32(vec![], &[0.5]).unwrap();
        assert_eq!(super::tensor(&named(single)).unwrap()["data"], json!(0.5));
        let none = Tensor::from_f32(vec![1 << 40, 0], &[]).unwrap();
        assert_eq!(super::tensor(&named(none)).unwrap()["data"], json!([]));
    }

    #[test]
    fn integers_keep_their_sign_and_width() {
        let t = |dtype, bytes: &[u8]| {
            let n = bytes.len() / DType::size(dtype);
            Tensor::new(dtype, vec![n], Bytes::copy_from_slice(bytes)).unwrap()
        };
        assert_eq!(
            numbers(&t(DType::I8, &[0xff, 1])).unwrap(),
            [json!(-1), json!(1)]
        );
        assert_eq!(numbers(&t(DType::U8, &[0xff])).unwrap(), [json!(255)]);
        assert_eq!(
            numbers(&t(DType::I32, &(-7i32).to_le_bytes())).unwrap(),
            [json!(-7)]
        );
        assert_eq!(
            numbers(&t(DType::U64, &u64::MAX.to_le_bytes())).unwrap(),
            [json!(u64::MAX)]
        );
    }
}
