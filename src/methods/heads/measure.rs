//! Numbers of a pattern, by the definitions of `proto/introspect/v1/heads.proto`. Sums run in double precision.

use super::Measure;

/// A pattern of a head: `[query, key]`, both of the extent `n`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pattern<'a> {
    pub(super) n: usize,
    pub(super) weights: &'a [f32],
}

/// What is known of the row that a pattern is of.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    /// Token ids; empty where there are none.
    pub(super) ids: Vec<u32>,
    /// Which keys are special tokens.
    pub(super) special: Vec<bool>,
    /// Where tokens begin that are repeated, and how many they are.
    pub(super) repeated: Option<(usize, usize)>,
}

impl<'a> Pattern<'a> {
    fn rows(self) -> impl Iterator<Item = (usize, &'a [f32])> {
        self.weights.chunks_exact(self.n.max(1)).enumerate()
    }

    fn at(self, query: usize, key: usize) -> f64 {
        self.weights
            .get(query * self.n + key)
            .map_or(f64::NAN, |w| f64::from(*w))
    }

    /// A measure of this pattern; none where there is nothing to measure.
    pub(super) fn measure(self, measure: Measure, facts: &Facts) -> Option<f64> {
        match measure {
            Measure::Entropy => mean(self.rows().map(|(_, row)| entropy(row))),
            Measure::Distance => mean(self.rows().filter_map(|(q, row)| distance(q, row))),
            Measure::Current => mean((0..self.n).map(|q| self.at(q, q))),
            Measure::PreviousToken => mean((1..self.n).map(|q| self.at(q, q - 1))),
            Measure::FirstToken => mean((0..self.n).map(|q| self.at(q, 0))),
            Measure::SpecialTokens => {
                if facts.special.len() != self.n {
                    return None;
                }
                let on_special = |(_, row): (usize, &[f32])| {
                    let keys = row.iter().zip(&facts.special).filter(|(_, s)| **s);
                    keys.map(|(w, _)| f64::from(*w)).sum()
                };
                mean(self.rows().map(on_special))
            }
            Measure::DuplicateToken => self.back(facts, 0),
            Measure::Induction => self.back(facts, 1),
        }
    }

    /// What queries of the second half give to the same token of the first half, or so many behind it.
    fn back(self, facts: &Facts, behind: usize) -> Option<f64> {
        let (start, s) = facts.repeated?;
        mean((start + s..start + 2 * s).map(|q| self.at(q, q - s + behind)))
    }

    /// Adds each entry to the sum of its offset `q - k`, which stands at `zero + q - k`.
    pub(super) fn by_offset(self, sums: &mut [f64], zero: usize) {
        for (q, row) in self.rows() {
            for (k, weight) in row.iter().enumerate() {
                sums[zero + q - k] += f64::from(*weight);
            }
        }
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, n), v| (sum + v, n + 1));
    (count > 0).then(|| sum / count as f64)
}

fn entropy(row: &[f32]) -> f64 {
    let positive = row.iter().map(|w| f64::from(*w)).filter(|w| *w > 0.0);
    -positive.map(|w| w * w.ln()).sum::<f64>()
}

/// None for a query that attends to nothing.
fn distance(query: usize, row: &[f32]) -> Option<f64> {
    let (mut mass, mut sum) = (0.0, 0.0);
    for (key, weight) in row.iter().enumerate() {
        let weight = f64::from(*weight);
        mass += weight;
        sum += weight * query.abs_diff(key) as f64;
    }
    (mass > 0.0).then(|| sum / mass)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLOSE: f64 = 1e-7;

    fn facts() -> Facts {
        Facts {
            ids: vec![5, 6, 5, 6],
            special: vec![true, false, false, false],
            repeated: Some((0, 2)),
        }
    }

    fn of(rows: &[[f32; 4]; 4], measure: Measure) -> f64 {
        let weights: Vec<f32> = rows.iter().flatten().copied().collect();
        let pattern = Pattern {
            n: 4,
            weights: &weights,
        };
        pattern.measure(measure, &facts()).unwrap()
    }

    #[test]
    fn pure_heads_have_pure_numbers() {
        let previous = [
            [1., 0., 0., 0.],
            [1., 0., 0., 0.],
            [0., 1., 0., 0.],
            [0., 0., 1., 0.],
        ];
        let uniform = [[0.25; 4]; 4];
        for (rows, measure, wanted) in [
            (&previous, Measure::PreviousToken, 1.0),
            (&previous, Measure::Entropy, 0.0),
            (&previous, Measure::Distance, 0.75),
            (&previous, Measure::Current, 0.25),
            (&previous, Measure::FirstToken, 0.5),
            (&previous, Measure::SpecialTokens, 0.5),
            // The second half looks one back: with two tokens that is what came next the first time.
            (&previous, Measure::Induction, 1.0),
            (&previous, Measure::DuplicateToken, 0.0),
            (&uniform, Measure::Entropy, 4f64.ln()),
            (&uniform, Measure::Distance, 1.25),
            (&uniform, Measure::Induction, 0.25),
        ] {
            let found = of(rows, measure);
            assert!((found - wanted).abs() < CLOSE, "{measure:?}: {found}");
        }
    }

    #[test]
    fn offsets_are_of_the_key_before_the_query() {
        let weights = [1.0, 0.0, 0.7, 0.3];
        let mut sums = [0.0; 5];
        let pattern = Pattern {
            n: 2,
            weights: &weights,
        };
        pattern.by_offset(&mut sums, 2);
        assert!((sums[2] - 1.3).abs() < CLOSE && (sums[3] - 0.7).abs() < CLOSE);
    }

    #[test]
    fn nothing_is_measured_on_nothing() {
        let one = Pattern {
            n: 1,
            weights: &[1.0],
        };
        let none = Facts::default();
        assert_eq!(one.measure(Measure::PreviousToken, &none), None);
        assert_eq!(one.measure(Measure::SpecialTokens, &none), None);
        assert_eq!(one.measure(Measure::Induction, &none), None);
    }
}
