//! What an intervention changes of the answer.
//!
//! With `p` the softmax of the scores of the model as it is, and `q` that of the edited one:
//!
//! ```text
//!   kl = sum_i p_i (ln p_i - ln q_i)          in nats, Kullback and Leibler (1951)
//!   total variation = 1/2 sum_i |p_i - q_i|
//! ```

use crate::{
    engine::EngineError,
    methods::predict::{Places, Scores},
};

/// What changed at one place.
#[derive(Clone, Debug, PartialEq)]
pub struct Effect {
    /// The position; none when the prediction is about the whole input.
    pub position: Option<u32>,
    /// Divergence of the edited model's answer from the other, in nats.
    pub kl: f64,
    /// Half the sum of the changes of all probabilities.
    pub total_variation: f64,
    /// Whether another label scores best.
    pub flipped: bool,
    /// The labels whose probability changed most, greatest change first.
    pub changes: Vec<Change>,
}

/// What changed of a label. The first of two numbers is the model's as it is, the second that of the edited model.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Label or token.
    pub index: u32,
    /// The scores.
    pub logits: [f32; 2],
    /// Their softmax.
    pub probabilities: [f64; 2],
}

/// Compares two runs place by place, and keeps so many changes of each.
///
/// # Errors
/// When they were read at different places.
pub fn effects(
    original: &Scores,
    modified: &Scores,
    most: usize,
) -> Result<Vec<Effect>, EngineError> {
    let floats = |s: &Scores| {
        Ok(s.scores
            .to_f32()
            .map_err(EngineError::internal)?
            .into_owned())
    };
    let (a, b): (Vec<f32>, Vec<f32>) = (floats(original)?, floats(modified)?);
    if original.places != modified.places || original.scores.shape() != modified.scores.shape() {
        return Err(EngineError::internal(
            "two runs were read at different places",
        ));
    }
    let width = original.scores.shape().last().copied().unwrap_or(1).max(1);
    let rows = a.chunks_exact(width).zip(b.chunks_exact(width));
    Ok(rows
        .enumerate()
        .map(|(row, (a, b))| Effect {
            position: match &original.places {
                Places::Whole => None,
                Places::Every => u32::try_from(row).ok(),
                Places::Positions(p) => p.get(row).copied(),
            },
            ..effect(a, b, most)
        })
        .collect())
}

fn effect(a: &[f32], b: &[f32], most: usize) -> Effect {
    let (log_p, log_q) = (log_softmax(a), log_softmax(b));
    let both = log_p.iter().zip(&log_q);
    let kl = both
        .clone()
        .map(|(p, q)| {
            if *p == f64::NEG_INFINITY {
                0.0
            } else {
                p.exp() * (p - q)
            }
        })
        .sum::<f64>();
    let distance = |p: f64, q: f64| (p.exp() - q.exp()).abs();
    let mut changes: Vec<(usize, f64)> = both.map(|(p, q)| distance(*p, *q)).enumerate().collect();
    let total_variation = changes.iter().map(|(_, d)| d).sum::<f64>() / 2.0;
    changes.sort_by(|(i, a), (j, b)| b.total_cmp(a).then(i.cmp(j)));
    changes.truncate(most);
    Effect {
        position: None,
        // Rounding makes it a little less than zero where nothing changed.
        kl: kl.max(0.0),
        total_variation,
        flipped: best(a) != best(b),
        changes: changes
            .into_iter()
            .map(|(i, _)| Change {
                index: u32::try_from(i).unwrap_or(u32::MAX),
                logits: [a[i], b[i]],
                probabilities: [log_p[i].exp(), log_q[i].exp()],
            })
            .collect(),
    }
}

fn log_softmax(scores: &[f32]) -> Vec<f64> {
    let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let most = f64::from(most);
    let sum: f64 = scores.iter().map(|s| (f64::from(*s) - most).exp()).sum();
    let all = most + sum.ln();
    scores.iter().map(|s| f64::from(*s) - all).collect()
}

fn best(scores: &[f32]) -> Option<usize> {
    let all = scores.iter().enumerate();
    all.max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i)))
        .map(|(i, _)| i)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;

    fn scores(values: &[f32]) -> Scores {
        Scores {
            places: Places::Whole,
            scores: Tensor::from_f32(vec![values.len()], values).unwrap(),
        }
    }

    #[test]
    fn nothing_changed_is_zero() {
        let same = scores(&[1.0, -2.0, 0.5]);
        let [effect] = &effects(&same, &same, 2).unwrap()[..] else {
            panic!("one place");
        };
        assert_eq!(
            (effect.kl, effect.total_variation, effect.flipped),
            (0.0, 0.0, false)
        );
        assert_eq!(effect.changes.len(), 2);
    }

    #[test]
    fn divergence_and_distance_are_those_of_the_formulas() {
        // p = (3/4, 1/4), q = (1/4, 3/4).
        let a = scores(&[3f32.ln(), 0.0]);
        let b = scores(&[0.0, 3f32.ln()]);
        let effect = &effects(&a, &b, 1).unwrap()[0];
        assert!((effect.kl - 0.5 * 3f64.ln()).abs() < 1e-6);
        assert!((effect.total_variation - 0.5).abs() < 1e-6);
        assert!(effect.flipped);
        assert_eq!(effect.changes[0].index, 0);
    }
}
