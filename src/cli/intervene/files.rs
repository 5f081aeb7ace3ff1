//! What an intervention changed, as JSON, arrays and pictures.
//!
//! Arrays are `original:NAME`, `modified:NAME` and `difference:NAME` of every hook point, and of the output. Pictures have bars of the
//! probabilities before and after, and a map of the difference of what has two axes, or queries and keys for each head.

use ndarray::{Array2, ArrayViewD, Axis, Ix2};
use serde_json::{Map, Value, json};

use super::{Answer, pair::Pair, show};
use crate::{
    cli::{
        capture::{
            Kind,
            json::{prediction, shortest, summary, token},
            view::spelled,
        },
        files::Contents,
        picture::grid::{Grid, Scale},
    },
    service::wire::introspect as pb,
};

/// Most places of a prediction that are drawn: those that change most.
const PLACES: usize = 16;
/// Widest map: wider ones, such as those of a vocabulary, are for other files.
const WIDEST: usize = 4096;

/// Everything but tensors.
pub(in crate::cli) fn facts(answer: &Answer) -> Value {
    let at = answer.effect.at.iter().map(|at| {
        let changes = at.changes.iter().map(|c| {
            json!({
                "index": c.index, "label": c.label,
                "logit_before": c.logit_before, "logit_after": c.logit_after,
                "probability_before": c.probability_before, "probability_after": c.probability_after,
            })
        });
        json!({
            "position": at.position, "kl": at.kl, "total_variation": at.total_variation, "flipped": at.flipped,
            "changes": changes.collect::<Vec<_>>(),
        })
    });
    let hooks = answer.pairs.iter().map(|pair| {
        json!({
            "name": pair.name(), "axes": pair.original.axes, "shape": pair.original.shape(),
            "relative_change": pair.relative(), "greatest_change": shortest(pair.greatest()),
        })
    });
    json!({
        "model": answer.header.model,
        "fingerprint": answer.header.fingerprint,
        "tokens": answer.header.tokens.iter().map(token).collect::<Vec<_>>(),
        "original": answer.original.as_ref().map(prediction),
        "modified": answer.modified.as_ref().map(prediction),
        "effect": at.collect::<Vec<_>>(),
        "hooks": hooks.collect::<Vec<_>>(),
        "summary": summary(&answer.summary),
    })
}

/// Everything.
pub(super) fn whole(answer: &Answer) -> Value {
    let mut value = facts(answer);
    let arrays = answer.pairs.iter().flat_map(Pair::arrays);
    let tensors: Map<String, Value> = arrays.map(|a| (a.name.clone(), a.json())).collect();
    value["tensors"] = tensors.into();
    value
}

/// For files.
pub(super) fn contents(answer: &Answer, kind: Kind) -> Contents {
    let mut contents = Contents {
        json: Value::Null,
        arrays: Vec::new(),
        title: format!("{}: intervention", answer.header.model),
        grids: Vec::new(),
    };
    match kind {
        Kind::Json => contents.json = whole(answer),
        Kind::Npz => {
            contents.json = facts(answer);
            let arrays = answer.pairs.iter().flat_map(Pair::arrays);
            contents.arrays = arrays.map(|a| (a.name, a.values)).collect();
        }
        Kind::Png | Kind::Html => {
            contents.grids = bars(answer);
            contents
                .grids
                .extend(answer.pairs.iter().flat_map(|p| maps(answer, p)));
        }
    }
    contents
}

/// The places that change most, in the order of the text.
fn bars(answer: &Answer) -> Vec<Grid> {
    let all = &answer.effect.at;
    let mut most: Vec<usize> = (0..all.len()).collect();
    most.sort_by(|a, b| all[*b].total_variation.total_cmp(&all[*a].total_variation));
    most.truncate(PLACES);
    most.sort_unstable();
    most.into_iter()
        .map(|at| before_and_after(answer, &all[at]))
        .collect()
}

/// A bar for each label, before and after: its probability, or its score where a label is alone.
fn before_and_after(answer: &Answer, at: &pb::EffectAt) -> Grid {
    let one = answer.original.iter().flat_map(|p| &p.at);
    let scores = one
        .flat_map(|a| &a.candidates)
        .any(|c| c.probability.is_none());
    #[allow(clippy::cast_possible_truncation)] // as bars
    let numbers = |c: &pb::Change| match scores {
        true => [c.logit_before, c.logit_after],
        false => [c.probability_before as f32, c.probability_after as f32],
    };
    let numbers: Vec<[f32; 2]> = at.changes.iter().map(numbers).collect();
    let longest = if scores {
        numbers
            .as_flattened()
            .iter()
            .fold(0f32, |m, v| m.max(v.abs()))
    } else {
        1.0
    };
    let place = show::place(answer, at).map_or(String::new(), |p| format!(", {p}"));
    let what = if scores { "score" } else { "probability" };
    Grid {
        title: format!("{what} before and after{place}"),
        facts: show::told(at),
        rows: at.changes.iter().map(show::name).collect(),
        columns: vec!["before".to_owned(), "after".to_owned()],
        values: Array2::from(numbers),
        scale: Scale::Bars(longest),
    }
}

/// What changed of a tensor, where it can be drawn.
fn maps(answer: &Answer, pair: &Pair) -> Vec<Grid> {
    let axes = &pair.original.axes;
    let difference = pair.difference();
    let map = |values: ArrayViewD<'_, f32>, head: Option<String>, [rows, columns]: [&str; 2]| {
        let values = values.into_dimensionality::<Ix2>().ok()?.to_owned();
        let (of_head, of_all) = match head {
            Some(head) => (format!(", head {head}"), "all heads: "),
            None => (String::new(), ""),
        };
        Some(Grid {
            title: format!("change of {}{of_head}", pair.name()),
            facts: format!("{of_all}{}", show::distance(pair)),
            rows: names(answer, rows, values.nrows()),
            columns: names(answer, columns, values.ncols()),
            values,
            scale: Scale::Signed,
        })
    };
    match (axes.as_slice(), pair.original.shape()) {
        ([rows, columns], [_, width]) if *width <= WIDEST => {
            let whole = map(difference.view(), None, [rows, columns]);
            whole.into_iter().collect()
        }
        ([_, query, key], [..]) if query == "query" && key == "key" => {
            let heads = difference.axis_iter(Axis(0)).enumerate();
            let named = heads.map(|(at, head)| {
                let asked = answer.selection.heads.get(at);
                (head, asked.map_or_else(|| at.to_string(), u32::to_string))
            });
            let maps = named.filter_map(|(head, name)| map(head, Some(name), [query, key]));
            maps.collect()
        }
        _ => Vec::new(),
    }
}

/// Names of the indices of an axis.
fn names(answer: &Answer, axis: &str, extent: usize) -> Vec<String> {
    let tokens = &answer.header.tokens;
    let asked = &answer.selection.positions;
    let name = |at: usize| match axis {
        "pos" | "query" if extent == asked.len() => asked[at].to_string(),
        "pos" | "query" | "key" if extent == tokens.len() => {
            spelled(tokens, at).unwrap_or_else(|| at.to_string())
        }
        _ => at.to_string(),
    };
    (0..extent).map(name).collect()
}

/// The tensors that no picture shows; scores of labels are what bars are of.
pub(super) fn undrawn(answer: &Answer) -> Vec<&str> {
    let scores = |pair: &Pair| {
        let last = pair.original.axes.last();
        let labels = last.is_some_and(|axis| axis == "label" || axis == "d_vocab");
        labels && !answer.effect.at.is_empty()
    };
    let pairs = answer.pairs.iter().filter(|pair| !scores(pair));
    let left = pairs.filter(|pair| maps(answer, pair).is_empty());
    left.map(Pair::name).collect()
}
