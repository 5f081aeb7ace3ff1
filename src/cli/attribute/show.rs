//! An explanation on the terminal: the text coloured by its scores, a table, the evidence.

use std::fmt::Write as _;

use super::answer::{Explained, Scored};
use crate::cli::{
    out::{self, Paint, clean},
    picture::{colour, terminal::Style},
};

/// Characters of the longest bar.
const BAR: f32 = 16.0;
/// Most scores that are listed; files hold all.
const ROWS: usize = 200;

/// The whole page.
pub(super) fn page(found: &Explained) -> String {
    let paint = Paint::of_stdout();
    let mut text = format!(
        "{}  {}\n\n",
        paint.bold(&clean(&found.header.model)),
        paint.dim(&out::line(&format!(
            "{}, {}",
            found.header.method,
            found.target()
        )))
    );
    let scored = found.scored();
    if found.header.tokens.is_empty() {
        let _ = writeln!(
            text,
            "{} scores of shape {:?}; -o FILE.png shows them",
            scored.len(),
            found
                .tensors
                .get("attributions")
                .map(|a| a.shape().to_vec())
                .unwrap_or_default()
        );
    } else {
        let _ = writeln!(text, "{}\n", coloured(&scored, Style::of_stdout()));
        text.push_str(&table(&scored));
    }
    let _ = write!(text, "\n{}", evidence(found, paint));
    text
}

/// Words on a ground of their score: blue against, red for.
pub(in crate::cli) fn coloured(scored: &[Scored], style: Style) -> String {
    let most = largest(scored);
    let words: Vec<String> = scored
        .iter()
        .map(|s| {
            let word = clean(&s.text);
            match style {
                Style::Plain => word,
                Style::Colour => {
                    let [r, g, b] = colour::diverging(s.score / most);
                    format!("\x1b[30;48;2;{r};{g};{b}m{word}\x1b[0m")
                }
            }
        })
        .collect();
    words.join(" ")
}

/// The greatest score, never zero.
pub(in crate::cli) fn largest(scored: &[Scored]) -> f32 {
    scored
        .iter()
        .fold(f32::MIN_POSITIVE, |m, s| m.max(s.score.abs()))
}

fn table(scored: &[Scored]) -> String {
    let most = largest(scored);
    let errors = scored.iter().any(|s| s.error.is_some());
    let rows = scored.iter().take(ROWS).map(|s| {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // 0 to BAR
        let length = (s.score.abs() / most * BAR).round() as usize;
        let sign = if s.score < 0.0 { "▒" } else { "█" };
        let mut cells = vec![s.text.clone(), format!("{:+.4}", s.score)];
        if errors {
            cells.push(s.error.map_or(String::new(), |e| format!("±{e:.1e}")));
        }
        cells.push(sign.repeat(length));
        cells
    });
    let heading: &[&str] = if errors {
        &["feature", "score", "error", ""]
    } else {
        &["feature", "score", ""]
    };
    let mut text = out::table(heading, rows);
    if scored.len() > ROWS {
        let _ = writeln!(text, " ... and {} more", scored.len() - ROWS);
    }
    text
}

/// What speaks for the numbers.
fn evidence(found: &Explained, paint: Paint) -> String {
    let r = &found.result;
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<12} {}", clean(&value));
    };
    line("method", format!("{}: {}", r.method, r.convention));
    line("site", format!("{}, {}", r.site, r.precision));
    let mut values = format!("F(x) = {:.5}", r.value);
    if let Some(baseline) = r.baseline_value {
        let _ = write!(values, ", F({}) = {baseline:.5}", found.header.baseline);
    }
    line("values", values);
    if let Some(delta) = r.delta {
        let ratio = r.residual_ratio.map_or(String::new(), |p| {
            format!(", {:.3} % of the change", 100.0 * p)
        });
        line("delta", format!("{delta:+.2e}{ratio}"));
    }
    if let Some(error) = r.error {
        line("error", format!("{error:.2e} ({})", r.error_kind));
    }
    if r.exact {
        line("exact", "by enumeration of all coalitions".into());
    }
    if let Some(seed) = r.seed {
        line("seed", seed.to_string());
    }
    if let Some(cost) = &r.cost {
        line(
            "cost",
            format!(
                "{} rows forward, {} forward and backward",
                cost.forward_rows, cost.gradient_rows
            ),
        );
    }
    let times = found.summary.timings.as_ref().map(|t| {
        format!(
            "in {}: build {}, run {}",
            out::seconds(t.total_seconds),
            out::seconds(t.build_seconds),
            out::seconds(t.run_seconds)
        )
    });
    if let Some(times) = times {
        let _ = writeln!(text, "{}", paint.dim(&times));
    }
    for note in &found.summary.notes {
        let _ = writeln!(text, "note: {}", clean(note));
    }
    text
}
