//! One hidden layer of ReLUs, on features of mean 0 and variance 1: some dimensions of hidden states are a hundred times larger than others,
//! and a descent in their own scales ends before it has begun. What comes out reads the features as they are.

use ndarray::{Array1, ArrayView2, Axis};

use super::{
    Fitted, Layer,
    lbfgs::{Until, minimise},
    loss::losses,
    unpacked,
};
use crate::methods::attribute::draw::Draws;

/// Of the greatest entry of the slope.
const TOLERANCE: f64 = 1e-4;
const ITERATIONS: usize = 500;

/// Means and inverse deviations of features; those that never differ stay at 0.
struct Scales {
    means: Array1<f64>,
    inverse: Array1<f64>,
}

impl Scales {
    fn of(x: ArrayView2<'_, f64>) -> Self {
        let share = (x.nrows().max(1) as f64).recip();
        let means = x.sum_axis(Axis(0)) * share;
        let columns = x.axis_iter(Axis(1)).zip(&means);
        let inverse = columns.map(|(column, mean)| {
            let variance = column.fold(0.0, |sum, v| sum + (v - mean) * (v - mean)) * share;
            if variance > 0.0 {
                variance.sqrt().recip()
            } else {
                0.0
            }
        });
        Self {
            inverse: inverse.collect(),
            means,
        }
    }

    /// A layer of the features from one of the scaled features.
    fn undone(&self, scaled: Layer) -> Layer {
        let weight = scaled.weight * &self.inverse;
        let bias = scaled.bias - weight.dot(&self.means);
        Layer { weight, bias }
    }
}

/// Minimises the mean loss from a start that the seed draws.
pub(super) fn fit(
    (hidden, alpha): (usize, f64),
    x: ArrayView2<'_, f64>,
    (of, classes): (&[usize], usize),
    seed: u64,
    stop: &dyn Fn() -> bool,
) -> Fitted {
    let (rows, width) = x.dim();
    let outputs = if classes == 2 { 1 } else { classes };
    let share = (rows as f64).recip();
    let scales = Scales::of(x);
    let scaled = (&x - &scales.means) * &scales.inverse;
    let x = scaled.view();
    let first = hidden * (width + 1);
    let mut draws = Draws::new(seed);
    // Glorot and Bengio 2010.
    let mut start = Vec::with_capacity(first + outputs * (hidden + 1));
    for (out, into) in [(hidden, width), (outputs, hidden)] {
        let bound = (6.0 / (out + into) as f64).sqrt();
        start.extend((0..out * into).map(|_| (2.0 * draws.uniform() - 1.0) * bound));
        start.extend(std::iter::repeat_n(0.0, out));
    }
    let objective = |p: &[f64], g: &mut [f64]| {
        let below = unpacked(&p[..first], hidden, width);
        let above = unpacked(&p[first..], outputs, hidden);
        let inner = below.at(x).mapv_into(|v| v.max(0.0));
        let mut scores = above.at(inner.view());
        let loss = losses(&mut scores, of) * share;
        let back = scores.dot(&above.weight);
        let back = ndarray::Zip::from(&back)
            .and(&inner)
            .map_collect(|b, v| if *v > 0.0 { *b } else { 0.0 });
        let mut penalised = 0.0;
        let mut at = 0;
        for (delta, below, layer) in [(&back, x, &below), (&scores, inner.view(), &above)] {
            let slope = delta.t().dot(&below);
            for (s, w) in slope.iter().zip(layer.weight.iter()) {
                g[at] = s * share + alpha * w;
                penalised += w * w;
                at += 1;
            }
            for s in delta.sum_axis(Axis(0)) {
                g[at] = s * share;
                at += 1;
            }
        }
        loss + alpha * penalised / 2.0
    };
    let until = Until {
        tolerance: TOLERANCE,
        iterations: ITERATIONS,
    };
    let found = minimise(objective, start, until, stop);
    Fitted {
        hidden: Some(scales.undone(unpacked(&found.x[..first], hidden, width))),
        output: unpacked(&found.x[first..], outputs, hidden),
        iterations: found.iterations,
        converged: found.converged,
    }
}
