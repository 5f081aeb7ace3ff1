//! From vectors and labels to weights: every kind of probe. Arithmetic in double precision on the vectors as they came.
//!
//! ```text
//!   logistic          sum of losses times C + |W|^2 / 2, the bias not penalised       scikit-learn's `LogisticRegression`, L-BFGS
//!   ridge             |y - X w - b|^2 + alpha |w|^2, the bias not penalised           scikit-learn's `Ridge`
//!   mean difference   the mean of the second class minus that of the first, cut half way
//!   pca               the direction of greatest variance, towards the second class or greater numbers, cut half way between the means
//!   mlp               mean loss + alpha |W|^2 / 2 over a layer of ReLUs, of features that are made alike, L-BFGS from a seeded start
//! ```

mod lbfgs;
mod linear;
mod logistic;
mod loss;
mod metric;
mod mlp;

use ndarray::{Array1, Array2, ArrayView2};

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

impl How {
    /// Whether a softmax of its scores means anything.
    pub fn gives_probabilities(&self) -> bool {
        match self {
            How::Logistic { .. } | How::Mlp { .. } => true,
            How::Ridge { .. } | How::MeanDifference | How::Pca => false,
        }
    }

    /// Bytes that fitting and judging takes for so many rows: the rows in double precision, scores, what a kind copies or multiplies out,
    /// and what the optimiser remembers.
    pub fn bytes(&self, rows: usize, width: usize, outputs: usize) -> usize {
        let times = |a: usize, b: usize| a.saturating_mul(b);
        let remembered = |parameters| times(lbfgs::VECTORS, parameters);
        // With folds, rows are copied apart; ridge regression, PCA and MLPs change a copy.
        let (of_a_row, square, optimiser) = match self {
            How::Logistic { choices, .. } => {
                let copies = if choices.is_empty() { 1 } else { 2 };
                let remembered = remembered(times(outputs, width + 1));
                (times(copies, width), width.min(rows), remembered)
            }
            How::Ridge { .. } | How::Pca => (2 * width, width.min(rows), 0),
            How::MeanDifference => (width, 0, 0),
            How::Mlp { hidden, .. } => {
                let parameters = times(*hidden, width + outputs + 1).saturating_add(outputs);
                (2 * width + 4 * hidden, 0, remembered(parameters))
            }
        };
        let numbers = times(of_a_row.saturating_add(outputs), rows)
            .saturating_add(3 * square * square)
            .saturating_add(optimiser);
        times(numbers, size_of::<f64>())
    }
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
    /// Of each row of `x`.
    fn at(&self, x: ArrayView2<'_, f64>) -> Array2<f64> {
        x.dot(&self.weight.t()) + &self.bias
    }
}

impl Fitted {
    /// The same with weights as they are stored: in single precision.
    #[must_use]
    pub fn rounded(mut self) -> Self {
        for layer in self.hidden.iter_mut().chain([&mut self.output]) {
            #[allow(clippy::cast_possible_truncation)] // what it is about
            let single = |v: f64| f64::from(v as f32);
            layer.weight.mapv_inplace(single);
            layer.bias.mapv_inplace(single);
        }
        self
    }

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
                row[1] = loss::sigmoid(*z);
                row[0] = loss::sigmoid(-*z);
            }
            return both;
        }
        let mut scores = scores;
        for mut row in scores.outer_iter_mut() {
            loss::softmax(row.as_slice_mut().unwrap_or_default());
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
            Ok(logistic::fit(*c, x, of, *classes, stop))
        }
        (How::Mlp { hidden, alpha }, Targets::Classes(of, classes)) => {
            Ok(mlp::fit((*hidden, *alpha), x, (of, *classes), seed, stop))
        }
        (How::MeanDifference, Targets::Classes(of, 2)) => Ok(linear::mean_difference(x, of)),
        (How::Pca, Targets::Classes(of, 2)) => {
            let values: Vec<f64> = of.iter().map(|c| *c as f64).collect();
            Ok(linear::pca(x, &values, true))
        }
        (How::Pca, Targets::Numbers(values)) => Ok(linear::pca(x, values, false)),
        (How::Ridge { alpha }, Targets::Numbers(values)) => linear::ridge(*alpha, x, values),
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

fn unpacked(p: &[f64], outputs: usize, width: usize) -> Layer {
    let (weight, bias) = p.split_at(outputs * width);
    Layer {
        weight: Array2::from_shape_fn((outputs, width), |(i, j)| weight[i * width + j]),
        bias: Array1::from_vec(bias[..outputs].to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::attribute::draw::Draws;

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

    fn apart(a: &Fitted, b: &Fitted) -> f64 {
        let numbers = |f: &Fitted| {
            f.output
                .weight
                .iter()
                .chain(&f.output.bias)
                .copied()
                .collect()
        };
        let (a, b): (Vec<f64>, Vec<f64>) = (numbers(a), numbers(b));
        a.iter()
            .zip(&b)
            .fold(0f64, |m, (a, b)| m.max((a - b).abs()))
    }

    proptest::proptest! {
        #![proptest_config(proptest::test_runner::Config::with_cases(24))]

        #[test]
        fn the_order_of_rows_changes_nothing(seed in 0u64..1000, width in 2usize..40) {
            let (x, of) = blobs(60, width, 1.0, seed);
            let order = Draws::new(seed).permutation(60);
            let shuffled = x.select(ndarray::Axis(0), &order);
            for how in [
                How::Logistic { c: 1.0, choices: Vec::new() },
                How::MeanDifference,
                How::Pca,
            ] {
                let targets = Targets::Classes(of.clone(), 2);
                let one = fit(&how, x.view(), &targets, 0, &never).unwrap();
                let other = fit(&how, shuffled.view(), &targets.of(&order), 0, &never).unwrap();
                proptest::prop_assert!(apart(&one, &other) < 1e-4, "{how:?}: {}", apart(&one, &other));
            }
        }

        #[test]
        fn rows_said_so_often_weigh_as_much_as_a_larger_c(seed in 0u64..1000, times in 2usize..5, c in 0.01f64..10.0) {
            let (x, of) = blobs(40, 6, 1.0, seed);
            let rows: Vec<usize> = (0..40 * times).map(|r| r % 40).collect();
            let often = x.select(ndarray::Axis(0), &rows);
            let targets = Targets::Classes(of, 2);
            let said = |c: f64| How::Logistic { c, choices: Vec::new() };
            let one = fit(&said(c * times as f64), x.view(), &targets, 0, &never).unwrap();
            let other = fit(&said(c), often.view(), &targets.of(&rows), 0, &never).unwrap();
            proptest::prop_assert!(apart(&one, &other) < 1e-4, "{}", apart(&one, &other));
        }
    }

    #[test]
    fn what_a_fit_takes_grows_with_its_rows_and_with_its_copies() {
        let logistic = How::Logistic {
            c: 1.0,
            choices: Vec::new(),
        };
        let optimiser = lbfgs::VECTORS * 2 * 11;
        assert_eq!(
            logistic.bytes(1000, 10, 2),
            8 * (1000 * 12 + 3 * 100 + optimiser)
        );
        let mlp = How::Mlp {
            hidden: 4096,
            alpha: 1e-4,
        };
        assert!(
            mlp.bytes(10, 384, 2) > 20 * 8 * 4096 * 384,
            "what is remembered of many weights"
        );
        let ridge = How::Ridge { alpha: 1.0 };
        assert!(ridge.bytes(1000, 10, 1) > 2 * 8 * 1000 * 10);
        assert!(
            How::MeanDifference.bytes(usize::MAX, 10, 2) >= usize::MAX / 2,
            "it does not wrap"
        );
        // The 100,000 examples of MiniLM that a gibibyte has to hold.
        assert!(logistic.bytes(100_000, 384, 2) < 1 << 30);
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
