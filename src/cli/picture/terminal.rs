//! Attention as text: a heat map in 24-bit colour, or in digits where there is no colour.

use std::fmt::Write as _;

use ndarray::ArrayView2;

use super::{colour, label};

/// Whether escape sequences may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// 24-bit ANSI colours.
    Colour,
    /// Digits 0 to 9 (tenths, rounded down), `·` below 0.05.
    Plain,
}

impl Style {
    /// Colour on a terminal, unless `NO_COLOR` is set (no-color.org).
    pub fn of_stdout() -> Self {
        use std::io::IsTerminal as _;
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        if wanted && std::io::stdout().is_terminal() {
            Style::Colour
        } else {
            Style::Plain
        }
    }
}

const LABEL_CHARACTERS: usize = 14;

/// A heat map with query tokens down and key tokens across; columns are numbered as the rows are.
pub fn heat_map(tokens: &[String], pattern: ArrayView2<'_, f32>, style: Style) -> String {
    let mut out = String::new();
    let blank = " ".repeat(LABEL_CHARACTERS + 5);
    // Column numbers, tens above units.
    for digit in [10, 1] {
        if digit == 10 && pattern.ncols() <= 10 {
            continue;
        }
        out.push_str(&blank);
        for column in 0..pattern.ncols() {
            let shown = (column / digit) % 10;
            if digit == 10 && column < 10 {
                out.push_str("  ");
            } else {
                let _ = write!(out, " {shown}");
            }
        }
        out.push('\n');
    }
    for (row, weights) in pattern.rows().into_iter().enumerate() {
        let name = tokens.get(row).map_or("", String::as_str);
        let _ = write!(
            out,
            "{:>LABEL_CHARACTERS$} {row:>3} ",
            label(name, LABEL_CHARACTERS)
        );
        for weight in weights {
            match style {
                Style::Colour => {
                    let [r, g, b] = colour::scale(*weight);
                    let _ = write!(out, "\x1b[48;2;{r};{g};{b}m  ");
                }
                Style::Plain => {
                    let _ = write!(out, " {}", digit(*weight));
                }
            }
        }
        if style == Style::Colour {
            out.push_str("\x1b[0m");
        }
        out.push('\n');
    }
    out
}

fn digit(weight: f32) -> char {
    if weight.is_nan() {
        '?'
    } else if weight < 0.05 {
        '·'
    } else {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // 0 to 9 after clamping
        let tenth = (weight * 10.0).clamp(0.0, 9.0) as u8;
        char::from(b'0' + tenth)
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn plain_maps_show_tenths() {
        let map = heat_map(
            &["[CLS]".into(), "good".into()],
            array![[0.96, 0.04], [0.30, 0.70]].view(),
            Style::Plain,
        );
        let rows: Vec<&str> = map.lines().collect();
        assert!(rows[1].ends_with("[CLS]   0  9 ·"), "{map}");
        assert!(rows[2].ends_with("good   1  3 7"), "{map}");
    }

    #[test]
    fn colours_are_ended_on_every_line() {
        let map = heat_map(&["a".into()], array![[0.5]].view(), Style::Colour);
        assert!(map.lines().last().unwrap().ends_with("\x1b[0m"));
    }
}
