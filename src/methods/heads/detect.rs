//! Patterns that are looked for, as TransformerLens's `head_detector.py` (`detect_head`,
//! `compute_head_attention_similarity_score`) has them. Other than there, the stored pattern is not changed, and "abs" is not rounded to three
//! decimals.

use super::measure::Pattern;
use crate::{engine::EngineError, tensor::Tensor};

/// A pattern, and how alike a head is to it.
#[derive(Clone, Debug)]
pub struct Detector {
    /// What is looked for.
    pub pattern: Sought,
    /// How alike.
    pub similarity: Similarity,
    /// The first key counts for nothing.
    pub exclude_bos: bool,
    /// The diagonal counts for nothing.
    pub exclude_current_token: bool,
}

/// What is looked for.
#[derive(Clone, Debug)]
pub enum Sought {
    /// The token before.
    PreviousToken,
    /// The same token before.
    DuplicateToken,
    /// What followed the same token before.
    Induction,
    /// `[query, key]`
    Given(Tensor),
}

/// How alike a head is to a pattern.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Similarity {
    /// `sum(A D) / sum(A)`
    #[default]
    Mul,
    /// `1 - n mean|A - D|`
    Abs,
}

impl Sought {
    /// Name in answers.
    pub const fn name(&self) -> &'static str {
        match self {
            Sought::PreviousToken => "previous_token_head",
            Sought::DuplicateToken => "duplicate_token_head",
            Sought::Induction => "induction_head",
            Sought::Given(_) => "given",
        }
    }

    /// Whether it is made from token ids.
    pub(super) const fn needs_ids(&self) -> bool {
        matches!(self, Sought::DuplicateToken | Sought::Induction)
    }

    /// Whether there is a one at an entry of a named pattern.
    fn names(&self, ids: &[u32], q: usize, k: usize) -> bool {
        let duplicate = |k: usize| k < q && ids.get(k) == ids.get(q);
        match self {
            Sought::PreviousToken => k + 1 == q,
            Sought::DuplicateToken => duplicate(k),
            Sought::Induction => k > 0 && duplicate(k - 1),
            Sought::Given(_) => false,
        }
    }

    /// The numbers of a given pattern, for a row of `n` positions; nothing of a named one.
    ///
    /// # Errors
    /// For one of another extent; the field is `given.shape`.
    pub(super) fn given(&self, n: usize) -> Result<Vec<f32>, EngineError> {
        let Sought::Given(tensor) = self else {
            return Ok(Vec::new());
        };
        if tensor.shape() != [n, n] {
            return Err(EngineError::invalid(
                "given.shape",
                format!(
                    "is {:?}, and an input has {n} tokens: a pattern is as long as every input",
                    tensor.shape()
                ),
            ));
        }
        let values = tensor.to_f32().map_err(EngineError::internal)?;
        Ok(values.into_owned())
    }

    /// Checks a given pattern as far as it can be without a row.
    ///
    /// # Errors
    /// With paths of fields that begin at the detector.
    pub(super) fn check(&self) -> Result<(), EngineError> {
        let Sought::Given(tensor) = self else {
            return Ok(());
        };
        let values = tensor.to_f32().map_err(|_| {
            EngineError::invalid("given.dtype", format!("is {}: give floats", tensor.dtype()))
        })?;
        if values.iter().any(|v| !v.is_finite()) {
            return Err(EngineError::invalid(
                "given.data",
                "holds a number that is not finite",
            ));
        }
        match tensor.shape() {
            [q, k] if q == k => Ok(()),
            shape => Err(EngineError::invalid(
                "given.shape",
                format!("is {shape:?}: give [query, key], both as long as the input"),
            )),
        }
    }
}

impl Detector {
    /// How alike a head is, of a row with these ids; none when nothing is left to compare. `given` are the numbers of a given pattern.
    pub(super) fn score(&self, pattern: Pattern<'_>, ids: &[u32], given: &[f32]) -> Option<f64> {
        let n = pattern.n;
        let sought = |at: usize| match given.get(at) {
            Some(value) => f64::from(*value),
            None => f64::from(u8::from(self.pattern.names(ids, at / n, at % n))),
        };
        let excluded = |at: usize| {
            let (q, k) = (at / n, at % n);
            (self.exclude_bos && k == 0) || (self.exclude_current_token && k == q)
        };
        let entries = pattern.weights.iter().enumerate();
        let kept = entries
            .filter(|(at, _)| !excluded(*at))
            .map(|(at, a)| (f64::from(*a), sought(at)));
        match self.similarity {
            Similarity::Mul => {
                let (on, all) = kept.fold((0.0, 0.0), |(on, all), (a, d)| (on + a * d, all + a));
                (all > 0.0).then(|| on / all)
            }
            Similarity::Abs => {
                let off: f64 = kept.map(|(a, d)| (a - d).abs()).sum();
                // n times the mean over n n entries.
                (n > 0).then(|| 1.0 - off / n as f64)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDS: [u32; 4] = [7, 8, 7, 8];

    fn detector(pattern: Sought, similarity: Similarity) -> Detector {
        Detector {
            pattern,
            similarity,
            exclude_bos: false,
            exclude_current_token: false,
        }
    }

    fn score(detector: &Detector, weights: &[f32]) -> f64 {
        detector
            .score(Pattern { n: 4, weights }, &IDS, &[])
            .unwrap()
    }

    fn matrix(sought: &Sought) -> Vec<f32> {
        let entries = (0..16).map(|at| sought.names(&IDS, at / 4, at % 4));
        entries.map(|on| f32::from(u8::from(on))).collect()
    }

    #[test]
    fn named_patterns_are_those_of_transformer_lens() {
        let of = |sought: Sought| matrix(&sought);
        let rows = |rows: [[f32; 4]; 4]| rows.concat();
        assert_eq!(
            of(Sought::PreviousToken),
            rows([
                [0., 0., 0., 0.],
                [1., 0., 0., 0.],
                [0., 1., 0., 0.],
                [0., 0., 1., 0.]
            ])
        );
        assert_eq!(
            of(Sought::DuplicateToken),
            rows([
                [0., 0., 0., 0.],
                [0., 0., 0., 0.],
                [1., 0., 0., 0.],
                [0., 1., 0., 0.]
            ])
        );
        assert_eq!(
            of(Sought::Induction),
            rows([
                [0., 0., 0., 0.],
                [0., 0., 0., 0.],
                [0., 1., 0., 0.],
                [0., 0., 1., 0.]
            ])
        );
    }

    #[test]
    fn a_head_that_is_the_pattern_scores_best() {
        // Rows without an entry look at the first token.
        let mut head = matrix(&Sought::PreviousToken);
        head[0] = 1.0;
        let mul = detector(Sought::PreviousToken, Similarity::Mul);
        let abs = detector(Sought::PreviousToken, Similarity::Abs);
        assert_eq!(score(&mul, &head), 0.75);
        assert_eq!(score(&abs, &head), 0.75);
        let excluded = Detector {
            exclude_current_token: true,
            ..mul.clone()
        };
        assert_eq!(score(&excluded, &head), 1.0);
        let excluded = Detector {
            exclude_bos: true,
            ..abs
        };
        assert_eq!(score(&excluded, &head), 1.0, "both first columns are gone");
        let nothing = Detector {
            exclude_bos: true,
            ..mul
        };
        let first = [1., 0., 0., 0.].repeat(4);
        let pattern = Pattern {
            n: 4,
            weights: &first,
        };
        assert_eq!(nothing.score(pattern, &IDS, &[]), None);
    }

    #[test]
    fn given_patterns_are_checked() {
        let given = |shape: Vec<usize>, values: &[f32]| {
            Sought::Given(Tensor::from_f32(shape, values).unwrap())
        };
        assert!(given(vec![2, 2], &[0.0; 4]).check().is_ok());
        assert!(given(vec![4], &[0.0; 4]).check().is_err());
        assert!(given(vec![1, 1], &[f32::NAN]).check().is_err());
        assert!(given(vec![2, 2], &[0.0; 4]).given(3).is_err());
        let integers = Sought::Given(Tensor::from_i64(vec![1, 1], &[0]).unwrap());
        assert!(integers.check().is_err());
    }
}
