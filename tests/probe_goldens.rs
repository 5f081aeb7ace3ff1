//! Probes against scikit-learn, on the same vectors and the same split. What each array holds is in `tests/fixtures/make/probes.py`.

#[path = "support/arrays.rs"]
mod arrays;

use std::collections::BTreeMap;

use introspectd::methods::probe::{
    fit::{Fitted, How, Targets, fit},
    judge::{Judgement, Rows, judge},
    split::Split,
};
use ndarray::{Array1, Array2, ArrayD, Axis, Ix1, Ix2, s};

/// Coefficients by another optimiser, relative to the greatest.
const COEFFICIENTS: f64 = 1e-3;
/// The same closed form.
const CLOSE: f64 = 1e-5;
/// Rows that are trained on.
const TRAIN: usize = 200;

struct Golden(BTreeMap<String, ArrayD<f64>>);

impl Golden {
    fn read() -> Self {
        Self(arrays::read("probes/scikit.npz"))
    }

    fn matrix(&self, name: &str) -> Array2<f64> {
        self.0[name].clone().into_dimensionality::<Ix2>().unwrap()
    }

    fn vector(&self, name: &str) -> Array1<f64> {
        self.0[name].clone().into_dimensionality::<Ix1>().unwrap()
    }

    fn number(&self, name: &str) -> f64 {
        self.vector(name)[0]
    }

    fn classes(&self, name: &str) -> Vec<usize> {
        self.vector(name).iter().map(|v| *v as usize).collect()
    }
}

fn off(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let greatest = expected
        .iter()
        .fold(f64::MIN_POSITIVE, |m, v| m.max(v.abs()));
    let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    apart.fold(0.0, f64::max) / greatest
}

fn never() -> bool {
    false
}

fn fitted(how: &How, x: &Array2<f64>, targets: &Targets) -> Fitted {
    fit(how, x.view(), targets, 0, &never).unwrap()
}

const LOGISTIC: How = How::Logistic {
    c: 1.0,
    choices: Vec::new(),
};

#[test]
fn logistic_regression_is_that_of_scikit_learn() {
    let golden = Golden::read();
    for name in ["dense2", "separable2", "dense5", "separable5"] {
        let x = golden.matrix(&format!("{name}_x"));
        let of = golden.classes(&format!("{name}_y"));
        let classes = of.iter().max().unwrap() + 1;
        let targets = Targets::Classes(of, classes);
        let all: Vec<usize> = (0..x.nrows()).collect();
        let split = Split::said(&all[..TRAIN], &all[TRAIN..], &all, 0);
        let types: Vec<u64> = (0..x.nrows() as u64).collect();
        let (report, found) = judge(
            &LOGISTIC,
            &Rows {
                train: x.select(Axis(0), &split.train),
                test: x.select(Axis(0), &split.test),
            },
            (&targets, &types),
            &split,
            Judgement::default(),
            &never,
        )
        .unwrap();
        assert!(report.converged, "{name}: {report:?}");
        let weight: Vec<f64> = found.output.weight.iter().copied().collect();
        let coefficients: Vec<f64> = golden
            .matrix(&format!("{name}_coef"))
            .iter()
            .copied()
            .collect();
        let worst = off(&weight, &coefficients);
        let bias = off(
            &found.output.bias.to_vec(),
            &golden.vector(&format!("{name}_intercept")).to_vec(),
        );
        println!(
            "{name}: {worst:.1e} {bias:.1e}, {} steps",
            report.iterations
        );
        assert!(
            worst < COEFFICIENTS && bias < COEFFICIENTS,
            "{name}: {worst} {bias}"
        );
        let held = x.slice(s![TRAIN.., ..]);
        let probabilities = found.probabilities(held);
        let expected = golden.matrix(&format!("{name}_probabilities"));
        let apart = (&probabilities - &expected)
            .iter()
            .fold(0.0f64, |m, v| m.max(v.abs()));
        assert!(apart < COEFFICIENTS, "{name}: {apart}");
        let metrics = report.classes.unwrap();
        for (measure, found) in [("accuracy", metrics.accuracy), ("f1", metrics.macro_f1)] {
            let expected = golden.number(&format!("{name}_{measure}"));
            assert!(
                (found - expected).abs() < CLOSE,
                "{name} {measure}: {found}, not {expected}"
            );
        }
        let counts = golden.matrix(&format!("{name}_confusion"));
        let found: Vec<f64> = metrics.confusion.iter().map(|c| *c as f64).collect();
        assert_eq!(found, counts.iter().copied().collect::<Vec<_>>(), "{name}");
        if classes == 2 {
            let expected = golden.number(&format!("{name}_auc"));
            assert!((metrics.auc.unwrap() - expected).abs() < CLOSE, "{name}");
        }
    }
}

/// Of classes that come apart, and others, where hardly anything keeps weights from growing.
#[test]
fn a_weak_penalty_gives_the_weights_of_newtons_method() {
    let golden = Golden::read();
    let weak = How::Logistic {
        c: 1e4,
        choices: Vec::new(),
    };
    for name in ["dense2", "separable2", "dense5", "separable5"] {
        let x = golden
            .matrix(&format!("{name}_x"))
            .slice(s![..TRAIN, ..])
            .to_owned();
        let of = golden.classes(&format!("{name}_y"));
        let classes = of.iter().max().unwrap() + 1;
        let found = fitted(&weak, &x, &Targets::Classes(of[..TRAIN].to_vec(), classes));
        assert!(found.converged, "{name}: {} steps", found.iterations);
        let weight: Vec<f64> = found.output.weight.iter().copied().collect();
        let expected = golden.matrix(&format!("{name}_weak_coef"));
        let worst = off(&weight, &expected.iter().copied().collect::<Vec<_>>());
        let expected = golden.vector(&format!("{name}_weak_intercept")).to_vec();
        let bias = off(&found.output.bias.to_vec(), &expected);
        assert!(
            worst < COEFFICIENTS && bias < COEFFICIENTS,
            "{name}: {worst} {bias}"
        );
    }
}

#[test]
fn closed_forms_are_those_of_scikit_learn() {
    let golden = Golden::read();
    let x = golden.matrix("dense2_x").slice(s![..TRAIN, ..]).to_owned();
    let of: Vec<usize> = golden.classes("dense2_y")[..TRAIN].to_vec();
    let classes = Targets::Classes(of.clone(), 2);
    let direction = |how| {
        let found = fitted(&how, &x, &classes);
        found.output.weight.index_axis(Axis(0), 0).to_vec()
    };
    let means = off(
        &direction(How::MeanDifference),
        &golden.vector("means").to_vec(),
    );
    assert!(means < CLOSE, "{means}");
    // The sign of a principal component is anybody's choice; ours is towards the second class.
    let (found, expected) = (direction(How::Pca), golden.vector("pca").to_vec());
    let along: f64 = found.iter().zip(&expected).map(|(a, b)| a * b).sum();
    let turned: Vec<f64> = expected.iter().map(|v| v * along.signum()).collect();
    assert!(off(&found, &turned) < CLOSE);
    let towards: f64 = x
        .outer_iter()
        .zip(&of)
        .map(|(row, c)| row.dot(&Array1::from_vec(found.clone())) * (*c as f64 - 0.5))
        .sum();
    assert!(towards > 0.0);

    let numbers = golden.vector("numbers").to_vec();
    for (name, rows) in [("ridge", TRAIN), ("ridge_wide", 8)] {
        let part = x.slice(s![..rows, ..]).to_owned();
        let targets = Targets::Numbers(numbers[..rows].to_vec());
        let found = fitted(&How::Ridge { alpha: 1.0 }, &part, &targets);
        let weight = found.output.weight.index_axis(Axis(0), 0).to_vec();
        let worst = off(&weight, &golden.vector(&format!("{name}_coef")).to_vec());
        assert!(worst < CLOSE, "{name}: {worst}");
        let bias = golden.number(&format!("{name}_intercept"));
        assert!((found.output.bias[0] - bias).abs() < CLOSE, "{name}");
    }
}
