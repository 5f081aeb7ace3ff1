//! Sums and maxima of the neurons of a layer, over tokens and texts. Sums are in double precision.

use super::Set;

/// What a neuron takes.
pub(super) const BYTES_EACH: usize = 2 * size_of::<f64>() + size_of::<f32>();

/// The neurons of a layer.
#[derive(Clone, Debug)]
pub(super) struct Sums {
    a: Vec<f64>,
    b: Vec<f64>,
    greatest: Vec<f32>,
    /// Tokens of both sets.
    tokens: [u64; 2],
}

/// One text.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Reduced {
    pub(super) sums: Vec<f64>,
    /// Greatest activation, and the first position that has it.
    pub(super) best: Vec<(f32, u32)>,
    pub(super) tokens: u64,
}

/// Reduces `[pos, neuron]`.
pub(super) fn reduce(values: &[f32], width: usize) -> Reduced {
    let mut sums = vec![0.0; width];
    let mut best = vec![(f32::NEG_INFINITY, 0); width];
    let mut tokens = 0;
    for (position, row) in (0u32..).zip(values.chunks_exact(width.max(1))) {
        tokens += 1;
        for ((sum, best), value) in sums.iter_mut().zip(&mut best).zip(row) {
            *sum += f64::from(*value);
            if *value > best.0 {
                *best = (*value, position);
            }
        }
    }
    Reduced { sums, best, tokens }
}

impl Sums {
    pub(super) fn new(width: usize) -> Self {
        Self {
            a: vec![0.0; width],
            b: vec![0.0; width],
            greatest: vec![f32::NEG_INFINITY; width],
            tokens: [0; 2],
        }
    }

    /// Adds a text.
    pub(super) fn add(&mut self, text: &Reduced, set: Set) {
        let (sums, tokens) = match set {
            Set::A => (&mut self.a, &mut self.tokens[0]),
            Set::B => (&mut self.b, &mut self.tokens[1]),
        };
        *tokens += text.tokens;
        for (sum, more) in sums.iter_mut().zip(&text.sums) {
            *sum += more;
        }
        for (greatest, (value, _)) in self.greatest.iter_mut().zip(&text.best) {
            *greatest = greatest.max(*value);
        }
    }

    /// Mean over all tokens.
    pub(super) fn mean(&self, index: usize) -> f64 {
        (self.a[index] + self.b[index]) / (self.tokens[0] + self.tokens[1]) as f64
    }

    /// Greatest activation.
    pub(super) fn max(&self, index: usize) -> f32 {
        self.greatest[index]
    }

    /// Mean over set A less that over set B.
    pub(super) fn contrast(&self, index: usize) -> Option<f64> {
        if self.lacks().is_some() {
            return None;
        }
        let [a, b] = self.tokens;
        Some(self.a[index] / a as f64 - self.b[index] / b as f64)
    }

    /// A set without a token.
    pub(super) fn lacks(&self) -> Option<Set> {
        match self.tokens {
            [0, _] => Some(Set::A),
            [_, 0] => Some(Set::B),
            [_, _] => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_counts_once() {
        let first = reduce(&[1.0, -1.0, 3.0, -5.0, 3.0, -3.0], 2);
        assert_eq!(first.best, [(3.0, 1), (-1.0, 0)], "the first of equals");
        let second = reduce(&[9.0, 1.0], 2);
        let mut sums = Sums::new(2);
        sums.add(&first, Set::A);
        assert_eq!(sums.contrast(0), None);
        assert_eq!(sums.lacks(), Some(Set::B));
        sums.add(&second, Set::B);
        assert_eq!((sums.mean(0), sums.max(0)), (4.0, 9.0));
        assert_eq!(sums.contrast(1), Some(-4.0));
    }
}
