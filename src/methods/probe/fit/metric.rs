//! Other coordinates for weights, in which a bowl that is long and narrow becomes round.
//!
//! Hidden states are far from zero, some dimensions are a hundred times larger than others, and many go together: descent in their own
//! coordinates takes thousands of steps. The curvature of the logistic loss is nowhere more than `X'X / 4` (Böhning and Lindsay 1988), so
//! descent goes in the coordinates in which that bound, with the penalty, is the identity. What is minimised stays the same.

use faer::{Mat, Par, Side, linalg::triangular_solve::solve_lower_triangular_in_place};
use ndarray::{Array1, Array2, ArrayView2, Axis};

use super::Layer;

/// Coordinates about the mean of the rows.
#[derive(Debug)]
pub(super) struct Metric {
    means: Array1<f64>,
    onto: Onto,
}

/// From coordinates to weights.
#[derive(Debug)]
enum Onto {
    /// Rows of weights are rows of coordinates times this.
    Matrix(Array2<f64>),
    /// Each weight is its coordinate times this.
    Scales(Array1<f64>),
}

impl Metric {
    /// Of rows and a penalty. With fewer rows than dimensions, only the scales of the dimensions are made alike.
    pub fn new(x: ArrayView2<'_, f64>, penalty: f64) -> Self {
        let (rows, width) = x.dim();
        let share = (rows as f64).recip();
        let means = x.sum_axis(Axis(0)) * share;
        let whole = (rows >= width).then(|| whole(x, &means, penalty)).flatten();
        let onto = whole.map_or_else(
            || {
                let variances = x.axis_iter(Axis(1)).zip(&means).map(|(column, mean)| {
                    column.fold(0.0, |sum, v| sum + (v - mean) * (v - mean)) * share
                });
                Onto::Scales(
                    variances
                        .map(|v| (v / 4.0 + penalty).sqrt().recip())
                        .collect(),
                )
            },
            Onto::Matrix,
        );
        Self { means, onto }
    }

    /// From coordinates to weights of the features.
    pub fn layer(&self, coordinates: Layer) -> Layer {
        let weight = match &self.onto {
            Onto::Matrix(onto) => coordinates.weight.dot(onto),
            Onto::Scales(scales) => coordinates.weight * scales,
        };
        let bias = coordinates.bias - weight.dot(&self.means);
        Layer { weight, bias }
    }

    /// From a slope in the weights of the features to one in coordinates.
    pub fn slope(&self, slope: Layer) -> Layer {
        let Layer { mut weight, bias } = slope;
        for (mut row, bias) in weight.outer_iter_mut().zip(&bias) {
            row.scaled_add(-bias, &self.means);
        }
        let weight = match &self.onto {
            Onto::Matrix(onto) => weight.dot(&onto.t()),
            Onto::Scales(scales) => weight * scales,
        };
        Layer { weight, bias }
    }
}

/// The inverse of the root of the curvature's bound; `None` where rounding, or a value that is not finite, leaves it no root.
fn whole(x: ArrayView2<'_, f64>, means: &Array1<f64>, penalty: f64) -> Option<Array2<f64>> {
    let (rows, width) = x.dim();
    let gram = x.t().dot(&x) / rows as f64;
    let curvature = Mat::from_fn(width, width, |i, j| {
        let about = (gram[[i, j]] - means[i] * means[j]) / 4.0;
        if i == j { about + penalty } else { about }
    });
    let root = curvature.llt(Side::Lower).ok()?;
    let mut inverse = Mat::identity(width, width);
    solve_lower_triangular_in_place(root.L(), inverse.as_mut(), Par::Seq);
    Some(Array2::from_shape_fn((width, width), |(i, j)| {
        inverse[(i, j)]
    }))
}
