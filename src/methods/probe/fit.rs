//! From vectors and labels to weights: every kind of probe. Arithmetic in double precision on the vectors as they came.
//!
//! ```text
//!   logistic          sum of losses times C + |W|^2 / 2, the bias not penalised       scikit-learn's `LogisticRegression`, L-BFGS
//!   ridge             |y - X w - b|^2 + alpha |w|^2, the bias not penalised           scikit-learn's `Ridge`
//!   mean difference   the mean of the second class minus that of the first, cut half way
//!   pca               the direction of greatest variance, towards the second class or greater numbers, cut half way between the means
//!   mlp               mean loss + alpha |W|^2 / 2 over a layer of ReLUs, L-BFGS from a seeded start
//! ```

use faer::{Mat, Side, linalg::solvers::Solve as _};
use ndarray::{Array1, Array2, ArrayView2, Axis};

use super::lbfgs::{Until, minimise};
use crate::methods::attribute::draw::Draws;

/// What is trained.
#[derive(Clone, Debug, PartialEq)]
pub enum How {
    /// Multinomial logistic regression.
    Logistic {
        /// Inverse strength of the penalty.
        c: f64,
        /// Choose C among these by folds; empty to take `c`.
        choices: Vec<f64>,
    },
    /// Ridge regression.
    Ridge {
        /// Strength of the penalty.
        alpha: f64,
    },
    /// Difference of means.
    MeanDifference,
    /// First principal component.
    Pca,
    /// One hidden layer.
    Mlp {
        /// Its width.
        hidden: usize,
        /// Strength of the penalty.
        alpha: f64,
    },
}

/// Labels of rows.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// Numbers of classes, and how many classes there are.
    Classes(Vec<usize>, usize),
    /// Numbers.
    Numbers(Vec<f64>),
}

impl Targets {
    /// How many rows.
    pub fn len(&self) -> usize {
        match self {
            Targets::Classes(of, _) => of.len(),
            Targets::Numbers(of) => of.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Of some rows.
    pub fn of(&self, rows: &[usize]) -> Self {
        match self {
            Targets::Classes(of, classes) => {
                Targets::Classes(rows.iter().map(|r| of[*r]).collect(), *classes)
            }
            Targets::Numbers(of) => Targets::Numbers(rows.iter().map(|r| of[*r]).collect()),
        }
    }
}

/// Weights, and how they came about.
#[derive(Clone, Debug, PartialEq)]
pub struct Fitted {
    /// The hidden layer of an MLP.
    pub hidden: Option<Layer>,
    /// One row for each class; one row for two classes (the score of the second) and for numbers.
    pub output: Layer,
    /// Steps of the optimiser; 0 where there is none.
    pub iterations: usize,
    /// Whether it converged.
    pub converged: bool,
}

/// `weight x + bias`
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// `[output, input]`
    pub weight: Array2<f64>,
    /// `[output]`
    pub bias: Array1<f64>,
}

impl Layer {
    fn at(&self, x: ArrayView2<'_, f64>) -> Array2<f64> {
        x.dot(&self.weight.t()) + &self.bias
    }
}

impl Fitted {
    /// Scores `[row, output]`.
    pub fn scores(&self, x: ArrayView2<'_, f64>) -> Array2<f64> {
        match &self.hidden {
            None => self.output.at(x),
            Some(hidden) => {
                let inner = hidden.at(x).mapv_into(|v| v.max(0.0));
                self.output.at(inner.view())
            }
        }
    }

    /// The class of each row.
    pub fn classes(&self, x: ArrayView2<'_, f64>) -> Vec<usize> {
        let scores = self.scores(x);
        let best = |row: ndarray::ArrayView1<'_, f64>| {
            if row.len() == 1 {
                return usize::from(row[0] > 0.0);
            }
            let greater = |(at, most): (usize, f64), (here, v): (usize, &f64)| {
                if *v > most { (here, *v) } else { (at, most) }
            };
            row.iter()
                .enumerate()
                .fold((0, f64::NEG_INFINITY), greater)
                .0
        };
        scores.outer_iter().map(best).collect()
    }

    /// Probabilities of the classes `[row, class]`, by a softmax of the scores.
    pub fn probabilities(&self, x: ArrayView2<'_, f64>) -> Array2<f64> {
        let scores = self.scores(x);
        if scores.ncols() == 1 {
            let mut both = Array2::zeros((scores.nrows(), 2));
            for (mut row, z) in both.outer_iter_mut().zip(scores.iter()) {
                row[1] = sigmoid(*z);
                row[0] = sigmoid(-*z);
            }
            return both;
        }
        let mut scores = scores;
        for mut row in scores.outer_iter_mut() {
            softmax(row.as_slice_mut().unwrap_or_default());
        }
        scores
    }
}

/// Fits one probe. `kind` must suit the targets; asked to stop, it ends early.
///
/// # Errors
/// What the targets lack: classes, rows.
pub fn fit(
    how: &How,
    x: ArrayView2<'_, f64>,
    targets: &Targets,
    seed: u64,
    stop: &dyn Fn() -> bool,
) -> Result<Fitted, String> {
    if let Targets::Classes(of, classes) = targets {
        let mut counts = vec![0usize; *classes];
        of.iter().for_each(|c| counts[*c] += 1);
        if counts.iter().filter(|n| **n > 0).count() < 2 {
            return Err("all examples that are trained on have the same class".to_owned());
        }
    }
    if targets.len() < 2 {
        return Err(format!("there are {} examples to train on", targets.len()));
    }
    match (how, targets) {
        (How::Logistic { c, .. }, Targets::Classes(of, classes)) => {
            Ok(logistic(*c, x, of, *classes, stop))
        }
        (How::Mlp { hidden, alpha }, Targets::Classes(of, classes)) => {
            Ok(mlp((*hidden, *alpha), x, (of, *classes), seed, stop))
        }
        (How::MeanDifference, Targets::Classes(of, 2)) => Ok(mean_difference(x, of)),
        (How::Pca, Targets::Classes(of, 2)) => {
            let values: Vec<f64> = of.iter().map(|c| *c as f64).collect();
            Ok(pca(x, &values, true))
        }
        (How::Pca, Targets::Numbers(values)) => Ok(pca(x, values, false)),
        (How::Ridge { alpha }, Targets::Numbers(values)) => ridge(*alpha, x, values),
        (How::MeanDifference | How::Pca, Targets::Classes(_, classes)) => Err(format!(
            "a single direction tells two classes apart, and there are {classes}: train logistic regression"
        )),
        (How::Ridge { .. }, Targets::Classes(..)) => {
            Err("ridge regression is for numbers, and these are classes".to_owned())
        }
        (How::Logistic { .. } | How::Mlp { .. } | How::MeanDifference, Targets::Numbers(_)) => Err(
            "this kind is for classes, and these are numbers: train ridge regression".to_owned(),
        ),
    }
}

/// Of the mean loss; scikit-learn stops at 1e-4.
const TOLERANCE: f64 = 1e-7;
const ITERATIONS: usize = 1000;

fn logistic(
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
    let objective = |p: &[f64], g: &mut [f64]| {
        let layer = unpacked(p, outputs, width);
        let mut scores = layer.at(x);
        let loss = losses(&mut scores, of) * share;
        let penalised: f64 = p[..outputs * width].iter().map(|w| w * w).sum();
        let slope = scores.t().dot(&x);
        for ((g, s), w) in g.iter_mut().zip(slope.iter()).zip(p) {
            *g = s * share + penalty * w;
        }
        for (g, s) in g[outputs * width..]
            .iter_mut()
            .zip(scores.sum_axis(Axis(0)))
        {
            *g = s * share;
        }
        loss + penalty * penalised / 2.0
    };
    let until = Until {
        tolerance: TOLERANCE,
        iterations: ITERATIONS,
    };
    let found = minimise(objective, vec![0.0; outputs * (width + 1)], until, stop);
    Fitted {
        hidden: None,
        output: unpacked(&found.x, outputs, width),
        iterations: found.iterations,
        converged: found.converged,
    }
}

fn unpacked(p: &[f64], outputs: usize, width: usize) -> Layer {
    let (weight, bias) = p.split_at(outputs * width);
    Layer {
        weight: Array2::from_shape_fn((outputs, width), |(i, j)| weight[i * width + j]),
        bias: Array1::from_vec(bias[..outputs].to_vec()),
    }
}

/// The sum of cross-entropies; scores become its gradient with respect to them.
fn losses(scores: &mut Array2<f64>, of: &[usize]) -> f64 {
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

fn sigmoid(z: f64) -> f64 {
    if z >= 0.0 {
        (1.0 + (-z).exp()).recip()
    } else {
        let e = z.exp();
        e / (1.0 + e)
    }
}

fn softmax(row: &mut [f64]) {
    let most = row.iter().fold(f64::NEG_INFINITY, |m, v| m.max(*v));
    row.iter_mut().for_each(|v| *v = (*v - most).exp());
    let sum: f64 = row.iter().sum();
    row.iter_mut().for_each(|v| *v /= sum);
}

fn ridge(alpha: f64, x: ArrayView2<'_, f64>, y: &[f64]) -> Result<Fitted, String> {
    let (centred, means) = centred(x);
    let mean = y.iter().sum::<f64>() / y.len() as f64;
    let y: Array1<f64> = y.iter().map(|v| v - mean).collect();
    let (rows, width) = centred.dim();
    // The smaller of the two systems that have the same solution.
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

fn mean_difference(x: ArrayView2<'_, f64>, of: &[usize]) -> Fitted {
    let [first, second] = means(x, of);
    let direction = &second - &first;
    let middle = (&second + &first) / 2.0;
    let bias = -direction.dot(&middle);
    direct(direction, bias)
}

fn pca(x: ArrayView2<'_, f64>, y: &[f64], classes: bool) -> Fitted {
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

fn mlp(
    (hidden, alpha): (usize, f64),
    x: ArrayView2<'_, f64>,
    (of, classes): (&[usize], usize),
    seed: u64,
    stop: &dyn Fn() -> bool,
) -> Fitted {
    let (rows, width) = x.dim();
    let outputs = if classes == 2 { 1 } else { classes };
    let share = (rows as f64).recip();
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
        tolerance: 1e-5,
        iterations: 200,
    };
    let found = minimise(objective, start, until, stop);
    Fitted {
        hidden: Some(unpacked(&found.x[..first], hidden, width)),
        output: unpacked(&found.x[first..], outputs, hidden),
        iterations: found.iterations,
        converged: found.converged,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn never() -> bool {
        false
    }

    /// Rows around two centres, `apart` along the first axis.
    fn blobs(rows: usize, width: usize, apart: f64, seed: u64) -> (Array2<f64>, Vec<usize>) {
        let mut draws = Draws::new(seed);
        let of: Vec<usize> = (0..rows).map(|r| r % 2).collect();
        let x = Array2::from_shape_fn((rows, width), |(r, j)| {
            draws.normal() + if j == 0 { apart * of[r] as f64 } else { 0.0 }
        });
        (x, of)
    }

    #[test]
    fn every_kind_finds_the_planted_direction() {
        let (x, of) = blobs(400, 6, 6.0, 3);
        for how in [
            How::Logistic {
                c: 1.0,
                choices: Vec::new(),
            },
            How::MeanDifference,
            How::Pca,
            How::Mlp {
                hidden: 8,
                alpha: 1e-4,
            },
        ] {
            let found = fit(&how, x.view(), &Targets::Classes(of.clone(), 2), 1, &never).unwrap();
            let right = found.classes(x.view());
            let right = right.iter().zip(&of).filter(|(a, b)| a == b).count();
            assert!(right > 390, "{how:?}: {right} of 400");
            if found.hidden.is_none() {
                let w = found.output.weight.row(0);
                assert!(w[0] / w.dot(&w).sqrt() > 0.9, "{how:?}: {w}");
            }
        }
    }

    #[test]
    fn ridge_is_the_same_by_both_systems_and_fits_a_line() {
        let mut draws = Draws::new(5);
        let x = Array2::from_shape_fn((5, 9), |_| draws.normal());
        let y: Vec<f64> = x.outer_iter().map(|r| 2.0 * r[0] + 1.0).collect();
        let wide = fit(
            &How::Ridge { alpha: 0.5 },
            x.view(),
            &Targets::Numbers(y.clone()),
            0,
            &never,
        )
        .unwrap();
        // The normal equations of the same, by hand: (X'X + a I) w = X' y about the means.
        let (centred, _) = centred(x.view());
        let mean = y.iter().sum::<f64>() / 5.0;
        let residual: Array1<f64> = y.iter().map(|v| v - mean).collect();
        let w = wide.output.weight.row(0).to_owned();
        let left = centred.t().dot(&centred.dot(&w)) + &w * 0.5;
        let right = centred.t().dot(&residual);
        assert!((&left - &right).iter().all(|v| v.abs() < 1e-9));
    }

    #[test]
    fn what_cannot_be_fitted_says_why() {
        let x = Array2::zeros((4, 2));
        let logistic = How::Logistic {
            c: 1.0,
            choices: Vec::new(),
        };
        for (how, targets, part) in [
            (&logistic, Targets::Classes(vec![1; 4], 3), "same class"),
            (
                &logistic,
                Targets::Numbers(vec![0.0; 4]),
                "these are numbers",
            ),
            (
                &How::Pca,
                Targets::Classes(vec![0, 1, 2, 0], 3),
                "there are 3",
            ),
            (
                &How::Ridge { alpha: 1.0 },
                Targets::Classes(vec![0, 1, 0, 1], 2),
                "these are classes",
            ),
        ] {
            let error = fit(how, x.view(), &targets, 0, &never).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
