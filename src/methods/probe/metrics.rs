//! How good a probe is, on examples that it was not trained on.

use ndarray::Array2;

use crate::methods::attribute::{draw::Draws, evaluate::spearman};

/// Bins of the calibration error.
const BINS: usize = 15;
/// Draws of the bootstrap.
const BOOTSTRAP: usize = 1000;

/// Part of the classes that is right.
pub fn accuracy(said: &[usize], of: &[usize]) -> f64 {
    let right = said.iter().zip(of).filter(|(a, b)| a == b).count();
    right as f64 / of.len().max(1) as f64
}

/// Counts `[true class, said class]`, row-major.
pub fn confusion(said: &[usize], of: &[usize], classes: usize) -> Vec<u64> {
    let mut counts = vec![0; classes * classes];
    for (said, of) in said.iter().zip(of) {
        counts[of * classes + said] += 1;
    }
    counts
}

/// Mean over the classes of `2 tp / (2 tp + fp + fn)`; of classes that neither are nor were said, 0 is not counted, as in scikit-learn.
pub fn macro_f1(confusion: &[u64], classes: usize) -> f64 {
    let f1 = |class: usize| {
        let right = confusion[class * classes + class];
        let of: u64 = confusion[class * classes..(class + 1) * classes]
            .iter()
            .sum();
        let said: u64 = (0..classes)
            .map(|row| confusion[row * classes + class])
            .sum();
        (of + said > 0).then(|| 2.0 * right as f64 / (of + said) as f64)
    };
    let scores: Vec<f64> = (0..classes).filter_map(f1).collect();
    scores.iter().sum::<f64>() / scores.len().max(1) as f64
}

/// Area under the receiver operating characteristic: how often a row of the second class scores above one of the first, ties by half.
/// None where a class is missing.
pub fn auc(scores: &[f64], of: &[usize]) -> Option<f64> {
    let mut order: Vec<usize> = (0..of.len()).collect();
    order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
    let positives = of.iter().filter(|c| **c == 1).count();
    let negatives = of.len() - positives;
    if positives == 0 || negatives == 0 {
        return None;
    }
    let (mut below, mut above) = (0.0, 0.0);
    for tied in order.chunk_by(|a, b| scores[*a] == scores[*b]) {
        let high = tied.iter().filter(|r| of[**r] == 1).count() as f64;
        let low = tied.len() as f64 - high;
        above += high * (below + low / 2.0);
        below += low;
    }
    Some(above / (positives as f64 * negatives as f64))
}

/// Expected calibration error (Guo et al. 2017): over bins of the confidence, how far it is from the accuracy, weighted by their rows.
pub fn calibration_error(probabilities: &Array2<f64>, of: &[usize]) -> f64 {
    let mut bins = [(0usize, 0.0, 0.0); BINS];
    for (row, class) in probabilities.outer_iter().zip(of) {
        let (said, confidence) =
            row.iter()
                .enumerate()
                .fold((0, f64::NEG_INFINITY), |best, (at, p)| {
                    if *p > best.1 { (at, *p) } else { best }
                });
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // 0 to BINS
        let bin = ((confidence * BINS as f64).ceil() as usize).clamp(1, BINS) - 1;
        bins[bin].0 += 1;
        bins[bin].1 += confidence;
        bins[bin].2 += f64::from(u8::from(said == *class));
    }
    let off = bins.iter().map(|(_, sure, right)| (sure - right).abs());
    off.sum::<f64>() / of.len().max(1) as f64
}

/// 95 % interval of an accuracy: percentiles of the accuracies of examples drawn with replacement, each with all of its rows. `ends` says
/// where the rows of each example end.
pub fn bootstrap(said: &[usize], of: &[usize], ends: &[usize], seed: u64) -> (f64, f64) {
    interval(ends, seed, |rows| {
        let right = rows.iter().filter(|r| said[**r] == of[**r]).count();
        right as f64 / rows.len().max(1) as f64
    })
}

/// 95 % interval of the coefficient of determination, likewise.
pub fn bootstrap_numbers(said: &[f64], of: &[f64], ends: &[usize], seed: u64) -> (f64, f64) {
    interval(ends, seed, |rows| {
        let mean = rows.iter().map(|r| of[*r]).sum::<f64>() / rows.len().max(1) as f64;
        let (left, all) = rows.iter().fold((0.0, 0.0), |(left, all), r| {
            (
                left + (said[*r] - of[*r]).powi(2),
                all + (of[*r] - mean).powi(2),
            )
        });
        determination(left, all)
    })
}

fn interval(ends: &[usize], seed: u64, measure: impl Fn(&[usize]) -> f64) -> (f64, f64) {
    let mut draws = Draws::new(seed);
    let mut drawn = Vec::new();
    let mut found: Vec<f64> = (0..BOOTSTRAP)
        .map(|_| {
            drawn.clear();
            for _ in ends {
                let example = draws.below(ends.len());
                let begin = example.checked_sub(1).map_or(0, |before| ends[before]);
                drawn.extend(begin..ends[example]);
            }
            measure(&drawn)
        })
        .collect();
    found.sort_by(f64::total_cmp);
    (found[BOOTSTRAP * 25 / 1000], found[BOOTSTRAP * 975 / 1000])
}

/// Of the squares that are left and of all; nothing of numbers that are all the same.
fn determination(left: f64, all: f64) -> f64 {
    if all > 0.0 { 1.0 - left / all } else { 0.0 }
}

/// Coefficient of determination, mean squared error, Spearman's rank correlation.
pub fn of_numbers(said: &[f64], of: &[f64]) -> (f64, f64, f64) {
    let n = of.len().max(1) as f64;
    let mean = of.iter().sum::<f64>() / n;
    let left: f64 = said.iter().zip(of).map(|(a, b)| (a - b).powi(2)).sum();
    let all: f64 = of.iter().map(|v| (v - mean).powi(2)).sum();
    (determination(left, all), left / n, spearman(said, of))
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn measures_of_a_small_case_by_hand() {
        let (said, of) = ([0, 1, 1, 2, 0], [0, 1, 2, 2, 1]);
        assert!((accuracy(&said, &of) - 0.6).abs() < 1e-12);
        let counts = confusion(&said, &of, 3);
        assert_eq!(counts, [1, 0, 0, 1, 1, 0, 0, 1, 1]);
        let f1 = (2.0 / 3.0 + 2.0 / 4.0 + 2.0 / 3.0) / 3.0;
        assert!((macro_f1(&counts, 3) - f1).abs() < 1e-12);
    }

    #[test]
    fn ties_count_half_in_the_area() {
        assert_eq!(auc(&[0.1, 0.4, 0.35, 0.8], &[0, 0, 1, 1]), Some(0.75));
        assert_eq!(auc(&[1.0, 1.0, 1.0], &[0, 1, 1]), Some(0.5));
        assert_eq!(auc(&[1.0], &[1]), None);
    }

    #[test]
    fn certainty_that_is_right_is_calibrated() {
        let sure = array![[1.0, 0.0], [0.0, 1.0]];
        assert!(calibration_error(&sure, &[0, 1]).abs() < 1e-12);
        assert!((calibration_error(&sure, &[1, 1]) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn an_interval_holds_its_accuracy() {
        let of: Vec<usize> = (0..200).map(|i| i % 2).collect();
        let said: Vec<usize> = (0..200)
            .map(|i| if i % 5 == 0 { 1 - i % 2 } else { i % 2 })
            .collect();
        let (low, high) = bootstrap(&said, &of, &(1..=of.len()).collect::<Vec<_>>(), 1);
        assert!(low < 0.8 && 0.8 < high && high - low < 0.13, "{low} {high}");
    }
}
