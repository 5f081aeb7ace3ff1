//! Pictures of what came back: for the terminal, as PNG and as a page that stands alone.
//!
//! Pure functions from data to text or bytes; writing files is the caller's work. Weights are drawn as they are
//! on a fixed scale from 0 to 1, so that two pictures can be compared; nothing is renormalised.

pub mod attribution;
pub mod canvas;
pub mod colour;
pub mod curve;
pub mod grid;
pub mod page;
pub mod png;
pub mod terminal;

use ndarray::{Array2, ArrayView2};

/// One attention pattern, `query x key`, with weights in [0, 1].
pub type Pattern = Array2<f32>;

/// The attention of a text, as pictures need it.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Name of the model.
    pub model: String,
    /// Prediction in a line for people, such as `positive (0.98)`; empty when there is none.
    pub prediction: String,
    /// Labels of both axes, one per position.
    pub tokens: Vec<String>,
    /// Layers in ascending order.
    pub layers: Vec<Layer>,
}

/// The heads of one layer.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Index of the layer in the model, from 0.
    pub index: usize,
    /// Heads in ascending order, with their index in the model.
    pub heads: Vec<(usize, Pattern)>,
}

impl Attention {
    /// The pattern of a head, if it is among the ones held.
    pub fn head(&self, layer: usize, head: usize) -> Option<ArrayView2<'_, f32>> {
        let layer = self.layers.iter().find(|l| l.index == layer)?;
        let (_, pattern) = layer.heads.iter().find(|(h, _)| *h == head)?;
        Some(pattern.view())
    }
}

/// Cuts a label to `width` characters, with an ellipsis where something was cut, and makes control characters visible.
pub fn label(text: &str, width: usize) -> String {
    let visible: String = text
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    if visible.chars().count() <= width {
        return visible;
    }
    let mut cut: String = visible.chars().take(width.saturating_sub(1)).collect();
    cut.push('…');
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_labels_are_cut_with_an_ellipsis() {
        assert_eq!(label("fantastic", 6), "fanta…");
        assert_eq!(label("short", 6), "short");
    }

    #[test]
    fn control_characters_cannot_reach_a_terminal() {
        assert_eq!(label("a\x1b[31m", 10), "a\u{fffd}[31m");
    }
}
