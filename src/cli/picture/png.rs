//! Attention as a PNG: a row of heat maps per layer, one per head, with the tokens on both axes.

use super::{
    Attention, Pattern,
    canvas::{CHAR_HEIGHT, CHAR_WIDTH, Canvas, Direction},
    colour, label,
};

const INK: [u8; 3] = [30, 30, 30];
const FAINT: [u8; 3] = [120, 120, 120];
const GAP: usize = 14;
const LABEL_CHARACTERS: usize = 12;
/// Widest picture in pixels; cells shrink until it fits, and below one pixel the call fails.
const MAX_SIDE: usize = 8192;

/// Draws every layer and head.
///
/// # Errors
/// When there is nothing to draw, or so much that a cell would be smaller than a pixel.
pub fn attention(view: &Attention) -> Result<Vec<u8>, PictureError> {
    encode(&attention_canvas(view)?)
}

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    /// No pattern was given.
    #[error("there is no attention to draw; ask for at least one layer and head")]
    Empty,
    /// The grid does not fit.
    #[error(
        "{columns} x {rows} heat maps of {tokens} tokens do not fit a picture of {MAX_SIDE} pixels; choose fewer layers or heads, or a shorter text"
    )]
    TooLarge {
        /// Heads in the widest layer.
        columns: usize,
        /// Layers.
        rows: usize,
        /// Positions on each axis.
        tokens: usize,
    },
    /// The encoder failed.
    #[error("the picture could not be encoded: {0}")]
    Encode(#[from] png::EncodingError),
}

fn attention_canvas(view: &Attention) -> Result<Canvas, PictureError> {
    let columns = view.layers.iter().map(|l| l.heads.len()).max().unwrap_or(0);
    let (rows, tokens) = (view.layers.len(), view.tokens.len());
    if columns == 0 || tokens == 0 {
        return Err(PictureError::Empty);
    }
    let labels: Vec<String> = view
        .tokens
        .iter()
        .map(|t| label(t, LABEL_CHARACTERS))
        .collect();
    let longest = labels.iter().map(|l| l.chars().count()).max().unwrap_or(0);
    let margin = longest * CHAR_WIDTH + 6;
    let title = 3 * CHAR_HEIGHT;

    let side = |cell: usize| {
        let map = cell * tokens;
        (
            margin + columns * (map + GAP) + GAP,
            title + rows * (map + GAP + CHAR_HEIGHT + 4) + margin + GAP,
        )
    };
    // A label needs a character's height for each cell to be legible; smaller cells go without.
    let cell = [CHAR_HEIGHT + 2, CHAR_HEIGHT, 8, 6, 5, 4, 3, 2, 1]
        .into_iter()
        .find(|cell| {
            let (w, h) = side(*cell);
            w.max(h) <= if *cell > 4 { MAX_SIDE / 3 } else { MAX_SIDE }
        })
        .ok_or(PictureError::TooLarge {
            columns,
            rows,
            tokens,
        })?;
    let (width, height) = side(cell);
    let labelled = cell >= CHAR_HEIGHT;

    let mut canvas = Canvas::new(width, height);
    let heading = format!(
        "{}  {}  rows: query, columns: key, scale 0 to 1",
        view.model, view.prediction
    );
    canvas.text(GAP, CHAR_HEIGHT, &heading, Direction::Across, INK);
    for (row, layer) in view.layers.iter().enumerate() {
        let top = title + row * (cell * tokens + GAP + CHAR_HEIGHT + 4);
        let map_top = top + CHAR_HEIGHT + 4;
        for (column, (head, pattern)) in layer.heads.iter().enumerate() {
            let left = margin + column * (cell * tokens + GAP);
            let name = format!("{}.{head}", layer.index);
            canvas.text(left, top, &name, Direction::Across, FAINT);
            draw_map(&mut canvas, pattern, left, map_top, cell);
            if labelled && row + 1 == rows {
                for (i, l) in labels.iter().enumerate() {
                    let below = map_top + cell * tokens + 4;
                    canvas.text(left + i * cell, below, l, Direction::Down, INK);
                }
            }
        }
        if labelled {
            for (i, l) in labels.iter().enumerate() {
                let start = margin - 4 - l.chars().count() * CHAR_WIDTH;
                canvas.text(start, map_top + i * cell, l, Direction::Across, INK);
            }
        }
    }
    Ok(canvas)
}

fn draw_map(canvas: &mut Canvas, pattern: &Pattern, left: usize, top: usize, cell: usize) {
    for ((query, key), weight) in pattern.indexed_iter() {
        canvas.fill(
            left + key * cell,
            top + query * cell,
            cell,
            cell,
            colour::scale(*weight),
        );
    }
}

pub(super) fn encode(canvas: &Canvas) -> Result<Vec<u8>, PictureError> {
    let mut bytes = Vec::new();
    let side = |n: usize| u32::try_from(n).expect("a canvas is at most MAX_SIDE pixels wide");
    let mut encoder = png::Encoder::new(&mut bytes, side(canvas.width), side(canvas.height));
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header()?.write_image_data(canvas.rgb())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::{super::Layer, *};

    fn view(tokens: usize, layers: usize, heads: usize) -> Attention {
        Attention {
            model: "m".into(),
            prediction: "positive (0.98)".into(),
            tokens: (0..tokens).map(|i| format!("t{i}")).collect(),
            layers: (0..layers)
                .map(|index| Layer {
                    index,
                    heads: (0..heads).map(|h| (h, Array2::eye(tokens))).collect(),
                })
                .collect(),
        }
    }

    #[test]
    fn the_diagonal_of_an_identity_pattern_is_bright() {
        let canvas = attention_canvas(&view(3, 1, 1)).unwrap();
        let bright = canvas
            .rgb()
            .as_chunks::<3>()
            .0
            .iter()
            .filter(|p| **p == colour::scale(1.0))
            .count();
        let dark = canvas
            .rgb()
            .as_chunks::<3>()
            .0
            .iter()
            .filter(|p| **p == colour::scale(0.0))
            .count();
        assert_eq!(2 * bright, dark, "three cells of nine");
    }

    #[test]
    fn a_png_comes_out_with_the_size_of_the_canvas() {
        let canvas = attention_canvas(&view(7, 2, 4)).unwrap();
        let bytes = attention(&view(7, 2, 4)).unwrap();
        let reader = png::Decoder::new(std::io::Cursor::new(bytes))
            .read_info()
            .unwrap();
        assert_eq!(reader.info().width as usize, canvas.width);
        assert_eq!(reader.info().height as usize, canvas.height);
    }

    #[test]
    fn nothing_to_draw_and_too_much_to_draw_are_errors() {
        assert!(matches!(
            attention(&view(3, 1, 0)),
            Err(PictureError::Empty)
        ));
        assert!(matches!(
            attention(&view(512, 24, 32)),
            Err(PictureError::TooLarge { .. })
        ));
    }
}
