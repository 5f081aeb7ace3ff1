//! A lens on the terminal: what each state would say, heat maps, bars.

use std::fmt::Write as _;

use super::{
    answer::Lensed,
    files::{self, short},
};
use crate::cli::{
    out::{self, Paint, clean},
    picture::{
        grid::{self, Grid},
        label,
        terminal::Style,
    },
};

/// Characters of a cell of the table, with the space before it.
const CELL: usize = 16;
/// Characters of a token in it.
const TOKEN: usize = 9;
/// Positions shown where no terminal says how many fit.
const MOST_POSITIONS: usize = 32;
/// Columns of heat maps there.
const WIDE: usize = 160;
/// Characters of the longest bar.
const BAR: f32 = 24.0;
/// Most components that are listed; files hold all.
const ROWS: usize = 100;

/// The whole page.
pub(super) fn page(found: &Lensed) -> String {
    let paint = Paint::of_stdout();
    let mut about = Vec::new();
    if !found.header.tuned.is_empty() {
        about.push(format!("tuned lens \"{}\"", found.header.tuned));
    }
    if !found.header.terms.is_empty() {
        about.push(found.target());
    }
    let mut text = format!(
        "{}  {}\n",
        paint.bold(&clean(&found.header.model)),
        paint.dim(&out::line(&about.join(", ")))
    );
    if found.array("top_index").is_some() {
        let _ = write!(text, "\n{}", says(found));
        maps(&mut text, &files::lens(found)[..]);
    }
    if found.attribution.is_some() {
        let _ = write!(text, "\n{}", bars(found));
        let grids = files::attribution(found);
        // Bars say what is by component; by position is for files.
        maps(&mut text, &grids[..grids.len().min(1)]);
    }
    maps(&mut text, &files::residual(found));
    let times = found.summary.timings.as_ref().map(|t| {
        format!(
            "{} rows in {}: build {}, run {}",
            found.summary.rows,
            out::seconds(t.total_seconds),
            out::seconds(t.build_seconds),
            out::seconds(t.run_seconds)
        )
    });
    if let Some(times) = times {
        let _ = writeln!(text, "\n{}", paint.dim(&times));
    }
    for note in &found.summary.notes {
        let _ = writeln!(text, "note: {}", clean(note));
    }
    text
}

fn maps(text: &mut String, grids: &[Grid]) {
    let width = out::width().unwrap_or(WIDE);
    for grid in grids {
        let _ = write!(text, "\n{}", grid::text(grid, Style::of_stdout(), width));
    }
}

/// The best label of each state at each position, with its probability. The last positions are shown where not all fit.
fn says(found: &Lensed) -> String {
    let all = found.header.positions.len();
    let whole = found.array("whole_top_index").is_some();
    let columns = match out::width() {
        Some(width) => (width.saturating_sub(10) / CELL).max(1),
        None => MOST_POSITIONS,
    };
    let fits = columns
        .saturating_sub(usize::from(whole))
        .clamp(1, all.max(1));
    let from = all.saturating_sub(fits);
    let shown = &found.header.positions[from..];
    let mut heading = vec!["state".to_owned()];
    heading.extend(whole.then(|| "whole".to_owned()));
    heading.extend(shown.iter().map(u32::to_string));
    // Tokens are spelled as they are, which headings are not.
    let mut tokens = vec![String::new(); 1 + usize::from(whole)];
    let named = shown.iter().map(|p| clean(&found.position(*p)));
    tokens.extend(named.map(|name| label(&name, TOKEN)));
    let tokens = (!found.header.tokens.is_empty()).then_some(tokens);
    let rows = (0..found.header.states.len()).map(|state| {
        let mut row = vec![found.state(state)];
        row.extend(whole.then(|| best(found, "whole_", state)));
        row.extend((from..all).map(|place| best(found, "", state * all + place)));
        row
    });
    let names: Vec<&str> = heading.iter().map(String::as_str).collect();
    let mut text = out::table(&names, tokens.into_iter().chain(rows));
    if from > 0 {
        let _ = writeln!(
            text,
            "  the last {fits} of {all} positions fit; --positions names others, -o FILE.json has all"
        );
    }
    text
}

/// What a state says best at a place.
fn best(found: &Lensed, prefix: &str, place: usize) -> String {
    let first = |name: &str| {
        let array = found.array(&format!("{prefix}{name}"))?;
        let kept = array.shape().last()?;
        array.flat().get(place * kept).copied()
    };
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it came as a whole number
    let name = first("top_index").map_or(String::new(), |i| found.label(i as u32));
    // A space that begins a token is a part of it.
    let name = label(&out::line(&name), TOKEN);
    match (first("top_probability"), first("top_logit")) {
        (Some(p), _) => format!("{name} {p:.2}"),
        (None, Some(logit)) => format!("{name} {logit:.2}"),
        (None, None) => name,
    }
}

/// What components contribute, as bars.
fn bars(found: &Lensed) -> String {
    let (Some(facts), Some(array)) = (&found.attribution, found.array("contributions")) else {
        return String::new();
    };
    let positions = array.shape().last().copied().unwrap_or(1).max(1);
    let sums = array
        .flat()
        .chunks(positions)
        .map(|c| c.iter().sum::<f32>());
    #[allow(clippy::cast_possible_truncation)] // for people
    let bias = ("bias".to_owned(), facts.bias as f32);
    let names = facts.components.iter().map(|c| short(c));
    let all: Vec<(String, f32)> = names.zip(sums).chain([bias]).collect();
    let largest = |m: f32, (_, v): &(String, f32)| m.max(v.abs());
    let most = all.iter().fold(f32::MIN_POSITIVE, largest);
    let rows = all.iter().take(ROWS).map(|(name, value)| {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // 0 to BAR
        let length = (value.abs() / most * BAR).round() as usize;
        let sign = if *value < 0.0 { "▒" } else { "█" };
        vec![name.clone(), format!("{value:+.4}"), sign.repeat(length)]
    });
    let mut text = out::table(&["component", "contribution", ""], rows);
    if all.len() > ROWS {
        let _ = writeln!(text, " ... and {} more", all.len() - ROWS);
    }
    let _ = writeln!(
        text,
        "  sum = {} = {:.5}",
        out::line(&found.target()),
        facts.value
    );
    text
}
