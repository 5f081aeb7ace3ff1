//! Effects to first order: attribution patching (Nanda 2023; Syed et al. 2023), and the same for ablations.
//!
//! ```text
//!   F(x with a part replaced) - F(x)  ~  sum over the part of (new - x) dF/dx
//! ```
//!
//! One run forward and backward gives the gradient at every hook point, and with it the estimate of every part.

use super::{
    super::operand::{Grid, each_index},
    Swept,
};
use crate::{
    engine::EngineError,
    ipc::spec::Reduction,
    methods::subject::{Show, Subject, first, floats},
};

/// The number for the row as it is, and the estimates of the parts of each hook point.
///
/// # Errors
/// Those of the run: an operator without gradient among them.
pub(super) async fn estimates(
    subject: &mut Subject,
    swept: &[Swept],
) -> Result<(f64, Vec<Vec<f64>>), EngineError> {
    let show = Show {
        points: swept
            .iter()
            .map(|s| (s.name().to_owned(), Reduction::Whole))
            .collect(),
        expose: swept.iter().map(|s| s.name().to_owned()).collect(),
        ..Show::objective()
    };
    let mut found = vec![Vec::new(); swept.len()];
    let mut number = f64::NAN;
    subject
        .run(
            &show,
            (1, 1),
            |_| Ok(Vec::new()),
            |_, _, tensors| {
                number = first(tensors)?;
                for (swept, found) in swept.iter().zip(&mut found) {
                    // Tensors come after the objective: gradients, then values, each by name.
                    let at = |names: &mut dyn Iterator<Item = &String>| {
                        names.take_while(|n| *n != swept.name()).count()
                    };
                    let gradient = floats(tensors, 1 + at(&mut show.points.keys()))?;
                    let values = at(&mut show.expose.iter());
                    let value = floats(tensors, 1 + show.points.len() + values)?;
                    *found = of_parts(swept, &gradient, &value)?;
                }
                Ok(())
            },
        )
        .await?;
    Ok((number, found))
}

fn of_parts(swept: &Swept, gradient: &[f32], value: &[f32]) -> Result<Vec<f64>, EngineError> {
    let extents = &swept.parts.site.extents;
    let elements: usize = extents.iter().product();
    if gradient.len() != elements || value.len() != elements {
        return Err(EngineError::internal(format!(
            "\"{}\" came back in another shape",
            swept.name()
        )));
    }
    let mut sums = vec![0.0f64; swept.parts.len()];
    let mut at = 0;
    let new: &Grid = &swept.new;
    each_index(extents, |index| {
        // Where nothing flows, nothing counts: scores that a mask made infinite among them.
        if gradient[at] != 0.0 {
            let change = f64::from(new.at(index)) - f64::from(value[at]);
            sums[swept.parts.of(index)] += change * f64::from(gradient[at]);
        }
        at += 1;
    });
    Ok(sums)
}

/// Pearson's correlation of the pairs of which both numbers are finite, and how many these are.
pub(super) fn correlation<'a>(
    pairs: impl Iterator<Item = (&'a f64, &'a f64)>,
) -> (Option<f64>, usize) {
    let pairs: Vec<(f64, f64)> = pairs
        .filter(|(a, b)| a.is_finite() && b.is_finite())
        .map(|(a, b)| (*a, *b))
        .collect();
    let n = pairs.len() as f64;
    let (sum_a, sum_b) = pairs
        .iter()
        .fold((0.0, 0.0), |(a, b), p| (a + p.0, b + p.1));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (a, b) in &pairs {
        let (a, b) = (a - sum_a / n, b - sum_b / n);
        ab += a * b;
        aa += a * a;
        bb += b * b;
    }
    let varies = pairs.len() > 1 && aa > 0.0 && bb > 0.0;
    (varies.then(|| ab / (aa.sqrt() * bb.sqrt())), pairs.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_rises_together_is_correlated_and_what_was_not_run_is_left_out() {
        let (a, b) = ([1.0, 2.0, 3.0, 9.0], [2.0, 4.0, 6.0, f64::NAN]);
        let (r, n) = correlation(a.iter().zip(&b));
        assert!((r.unwrap() - 1.0).abs() < 1e-12);
        assert_eq!(n, 3);
        assert_eq!(correlation([1.0].iter().zip(&[2.0])), (None, 1));
        assert_eq!(correlation([1.0, 2.0].iter().zip(&[3.0, 3.0])).0, None);
    }
}
