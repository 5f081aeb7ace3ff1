//! Directions that are fitted on every row and judged by none: steering vectors, whose direction is the answer.
//!
//! What is told of one is how long it is, and how far apart the classes lie along it among the rows that made it. That says nothing of rows
//! that it has not seen.

use std::time::Instant;

use ndarray::{ArrayView1, ArrayView2};

use super::{
    card::{Direction, Report},
    fit::{Fitted, How, Targets, fit},
};

/// Fits a direction from the first class to the second.
///
/// # Errors
/// Those of [`fit`], and that there are not two classes.
pub fn direction(
    how: &How,
    rows: ArrayView2<'_, f64>,
    targets: &Targets,
    seed: u64,
    stop: &dyn Fn() -> bool,
) -> Result<(Report, Fitted), String> {
    let begun = Instant::now();
    let fitted = fit(how, rows, targets, seed, stop)?;
    let Targets::Classes(of, 2) = targets else {
        return Err("a direction leads from one class to another: give two classes".to_owned());
    };
    let weight = fitted.output.weight.row(0);
    let length = weight.dot(&weight).sqrt();
    let separation = separation(rows.dot(&weight).view(), of);
    let mut notes = Vec::new();
    if length == 0.0 {
        notes.push("the direction has no length: adding it changes nothing".to_owned());
    } else if separation.is_none() {
        notes.push("no separation: the examples of each class are all alike".to_owned());
    }
    let report = Report {
        direction: Some(Direction { length, separation }),
        iterations: fitted.iterations,
        converged: fitted.converged,
        seconds: begun.elapsed().as_secs_f64(),
        notes,
        ..Report::default()
    };
    Ok((report, fitted))
}

/// The difference of the means of both classes by the pooled standard deviation, of numbers that may have any scale; none where nothing is
/// spread.
fn separation(along: ArrayView1<'_, f64>, of: &[usize]) -> Option<f64> {
    let [first, second] = [0, 1].map(|class| {
        let rows = || along.iter().zip(of).filter(|(_, c)| **c == class);
        let count = rows().count() as f64;
        let mean = rows().map(|(v, _)| v).sum::<f64>() / count;
        let squares: f64 = rows().map(|(v, _)| (v - mean).powi(2)).sum();
        (count, mean, squares)
    });
    let freedom = first.0 + second.0 - 2.0;
    let deviation = ((first.2 + second.2) / freedom).sqrt();
    let apart = (second.1 - first.1) / deviation;
    apart.is_finite().then_some(apart)
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    fn never() -> bool {
        false
    }

    #[test]
    fn the_difference_of_means_is_exact_and_its_separation_has_no_scale() {
        let x = array![[0.0, 1.0], [2.0, 1.0], [6.0, 1.0], [8.0, 1.0]];
        let targets = Targets::Classes(vec![0, 0, 1, 1], 2);
        for scale in [1.0, 1000.0] {
            let x = &x * scale;
            let how = How::MeanDifference;
            let (report, fitted) = direction(&how, x.view(), &targets, 0, &never).unwrap();
            assert_eq!(fitted.output.weight, array![[6.0 * scale, 0.0]]);
            let told = report.direction.unwrap();
            assert!((told.length - 6.0 * scale).abs() < 1e-9);
            // Means 1 and 7, variances of 2 with one degree of freedom each.
            let separation = told.separation.unwrap();
            assert!((separation - 6.0 / 2f64.sqrt()).abs() < 1e-12, "{told:?}");
            assert!(report.classes.is_none() && report.notes.is_empty());
        }
    }

    #[test]
    fn principal_components_have_length_one_and_lead_to_the_second_class() {
        let x = array![[5.0, 0.1], [4.0, 0.0], [-4.0, 0.0], [-5.0, 0.1]];
        for (of, sign) in [(vec![0, 0, 1, 1], -1.0), (vec![1, 1, 0, 0], 1.0)] {
            let targets = Targets::Classes(of, 2);
            let (report, fitted) = direction(&How::Pca, x.view(), &targets, 0, &never).unwrap();
            let told = report.direction.unwrap();
            assert!((told.length - 1.0).abs() < 1e-12 && told.separation.unwrap() > 0.0);
            assert!(fitted.output.weight[[0, 0]] * sign > 0.99);
        }
    }

    #[test]
    fn what_has_no_spread_or_no_length_says_so() {
        let targets = Targets::Classes(vec![0, 1], 2);
        for (x, part) in [
            (array![[0.0], [1.0]], "no separation"),
            (array![[1.0], [1.0]], "no length"),
        ] {
            let how = How::MeanDifference;
            let (report, _) = direction(&how, x.view(), &targets, 0, &never).unwrap();
            assert_eq!(report.direction.unwrap().separation, None);
            assert!(report.notes[0].contains(part), "{:?}", report.notes);
        }
        let numbers = Targets::Numbers(vec![0.0, 1.0]);
        let x = array![[0.0], [1.0]];
        let error = direction(&How::Pca, x.view(), &numbers, 0, &never).unwrap_err();
        assert!(error.contains("two classes"), "{error}");
    }
}
