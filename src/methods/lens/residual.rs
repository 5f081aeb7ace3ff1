//! How the residual stream grows and turns from state to state.
//!
//! ```text
//!   norm[state, position]     = |h|                                                Euclidean
//!   step[state, position]     = cos(h_state, h_state+1)                            consecutive states
//!   cosine[state, other]      = mean over positions of cos(h_state, h_other)       special tokens included
//! ```
//!
//! The cosine with a vector of zeros is zero.

use super::stream::States;

/// See the module.
#[derive(Clone, Debug, PartialEq)]
pub struct Residual {
    /// `[state, position]`
    pub norm: Vec<f64>,
    /// `[state, position]`, of every state but the last with the next.
    pub step: Vec<f64>,
    /// `[state, state]`
    pub cosine: Vec<f64>,
}

pub(super) fn residual(states: &States) -> Residual {
    let width = states.width.max(1);
    let vectors: Vec<Vec<&[f32]>> = states
        .values
        .iter()
        .map(|v| v.chunks_exact(width).collect())
        .collect();
    let norms: Vec<Vec<f64>> = vectors
        .iter()
        .map(|state| state.iter().map(|h| dot(h, h).sqrt()).collect())
        .collect();
    let cosines = |a: usize, b: usize| -> Vec<f64> {
        let pairs = vectors[a].iter().zip(&vectors[b]);
        let sizes = norms[a].iter().zip(&norms[b]);
        pairs
            .zip(sizes)
            .map(|((x, y), (nx, ny))| {
                let size = nx * ny;
                if size == 0.0 { 0.0 } else { dot(x, y) / size }
            })
            .collect()
    };
    let count = vectors.len();
    let mut cosine = vec![1.0; count * count];
    for a in 0..count {
        for b in 0..=a {
            let all = cosines(a, b);
            let mean = all.iter().sum::<f64>() / all.len().max(1) as f64;
            cosine[a * count + b] = mean;
            cosine[b * count + a] = mean;
        }
    }
    Residual {
        step: (1..count).flat_map(|to| cosines(to - 1, to)).collect(),
        norm: norms.concat(),
        cosine,
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    let pairs = a.iter().zip(b);
    pairs.map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_and_cosines_are_those_of_the_formulas() {
        let found = residual(&States {
            positions: 2,
            width: 2,
            values: vec![vec![3.0, 4.0, 1.0, 0.0], vec![-3.0, -4.0, 0.0, 2.0]],
            scores: Vec::new(),
        });
        assert_eq!(found.norm, [5.0, 1.0, 5.0, 2.0]);
        assert_eq!(found.step, [-1.0, 0.0]);
        assert_eq!(found.cosine, [1.0, -0.5, -0.5, 1.0]);
    }

    #[test]
    fn nothing_points_nowhere() {
        let found = residual(&States {
            positions: 1,
            width: 1,
            values: vec![vec![0.0], vec![1.0]],
            scores: Vec::new(),
        });
        assert_eq!((found.norm[0], found.step[0]), (0.0, 0.0));
    }
}
