//! A lens as JSON, arrays and grids.

use ndarray::Array2;
use serde_json::{Value, json};

use super::answer::Lensed;
use crate::cli::{
    arrays::Array,
    capture::json as common,
    files::Contents,
    picture::grid::{Grid, Scale},
};

/// Everything.
pub(super) fn json(found: &Lensed) -> Value {
    let mut value = facts(found);
    let tensors = found.tensors.iter().map(|(name, a)| {
        let tensor = json!({ "axes": a.axes, "shape": a.shape(), "values": a.flat() });
        (name.clone(), tensor)
    });
    value["tensors"] = Value::Object(tensors.collect());
    value
}

/// Everything but the tensors.
fn facts(found: &Lensed) -> Value {
    let header = &found.header;
    let labels = found.labels.iter();
    let labels = labels.map(|(index, label)| (index.to_string(), Value::from(label.clone())));
    json!({
        "model": header.model,
        "fingerprint": header.fingerprint,
        "generation": header.generation,
        "provider": header.provider,
        "tokens": header.tokens.iter().map(common::token).collect::<Vec<_>>(),
        "states": header.states,
        "positions": header.positions,
        "length": header.length,
        "tuned": header.tuned,
        "terms": header.terms.iter().map(|t| json!({
            "index": t.index, "label": t.label, "position": t.position, "weight": t.weight,
        })).collect::<Vec<_>>(),
        "attribution": found.attribution.as_ref().map(|a| json!({
            "value": a.value, "bias": a.bias, "value_of_nothing": a.value_of_nothing, "affine": a.affine,
            "components": a.components, "layers": a.layers,
        })),
        "labels": Value::Object(labels.collect()),
        "summary": common::summary(&found.summary),
    })
}

/// What files hold.
pub(super) fn contents(found: &Lensed) -> Contents {
    let arrays = found.tensors.iter();
    Contents {
        arrays: arrays.map(|(n, a)| (n.clone(), a.values.clone())).collect(),
        json: json(found),
        title: format!("{}: lens", found.header.model),
        grids: grids(found),
    }
}

/// Heat maps of everything that came.
pub(super) fn grids(found: &Lensed) -> Vec<Grid> {
    let mut all = Vec::new();
    all.extend(lens(found));
    all.extend(attribution(found));
    all.extend(residual(found));
    all
}

/// What states say at each position.
pub(super) fn lens(found: &Lensed) -> Vec<Grid> {
    let columns = || {
        let positions = found.header.positions.iter();
        positions.map(|p| found.position(*p)).collect()
    };
    let most = |a: &Array| a.values.iter().copied().fold(0f32, f32::max);
    let mut all = Vec::new();
    if let Some(logs) = found.array("target_log_probability") {
        let probabilities = Array {
            values: logs.values.mapv(f32::exp),
            ..logs.clone()
        };
        let first = found.header.terms.first();
        let name = first.map_or_else(String::new, |t| {
            if t.label.is_empty() {
                t.index.to_string()
            } else {
                format!("{:?}", t.label)
            }
        });
        all.extend(grid(
            found,
            format!("probability of {name} by state and position"),
            (&probabilities, columns()),
            Scale::Range(0.0, 1.0),
        ));
        if let Some(rank) = found.array("target_rank") {
            all.extend(grid(
                found,
                format!("rank of {name} (0: best)"),
                (rank, columns()),
                Scale::Range(0.0, most(rank)),
            ));
        }
    }
    if let Some(entropy) = found.array("entropy") {
        all.extend(grid(
            found,
            "entropy in nats".to_owned(),
            (entropy, columns()),
            Scale::Range(0.0, most(entropy)),
        ));
    }
    if found.header.terms.len() > 1
        && let Some(difference) = found.array("target")
    {
        all.extend(grid(
            found,
            found.target(),
            (difference, columns()),
            Scale::Signed,
        ));
    }
    all
}

/// What components and heads contribute.
pub(super) fn attribution(found: &Lensed) -> Vec<Grid> {
    let Some(facts) = &found.attribution else {
        return Vec::new();
    };
    let mut all = Vec::new();
    let said = format!(
        "{} = {:.4}, bias {:+.4}",
        found.target(),
        facts.value,
        facts.bias
    );
    if let Some(a) = found.array("head_contributions")
        && let [layers, heads, positions] = a.shape()[..]
    {
        let sums = a.flat().chunks(positions.max(1));
        let sums: Vec<f32> = sums.map(|row| row.iter().sum()).collect();
        if let Ok(values) = Array2::from_shape_vec((layers, heads), sums) {
            all.push(Grid {
                title: "contribution of each head".to_owned(),
                facts: said.clone(),
                rows: facts.layers.iter().map(|l| format!("layer {l}")).collect(),
                columns: (0..heads).map(|h| h.to_string()).collect(),
                values,
                scale: Scale::Signed,
            });
        }
    }
    if let Some(a) = found.array("contributions")
        && let Some(values) = a.matrix()
    {
        let columns = (0u32..).take(values.ncols());
        all.push(Grid {
            title: "contribution of each component by position".to_owned(),
            facts: said,
            rows: facts.components.iter().map(|c| short(c)).collect(),
            columns: columns.map(|p| found.position(p)).collect(),
            values: values.to_owned(),
            scale: Scale::Signed,
        });
    }
    all
}

/// Lengths and angles.
pub(super) fn residual(found: &Lensed) -> Vec<Grid> {
    let mut all = Vec::new();
    if let Some(norm) = found.array("residual_norm") {
        let most = norm.values.iter().copied().fold(0f32, f32::max);
        let columns = (0..found.header.length).map(|p| found.position(p));
        all.extend(grid(
            found,
            "length of the residual stream".to_owned(),
            (norm, columns.collect()),
            Scale::Range(0.0, most),
        ));
    }
    if let Some(cosine) = found.array("residual_cosine") {
        let columns = (0..found.header.states.len()).map(|s| found.state(s));
        all.extend(grid(
            found,
            "cosine of states, mean over positions".to_owned(),
            (cosine, columns.collect()),
            Scale::Signed,
        ));
    }
    all
}

/// A grid whose rows are states.
fn grid(
    found: &Lensed,
    title: String,
    (array, columns): (&Array, Vec<String>),
    scale: Scale,
) -> Option<Grid> {
    let values = array.matrix()?;
    Some(Grid {
        title,
        facts: String::new(),
        rows: (0..values.nrows()).map(|s| found.state(s)).collect(),
        columns,
        values: values.to_owned(),
        scale,
    })
}

/// A component without what all have in common: `embed`, `0 attn_out`.
pub(super) fn short(component: &str) -> String {
    let inside = component.strip_prefix("blocks.").unwrap_or(component);
    match inside.split_once(".hook_") {
        Some((_, "resid_pre")) => "embed".to_owned(),
        Some((layer, part)) => format!("{layer} {part}"),
        None => inside.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::short;

    #[test]
    fn components_have_short_names() {
        assert_eq!(short("blocks.0.hook_resid_pre"), "embed");
        assert_eq!(short("blocks.11.hook_mlp_out"), "11 mlp_out");
    }
}
