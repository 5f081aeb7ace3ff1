//! Scores as pictures: a bar for each token, or a map over the pixels of an image; a page with the text coloured.

use serde_json::json;

use super::{
    canvas::{CHAR_HEIGHT, CHAR_WIDTH, Canvas, Direction},
    colour, label,
    png::{PictureError, encode},
};

const TEMPLATE: &str = include_str!("attribution.html");
const INK: [u8; 3] = [30, 30, 30];
const FAINT: [u8; 3] = [120, 120, 120];
const GAP: usize = 12;
const ROW: usize = CHAR_HEIGHT + 4;
const LABEL_CHARACTERS: usize = 18;
/// Pixels of the longest bar, to either side.
const BAR: usize = 220;
/// Most bars; a page takes more.
const MOST_BARS: usize = 512;
/// Edge of the picture of an image, about.
const IMAGE: usize = 480;

/// Scores, with their names.
#[derive(Clone, Debug, Default)]
pub struct Attribution {
    /// Model, method, target.
    pub title: String,
    /// Values, delta, error.
    pub facts: String,
    /// What the scores are of.
    pub labels: Vec<String>,
    /// One for each.
    pub scores: Vec<f32>,
    /// Extents of the scores; three for an image: channel, height, width.
    pub shape: Vec<usize>,
}

impl Attribution {
    /// The greatest score, never zero.
    fn largest(&self) -> f32 {
        self.scores
            .iter()
            .fold(f32::MIN_POSITIVE, |m, s| m.max(s.abs()))
    }
}

/// A bar chart, or a map over an image's pixels (channels added up).
///
/// # Errors
/// When there is nothing to draw, or more than fits.
pub fn png(view: &Attribution) -> Result<Vec<u8>, PictureError> {
    encode(&match view.shape[..] {
        [channels, height, width] => map(view, [channels, height, width])?,
        _ => bars(view)?,
    })
}

fn bars(view: &Attribution) -> Result<Canvas, PictureError> {
    let n = view.scores.len();
    if n == 0 {
        return Err(PictureError::Empty);
    }
    if n > MOST_BARS {
        return Err(PictureError::TooLarge {
            columns: 1,
            rows: 1,
            tokens: n,
        });
    }
    let margin = LABEL_CHARACTERS * CHAR_WIDTH + GAP;
    let numbers = 10 * CHAR_WIDTH;
    let heading = view.title.chars().count().max(view.facts.chars().count()) * CHAR_WIDTH;
    let width = (margin + 2 * BAR + numbers + GAP).max(heading + 2 * GAP);
    let top = 3 * ROW;
    let mut canvas = Canvas::new(width, top + n * ROW + GAP);
    canvas.text(GAP, GAP / 2, &view.title, Direction::Across, INK);
    canvas.text(GAP, GAP / 2 + ROW, &view.facts, Direction::Across, FAINT);
    let middle = margin + BAR;
    canvas.fill(middle, top, 1, n * ROW, FAINT);
    let most = view.largest();
    for (at, (name, score)) in view.labels.iter().zip(&view.scores).enumerate() {
        let y = top + at * ROW;
        canvas.text(
            GAP / 2,
            y + 2,
            &label(name, LABEL_CHARACTERS),
            Direction::Across,
            INK,
        );
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss
        )]
        // 0 to BAR
        let length = (score.abs() / most * BAR as f32).round() as usize;
        let left = if *score < 0.0 {
            middle - length
        } else {
            middle
        };
        canvas.fill(
            left,
            y + 1,
            length,
            ROW - 3,
            colour::diverging(score / most),
        );
        canvas.text(
            middle + BAR + 4,
            y + 2,
            &format!("{score:+.4}"),
            Direction::Across,
            FAINT,
        );
    }
    Ok(canvas)
}

fn map(view: &Attribution, [channels, height, width]: [usize; 3]) -> Result<Canvas, PictureError> {
    let pixels = height * width;
    if pixels == 0 || view.scores.len() != channels * pixels {
        return Err(PictureError::Empty);
    }
    let sums: Vec<f32> = (0..pixels)
        .map(|at| (0..channels).map(|c| view.scores[c * pixels + at]).sum())
        .collect();
    let most = sums.iter().fold(f32::MIN_POSITIVE, |m, s| m.max(s.abs()));
    let cell = (IMAGE / height.max(width)).max(1);
    let heading = view.title.chars().count().max(view.facts.chars().count()) * CHAR_WIDTH;
    let top = 3 * ROW;
    let wide = (width * cell + 2 * GAP).max(heading + 2 * GAP);
    let mut canvas = Canvas::new(wide, top + height * cell + GAP);
    canvas.text(GAP, GAP / 2, &view.title, Direction::Across, INK);
    canvas.text(GAP, GAP / 2 + ROW, &view.facts, Direction::Across, FAINT);
    for (at, sum) in sums.iter().enumerate() {
        let (x, y) = (GAP + at % width * cell, top + at / width * cell);
        canvas.fill(x, y, cell, cell, colour::diverging(sum / most));
    }
    Ok(canvas)
}

/// A page that stands alone: the text coloured by its scores, the values on hover and as bars.
pub fn html(view: &Attribution) -> String {
    let most = view.largest();
    let parts: Vec<_> = view
        .labels
        .iter()
        .zip(&view.scores)
        .map(|(text, score)| {
            let [r, g, b] = colour::diverging(score / most);
            json!({ "text": text, "score": score, "colour": format!("rgb({r},{g},{b})"), "part": score / most })
        })
        .collect();
    let data = json!({ "title": view.title, "facts": view.facts, "parts": parts });
    // Inside a script element only `<` can end it early; JSON may spell it as an escape.
    TEMPLATE.replace("/*DATA*/", &data.to_string().replace('<', "\\u003c"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(scores: &[f32], shape: &[usize]) -> Attribution {
        Attribution {
            title: "m: method of logit".into(),
            facts: "delta".into(),
            labels: (0..scores.len()).map(|i| format!("<t{i}>")).collect(),
            scores: scores.to_vec(),
            shape: shape.to_vec(),
        }
    }

    #[test]
    fn bars_go_to_the_side_of_their_sign() {
        let canvas = bars(&view(&[1.0, -1.0], &[2])).unwrap();
        let middle = LABEL_CHARACTERS * CHAR_WIDTH + GAP + BAR;
        let y = |row: usize| 3 * ROW + row * ROW + ROW / 2;
        assert_eq!(
            canvas.pixel(middle + BAR / 2, y(0)),
            Some(colour::diverging(1.0))
        );
        assert_eq!(
            canvas.pixel(middle - BAR / 2, y(1)),
            Some(colour::diverging(-1.0))
        );
        assert_eq!(canvas.pixel(middle - BAR / 2, y(0)), Some([255; 3]));
    }

    #[test]
    fn images_are_maps_of_their_pixels() {
        let scores: Vec<f32> = (0..12).map(|i| if i == 0 { 1.0 } else { 0.0 }).collect();
        let canvas = map(&view(&scores, &[3, 2, 2]), [3, 2, 2]).unwrap();
        assert_eq!(
            canvas.pixel(GAP + 3, 3 * ROW + 3),
            Some(colour::diverging(1.0))
        );
        assert!(png(&view(&scores, &[3, 2, 2])).is_ok());
    }

    #[test]
    fn nothing_and_too_much_are_errors_and_a_page_is_escaped() {
        assert!(png(&view(&[], &[0])).is_err());
        assert!(png(&view(&vec![1.0; 1000], &[1000])).is_err());
        let page = html(&view(&[0.5], &[1]));
        assert!(page.contains("\\u003ct0>") && !page.contains("<t0>"));
    }
}
