//! Attention as a page that stands alone: a grid of all layers and heads, one of them large with labels and values.

use base64::Engine as _;
use serde_json::json;

use super::{Attention, colour};

const TEMPLATE: &str = include_str!("attention.html");

/// The page. Weights travel as bytes (1/255 steps), which is finer than the eye tells the colours apart.
pub fn attention(view: &Attention) -> String {
    let layers: Vec<_> = view
        .layers
        .iter()
        .map(|layer| {
            let heads: Vec<_> = layer
                .heads
                .iter()
                .map(|(index, pattern)| {
                    let bytes: Vec<u8> = pattern.iter().map(|w| byte(*w)).collect();
                    json!({
                        "index": index,
                        "weights": base64::engine::general_purpose::STANDARD.encode(bytes),
                    })
                })
                .collect();
            json!({ "index": layer.index, "heads": heads })
        })
        .collect();
    let data = json!({
        "model": view.model,
        "prediction": view.prediction,
        "tokens": view.tokens,
        "layers": layers,
    });
    // Inside a script element only `<` can end it early; JSON may spell it as an escape.
    let data = data.to_string().replace('<', "\\u003c");
    TEMPLATE
        .replace("/*STOPS*/", &colour::css_stops())
        .replace("/*DATA*/", &data)
}

fn byte(weight: f32) -> u8 {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // clamped; NaN becomes 0
    let byte = (weight.clamp(0.0, 1.0) * 255.0).round() as u8;
    byte
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::{super::Layer, *};

    #[test]
    fn a_token_cannot_end_the_script() {
        let page = attention(&Attention {
            model: "m".into(),
            prediction: String::new(),
            tokens: vec!["</script><script>alert(1)</script>".into()],
            layers: vec![Layer {
                index: 0,
                heads: vec![(0, array![[1.0]])],
            }],
        });
        assert_eq!(page.matches("</script>").count(), 1, "the page's own");
        assert!(page.contains("\\u003c/script>"));
        assert!(page.contains("/w=="), "the weight 1.0 as one byte");
    }
}
