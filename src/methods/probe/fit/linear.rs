//! Kinds that are solved without an optimiser: ridge regression, difference of means, first principal component.

use faer::{Mat, Side, linalg::solvers::Solve as _};
use ndarray::{Array1, Array2, ArrayView2, Axis};

use super::{Fitted, Layer};

/// The smaller of the two systems that have the same solution.
pub(super) fn ridge(alpha: f64, x: ArrayView2<'_, f64>, y: &[f64]) -> Result<Fitted, String> {
    let (centred, means) = centred(x);
    let mean = y.iter().sum::<f64>() / y.len() as f64;
    let y: Array1<f64> = y.iter().map(|v| v - mean).collect();
    let (rows, width) = centred.dim();
    let weight = if width <= rows {
        let mut gram = centred.t().dot(&centred);
        gram.diag_mut().mapv_inplace(|v| v + alpha);
        solved(&gram, &centred.t().dot(&y))?
    } else {
        let mut gram = centred.dot(&centred.t());
        gram.diag_mut().mapv_inplace(|v| v + alpha);
        centred.t().dot(&solved(&gram, &y)?)
    };
    let bias = mean - weight.dot(&means);
    Ok(direct(weight, bias))
}

/// Of a symmetric, positive definite system.
fn solved(system: &Array2<f64>, right: &Array1<f64>) -> Result<Array1<f64>, String> {
    let n = right.len();
    let factor = Mat::from_fn(n, n, |i, j| system[[i, j]])
        .llt(Side::Lower)
        .map_err(|_| "the system of the regression is singular: raise alpha".to_owned())?;
    let found = factor.solve(Mat::from_fn(n, 1, |i, _| right[i]));
    Ok((0..n).map(|i| found[(i, 0)]).collect())
}

fn centred(x: ArrayView2<'_, f64>) -> (Array2<f64>, Array1<f64>) {
    let means = x.sum_axis(Axis(0)) / x.nrows().max(1) as f64;
    (&x - &means, means)
}

fn direct(weight: Array1<f64>, bias: f64) -> Fitted {
    Fitted {
        hidden: None,
        output: Layer {
            weight: weight.insert_axis(Axis(0)),
            bias: Array1::from_elem(1, bias),
        },
        iterations: 0,
        converged: true,
    }
}

/// Means of the rows of the first class and of the second.
fn means(x: ArrayView2<'_, f64>, of: &[usize]) -> [Array1<f64>; 2] {
    [0, 1].map(|class| {
        let rows = || x.outer_iter().zip(of).filter(|(_, c)| **c == class);
        let mut mean = Array1::zeros(x.ncols());
        rows().for_each(|(row, _)| mean += &row);
        mean / rows().count().max(1) as f64
    })
}

/// The mean of the second class minus that of the first.
pub(super) fn mean_difference(x: ArrayView2<'_, f64>, of: &[usize]) -> Fitted {
    let [first, second] = means(x, of);
    let direction = &second - &first;
    let middle = (&second + &first) / 2.0;
    let bias = -direction.dot(&middle);
    direct(direction, bias)
}

/// The direction of greatest variance.
pub(super) fn pca(x: ArrayView2<'_, f64>, y: &[f64], classes: bool) -> Fitted {
    let (centred, means_of_all) = centred(x);
    let mut direction = greatest_variance(&centred);
    let mean = y.iter().sum::<f64>() / y.len().max(1) as f64;
    let along = centred.dot(&direction);
    let towards: f64 = along.iter().zip(y).map(|(a, y)| a * (y - mean)).sum();
    if towards < 0.0 {
        direction.mapv_inplace(|v| -v);
    }
    if classes {
        let of: Vec<usize> = y.iter().map(|v| usize::from(*v > 0.5)).collect();
        let [first, second] = means(x, &of);
        let middle = (&second + &first) / 2.0;
        let bias = -direction.dot(&middle);
        return direct(direction, bias);
    }
    // For numbers: the length along the direction, on the scale of the numbers.
    let along = centred.dot(&direction);
    let variance: f64 = along.iter().map(|a| a * a).sum();
    let slope = if variance > 0.0 {
        along
            .iter()
            .zip(y)
            .map(|(a, y)| a * (y - mean))
            .sum::<f64>()
            / variance
    } else {
        0.0
    };
    let weight = direction * slope;
    let bias = mean - weight.dot(&means_of_all);
    direct(weight, bias)
}

/// The first right singular vector of centred rows, of length one.
fn greatest_variance(centred: &Array2<f64>) -> Array1<f64> {
    let (rows, width) = centred.dim();
    let dual = rows < width;
    let gram = if dual {
        centred.dot(&centred.t())
    } else {
        centred.t().dot(centred)
    };
    let n = gram.nrows();
    let Ok(eigen) = Mat::from_fn(n, n, |i, j| gram[[i, j]]).self_adjoint_eigen(Side::Lower) else {
        return Array1::zeros(width);
    };
    // Ascending: the last belongs to the greatest.
    let last: Array1<f64> = (0..n).map(|i| eigen.U()[(i, n - 1)]).collect();
    let direction = if dual { centred.t().dot(&last) } else { last };
    let length = direction.dot(&direction).sqrt();
    if length > 0.0 {
        direction / length
    } else {
        direction
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::attribute::draw::Draws;

    #[test]
    fn ridge_is_the_same_by_both_systems_and_fits_a_line() {
        let mut draws = Draws::new(5);
        let x = Array2::from_shape_fn((5, 9), |_| draws.normal());
        let y: Vec<f64> = x.outer_iter().map(|r| 2.0 * r[0] + 1.0).collect();
        let wide = ridge(0.5, x.view(), &y).unwrap();
        // The normal equations of the same, by hand: (X'X + a I) w = X' y about the means.
        let (centred, _) = centred(x.view());
        let mean = y.iter().sum::<f64>() / 5.0;
        let residual: Array1<f64> = y.iter().map(|v| v - mean).collect();
        let w = wide.output.weight.row(0).to_owned();
        let left = centred.t().dot(&centred.dot(&w)) + &w * 0.5;
        let right = centred.t().dot(&residual);
        assert!((&left - &right).iter().all(|v| v.abs() < 1e-9));
    }
}
