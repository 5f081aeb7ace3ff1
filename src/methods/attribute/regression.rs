//! Weighted linear models: plain, ridge, lasso. Systems are solved by `faer`.

use faer::Mat;

/// What is fitted: rows of features, a target and a weight for each.
#[derive(Clone, Copy, Debug)]
pub struct Data<'a> {
    /// `[row][feature]`.
    pub rows: &'a [Vec<f64>],
    /// Of each row.
    pub targets: &'a [f64],
    /// Of each row; not negative.
    pub weights: &'a [f64],
}

/// A fitted model: `target = coefficients . features + intercept`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fitted {
    /// One for each feature.
    pub coefficients: Vec<f64>,
    /// What is left where all features are zero.
    pub intercept: f64,
}

/// Data about their weighted means, so that the intercept is not penalised.
struct Centred {
    rows: Vec<Vec<f64>>,
    targets: Vec<f64>,
    means: Vec<f64>,
    target: f64,
}

impl Data<'_> {
    fn features(&self) -> usize {
        self.rows.first().map_or(0, Vec::len)
    }

    fn centred(&self) -> Centred {
        let total: f64 = self.weights.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        let mut means = vec![0.0; self.features()];
        let mut target = 0.0;
        for ((row, y), w) in self.rows.iter().zip(self.targets).zip(self.weights) {
            for (mean, x) in means.iter_mut().zip(row) {
                *mean += w * x / total;
            }
            target += w * y / total;
        }
        let about = |row: &Vec<f64>| row.iter().zip(&means).map(|(x, m)| x - m).collect();
        Centred {
            rows: self.rows.iter().map(about).collect(),
            targets: self.targets.iter().map(|y| y - target).collect(),
            means,
            target,
        }
    }

    /// Minimises `sum w (y - X b - c)^2 + alpha |b|^2`, as scikit-learn's `Ridge`; with `alpha` 0 as `LinearRegression`. What the data do
    /// not decide is chosen least in norm.
    pub fn ridge(&self, alpha: f64) -> Fitted {
        let centred = self.centred();
        let coefficients = least_squares(&centred.rows, &centred.targets, self.weights, alpha);
        centred.fitted(coefficients)
    }

    /// Minimises `1/(2n) sum w' (y - X b - c)^2 + alpha |b|_1` with weights `w'` that sum to the number `n` of rows, as scikit-learn's
    /// `Lasso`, by coordinate descent until no coefficient moves by more than `1e-12` of the greatest.
    pub fn lasso(&self, alpha: f64) -> Fitted {
        const SWEEPS: usize = 10_000;
        const STILL: f64 = 1e-12;
        let centred = self.centred();
        let n = self.rows.len() as f64;
        let total: f64 = self.weights.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        let weights: Vec<f64> = self.weights.iter().map(|w| w * n / total).collect();
        let features = self.features();
        let norms: Vec<f64> = (0..features)
            .map(|j| {
                let of = centred.rows.iter().zip(&weights);
                of.map(|(row, w)| w * row[j] * row[j]).sum()
            })
            .collect();
        let mut left = centred.targets.clone();
        let mut coefficients = vec![0.0f64; features];
        for _ in 0..SWEEPS {
            let (mut moved, mut greatest) = (0.0f64, 0.0f64);
            for j in 0..features {
                if norms[j] <= 0.0 {
                    continue;
                }
                let before = coefficients[j];
                let rows = centred.rows.iter().zip(&weights).zip(&left);
                let pull: f64 = rows
                    .map(|((row, w), r)| w * row[j] * (r + row[j] * before))
                    .sum();
                let shrunk = pull.abs() - n * alpha;
                let now = if shrunk > 0.0 {
                    pull.signum() * shrunk / norms[j]
                } else {
                    0.0
                };
                if now != before {
                    for (r, row) in left.iter_mut().zip(&centred.rows) {
                        *r -= (now - before) * row[j];
                    }
                }
                coefficients[j] = now;
                moved = moved.max((now - before).abs());
                greatest = greatest.max(now.abs());
            }
            if moved <= STILL * greatest {
                break;
            }
        }
        centred.fitted(coefficients)
    }

    /// Minimises `sum w (y - X b)^2` without intercept over the `b` that sum to `total`.
    pub fn summing_to(&self, total: f64) -> Vec<f64> {
        // The last coefficient is what the others leave.
        let features = self.features();
        let Some(last) = features.checked_sub(1) else {
            return Vec::new();
        };
        let rows: Vec<Vec<f64>> = self
            .rows
            .iter()
            .map(|row| row[..last].iter().map(|x| x - row[last]).collect())
            .collect();
        let targets: Vec<f64> = self
            .rows
            .iter()
            .zip(self.targets)
            .map(|(row, y)| y - row[last] * total)
            .collect();
        let mut coefficients = least_squares(&rows, &targets, self.weights, 0.0);
        coefficients.push(total - coefficients.iter().sum::<f64>());
        coefficients
    }
}

impl Centred {
    fn fitted(&self, coefficients: Vec<f64>) -> Fitted {
        let both = coefficients.iter().zip(&self.means);
        let there: f64 = both.map(|(b, m)| b * m).sum();
        Fitted {
            intercept: self.target - there,
            coefficients,
        }
    }
}

/// `argmin sum w (y - X b)^2 + alpha |b|^2`: by QR of the weighted rows, below which the penalty stands as more rows, where that decides
/// every coefficient; least in norm otherwise.
fn least_squares(rows: &[Vec<f64>], targets: &[f64], weights: &[f64], alpha: f64) -> Vec<f64> {
    let features = rows.first().map_or(0, Vec::len);
    if features == 0 {
        return Vec::new();
    }
    let penalty = if alpha > 0.0 { features } else { 0 };
    let count = rows.len() + penalty;
    let matrix = Mat::from_fn(count, features, |i, j| match rows.get(i) {
        Some(row) => weights[i].sqrt() * row[j],
        None if i - rows.len() == j => alpha.sqrt(),
        None => 0.0,
    });
    let right = Mat::from_fn(count, 1, |i, _| match targets.get(i) {
        Some(y) => weights[i].sqrt() * y,
        None => 0.0,
    });
    // The decomposition tells which directions the data decide.
    let Ok(svd) = matrix.thin_svd() else {
        return vec![f64::NAN; features];
    };
    let (u, s, v) = (svd.U(), svd.S().column_vector(), svd.V());
    let greatest = (0..s.nrows()).map(|k| s[k]).fold(0.0, f64::max);
    let floor = greatest * f64::EPSILON * count.max(features) as f64;
    let along = u.transpose() * &right;
    (0..features)
        .map(|j| {
            (0..s.nrows())
                .filter(|k| s[*k] > floor)
                .map(|k| v[(j, k)] * along[(k, 0)] / s[k])
                .sum()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUNDING: f64 = 1e-9;

    fn rows() -> Vec<Vec<f64>> {
        (0..12)
            .map(|i| {
                let x = f64::from(i);
                vec![x.sin(), (1.7 * x).cos(), (0.3 * x * x).sin()]
            })
            .collect()
    }

    #[test]
    fn a_linear_model_is_found_again() {
        let rows = rows();
        let targets: Vec<f64> = rows
            .iter()
            .map(|r| 2.0 * r[0] - r[1] + 0.5 * r[2] + 3.0)
            .collect();
        let weights: Vec<f64> = (0..12).map(|i| 1.0 + f64::from(i % 4)).collect();
        let data = Data {
            rows: &rows,
            targets: &targets,
            weights: &weights,
        };
        let fitted = data.ridge(0.0);
        for (found, expected) in fitted.coefficients.iter().zip([2.0, -1.0, 0.5]) {
            assert!((found - expected).abs() < ROUNDING);
        }
        assert!((fitted.intercept - 3.0).abs() < ROUNDING);
        let lasso = data.lasso(0.0);
        assert!((lasso.coefficients[0] - 2.0).abs() < 1e-6);
    }

    #[test]
    fn a_penalty_shrinks_and_a_lasso_drops() {
        let rows = rows();
        let targets: Vec<f64> = rows.iter().map(|r| 2.0 * r[0] + 0.01 * r[2]).collect();
        let weights = vec![1.0; 12];
        let data = Data {
            rows: &rows,
            targets: &targets,
            weights: &weights,
        };
        let (plain, ridge, lasso) = (data.ridge(0.0), data.ridge(5.0), data.lasso(0.05));
        assert!(ridge.coefficients[0].abs() < plain.coefficients[0].abs());
        assert_eq!(lasso.coefficients[2], 0.0);
        assert!(lasso.coefficients[0] > 1.0);
    }

    #[test]
    fn coefficients_sum_to_what_they_must() {
        let rows = rows();
        let targets: Vec<f64> = rows.iter().map(|r| r[0] + r[1]).collect();
        let weights = vec![1.0; 12];
        let data = Data {
            rows: &rows,
            targets: &targets,
            weights: &weights,
        };
        let found = data.summing_to(2.0);
        assert!((found.iter().sum::<f64>() - 2.0).abs() < ROUNDING);
        for (found, expected) in found.iter().zip([1.0, 1.0, 0.0]) {
            assert!((found - expected).abs() < ROUNDING);
        }
    }

    #[test]
    fn what_the_data_do_not_decide_is_least_in_norm() {
        let rows = vec![vec![1.0, 1.0], vec![2.0, 2.0], vec![0.0, 0.0]];
        let data = Data {
            rows: &rows,
            targets: &[2.0, 4.0, 0.0],
            weights: &[1.0; 3],
        };
        let fitted = data.ridge(0.0);
        assert!((fitted.coefficients[0] - 1.0).abs() < ROUNDING);
        assert!((fitted.coefficients[1] - 1.0).abs() < ROUNDING);
    }
}
