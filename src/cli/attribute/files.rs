//! An explanation as a file: `.json`, `.npz`, `.png`, `.html`.

use std::io::Cursor;

use ndarray::{Array1, Array2, ArrayD};
use ndarray_npy::{NpzWriter, WritableElement};
use serde_json::{Value, json};

use super::answer::Explained;
use crate::cli::{
    capture::json as common,
    error::CliError,
    picture::{self, attribution},
};

/// Everything.
pub(super) fn json(found: &Explained) -> Value {
    let (header, result) = (&found.header, &found.result);
    let tensors: serde_json::Map<String, Value> = found
        .tensors
        .iter()
        .map(|(name, a)| {
            let value = json!({ "axes": a.axes, "shape": a.shape(), "values": a.flat() });
            (name.clone(), value)
        })
        .collect();
    json!({
        "model": header.model,
        "fingerprint": header.fingerprint,
        "generation": header.generation,
        "provider": header.provider,
        "method": result.method,
        "convention": result.convention,
        "site": result.site,
        "precision": result.precision,
        "baseline": header.baseline,
        "target": found.target(),
        "terms": header.terms.iter().map(|t| json!({
            "index": t.index, "label": t.label, "position": t.position, "weight": t.weight,
        })).collect::<Vec<_>>(),
        "value": result.value,
        "baseline_value": result.baseline_value,
        "delta": result.delta,
        "residual_ratio": result.residual_ratio,
        "error": result.error,
        "error_kind": result.error_kind,
        "seed": result.seed,
        "steps": result.steps,
        "exact": result.exact,
        "tokens": header.tokens.iter().map(common::token).collect::<Vec<_>>(),
        "features": header.features.iter().map(|f| json!({
            "text": f.text, "start": f.start, "end": f.end, "sequence": f.sequence, "tokens": f.tokens,
        })).collect::<Vec<_>>(),
        "tensors": tensors,
        "summary": common::summary(&found.summary),
    })
}

/// `numpy.load(FILE)["attributions"]`; the facts are UTF-8 bytes of JSON under `meta`.
pub(super) fn npz(found: &Explained) -> Result<Vec<u8>, CliError> {
    let mut archive = NpzWriter::new(Cursor::new(Vec::new()));
    for (name, a) in &found.tensors {
        put(&mut archive, name, &a.values)?;
    }
    let tokens = &found.header.tokens;
    let ids = Array1::from_iter(tokens.iter().map(|t| i64::from(t.id)));
    put(&mut archive, "token_ids", &ids.into_dyn())?;
    let offsets = Array2::from_shape_fn((tokens.len(), 2), |(i, end)| {
        i64::from(if end == 0 {
            tokens[i].start
        } else {
            tokens[i].end
        })
    });
    put(&mut archive, "token_offsets", &offsets.into_dyn())?;
    let mut meta = json(found);
    meta["tensors"] = Value::Null;
    put(
        &mut archive,
        "meta",
        &Array1::from(meta.to_string().into_bytes()).into_dyn(),
    )?;
    let done = archive.finish().map_err(|e| CliError::new(e.to_string()))?;
    Ok(done.into_inner())
}

fn put<T: WritableElement>(
    archive: &mut NpzWriter<Cursor<Vec<u8>>>,
    name: &str,
    array: &ArrayD<T>,
) -> Result<(), CliError> {
    archive
        .add_array(name, array)
        .map_err(|e| CliError::new(format!("array \"{name}\" cannot be written: {e}")))
}

/// For pictures.
pub(in crate::cli) fn pictured(found: &Explained) -> attribution::Attribution {
    let result = &found.result;
    let mut facts = vec![format!("F(x) = {:.5}", result.value)];
    if let Some(value) = result.baseline_value {
        facts.push(format!("F({}) = {value:.5}", found.header.baseline));
    }
    if let Some(delta) = result.delta {
        facts.push(format!("delta {delta:+.2e}"));
    }
    if let Some(error) = result.error {
        facts.push(format!("error {error:.2e} ({})", result.error_kind));
    }
    let shape = found
        .tensors
        .get("attributions")
        .map(|a| a.shape().to_vec());
    let scored = found.scored();
    attribution::Attribution {
        title: format!(
            "{}: {} of {}",
            found.header.model,
            result.method,
            found.target()
        ),
        facts: facts.join(", "),
        labels: scored.iter().map(|s| s.text.clone()).collect(),
        scores: scored.iter().map(|s| s.score).collect(),
        shape: shape.unwrap_or_default(),
    }
}

pub(super) fn png(found: &Explained) -> Result<Vec<u8>, CliError> {
    picture::attribution::png(&pictured(found)).map_err(|e| CliError::new(e.to_string()))
}

pub(super) fn html(found: &Explained) -> Vec<u8> {
    picture::attribution::html(&pictured(found)).into_bytes()
}
