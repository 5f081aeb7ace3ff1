//! Cross-entropy of scores.

use ndarray::Array2;

/// The sum of cross-entropies; scores become its gradient with respect to them.
pub(super) fn losses(scores: &mut Array2<f64>, of: &[usize]) -> f64 {
    let mut sum = 0.0;
    for (mut row, class) in scores.outer_iter_mut().zip(of) {
        if row.len() == 1 {
            let (z, y) = (row[0], *class as f64);
            // log(1 + exp(z)) - y z, without overflow.
            sum += z.max(0.0) + (-z.abs()).exp().ln_1p() - y * z;
            row[0] = sigmoid(z) - y;
            continue;
        }
        let most = row.fold(f64::NEG_INFINITY, |m, v| m.max(*v));
        let powers: f64 = row.iter().map(|v| (v - most).exp()).sum();
        sum += powers.ln() + most - row[*class];
        row.mapv_inplace(|v| (v - most).exp() / powers);
        row[*class] -= 1.0;
    }
    sum
}

/// 1 / (1 + exp(-z)), without overflow.
pub(super) fn sigmoid(z: f64) -> f64 {
    if z >= 0.0 {
        (1.0 + (-z).exp()).recip()
    } else {
        let e = z.exp();
        e / (1.0 + e)
    }
}

/// Exponentials by their sum, in place.
pub(super) fn softmax(row: &mut [f64]) {
    let most = row.iter().fold(f64::NEG_INFINITY, |m, v| m.max(*v));
    row.iter_mut().for_each(|v| *v = (*v - most).exp());
    let sum: f64 = row.iter().sum();
    row.iter_mut().for_each(|v| *v /= sum);
}
