//! A capture on the terminal: what is predicted, heat maps of attention, a line for everything else, where the time went.

use std::fmt::Write as _;

use ndarray::s;

use crate::{
    cli::{
        assemble::{Captured, Data, Named},
        error::CliError,
        out::{self, Paint, clean},
        picture::{Attention, terminal},
    },
    service::wire::introspect::{Prediction, Summary, Token},
};

/// Most heat maps that are printed; files take all.
const MAPS: usize = 4;
/// Columns that a heat map's labels take.
const LABELS: usize = 19;
/// Rows of a heat map that a terminal scrolls through without harm.
const PAGE: usize = 64;
/// Most positions of a prediction that are printed.
const PLACES: usize = 200;

/// The whole page.
pub(super) fn page(
    captured: &Captured,
    attention: &Attention,
    positions: &[i32],
) -> Result<String, CliError> {
    let paint = Paint::of_stdout();
    let mut text = String::new();
    let header = &captured.header;
    let length = match header.tokens.len() {
        0 => "tensors".to_owned(),
        n => format!("{n} tokens"),
    };
    let facts = format!(
        "{}, {length}, generation {}, {}",
        header.task, header.generation, header.provider
    );
    let _ = writeln!(
        text,
        "{}  {}",
        paint.bold(&clean(&header.model)),
        paint.dim(&clean(&facts))
    );
    if let Some(prediction) = &captured.prediction {
        let _ = write!(
            text,
            "\n{}",
            self::prediction(prediction, &captured.header.tokens)
        );
    }
    if attention.layers.iter().any(|l| !l.heads.is_empty()) {
        maps(&mut text, attention, positions, paint);
    }
    let others: Vec<&Named> = captured
        .tensors
        .iter()
        .filter(|t| super::view::layer(&t.name).is_none())
        .collect();
    if !others.is_empty() {
        let rows = others
            .iter()
            .map(|t| numbers(t))
            .collect::<Result<Vec<_>, _>>()?;
        let heading = ["tensor", "axes", "shape", "type", "min", "mean", "max"];
        let _ = write!(text, "\n{}", out::table(&heading, rows));
    }
    let _ = write!(text, "\n{}", footer(&captured.summary, paint));
    Ok(text)
}

/// Candidates and probabilities.
pub(in crate::cli) fn prediction(prediction: &Prediction, tokens: &[Token]) -> String {
    let many = prediction.at.len() > 1;
    let rows = prediction.at.iter().take(PLACES).flat_map(|at| {
        let shown = if many { 1 } else { at.candidates.len() };
        at.candidates.iter().take(shown).map(move |c| {
            let probability = c.probability.map_or("-".to_owned(), |p| format!("{p:.4}"));
            let bar = c.probability.map_or(String::new(), bar);
            let place = match at.position {
                Some(p) => match super::view::spelled(tokens, p as usize) {
                    Some(token) => format!("{p} {token}"),
                    None => p.to_string(),
                },
                None => "input".to_owned(),
            };
            let label = match c.label.as_str() {
                "" => c.index.to_string(),
                label => label.to_owned(),
            };
            vec![place, label, probability, format!("{:.3}", c.logit), bar]
        })
    });
    let mut text = out::table(&["at", "prediction", "prob", "logit", ""], rows);
    if prediction.at.len() > PLACES {
        let _ = writeln!(
            text,
            " ... and {} more places",
            prediction.at.len() - PLACES
        );
    }
    text
}

fn bar(probability: f32) -> String {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // 0 to 12; NaN is 0
    let filled = (probability.clamp(0.0, 1.0) * 12.0).round() as usize;
    "█".repeat(filled)
}

fn maps(text: &mut String, attention: &Attention, positions: &[i32], paint: Paint) {
    let all = attention
        .layers
        .iter()
        .map(|l| l.heads.len())
        .sum::<usize>();
    let heads = attention
        .layers
        .iter()
        .flat_map(|l| l.heads.iter().map(move |(h, p)| (l.index, *h, p)));
    for (layer, head, pattern) in heads.take(MAPS) {
        let _ = writeln!(
            text,
            "\n{}",
            paint.bold(&format!("layer {layer}, head {head}"))
        );
        let rows = queries(attention, positions, pattern.nrows());
        text.push_str(&map(&rows, pattern.view()));
    }
    if all > MAPS {
        let _ = writeln!(
            text,
            "\n{}",
            paint.dim(&format!(
                "{MAPS} of {all} heads; choose with --layers and --heads, or see all with -o FILE.html"
            ))
        );
    }
}

/// Labels of the rows: those of the positions that were asked for.
fn queries(attention: &Attention, positions: &[i32], rows: usize) -> Vec<String> {
    if positions.len() != rows {
        return attention.tokens.clone();
    }
    let n = attention.tokens.len();
    positions
        .iter()
        .map(|p| {
            let back = usize::try_from(p.unsigned_abs()).unwrap_or(usize::MAX);
            let place = if *p < 0 {
                n.checked_sub(back)
            } else {
                Some(back)
            };
            place
                .and_then(|i| attention.tokens.get(i).cloned())
                .unwrap_or_default()
        })
        .collect()
}

/// A heat map, cut to the columns that fit the terminal and to a page of rows.
pub(in crate::cli) fn map(tokens: &[String], pattern: ndarray::ArrayView2<'_, f32>) -> String {
    let fits = out::width().map_or(usize::MAX, |w| w.saturating_sub(LABELS) / 2);
    let (rows, columns) = (pattern.nrows(), pattern.ncols());
    let (shown_rows, shown) = (rows.min(fits.max(PAGE)), columns.min(fits));
    let cut = pattern.slice(s![..shown_rows, ..shown]);
    let mut text = terminal::heat_map(tokens, cut, terminal::Style::of_stdout());
    if shown < columns || shown_rows < rows {
        let _ = writeln!(
            text,
            "{shown_rows} of {rows} queries, {shown} of {columns} keys fit; -o FILE.html shows all"
        );
    }
    text
}

fn numbers(named: &Named) -> Result<Vec<String>, CliError> {
    let shape: Vec<String> = named.shape().iter().map(ToString::to_string).collect();
    let mut row = vec![
        named.name.clone(),
        named.axes.join(", "),
        shape.join(" x "),
        named.dtype().to_string(),
    ];
    let tensor = match &named.data {
        Data::Dense(tensor) => tensor,
        Data::Sparse(sparse) => &sparse.values,
    };
    if tensor.dtype().is_float() && tensor.elements() > 0 {
        let values = tensor.to_f32().map_err(|e| CliError::new(e.to_string()))?;
        let (mut least, mut most, mut sum) = (f32::INFINITY, f32::NEG_INFINITY, 0.0f64);
        for v in values.iter() {
            least = least.min(*v);
            most = most.max(*v);
            sum += f64::from(*v);
        }
        #[allow(clippy::cast_precision_loss)] // a mean for people
        let mean = sum / values.len() as f64;
        row.extend([
            format!("{least:.4}"),
            format!("{mean:.4}"),
            format!("{most:.4}"),
        ]);
    } else {
        row.extend(["-"; 3].map(String::from));
    }
    Ok(row)
}

/// Where the time went, and what else the daemon has to say.
fn footer(summary: &Summary, paint: Paint) -> String {
    let mut text = String::new();
    if let Some(t) = &summary.timings {
        let stages: Vec<String> = [
            ("tokenize", t.tokenize_seconds),
            ("queue", t.queue_seconds),
            ("build", t.build_seconds),
            ("run", t.run_seconds),
            ("reduce", t.reduce_seconds),
            ("encode", t.encode_seconds),
        ]
        .iter()
        .filter(|(_, s)| *s > 0.0)
        .map(|(name, s)| format!("{name} {}", out::seconds(*s)))
        .collect();
        let line = format!(
            "{} in {}: {}",
            out::bytes(summary.bytes),
            out::seconds(t.total_seconds),
            stages.join(", ")
        );
        let _ = writeln!(text, "{}", paint.dim(&line));
    }
    if summary.truncated_tokens > 0 {
        let _ = writeln!(
            text,
            "note: {} tokens were cut off",
            summary.truncated_tokens
        );
    }
    if !summary.non_finite.is_empty() {
        let names = clean(&summary.non_finite.join(", "));
        let _ = writeln!(text, "note: not every value is finite in {names}");
    }
    for note in &summary.notes {
        let _ = writeln!(text, "note: {}", clean(note));
    }
    text
}
