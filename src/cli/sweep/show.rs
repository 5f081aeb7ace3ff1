//! A sweep on the terminal and as files.

use ndarray::Array2;
use serde_json::{Value, json};

use super::Swept;
use crate::cli::{
    arrays::Array,
    attribute::answer,
    capture::{json as common, view::spelled},
    files::Contents,
    out,
    picture::{
        grid::{self, Grid},
        terminal::Style,
    },
};

/// Parts that are listed.
const LISTED: usize = 10;
/// Columns of a heat map that a terminal takes; wider ones are listed only.
const WIDEST: usize = 256;
/// Columns where there is no terminal to ask.
const COLUMNS: usize = 120;

/// Heat maps, and the parts that matter most.
pub(in crate::cli) fn page(found: &Swept) -> String {
    let header = &found.header;
    let mut text = format!("{}\n", out::line(&headline(found)));
    let width = out::width().unwrap_or(COLUMNS);
    for grid in grids(found) {
        if grid.values.ncols() <= WIDEST {
            text.push('\n');
            text.push_str(&grid::text(&grid, Style::of_stdout(), width));
        }
    }
    let what = ["effects", "estimates"]
        .into_iter()
        .find(|what| !found.of(what).is_empty());
    if let Some(what) = what {
        let mut parts = listed(found, what);
        let all = parts.len();
        parts.truncate(LISTED);
        let rows = parts.into_iter().map(|part| {
            let relative = part
                .normalized
                .map_or(String::new(), |n| format!("{n:+.3}"));
            vec![part.name, format!("{:+.4}", part.value), relative]
        });
        let heading = [
            "part",
            what,
            if header.source_value.is_some() {
                "restored"
            } else {
                ""
            },
        ];
        text.push_str(&format!("\n{}", out::table(&heading, rows)));
        if all > LISTED {
            text.push_str(&format!(" the greatest {LISTED} of {all} parts\n"));
        }
    }
    if let Some(r) = found.result.correlation {
        text.push_str(&format!(
            "\nestimates and effects of {} parts correlate by r = {r:.3}\n",
            found.result.compared
        ));
    }
    let timings = found.summary.timings.as_ref();
    let seconds = timings.map_or(0.0, |t| t.total_seconds);
    text.push_str(&format!(
        "\n{} rows in {}\n",
        found.summary.rows,
        out::seconds(seconds)
    ));
    text
}

/// What is watched, and its values.
fn headline(found: &Swept) -> String {
    let header = &found.header;
    let watched = answer::target(header.quantity(), &header.terms);
    let source = header.source_value.map_or(String::new(), |s| {
        format!("; {s:.4} for what is patched from")
    });
    format!("{}: {watched}, {:.4}{source}", header.model, header.value)
}

/// A part and what was found of it.
struct Part {
    name: String,
    value: f32,
    normalized: Option<f32>,
}

/// All parts that were found, the greatest magnitude first.
fn listed(found: &Swept, what: &str) -> Vec<Part> {
    let mut parts = Vec::new();
    for (hook, array) in found.of(what) {
        let normalized = found.tensors.get(&format!("normalized:{hook}"));
        for (at, value) in array.flat().iter().enumerate() {
            if value.is_nan() {
                continue;
            }
            parts.push(Part {
                name: named(found, hook, array, at),
                value: *value,
                normalized: normalized
                    .filter(|_| what == "effects")
                    .and_then(|n| n.flat().get(at).copied()),
            });
        }
    }
    parts.sort_by(|a, b| b.value.abs().total_cmp(&a.value.abs()));
    parts
}

/// `blocks.3.attn.hook_z, head 1`
fn named(found: &Swept, hook: &str, array: &Array, at: usize) -> String {
    let mut name = hook.to_owned();
    let mut rest = at;
    let mut places = Vec::new();
    for (axis, extent) in array.axes.iter().zip(array.shape()).rev() {
        places.push((axis, rest % (*extent).max(1)));
        rest /= (*extent).max(1);
    }
    for (axis, index) in places.into_iter().rev() {
        if axis == "all" {
            continue;
        }
        name.push_str(&format!(", {axis} {index}"));
        if let Some(token) = token(found, axis, index) {
            name.push_str(&format!(" ({token})"));
        }
    }
    name
}

/// The token of an index of an axis of positions, where it is spelled.
fn token(found: &Swept, axis: &str, index: usize) -> Option<String> {
    match axis {
        "pos" | "query" | "key" => spelled(&found.header.tokens, index),
        _ => None,
    }
}

/// Names of the indices of an axis.
fn names(found: &Swept, axis: &str, extent: usize) -> Vec<String> {
    let name = |at: usize| match token(found, axis, at) {
        Some(token) => token,
        None if axis == "all" => String::new(),
        None => at.to_string(),
    };
    (0..extent).map(name).collect()
}

/// The layer of a hook point and its kind.
fn split(hook: &str) -> (String, &str) {
    let of_block = hook.strip_prefix("blocks.").and_then(|r| r.split_once('.'));
    of_block.map_or((String::new(), hook), |(layer, kind)| {
        (format!("layer {layer}"), kind)
    })
}

/// Layers by parts, of hook points that are swept over one axis; of those of two, a map each.
fn grids(found: &Swept) -> Vec<Grid> {
    let mut grids: Vec<Grid> = Vec::new();
    let maps = [
        ("normalized", "restored: 0 nothing, 1 all"),
        ("effects", "change of the number"),
        ("estimates", "estimated by gradients"),
    ];
    for (what, facts) in maps {
        let all = found.of(what);
        if what == "effects" && !found.of("normalized").is_empty() {
            continue;
        }
        let mut of_kinds: Vec<(&str, Vec<(String, &Array)>)> = Vec::new();
        for (hook, array) in all {
            let (layer, kind) = split(hook);
            let alike = |(k, rows): &&mut (&str, Vec<(String, &Array)>)| {
                *k == kind && rows[0].1.shape() == array.shape() && array.shape().len() == 1
            };
            match of_kinds.iter_mut().find(alike) {
                Some((_, rows)) => rows.push((layer, array)),
                None => of_kinds.push((kind, vec![(layer, array)])),
            }
        }
        for (kind, rows) in of_kinds {
            let (layer, first) = &rows[0];
            let (names_of_rows, values) = match first.matrix() {
                Some(matrix) => (
                    names(found, &first.axes[0], matrix.nrows()),
                    matrix.to_owned(),
                ),
                None => {
                    let width = first.flat().len();
                    let all: Vec<f32> = rows
                        .iter()
                        .flat_map(|(_, a)| a.flat().iter().copied())
                        .collect();
                    let matrix = Array2::from_shape_vec((rows.len(), width), all);
                    let layers = rows.iter().map(|(l, _)| l.clone()).collect();
                    (layers, matrix.unwrap_or_default())
                }
            };
            let last = first.axes.last().map_or("", String::as_str);
            let whose = if first.shape().len() > 1 {
                format!("{kind}, {layer}")
            } else {
                kind.to_owned()
            };
            grids.push(Grid {
                title: format!("{whose} by {last}"),
                facts: facts.to_owned(),
                columns: names(found, last, values.ncols()),
                rows: names_of_rows,
                values,
                scale: grid::Scale::Signed,
            });
        }
    }
    grids
}

/// The heat maps as a page.
pub(in crate::cli) fn html(found: &Swept) -> String {
    grid::html(&headline(found), &grids(found))
}

/// Everything, as files.
pub(super) fn contents(found: &Swept) -> Contents {
    let arrays = found.tensors.iter();
    Contents {
        json: json(found),
        arrays: arrays.map(|(n, a)| (n.clone(), a.values.clone())).collect(),
        title: headline(found),
        grids: grids(found),
    }
}

/// Everything.
pub(super) fn json(found: &Swept) -> Value {
    let header = &found.header;
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
        "tokens": header.tokens.iter().map(common::token).collect::<Vec<_>>(),
        "watched": answer::target(header.quantity(), &header.terms),
        "value": header.value,
        "source_value": header.source_value,
        "hooks": header.hooks,
        "tensors": tensors,
        "correlation": found.result.correlation,
        "compared": found.result.compared,
        "summary": common::summary(&found.summary),
    })
}
