//! Fits a probe and judges it: on rows that it did not see, against what a probe finds where there is nothing to find.
//!
//! - *Selectivity* (Hewitt and Liang 2019): accuracy less that on a control task, in which every type of row (a text, a token of the
//!   vocabulary) has a label of its own, drawn from the labels that there are. A probe that does well there learns by heart.
//! - *Codelength* (Voita and Titov 2020), online: the bits that it takes to send the labels, block by block, each with a probe that was
//!   trained on the blocks before, the first by chance. *Compression* is how much shorter that is than by chance alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use ndarray::{Array2, ArrayView2, Axis, s};

use super::{
    card::{ClassMetrics, NumberMetrics, Report},
    fit::{Fitted, How, Targets, fit},
    metrics,
    split::Split,
};
use crate::methods::attribute::draw::Draws;

/// Where the blocks of the online code end, as parts of the rows.
const BLOCKS: [f64; 11] = [
    0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0,
];
/// Parts of the training rows of a learning curve.
const CURVE: [f64; 6] = [0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0];
/// Most classes whose confusion is told: it grows with their square, and a description has a limit.
const MOST_CONFUSED: usize = 128;
/// Folds of a cross-validation.
const FOLDS: usize = 5;

/// The rows of a [`Split`], in its order.
#[derive(Clone, Debug)]
pub struct Rows {
    /// `[row, width]`
    pub train: Array2<f64>,
    /// `[row, width]`
    pub test: Array2<f64>,
}

/// What is judged beside the probe itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// The control task.
    pub control: bool,
    /// The online code.
    pub codelength: bool,
    /// The learning curve.
    pub learning_curve: bool,
    /// Where draws begin.
    pub seed: u64,
}

/// Fits and judges. `types` says for each row what it is of.
///
/// # Errors
/// Those of [`fit`], and that there is nothing to judge by.
pub fn judge(
    how: &How,
    Rows { train, test }: &Rows,
    (targets, types): (&Targets, &[u64]),
    split: &Split,
    judgement: Judgement,
    stop: &dyn Fn() -> bool,
) -> Result<(Report, Fitted), String> {
    let begun = Instant::now();
    if split.test.is_empty() {
        return Err("there is no example to judge by: give more, or say which".to_owned());
    }
    let seed = judgement.seed;
    let (known, asked) = (targets.of(&split.train), targets.of(&split.test));
    let (how, chosen_c) = chosen(how, train.view(), (&known, split), seed, stop)?;
    // What is stored is judged, not what it was rounded from.
    let fitted = fit(&how, train.view(), &known, seed, stop)?.rounded();
    let mut report = Report {
        iterations: fitted.iterations,
        converged: fitted.converged,
        chosen_c,
        ..Report::default()
    };
    let control = || -> Result<Fitted, String> {
        let drawn = controlled(targets, types, seed);
        fit(&how, train.view(), &drawn.of(&split.train), seed, stop)
    };
    match (&known, &asked) {
        (Targets::Classes(known, classes), Targets::Classes(asked, _)) => {
            let classes = *classes;
            let said = fitted.classes(test.view());
            let (accuracy_low, accuracy_high) =
                metrics::bootstrap(&said, asked, split.test_ends(), seed);
            let confusion = metrics::confusion(&said, asked, classes);
            let mut found = ClassMetrics {
                accuracy: metrics::accuracy(&said, asked),
                accuracy_low,
                accuracy_high,
                macro_f1: metrics::macro_f1(&confusion, classes),
                majority: majority(known, asked, classes),
                calibration_error: how
                    .gives_probabilities()
                    .then(|| metrics::calibration_error(&fitted.probabilities(test.view()), asked)),
                confusion: if classes > MOST_CONFUSED {
                    Vec::new()
                } else {
                    confusion
                },
                train_accuracy: metrics::accuracy(&fitted.classes(train.view()), known),
                ..ClassMetrics::default()
            };
            if classes == 2 {
                let scores = fitted.scores(test.view());
                found.auc = metrics::auc(&scores.column(0).to_vec(), asked);
            }
            if judgement.control {
                match control() {
                    Ok(fitted) => {
                        let of = controlled(targets, types, seed).of(&split.test);
                        if let Targets::Classes(of, _) = of {
                            let right = metrics::accuracy(&fitted.classes(test.view()), &of);
                            found.control_accuracy = Some(right);
                            found.selectivity = Some(found.accuracy - right);
                        }
                    }
                    Err(why) => report.notes.push(format!("no control task: {why}")),
                }
            }
            if judgement.codelength && !how.gives_probabilities() {
                report.notes.push(
                    "no codelength: this kind gives no probabilities, which a code needs"
                        .to_owned(),
                );
            } else if judgement.codelength {
                let of = (&known[..], classes, split);
                let (bits, uniform) = codelength(&how, train.view(), of, seed, stop);
                found.codelength_bits = Some(bits);
                found.compression = Some(uniform / bits.max(f64::MIN_POSITIVE));
            }
            if judgement.learning_curve {
                let right = |f: &Fitted| metrics::accuracy(&f.classes(test.view()), asked);
                let known = Targets::Classes(known.clone(), classes);
                found.learning_curve =
                    curve(&how, (train.view(), &known, split), right, seed, stop);
            }
            report.classes = Some(found);
        }
        (Targets::Numbers(known), Targets::Numbers(asked)) => {
            // As scores are told: in single precision.
            #[allow(clippy::cast_possible_truncation)]
            let told = |score: &f64| f64::from(*score as f32);
            let numbers = |f: &Fitted, x: &Array2<f64>| {
                let scores = f.scores(x.view());
                scores.column(0).iter().map(told).collect::<Vec<f64>>()
            };
            let (r_squared, mean_squared_error, spearman) =
                metrics::of_numbers(&numbers(&fitted, test), asked);
            let mut found = NumberMetrics {
                r_squared,
                mean_squared_error,
                spearman,
                train_r_squared: metrics::of_numbers(&numbers(&fitted, train), known).0,
                ..NumberMetrics::default()
            };
            (found.r_squared_low, found.r_squared_high) =
                metrics::bootstrap_numbers(&numbers(&fitted, test), asked, split.test_ends(), seed);
            if judgement.control {
                let fitted = control()?;
                if let Targets::Numbers(of) = controlled(targets, types, seed).of(&split.test) {
                    let right = metrics::of_numbers(&numbers(&fitted, test), &of).0;
                    found.control_r_squared = Some(right);
                    // Worse than the mean is no less of nothing than the mean.
                    found.selectivity = Some(r_squared - right.max(0.0));
                }
            }
            if judgement.codelength {
                let note = "no codelength: numbers have none, classes do";
                report.notes.push(note.to_owned());
            }
            if judgement.learning_curve {
                let right = |f: &Fitted| metrics::of_numbers(&numbers(f, test), asked).0;
                let known = Targets::Numbers(known.clone());
                found.learning_curve =
                    curve(&how, (train.view(), &known, split), right, seed, stop);
            }
            report.numbers = Some(found);
        }
        (Targets::Classes(..), Targets::Numbers(_))
        | (Targets::Numbers(_), Targets::Classes(..)) => {
            return Err("labels are of two kinds".to_owned());
        }
    }
    if !report.converged {
        report.notes.push(format!(
            "the optimiser made {} steps and did not converge",
            report.iterations
        ));
    }
    report.seconds = begun.elapsed().as_secs_f64();
    Ok((report, fitted))
}

/// Accuracy of saying the class that is commonest among what was trained on.
fn majority(known: &[usize], asked: &[usize], classes: usize) -> f64 {
    let mut counts = vec![0; classes];
    known.iter().for_each(|c| counts[*c] += 1);
    let most = (0..classes).rev().max_by_key(|c| counts[*c]).unwrap_or(0);
    metrics::accuracy(&vec![most; asked.len()], asked)
}

/// A label for each type, drawn from those that there are.
fn controlled(targets: &Targets, types: &[u64], seed: u64) -> Targets {
    let kinds: BTreeSet<u64> = types.iter().copied().collect();
    let mut draws = Draws::new(seed ^ 0x5eed_c0de);
    // In the order of their values, so that the order of examples changes nothing.
    let drawn: BTreeMap<u64, usize> = kinds
        .into_iter()
        .map(|kind| (kind, draws.below(targets.len())))
        .collect();
    let rows: Vec<usize> = types.iter().map(|t| drawn[t]).collect();
    match targets {
        Targets::Classes(of, classes) => {
            let mut sorted = of.clone();
            sorted.sort_unstable();
            Targets::Classes(rows.iter().map(|r| sorted[*r]).collect(), *classes)
        }
        Targets::Numbers(of) => {
            let mut sorted = of.clone();
            sorted.sort_by(f64::total_cmp);
            Targets::Numbers(rows.iter().map(|r| sorted[*r]).collect())
        }
    }
}

/// The C with the best accuracy over folds of the training rows, the smallest of equal ones. Folds that leave a single class to train on
/// say nothing.
fn chosen(
    how: &How,
    train: ArrayView2<'_, f64>,
    (known, split): (&Targets, &Split),
    seed: u64,
    stop: &dyn Fn() -> bool,
) -> Result<(How, Option<f64>), String> {
    let How::Logistic { choices, .. } = how else {
        return Ok((how.clone(), None));
    };
    let Targets::Classes(of, _) = known else {
        return Ok((how.clone(), None));
    };
    if choices.is_empty() {
        return Ok((how.clone(), None));
    }
    let folds = split.folds(known, FOLDS);
    let mut choices = choices.clone();
    choices.sort_by(f64::total_cmp);
    let mut best = (f64::NEG_INFINITY, 1.0);
    let mut fitted = false;
    for c in choices {
        let one = How::Logistic {
            c,
            choices: Vec::new(),
        };
        let mut sum = 0.0;
        for held in &folds {
            let rest: Vec<usize> = (0..of.len()).filter(|row| !held.contains(row)).collect();
            let held: Vec<usize> = held.iter().copied().collect();
            let x = train.select(Axis(0), &rest);
            let Ok(found) = fit(&one, x.view(), &known.of(&rest), seed, stop) else {
                continue;
            };
            fitted = true;
            let said = found.classes(train.select(Axis(0), &held).view());
            let held: Vec<usize> = held.iter().map(|row| of[*row]).collect();
            sum += metrics::accuracy(&said, &held);
        }
        if sum > best.0 {
            best = (sum, c);
        }
    }
    if !fitted {
        return Err(format!(
            "are too few to choose C among {FOLDS} folds: each fold leaves one class to train on"
        ));
    }
    Ok((
        How::Logistic {
            c: best.1,
            choices: Vec::new(),
        },
        Some(best.1),
    ))
}

/// Bits of the online code, and by chance.
fn codelength(
    how: &How,
    train: ArrayView2<'_, f64>,
    (known, classes, split): (&[usize], usize, &Split),
    seed: u64,
    stop: &dyn Fn() -> bool,
) -> (f64, f64) {
    let chance = (classes as f64).log2();
    let ends = ends(known.len(), &BLOCKS, split);
    let mut bits = ends[0] as f64 * chance;
    for pair in ends.windows(2) {
        let (before, block) = (pair[0], &known[pair[0]..pair[1]]);
        let seen = Targets::Classes(known[..before].to_vec(), classes);
        // Before there are two classes, chance is all that there is.
        let Ok(fitted) = fit(how, train.slice(s![..before, ..]), &seen, seed, stop) else {
            bits += block.len() as f64 * chance;
            continue;
        };
        let probabilities = fitted.probabilities(train.slice(s![pair[0]..pair[1], ..]));
        for (row, class) in probabilities.outer_iter().zip(block) {
            bits -= row[*class].max(f64::MIN_POSITIVE).log2();
        }
    }
    (bits, known.len() as f64 * chance)
}

/// How right a probe is that was trained on a part of the rows, by how many they are. Parts of which none can be trained are left out.
fn curve(
    how: &How,
    (train, known, split): (ArrayView2<'_, f64>, &Targets, &Split),
    right: impl Fn(&Fitted) -> f64,
    seed: u64,
    stop: &dyn Fn() -> bool,
) -> Vec<(u64, f64)> {
    let sizes = ends(known.len(), &CURVE, split);
    sizes
        .into_iter()
        .filter_map(|rows| {
            let of = known.of(&(0..rows).collect::<Vec<_>>());
            let fitted = fit(how, train.slice(s![..rows, ..]), &of, seed, stop).ok()?;
            Some((rows as u64, right(&fitted)))
        })
        .collect()
}

/// Where parts of the training rows end, each once: no example is cut.
fn ends(rows: usize, parts: &[f64], split: &Split) -> Vec<usize> {
    let ends = parts.iter().map(|p| split.whole(part(rows, *p)));
    let mut ends: Vec<usize> = ends.collect();
    ends.dedup();
    ends
}

/// A part of so many, at least one.
fn part(n: usize, fraction: f64) -> usize {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // at most n
    let part = (n as f64 * fraction).round() as usize;
    part.clamp(1.min(n), n)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn never() -> bool {
        false
    }

    const LOGISTIC: How = How::Logistic {
        c: 1.0,
        choices: Vec::new(),
    };

    fn rows_of(x: &Array2<f64>, split: &Split) -> Rows {
        Rows {
            train: x.select(Axis(0), &split.train),
            test: x.select(Axis(0), &split.test),
        }
    }

    /// Rows whose first feature tells the class when `planted`, and random ones otherwise; every row is of a type of its own.
    fn rows(n: usize, planted: bool) -> (Array2<f64>, Targets, Vec<u64>) {
        let mut draws = Draws::new(7);
        let of: Vec<usize> = (0..n).map(|_| draws.below(2)).collect();
        let x = Array2::from_shape_fn((n, 20), |(r, j)| {
            let shift = if planted && j == 0 {
                4.0 * of[r] as f64
            } else {
                0.0
            };
            draws.normal() + shift
        });
        (x, Targets::Classes(of, 2), (0..n as u64).collect())
    }

    /// Every row is an example.
    fn of_their_own(rows: usize) -> Vec<usize> {
        (0..rows).collect()
    }

    fn judged(planted: bool, judgement: Judgement) -> Report {
        let (x, targets, types) = rows(600, planted);
        let split = Split::drawn(&targets, &of_their_own(600), 0.2, 1);
        let found = judge(
            &LOGISTIC,
            &rows_of(&x, &split),
            (&targets, &types),
            &split,
            judgement,
            &never,
        );
        found.unwrap().0
    }

    #[test]
    fn what_was_planted_is_found_and_what_was_not_is_not() {
        let all = Judgement {
            control: true,
            codelength: true,
            learning_curve: true,
            seed: 3,
        };
        let found = judged(true, all).classes.unwrap();
        assert!(
            found.accuracy > 0.94 && found.selectivity.unwrap() > 0.35,
            "{found:?}"
        );
        assert!(found.compression.unwrap() > 2.0, "{found:?}");
        assert!(found.auc.unwrap() > 0.97);
        assert_eq!(found.learning_curve.len(), CURVE.len());
        let nothing = judged(false, all).classes.unwrap();
        assert!(nothing.selectivity.unwrap().abs() < 0.15, "{nothing:?}");
        assert!(nothing.compression.unwrap() < 1.05, "{nothing:?}");
        assert!(
            nothing.accuracy_low < 0.5 && nothing.accuracy_high > 0.45,
            "{nothing:?}"
        );
    }

    #[test]
    fn numbers_have_a_curve_and_an_interval_and_say_what_they_lack() {
        let mut draws = Draws::new(2);
        let x = Array2::from_shape_fn((300, 10), |_| draws.normal());
        let y: Vec<f64> = x
            .outer_iter()
            .map(|r| r[0] + draws.normal() / 4.0)
            .collect();
        let (targets, types) = (Targets::Numbers(y), (0..300).collect::<Vec<u64>>());
        let split = Split::drawn(&targets, &of_their_own(300), 0.2, 1);
        let all = Judgement {
            control: true,
            codelength: true,
            learning_curve: true,
            seed: 3,
        };
        let ridge = How::Ridge { alpha: 1.0 };
        let rows = rows_of(&x, &split);
        let (report, _) = judge(&ridge, &rows, (&targets, &types), &split, all, &never).unwrap();
        let found = report.numbers.unwrap();
        assert!(found.r_squared_low < found.r_squared && found.r_squared < found.r_squared_high);
        assert!(found.r_squared_low > 0.8, "{found:?}");
        assert!(found.selectivity.unwrap() <= found.r_squared, "{found:?}");
        assert_eq!(found.learning_curve.len(), CURVE.len());
        assert!(
            report.notes[0].contains("no codelength"),
            "{:?}",
            report.notes
        );
    }

    #[test]
    fn what_gives_no_probabilities_is_not_judged_by_them() {
        let (x, targets, types) = rows(200, true);
        let split = Split::drawn(&targets, &of_their_own(200), 0.2, 1);
        let judgement = Judgement {
            codelength: true,
            ..Judgement::default()
        };
        let (rows, of) = (rows_of(&x, &split), (&targets, &types[..]));
        let found = judge(&How::MeanDifference, &rows, of, &split, judgement, &never);
        let report = found.unwrap().0;
        let classes = report.classes.unwrap();
        assert_eq!(classes.calibration_error, None);
        assert_eq!(classes.codelength_bits, None);
        assert!(
            report.notes[0].contains("no codelength"),
            "{:?}",
            report.notes
        );
    }

    #[test]
    fn the_better_penalty_is_chosen() {
        let (x, targets, types) = rows(300, true);
        let split = Split::drawn(&targets, &of_their_own(300), 0.2, 1);
        let how = How::Logistic {
            c: 1.0,
            choices: vec![1e-6, 1.0],
        };
        let judgement = Judgement::default();
        let (report, _) = judge(
            &how,
            &rows_of(&x, &split),
            (&targets, &types),
            &split,
            judgement,
            &never,
        )
        .unwrap();
        assert!(report.chosen_c.is_some());
    }

    #[test]
    fn the_same_type_has_the_same_label_in_a_control_task() {
        let targets = Targets::Classes(vec![0, 1, 1, 0, 1, 0], 2);
        let Targets::Classes(of, _) = controlled(&targets, &[5, 9, 5, 9, 7, 5], 2) else {
            panic!("classes stay classes");
        };
        assert!(of[0] == of[2] && of[2] == of[5] && of[1] == of[3]);
    }
}
