//! Measures of heads on the terminal, as JSON, and as pictures.

use ndarray::{Array2, Axis, Ix2};
use serde_json::{Value, json};

use super::Answer;
use crate::{
    cli::{
        arrays::Array,
        capture::json::{shortest, summary, token},
        files::Contents,
        out,
        picture::{
            grid::{self, Grid, Scale},
            terminal::Style,
        },
    },
    service::wire::introspect as pb,
};

/// Widest map where there is no terminal to fit.
const WIDTH: usize = 200;
/// Offsets on both sides that the terminal shows.
const NEAR: usize = 8;
/// Heads that are named beside a map.
const NAMED: usize = 3;

/// Heat maps below each other.
pub(super) fn page(answer: &Answer) -> String {
    let style = Style::of_stdout();
    let width = out::width().unwrap_or(WIDTH);
    let mut text = String::new();
    for grid in grids(answer, Some(NEAR)) {
        text.push_str(&grid::text(&grid, style, width));
        text.push('\n');
    }
    for note in &answer.summary.notes {
        text.push_str(&format!("  {}\n", out::clean(note)));
    }
    text
}

/// For files.
pub(super) fn contents(answer: &Answer) -> Contents {
    let arrays = answer.arrays.iter();
    Contents {
        json: json(answer),
        arrays: arrays.map(|a| (a.name.clone(), a.values.clone())).collect(),
        title: format!("Heads of {}", answer.header.model),
        grids: grids(answer, None),
    }
}

/// A grid for each measure, for each layer's offsets, and for positions.
fn grids(answer: &Answer, near: Option<usize>) -> Vec<Grid> {
    let mut grids = Vec::new();
    for array in &answer.arrays {
        match (&array.name[..], array.values.ndim()) {
            ("position_similarity", 2) => grids.extend(similarity(answer, array)),
            ("offsets", 3) => grids.extend(offsets(answer, array, near)),
            (_, 2) => grids.extend(measure(answer, array)),
            _ => {}
        }
    }
    grids
}

fn measure(answer: &Answer, array: &Array) -> Option<Grid> {
    let values = array.values.clone().into_dimensionality::<Ix2>().ok()?;
    let ranking = answer.rankings.iter().find(|r| r.name == array.name);
    let best = ranking.map(|r| &r.heads[..]).unwrap_or_default();
    let best: Vec<String> = best
        .iter()
        .take(NAMED)
        .map(|h| format!("{}.{} {:.3}", h.layer, h.head, h.score))
        .collect();
    let greatest = values.iter().filter(|v| v.is_finite());
    let greatest = greatest.fold(0f32, |m, v| m.max(*v));
    let part_of_one = !["entropy", "distance"].contains(&&array.name[..]);
    let scale = if values.iter().any(|v| *v < 0.0) {
        Scale::Signed
    } else if part_of_one {
        Scale::Range(0.0, 1.0)
    } else {
        Scale::Range(0.0, greatest)
    };
    Some(Grid {
        title: array.name.clone(),
        facts: format!("most (layer.head): {}", best.join(", ")),
        rows: layers(answer),
        columns: (0..values.ncols()).map(|h| h.to_string()).collect(),
        values,
        scale,
    })
}

fn layers(answer: &Answer) -> Vec<String> {
    let layers = answer.header.layers.iter();
    layers.map(|l| format!("layer {l}")).collect()
}

fn offsets(answer: &Answer, array: &Array, near: Option<usize>) -> Vec<Grid> {
    let all = array.values.shape()[2];
    let middle = all / 2;
    let from = near.map_or(0, |near| middle.saturating_sub(near));
    let to = near.map_or(all, |near| all.min(middle + near + 1));
    // 0 stands for the token itself, 1 for the one before.
    let name = |at: usize| {
        let back = i64::try_from(at).unwrap_or(0) - i64::try_from(middle).unwrap_or(0);
        back.to_string()
    };
    let each = array.values.axis_iter(Axis(0)).zip(&answer.header.layers);
    each.filter_map(|(heads, layer)| {
        let heads = heads.into_dimensionality::<Ix2>().ok()?;
        let values: Array2<f32> = heads.slice(ndarray::s![.., from..to]).to_owned();
        Some(Grid {
            title: format!("attention by offset, layer {layer}"),
            facts: "tokens back from the query; negative ones ahead".to_owned(),
            rows: (0..values.nrows()).map(|h| format!("head {h}")).collect(),
            columns: (from..to).map(name).collect(),
            values,
            scale: Scale::Range(0.0, 1.0),
        })
    })
    .collect()
}

fn similarity(answer: &Answer, array: &Array) -> Option<Grid> {
    let values = array.values.clone().into_dimensionality::<Ix2>().ok()?;
    let names: Vec<String> = (0..values.nrows()).map(|p| p.to_string()).collect();
    Some(Grid {
        title: "similarity of positions".to_owned(),
        facts: format!("cosine of what {} adds for each", answer.header.model),
        rows: names.clone(),
        columns: names,
        values,
        scale: Scale::Signed,
    })
}

/// Everything.
pub(super) fn json(answer: &Answer) -> Value {
    let header = &answer.header;
    let rankings = answer.rankings.iter().map(|r| (r.name.clone(), ranking(r)));
    let arrays = answer.arrays.iter().map(|a| (a.name.clone(), a.json()));
    let inputs = header.inputs.iter();
    let inputs = inputs.map(|i| i.tokens.iter().map(token).collect::<Value>());
    json!({
        "model": header.model,
        "fingerprint": header.fingerprint,
        "generation": header.generation,
        "provider": header.provider,
        "layers": header.layers,
        "inputs": inputs.collect::<Vec<_>>(),
        "sequences": header.sequences.iter().map(|s| s.ids.clone()).collect::<Vec<_>>(),
        "seed": header.seed,
        "repeated_length": header.repeated_length,
        "rankings": rankings.collect::<serde_json::Map<_, _>>(),
        "tensors": arrays.collect::<serde_json::Map<_, _>>(),
        "summary": summary(&answer.summary),
    })
}

fn ranking(ranking: &pb::HeadRanking) -> Value {
    let heads = ranking.heads.iter();
    heads
        .map(|h| json!({ "layer": h.layer, "head": h.head, "score": shortest(h.score) }))
        .collect()
}
