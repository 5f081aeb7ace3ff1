//! The parity certificate's checks: what was measured, against which named tolerance.
//!
//! Each is a pure function over tensors of trial runs. Those on structure ([`ROWS`], [`MIX`], the residual sums) are made
//! while the anatomy is read; [`same_logits`] compares what an exposed variant gives with what the file gives.

use crate::{
    ipc::info::Check,
    tensor::{DType, Tensor},
};

/// Rows of a pattern sum to one where anything may be seen.
pub const ROWS: &str = "pattern rows sum to one";
/// The pattern times the values is z.
pub const MIX: &str = "pattern @ v == z";
/// Residual sum over the attention.
pub const RESID_MID: &str = "resid_pre + attn_out == resid_mid";
/// Residual sum over the attention to another sequence.
pub const RESID_MID_CROSS: &str = "resid_mid + cross_attn_out == resid_mid_cross";
/// Residual sum over the perceptron.
pub const RESID_POST: &str = "resid_mid + mlp_out == resid_post";
/// Residual sum of a parallel block.
pub const RESID_PARALLEL: &str = "resid_pre + attn_out + mlp_out == resid_post";
/// Exposing changes nothing.
pub const LOGITS: &str = "exposed logits == plain logits";

/// Moving a hook point by nothing changes nothing.
pub const NULL: &str = "null intervention == original";
/// The gradient is what small moves show.
pub const GRADIENT: &str = "gradient matches a central difference";

/// A check that passes when what was measured is within the tolerance. What is no number fails.
pub fn within(
    name: &str,
    measured: f64,
    tolerance: f64,
    tolerance_name: &str,
    subject: &str,
) -> Check {
    Check {
        name: name.to_owned(),
        passed: measured <= tolerance,
        // What cannot be compared is as far off as can be written down.
        measured: if measured.is_finite() {
            measured
        } else {
            f64::MAX
        },
        tolerance,
        tolerance_name: tolerance_name.to_owned(),
        subject: subject.to_owned(),
    }
}

/// Compares the output of a variant with that of the file as it is, relative to the largest magnitude.
pub fn same_logits(exposed: &Tensor, plain: &Tensor, output: &str) -> Check {
    let half = !matches!(plain.dtype(), DType::F32 | DType::F64);
    let (tolerance, named) = if half {
        (2e-2, "Half")
    } else {
        (1e-4, "Rewritten")
    };
    within(LOGITS, distance(exposed, plain), tolerance, named, output)
}

/// Holds a gradient against a central difference. `off` is how far they are apart, relative to the derivative along the direction;
/// `doubt` is how far differences at two steps are apart themselves, as kinks and rounding make them: what they are not sure of is
/// tolerated, up to a bound.
pub fn same_gradient((off, doubt): (f64, f64), scores: DType, point: &str) -> Check {
    const MOST: f64 = 5e-2;
    let half = !matches!(scores, DType::F32 | DType::F64);
    let (tolerance, named) = if half {
        (MOST, "HalfGradient")
    } else if off > 1e-3 && doubt > 1e-3 {
        (doubt.min(MOST), "Difference")
    } else {
        (1e-3, "Gradient")
    };
    within(GRADIENT, off, tolerance, named, point)
}

/// Largest difference of two tensors, relative to the largest magnitude; infinite when they cannot be compared.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let (Ok(x), Ok(y)) = (a.to_f32(), b.to_f32()) else {
        return f64::INFINITY;
    };
    if a.shape() != b.shape() {
        return f64::INFINITY;
    }
    let mut largest = 0f64;
    let mut scale = 0f64;
    for (x, y) in x.iter().zip(y.iter()) {
        if x == y || (x.is_nan() && y.is_nan()) {
            continue;
        }
        if !x.is_finite() || !y.is_finite() {
            return f64::INFINITY;
        }
        largest = largest.max((f64::from(*x) - f64::from(*y)).abs());
    }
    for v in y.iter().filter(|v| v.is_finite()) {
        scale = scale.max(f64::from(v.abs()));
    }
    if largest == 0.0 {
        0.0
    } else {
        largest / scale.max(f64::MIN_POSITIVE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::from_f32(vec![values.len()], values).unwrap()
    }

    #[test]
    fn equal_logits_pass_and_distant_ones_fail() {
        let plain = tensor(&[1.0, -4.0]);
        assert!(same_logits(&plain, &plain, "logits").passed);
        let check = same_logits(&tensor(&[1.0, -4.1]), &plain, "logits");
        assert!(!check.passed);
        assert!((check.measured - 0.025).abs() < 1e-6);
    }

    #[test]
    fn a_difference_that_is_not_sure_of_itself_tolerates_as_much_and_no_more() {
        let check = |off, doubt| same_gradient((off, doubt), DType::F32, "hook_embed");
        assert!(check(9e-4, 0.0).passed);
        assert!(!check(2e-3, 1e-4).passed);
        assert!(check(2e-3, 3e-3).passed);
        assert!(!check(0.2, 0.3).passed);
        assert!(!check(f64::NAN, f64::NAN).passed);
    }

    #[test]
    fn what_is_no_number_fails() {
        assert!(!same_logits(&tensor(&[f32::NAN]), &tensor(&[1.0]), "logits").passed);
        assert!(!within("x", f64::NAN, 1.0, "t", "s").passed);
    }

    #[test]
    fn shapes_must_agree() {
        assert!(distance(&tensor(&[1.0]), &tensor(&[1.0, 2.0])).is_infinite());
    }
}
