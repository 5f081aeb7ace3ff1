//! Multinomial logistic regression; of two classes, the logistic regression of the second.

use ndarray::{Array1, Array2, ArrayView2, Axis};

use super::{
    Fitted, Layer,
    lbfgs::{Until, minimise},
    loss::losses,
    metric::Metric,
    unpacked,
};

/// Of the mean loss, in the metric of its curvature; scikit-learn stops at 1e-4 in that of the features. By `C` where that is above one: what
/// is minimised, in its own scale, is curved by the penalty alone where the classes come apart, and a slope says as much of the weights there.
const TOLERANCE: f64 = 1e-7;
const ITERATIONS: usize = 5000;
/// Rows at a time: what is read for the scores is still near when the slope wants it.
const BLOCK: usize = 64;

/// Minimises the sum of losses times `c`, plus half the square of the weights.
pub(super) fn fit(
    c: f64,
    x: ArrayView2<'_, f64>,
    of: &[usize],
    classes: usize,
    stop: &dyn Fn() -> bool,
) -> Fitted {
    let (rows, width) = x.dim();
    let outputs = if classes == 2 { 1 } else { classes };
    let share = (rows as f64).recip();
    let penalty = share / c;
    let metric = Metric::new(x, penalty);
    let objective = |p: &[f64], g: &mut [f64]| {
        let layer = metric.layer(unpacked(p, outputs, width));
        let (loss, mut slope) = slope(&layer, x, of);
        slope.weight *= share;
        slope.weight.scaled_add(penalty, &layer.weight);
        slope.bias *= share;
        let slope = metric.slope(slope);
        let (weights, biases) = g.split_at_mut(outputs * width);
        weights
            .iter_mut()
            .zip(&slope.weight)
            .for_each(|(g, s)| *g = *s);
        biases
            .iter_mut()
            .zip(&slope.bias)
            .for_each(|(g, s)| *g = *s);
        let penalised: f64 = layer.weight.iter().map(|w| w * w).sum();
        loss * share + penalty * penalised / 2.0
    };
    let until = Until {
        tolerance: TOLERANCE / c.max(1.0),
        iterations: ITERATIONS,
    };
    let found = minimise(objective, vec![0.0; outputs * (width + 1)], until, stop);
    Fitted {
        hidden: None,
        output: metric.layer(unpacked(&found.x, outputs, width)),
        iterations: found.iterations,
        converged: found.converged,
    }
}

/// The sum of losses, and its slope in weights and biases, in one reading of the rows.
fn slope(layer: &Layer, x: ArrayView2<'_, f64>, of: &[usize]) -> (f64, Layer) {
    let (outputs, width) = layer.weight.dim();
    let mut slope = Layer {
        weight: Array2::zeros((outputs, width)),
        bias: Array1::zeros(outputs),
    };
    let mut sum = 0.0;
    let blocks = x.axis_chunks_iter(Axis(0), BLOCK);
    for (block, of) in blocks.zip(of.chunks(BLOCK)) {
        if outputs == 1 {
            // By rows: products of a matrix and a vector, which the general product is slow at.
            let along = block.dot(&layer.weight.row(0)) + layer.bias[0];
            let mut scores = along.insert_axis(Axis(1));
            sum += losses(&mut scores, of);
            let mut total = slope.weight.row_mut(0);
            for (row, score) in block.outer_iter().zip(&scores) {
                total.scaled_add(*score, &row);
            }
            slope.bias[0] += scores.sum();
            continue;
        }
        let mut scores = layer.at(block);
        sum += losses(&mut scores, of);
        ndarray::linalg::general_mat_mul(1.0, &scores.t(), &block, 1.0, &mut slope.weight);
        slope.bias += &scores.sum_axis(Axis(0));
    }
    (sum, slope)
}

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;
    use crate::methods::attribute::draw::Draws;

    /// Features of very different scales, far from zero and close to each other, as hidden states are.
    #[test]
    fn where_it_ends_the_slope_of_scikit_learns_objective_is_nothing() {
        for (classes, width) in [(2, 12), (3, 12), (2, 90)] {
            let mut draws = Draws::new(11);
            let of: Vec<usize> = (0..80).map(|r| r % classes).collect();
            let mut x = Array2::from_shape_fn((80, width), |(r, j)| {
                let scale = 10f64.powi(i32::try_from(j % 4).unwrap() - 1);
                scale * (5.0 + draws.normal() + if j < 3 { of[r] as f64 } else { 0.0 })
            });
            let first = x.column(0).to_owned();
            x.slice_mut(s![.., 4]).scaled_add(3.0, &first);
            let found = fit(0.7, x.view(), &of, classes, &|| false);
            assert!(found.converged);
            let (_, slope) = slope(&found.output, x.view(), &of);
            let rest = slope.weight * 0.7 + &found.output.weight;
            let most = rest
                .iter()
                .chain(&slope.bias)
                .fold(0f64, |m, v| m.max(v.abs()));
            assert!(most < 2e-3, "{classes} classes, {width} features: {most}");
        }
    }

    /// Classes that a line tells apart, and hardly any penalty: weights grow far.
    #[test]
    fn a_weak_penalty_is_minimised_as_well() {
        for (classes, c) in [(2, 1e2), (2, 1e4), (5, 1e3), (5, 1e4)] {
            let mut draws = Draws::new(5);
            let of: Vec<usize> = (0..200).map(|r| r % classes).collect();
            let x = Array2::from_shape_fn((200, 30), |(r, j)| {
                let apart = if j == of[r] { 4.0 } else { 0.0 };
                3.0 + 0.5 * draws.normal() + apart
            });
            let found = fit(c, x.view(), &of, classes, &|| false);
            assert!(
                found.converged,
                "{classes} classes, C {c}: {}",
                found.iterations
            );
            // In the objective's own scale the weights are no farther from the least than this slope, for the penalty curves it by one.
            let (_, slope) = slope(&found.output, x.view(), &of);
            let rest = slope.weight * c + &found.output.weight;
            let off = rest.iter().map(|v| v * v).sum::<f64>().sqrt();
            let size = found
                .output
                .weight
                .iter()
                .map(|v| v * v)
                .sum::<f64>()
                .sqrt();
            assert!(
                off < 1e-3 * size,
                "{classes} classes, C {c}: {off} of {size}"
            );
        }
    }
}
