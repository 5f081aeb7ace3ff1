//! Which head is worth looking at first.

use crate::{cli::picture::Attention, service::wire::introspect::Token};

/// The layer and head that look hardest from a word to another word: the greatest mean, over the words, of the largest weight on
/// another one. Heads that rest on special tokens or on the word itself are common and say little.
pub(super) fn most_telling(attention: &Attention, tokens: &[Token]) -> Option<(usize, usize)> {
    let words: Vec<usize> = tokens
        .iter()
        .enumerate()
        .filter_map(|(i, t)| (!t.special).then_some(i))
        .collect();
    let score = |pattern: &ndarray::Array2<f32>| {
        words
            .iter()
            .map(|query| {
                words
                    .iter()
                    .filter(|key| *key != query)
                    .filter_map(|key| pattern.get((*query, *key)).copied())
                    .fold(0.0f32, f32::max)
            })
            .sum::<f32>()
    };
    attention
        .layers
        .iter()
        .flat_map(|l| l.heads.iter().map(move |(h, p)| (l.index, *h, p)))
        .map(|(layer, head, pattern)| ((layer, head), score(pattern)))
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(place, _)| place)
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, array};

    use super::*;
    use crate::cli::picture::Layer;

    #[test]
    fn looking_at_another_word_beats_looking_at_oneself_and_at_special_tokens() {
        let token = |special| Token {
            special,
            ..Default::default()
        };
        let tokens = [token(true), token(false), token(false)];
        let to_special = array![[1., 0., 0.], [1., 0., 0.], [1., 0., 0.]];
        let to_other = array![[1., 0., 0.], [0.2, 0.2, 0.6], [0.2, 0.6, 0.2]];
        let attention = Attention {
            model: String::new(),
            prediction: String::new(),
            tokens: vec![String::new(); 3],
            layers: vec![
                Layer {
                    index: 0,
                    heads: vec![(0, to_special), (1, Array2::eye(3))],
                },
                Layer {
                    index: 3,
                    heads: vec![(2, to_other)],
                },
            ],
        };
        assert_eq!(most_telling(&attention, &tokens), Some((3, 2)));
    }
}
