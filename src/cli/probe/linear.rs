//! Weights of a linear probe that was trained elsewhere, from JSON.

use std::{fs, path::Path};

use serde::Deserialize;

use crate::{
    cli::error::CliError,
    service::wire::introspect::{self as pb},
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Linear {
    hook: String,
    #[serde(default)]
    pooling: Option<Pooling>,
    #[serde(default)]
    labels: Vec<Label>,
    weight: Rows,
    bias: Numbers,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Pooling {
    Mean,
    Cls,
    Last,
    Max,
}

/// Classes of scikit-learn are texts or whole numbers.
#[derive(Deserialize)]
#[serde(untagged)]
enum Label {
    Text(String),
    Number(i64),
}

/// Regressions of scikit-learn have one row of weights, or a plain list.
#[derive(Deserialize)]
#[serde(untagged)]
enum Rows {
    Many(Vec<Vec<f32>>),
    One(Vec<f32>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Numbers {
    Many(Vec<f32>),
    One(f32),
}

/// Reads it. Whether it fits the model is the daemon's to say.
pub(super) fn read(path: &Path) -> Result<pb::LinearProbe, CliError> {
    let named = |e: &dyn std::fmt::Display| CliError::new(format!("\"{}\": {e}", path.display()));
    let text = fs::read_to_string(path).map_err(|e| named(&e))?;
    let given: Linear = serde_json::from_str(&text).map_err(|e| named(&e))?;
    let rows = match given.weight {
        Rows::Many(rows) => rows,
        Rows::One(row) => vec![row],
    };
    if rows.windows(2).any(|pair| pair[0].len() != pair[1].len()) {
        return Err(named(&"rows of weight have different lengths"));
    }
    let pooling = match given.pooling {
        None => pb::Pooling::Unspecified,
        Some(Pooling::Mean) => pb::Pooling::Mean,
        Some(Pooling::Cls) => pb::Pooling::Cls,
        Some(Pooling::Last) => pb::Pooling::Last,
        Some(Pooling::Max) => pb::Pooling::Max,
    };
    let spelled = |label| match label {
        Label::Text(text) => text,
        Label::Number(number) => number.to_string(),
    };
    Ok(pb::LinearProbe {
        hook: given.hook,
        pooling: pooling.into(),
        labels: given.labels.into_iter().map(spelled).collect(),
        weight: rows.concat(),
        bias: match given.bias {
            Numbers::Many(bias) => bias,
            Numbers::One(bias) => vec![bias],
        },
    })
}
