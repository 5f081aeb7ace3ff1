//! Random draws, the same on every machine for the same seed.

use rand::{Rng as _, SeedableRng as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution as _, StandardNormal};

/// A stream of draws.
#[derive(Clone, Debug)]
pub struct Draws(ChaCha8Rng);

impl Draws {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        // 53 bits, as many as a double holds.
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // less than n
        let drawn = (self.uniform() * n as f64) as usize;
        drawn.min(n.saturating_sub(1))
    }

    /// Normal of mean 0 and standard deviation 1.
    pub fn normal(&mut self) -> f64 {
        StandardNormal.sample(&mut self.0)
    }

    /// So many normal numbers, times a factor.
    pub fn noise(&mut self, n: usize, deviation: f64) -> Vec<f32> {
        #[allow(clippy::cast_possible_truncation)] // noise needs no more
        let next = |d: &mut Self| (deviation * d.normal()) as f32;
        (0..n).map(|_| next(self)).collect()
    }

    /// A direction of length one.
    pub fn direction(&mut self, n: usize) -> Vec<f32> {
        let mut direction: Vec<f64> = (0..n).map(|_| self.normal()).collect();
        let length = direction
            .iter()
            .map(|d| d * d)
            .sum::<f64>()
            .sqrt()
            .max(f64::MIN_POSITIVE);
        for d in &mut direction {
            *d /= length;
        }
        #[allow(clippy::cast_possible_truncation)] // a direction needs no more
        let direction = direction.into_iter().map(|d| d as f32).collect();
        direction
    }

    /// An order of `0..n`.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        order.shuffle(&mut self.0);
        order
    }

    /// An index drawn by weights that sum to more than zero.
    pub fn weighted(&mut self, weights: &[f64]) -> usize {
        let mut left = self.uniform() * weights.iter().sum::<f64>();
        for (at, weight) in weights.iter().enumerate() {
            left -= weight;
            if left < 0.0 {
                return at;
            }
        }
        weights.len().saturating_sub(1)
    }

    /// `k` of `0..n`.
    pub fn subset(&mut self, n: usize, k: usize) -> Vec<bool> {
        let mut chosen = vec![false; n];
        for at in self.permutation(n).into_iter().take(k) {
            chosen[at] = true;
        }
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_draws_the_same() {
        let (mut a, mut b, mut c) = (Draws::new(7), Draws::new(7), Draws::new(8));
        let drawn = |d: &mut Draws| (d.permutation(9), d.noise(3, 2.0), d.below(1000));
        let (a, b, c) = (drawn(&mut a), drawn(&mut b), drawn(&mut c));
        assert_eq!(a, b);
        assert_ne!(a, c);
    }

    #[test]
    fn draws_have_the_moments_that_they_should() {
        let mut draws = Draws::new(1);
        let n = 20_000;
        let normal: Vec<f64> = (0..n).map(|_| draws.normal()).collect();
        let mean = normal.iter().sum::<f64>() / f64::from(n);
        let variance = normal.iter().map(|x| x * x).sum::<f64>() / f64::from(n);
        // Three standard errors.
        assert!(mean.abs() < 3.0 / f64::from(n).sqrt());
        assert!((variance - 1.0).abs() < 3.0 * (2.0 / f64::from(n)).sqrt());
        let mut counts = [0u32; 3];
        for _ in 0..n {
            counts[draws.weighted(&[1.0, 0.0, 3.0])] += 1;
        }
        assert_eq!(counts[1], 0);
        assert!(
            (f64::from(counts[2]) / f64::from(n) - 0.75).abs()
                < 3.0 * (0.1875 / f64::from(n)).sqrt()
        );
        let length: f32 = draws.direction(50).iter().map(|d| d * d).sum();
        assert!((length - 1.0).abs() < 1e-5);
        assert_eq!(draws.subset(10, 4).iter().filter(|c| **c).count(), 4);
    }
}
