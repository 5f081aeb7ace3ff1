//! Numbers by row and column, such as layers by heads: as text, as PNG, as a page.
//!
//! Signed numbers are blue and red by their part of the greatest magnitude, others run over a given range; few that are to be compared are bars.
//! The scale is written beside the picture, and the page has every number.

use std::fmt::Write as _;

use ndarray::Array2;

use super::{
    canvas::{CHAR_HEIGHT, CHAR_WIDTH, Canvas, Direction},
    colour::{self, Rgb},
    label,
    png::{PictureError, encode},
    terminal::Style,
};

const INK: Rgb = [30, 30, 30];
const FAINT: Rgb = [120, 120, 120];
const GAP: usize = 12;
const LABEL_CHARACTERS: usize = 18;
/// Pixels of the longest bar.
const BAR: usize = 160;
/// Pixels of the number behind it.
const NUMBER: usize = 10 * CHAR_WIDTH;
/// Widest and highest picture in pixels.
const MAX_SIDE: usize = 8192;

/// A matrix with names.
#[derive(Clone, Debug, Default)]
pub struct Grid {
    /// What is shown.
    pub title: String,
    /// What else should be known: units, reference values.
    pub facts: String,
    /// A name for each row.
    pub rows: Vec<String>,
    /// A name for each column.
    pub columns: Vec<String>,
    /// `[row, column]`; NaN where there is nothing.
    pub values: Array2<f32>,
    /// How numbers become colours.
    pub scale: Scale,
}

/// How numbers become colours.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Scale {
    /// By sign, and by the part of the greatest magnitude.
    #[default]
    Signed,
    /// From the least to the greatest of a range.
    Range(f32, f32),
    /// As bars, this magnitude the longest; with the sign's colour.
    Bars(f32),
}

/// A number on the scale.
struct Shade {
    colour: Rgb,
    /// Two characters in the place of a colour.
    text: String,
}

impl Grid {
    /// The scale in words.
    pub fn legend(&self) -> String {
        match self.scale {
            Scale::Signed => format!(
                "scale: {:.3} (blue) to {:+.3} (red)",
                -self.largest(),
                self.largest()
            ),
            Scale::Range(low, high) => format!("scale: {low} (dark) to {high} (bright)"),
            Scale::Bars(longest) => format!("scale: the longest bar is {longest:.3}"),
        }
    }

    /// The part of the longest bar, where numbers are bars.
    fn bar(&self, value: f32) -> Option<f32> {
        match self.scale {
            Scale::Bars(longest) => {
                let part = value.abs() / longest.max(f32::MIN_POSITIVE);
                Some(if part.is_nan() { 0.0 } else { part.min(1.0) })
            }
            Scale::Signed | Scale::Range(..) => None,
        }
    }

    /// Pixels of a number across and down, of cells of this edge.
    fn extents(&self, cell: usize) -> (usize, usize) {
        match self.scale {
            Scale::Bars(_) => (BAR + NUMBER, CHAR_HEIGHT + 4),
            Scale::Signed | Scale::Range(..) => (cell, cell),
        }
    }

    /// The greatest magnitude, never zero.
    fn largest(&self) -> f32 {
        let finite = self.values.iter().filter(|v| v.is_finite());
        finite.fold(f32::MIN_POSITIVE, |m, v| m.max(v.abs()))
    }

    fn shade(&self, value: f32) -> Shade {
        let (part, colour, sign) = match self.scale {
            Scale::Signed => {
                let part = value / self.largest();
                let sign = if part < 0.0 { '-' } else { '+' };
                (part.abs(), colour::diverging(part), sign)
            }
            Scale::Range(low, high) => {
                let part = (value - low) / (high - low).max(f32::MIN_POSITIVE);
                (part, colour::scale(part), ' ')
            }
            Scale::Bars(longest) => {
                let sign = if value < 0.0 { '-' } else { '+' };
                let part = value.abs() / longest.max(f32::MIN_POSITIVE);
                (part, colour::diverging(1f32.copysign(value)), sign)
            }
        };
        let text = if part.is_nan() {
            " ?".to_owned()
        } else if part < 0.05 {
            " ·".to_owned()
        } else {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // 0 to 9
            let tenth = (part * 10.0).clamp(0.0, 9.0) as u8;
            format!("{sign}{tenth}")
        };
        Shade { colour, text }
    }
}

/// A heat map, cut to `width` characters: colours, or tenths of the scale (`·` below 0.05) with their sign.
pub fn text(grid: &Grid, style: Style, width: usize) -> String {
    let names: Vec<String> = grid
        .rows
        .iter()
        .map(|r| label(r, LABEL_CHARACTERS))
        .collect();
    let margin = names.iter().map(|n| n.chars().count()).max().unwrap_or(0);
    let all = grid.values.ncols();
    let fits = (width.saturating_sub(margin + 1) / 3).clamp(1, all.max(1));
    let mut out = String::new();
    if !grid.title.is_empty() {
        let _ = writeln!(out, "{}", label(&grid.title, width));
    }
    // Columns are named by as much of their names as fits: numbers whole, words numbered as they come.
    let short = grid.columns.iter().all(|c| c.chars().count() <= 2);
    let _ = write!(out, "{:margin$} ", "");
    for (at, column) in grid.columns.iter().take(fits).enumerate() {
        let name = if short {
            label(column, 2)
        } else {
            (at % 100).to_string()
        };
        let _ = write!(out, "{name:>3}");
    }
    out.push('\n');
    for (name, row) in names.iter().zip(grid.values.rows()) {
        let _ = write!(out, "{name:>margin$} ");
        for value in row.iter().take(fits) {
            let shade = grid.shade(*value);
            match style {
                Style::Colour => {
                    let [r, g, b] = shade.colour;
                    let _ = write!(out, "\x1b[48;2;{r};{g};{b}m   ");
                }
                Style::Plain => {
                    let _ = write!(out, " {}", shade.text);
                }
            }
        }
        if style == Style::Colour {
            out.push_str("\x1b[0m");
        }
        out.push('\n');
    }
    let _ = writeln!(out, "{:margin$} {}", "", grid.legend());
    if !grid.facts.is_empty() {
        let _ = writeln!(out, "{:margin$} {}", "", grid.facts);
    }
    if fits < all {
        let _ = writeln!(
            out,
            "{:margin$} {fits} of {all} columns fit; -o FILE.html shows all",
            ""
        );
    }
    out
}

/// The grids below each other.
///
/// # Errors
/// When there is nothing to draw, or more than fits.
pub fn png(grids: &[Grid]) -> Result<Vec<u8>, PictureError> {
    encode(&canvas(grids)?)
}

fn canvas(grids: &[Grid]) -> Result<Canvas, PictureError> {
    let rows: usize = grids.iter().map(|g| g.values.nrows()).sum();
    let columns = grids.iter().map(|g| g.values.ncols()).max().unwrap_or(0);
    if rows == 0 || columns == 0 {
        return Err(PictureError::Empty);
    }
    let heading = grids.iter().map(|g| {
        let longest = g.title.chars().count().max(g.facts.chars().count());
        longest.max(g.legend().chars().count()) * CHAR_WIDTH + 2 * GAP
    });
    let heading = heading.max().unwrap_or(0);
    let side = |cell: usize| {
        let sizes = grids.iter().map(|g| size(g, cell));
        sizes.fold((heading, 0), |(w, h), (width, height)| {
            (w.max(width), h + height)
        })
    };
    let cell = [24, 18, CHAR_HEIGHT + 2, CHAR_HEIGHT, 6, 4, 2, 1]
        .into_iter()
        .find(|cell| {
            let (w, h) = side(*cell);
            w.max(h) <= if *cell > 4 { MAX_SIDE / 4 } else { MAX_SIDE }
        })
        .ok_or(PictureError::TooLarge {
            columns: 1,
            rows: grids.len(),
            tokens: rows.max(columns),
        })?;
    let (width, height) = side(cell);
    let mut canvas = Canvas::new(width, height);
    let mut top = GAP / 2;
    for grid in grids {
        draw(&mut canvas, grid, top, cell);
        top += size(grid, cell).1;
    }
    Ok(canvas)
}

/// Pixels left of the numbers.
const MARGIN: usize = GAP + LABEL_CHARACTERS * CHAR_WIDTH + 4;
/// Pixels above them.
const ABOVE: usize = 3 * (CHAR_HEIGHT + 4);

/// Pixels of a grid across and down, its names and the gap behind it included.
fn size(grid: &Grid, cell: usize) -> (usize, usize) {
    let (wide, high) = grid.extents(cell);
    (
        MARGIN + grid.values.ncols() * wide + GAP,
        ABOVE + grid.values.nrows() * high + names(grid) + GAP,
    )
}

/// Pixels of the names of columns.
fn names(grid: &Grid) -> usize {
    let columns = grid.columns.iter();
    let longest = columns.map(|c| c.chars().count().min(LABEL_CHARACTERS));
    match grid.scale {
        Scale::Bars(_) => CHAR_HEIGHT + 8,
        Scale::Signed | Scale::Range(..) => longest.max().unwrap_or(0) * CHAR_WIDTH + 8,
    }
}

/// A grid with its names, from this line of pixels.
fn draw(canvas: &mut Canvas, grid: &Grid, top: usize, cell: usize) {
    let legend = grid.legend();
    let lines = [(&grid.title, INK), (&grid.facts, FAINT), (&legend, FAINT)];
    for (line, (words, ink)) in lines.into_iter().enumerate() {
        let y = top + line * (CHAR_HEIGHT + 4);
        canvas.text(GAP, y, words, Direction::Across, ink);
    }
    let map = top + ABOVE;
    let (wide, high) = grid.extents(cell);
    for ((row, column), value) in grid.values.indexed_iter() {
        let (x, y) = (MARGIN + column * wide, map + row * high);
        let colour = grid.shade(*value).colour;
        match grid.bar(*value) {
            Some(part) => bar(canvas, (x, y), (part, *value), colour),
            None => canvas.fill(x, y, wide, high, colour),
        }
    }
    if high < CHAR_HEIGHT {
        return;
    }
    for (at, name) in grid.rows.iter().enumerate() {
        let name = label(name, LABEL_CHARACTERS);
        let start = MARGIN - 4 - name.chars().count() * CHAR_WIDTH;
        let y = map + at * high + (high - CHAR_HEIGHT) / 2;
        canvas.text(start, y, &name, Direction::Across, INK);
    }
    let y = map + grid.values.nrows() * high + 4;
    for (at, name) in grid.columns.iter().enumerate() {
        let x = MARGIN + at * wide;
        let name = label(name, LABEL_CHARACTERS);
        match grid.scale {
            Scale::Bars(_) => canvas.text(x, y, &name, Direction::Across, FAINT),
            Scale::Signed | Scale::Range(..) => {
                canvas.text(x + (wide - CHAR_HEIGHT) / 2, y, &name, Direction::Down, INK);
            }
        }
    }
}

/// A bar and its number.
fn bar(canvas: &mut Canvas, (x, y): (usize, usize), (part, value): (f32, f32), colour: Rgb) {
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss
    )]
    // 0 to BAR
    let length = (part * BAR as f32).round() as usize;
    canvas.fill(x, y + 1, length, CHAR_HEIGHT + 2, colour);
    let number = format!("{value:.4}");
    canvas.text(x + length + 4, y + 2, &number, Direction::Across, INK);
}

/// A page that stands alone: tables of coloured cells, the number of each on hover.
pub fn html(title: &str, grids: &[Grid]) -> String {
    let mut page = format!(
        "<!doctype html><meta charset=\"utf-8\"><title>{0}</title><style>\
         body{{font:14px system-ui,sans-serif;margin:2rem;color:#1e1e1e}}table{{border-collapse:collapse;margin:.5rem 0 2rem}}\
         td{{min-width:1.4rem;height:1.4rem;border:1px solid #fff}}td.bar{{width:16rem}}td.bar div{{white-space:nowrap}}th{{font-weight:normal;font-size:12px;padding:0 .4rem;text-align:right}}\
         thead th{{writing-mode:vertical-rl;text-align:left;padding:.4rem 0}}p{{color:#666;margin:.2rem 0}}</style><h1>{0}</h1>",
        escaped(title)
    );
    for grid in grids {
        let _ = write!(
            page,
            "<h2>{}</h2><p>{}</p><p>{}</p><table><thead><tr><th></th>",
            escaped(&grid.title),
            escaped(&grid.facts),
            escaped(&grid.legend())
        );
        for column in &grid.columns {
            let _ = write!(page, "<th>{}</th>", escaped(column));
        }
        page.push_str("</tr></thead>");
        for (name, row) in grid.rows.iter().zip(grid.values.rows()) {
            let _ = write!(page, "<tr><th>{}</th>", escaped(name));
            for (at, value) in row.iter().enumerate() {
                let [r, g, b] = grid.shade(*value).colour;
                let column = grid.columns.get(at).map_or("", String::as_str);
                let (name, column) = (escaped(name), escaped(column));
                let _ = match grid.bar(*value) {
                    Some(part) => write!(
                        page,
                        "<td class=\"bar\" title=\"{name}, {column}: {value}\">\
                         <div style=\"width:{:.1}%;background:rgb({r},{g},{b})\">{value:.4}</div></td>",
                        part * 100.0
                    ),
                    None => write!(
                        page,
                        "<td style=\"background:rgb({r},{g},{b})\" title=\"{name}, {column}: {value}\"></td>"
                    ),
                };
            }
            page.push_str("</tr>");
        }
        page.push_str("</table>");
    }
    page
}

/// Text as it stands in a page.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    fn grid() -> Grid {
        Grid {
            title: "effects".into(),
            facts: "logit 2.0".into(),
            rows: vec!["layer 0".into(), "<layer 1>".into()],
            columns: vec!["0".into(), "1".into()],
            values: array![[2.0, -1.0], [0.0, f32::NAN]],
            scale: Scale::Signed,
        }
    }

    #[test]
    fn plain_maps_show_signed_tenths() {
        let map = text(&grid(), Style::Plain, 80);
        let lines: Vec<&str> = map.lines().collect();
        assert!(lines[2].ends_with("layer 0  +9 -5"), "{map}");
        assert!(lines[3].ends_with("<layer 1>   ·  ?"), "{map}");
        assert!(text(&grid(), Style::Plain, 13).contains("1 of 2 columns"));
    }

    #[test]
    fn pictures_have_a_cell_for_each_number() {
        let canvas = canvas(&[grid()]).unwrap();
        let red = canvas.rgb().as_chunks::<3>().0;
        let red = red.iter().filter(|p| **p == colour::diverging(1.0)).count();
        assert_eq!(red, 24 * 24);
        assert!(png(&[]).is_err());
        let page = html("a & b", &[grid()]);
        assert!(page.contains("a &amp; b") && page.contains("&lt;layer 1&gt;, 0: 0"));
        assert!(!page.contains("<layer"));
    }

    #[test]
    fn ranges_run_from_dark_to_bright() {
        let ranged = Grid {
            scale: Scale::Range(0.0, 2.0),
            ..grid()
        };
        assert_eq!(ranged.shade(2.0).colour, colour::scale(1.0));
        assert_eq!(ranged.shade(-1.0).text, " ·");
    }

    #[test]
    fn bars_are_as_long_as_their_part() {
        let bars = Grid {
            scale: Scale::Bars(4.0),
            ..grid()
        };
        let canvas = canvas(std::slice::from_ref(&bars)).unwrap();
        let coloured = |colour| {
            canvas
                .rgb()
                .as_chunks::<3>()
                .0
                .iter()
                .filter(|p| **p == colour)
                .count()
        };
        let row = CHAR_HEIGHT + 2;
        assert!(coloured(colour::diverging(-1.0)) <= BAR / 4 * row);
        assert_eq!(coloured(colour::diverging(1.0)), BAR / 2 * row);
        let page = html("bars", &[bars]);
        assert!(
            page.contains("width:50.0%") && page.contains("width:25.0%"),
            "{page}"
        );
    }
}
