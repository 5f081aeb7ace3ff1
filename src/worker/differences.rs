//! The gradient's part of the certificate: at the token embedding, moving nothing changes nothing, and the gradient is what small moves
//! show.
//!
//! Each row of a trial is moved along a direction of its own, the sum of its gradient and of a random vector of the same size: along the
//! gradient the answer moves enough to be seen above rounding, and the random part finds what the gradient leaves out. Steps grow and
//! shrink until the two agree. Where kinks and rounding let the differences at no four steps agree, that is all that they are
//! sure of, and the tolerance; a gradient that is wrong is off by more. On top of a kink differences of any step are off by the same:
//! when the two disagree they are compared again a little way off, where a gradient that is wrong is wrong too.
//!
//! Only classifiers and language models are checked: of other models no gradient is asked for.

use std::collections::BTreeMap;

use ort::session::{RunOptions, Session};

use super::{
    measure::{self, Inputs},
    session::{Bench, Effort, run},
};
use crate::{
    anatomy::{
        Anatomy, HookPoint, Trials,
        certificate::{NULL, distance, same_gradient, within},
    },
    ipc::{
        info::{Axis, Check},
        spec::{
            GradientSpec, OBJECTIVE, Quantity, Reduction, Rules, TARGET_LABEL, TARGET_POSITION,
            TARGET_WEIGHT, VariantSpec,
        },
    },
    onnx::Model,
    rewrite,
    tensor::{DType, Tensor},
};

/// Where the gradient is checked.
const POINT: &str = "hook_embed";
/// Steps relative to the size of what is moved, most telling first.
const STEPS: [f64; 7] = [1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-2, 1e-1];
/// The same where numbers have eleven bits or fewer.
const COARSE_STEPS: [f64; 3] = [1e-1, 3e-1, 3e-2];
/// How far off, relative to the size of what is moved.
const PLACES: [f64; 3] = [0.0, 1e-2, 3e-2];
/// Weights of the terms of the objective.
const WEIGHTS: [f32; 3] = [1.0, -0.5, 0.25];

/// The checks, and a note where the model cannot be differentiated, which names the operator.
pub(super) fn check(
    bench: &Bench,
    normal: &Model,
    anatomy: &Anatomy,
    trials: &Trials,
    inputs: &[Inputs],
) -> (Vec<Check>, Option<String>) {
    let hook = |name: &str| anatomy.hooks.iter().find(|h| h.name == name);
    let scores = (anatomy.hooks.iter())
        .find(|h| Some(h.value) == anatomy.main_output)
        .filter(|h| matches!(h.axes.last(), Some(Axis::Label | Axis::Vocab)));
    let (Some(point), Some(scores)) = (hook(POINT).filter(|h| h.dtype.is_float()), scores) else {
        return (Vec::new(), None);
    };
    let mut checks = Vec::new();
    let case = Case {
        point,
        scores,
        trials,
        inputs,
    };
    let note = case.check(bench, normal, anatomy, &mut checks).err();
    (checks, note)
}

struct Case<'a> {
    point: &'a HookPoint,
    scores: &'a HookPoint,
    trials: &'a Trials,
    inputs: &'a [Inputs],
}

impl Case<'_> {
    fn check(
        &self,
        bench: &Bench,
        normal: &Model,
        anatomy: &Anatomy,
        checks: &mut Vec<Check>,
    ) -> Result<(), String> {
        let spec = VariantSpec {
            intervene: [POINT.to_owned()].into(),
            gradient: Some(GradientSpec {
                of: Quantity::Logit,
                at: None,
                rules: Rules::Gradient,
                points: BTreeMap::from([(POINT.to_owned(), Reduction::Whole)]),
            }),
            keep_outputs: false,
            ..VariantSpec::rewritten()
        };
        let made = rewrite::variant(normal, anatomy, &spec, |model, movable| {
            let seen = measure::values(bench, model, movable, self.inputs)?;
            // Run with the same little effort as the trials, so that not a bit may differ.
            for port in normal.graph.outputs() {
                let still = seen.get(Trials::TWINS).and_then(|v| v.get(&port.value));
                let plain = self.trials.value(Trials::TWINS, port.value);
                if let (Some(still), Some(plain)) = (still, plain)
                    && plain.dtype().is_float()
                {
                    let name = normal.graph.name(port.value);
                    checks.push(within(NULL, distance(still, plain), 0.0, "Exact", name));
                }
            }
            Ok(measure::shapes_of(model, &seen))
        });
        let made = made.map_err(|e| e.to_string())?;
        let mut session = bench.session(&made.model, Effort::Full)?;
        let mut last = None;
        for place in PLACES {
            let Some((off, doubt)) = self.disagreement(&mut session, place)? else {
                return Ok(());
            };
            let check = same_gradient((off, doubt), self.scores.dtype, POINT);
            let passed = check.passed;
            last = Some((check, doubt));
            if passed {
                break;
            }
        }
        match last {
            Some((check, doubt)) if !check.passed && doubt > check.tolerance => Err(format!(
                "the gradient at \"{POINT}\" could not be checked: differences at no two steps agree"
            )),
            Some((check, _)) => {
                checks.push(check);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// How far gradient and differences are apart, relative to the derivative, and what the differences themselves are sure of; of the
    /// row where that is worst. So far off what the trial holds.
    fn disagreement(
        &self,
        session: &mut Session,
        place: f64,
    ) -> Result<Option<(f64, f64)>, String> {
        let known = |v| self.trials.value(Trials::TWINS, v);
        let (Some(inputs), Some(scores), Some(embedded)) = (
            self.inputs.get(Trials::TWINS),
            known(self.scores.value),
            known(self.point.value),
        ) else {
            return Ok(None);
        };
        let rows = scores.shape().first().copied().unwrap_or(0);
        let mut fed = inputs.clone();
        fed.extend(target(scores.shape()).map_err(|e| e.to_string())?);
        let options = RunOptions::new().map_err(|e| e.message().to_owned())?;
        let mut at = |shape: &[usize], shift: &[f32]| -> Result<[Tensor; 2], String> {
            let ones = vec![1; shape.len()];
            let mut fed = fed.clone();
            for (what, shape, values) in [("scale", &ones[..], &[1.0][..]), ("shift", shape, shift)]
            {
                let tensor = Tensor::from_f32(shape.to_vec(), values)
                    .and_then(|t| t.cast_float(self.point.dtype))
                    .map_err(|e| e.to_string())?;
                fed.push((format!("{what}:{POINT}"), tensor));
            }
            let made = run(session, &fed, &options)?;
            let named = |name: &str| made.iter().find(|(n, _)| n == name).map(|(_, t)| t.clone());
            named(OBJECTIVE)
                .zip(named(&format!("gradient:{POINT}")))
                .map(|(objective, gradient)| [objective, gradient])
                .ok_or_else(|| "the gradient did not come out".to_owned())
        };
        // The axes of the hook point, which may lie otherwise in the graph.
        let [_, still] = at(&vec![1; self.point.axes.len()], &[0.0])?;
        let shape = still.shape().to_vec();
        let size = root_mean_square(&doubles(embedded)?);
        let off: Vec<f64> = directions(&vec![0.0; still.elements()], still.elements().max(1))
            .iter()
            .map(|d| d * place * size)
            .collect();
        let mut moved = |direction: &[f64], by: f64| {
            let shift: Vec<f32> = (off.iter().zip(direction))
                .map(|(o, d)| (o + d * by) as f32)
                .collect();
            at(&shape, &shift)
        };
        let [value, gradient] = moved(&off, 0.0)?;
        let gradient = doubles(&gradient)?;
        let width = gradient.len().checked_div(rows).filter(|w| *w > 0);
        let Some(width) = width.filter(|w| w * rows == gradient.len()) else {
            return Ok(None);
        };
        let value = doubles(&value)?;
        if value.len() != rows {
            return Ok(None);
        }
        let direction = directions(&gradient, width);
        let exact: Vec<f64> = gradient
            .chunks(width)
            .zip(direction.chunks(width))
            .map(|(g, d)| g.iter().zip(d).map(|(g, d)| g * d).sum())
            .collect();

        let coarse = is_coarse(self.scores.dtype);
        let steps = if coarse { &COARSE_STEPS[..] } else { &STEPS };
        let enough = same_gradient((0.0, 0.0), self.scores.dtype, POINT).tolerance;
        let mut seen = vec![Vec::new(); rows];
        for step in steps {
            let step = step * if size > 0.0 { size } else { 1.0 };
            let mut objective =
                |by: f64| moved(&direction, by).and_then(|[objective, _]| doubles(&objective));
            let (up, down) = (objective(step)?, objective(-step)?);
            for (row, seen) in seen.iter_mut().enumerate() {
                let difference = (up[row] - down[row]) / (2.0 * step);
                // Less than this is not seen above rounding.
                let rounding = if coarse {
                    1e-3
                } else {
                    f64::from(f32::EPSILON)
                };
                let least = rounding * value[row].abs() / step / enough;
                let scale = exact[row].abs().max(least).max(f64::MIN_POSITIVE);
                seen.push((difference - exact[row]) / scale);
            }
            if seen.iter().all(|seen| apart(seen).0 <= enough) {
                break;
            }
        }
        let rows = seen.iter().map(|seen| apart(seen));
        let excess = |(off, doubt): (f64, f64)| off / doubt.max(enough);
        Ok(rows.reduce(|a, b| if excess(a) >= excess(b) { a } else { b }))
    }
}

/// Of the signed distances of the differences at all steps from the gradient: the least distance, and within what the difference at
/// that step agrees with those at three others. Two kinked differences often are near each other by chance, four seldom.
fn apart(seen: &[f64]) -> (f64, f64) {
    let Some(best) = seen
        .iter()
        .copied()
        .min_by(|a, b| a.abs().total_cmp(&b.abs()))
    else {
        return (f64::INFINITY, 0.0);
    };
    let mut others: Vec<f64> = seen.iter().map(|v| (v - best).abs()).collect();
    others.sort_by(f64::total_cmp);
    (best.abs(), others.get(3).copied().unwrap_or(0.0))
}

/// Terms that look at several labels and positions, the same for every row.
fn target(scores: &[usize]) -> Result<Inputs, crate::tensor::TensorError> {
    let rows = scores.first().copied().unwrap_or(0);
    let terms = WEIGHTS.len();
    let longs = |of: [usize; 3]| {
        let row = of.map(|v| i64::try_from(v).unwrap_or(0));
        Tensor::from_i64(vec![rows, terms], &row.repeat(rows))
    };
    let last = |extent: Option<&usize>| extent.map_or(0, |n| n.saturating_sub(1));
    let labels = last(scores.last());
    let mut target = vec![
        (TARGET_LABEL.to_owned(), longs([labels.min(1), 0, labels])?),
        (
            TARGET_WEIGHT.to_owned(),
            Tensor::from_f32(vec![rows, terms], &WEIGHTS.repeat(rows))?,
        ),
    ];
    if scores.len() > 2 {
        let end = last(scores.get(1));
        target.push((TARGET_POSITION.to_owned(), longs([end, 0, end / 2])?));
    }
    Ok(target)
}

/// For each row its gradient and a random vector, both of a mean square of one.
fn directions(gradient: &[f64], width: usize) -> Vec<f64> {
    let mut state = 0x2545_f491u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // Even over what has a mean square of one.
        (f64::from(state >> 8) / f64::from(1u32 << 23) - 1.0) * 3f64.sqrt()
    };
    gradient
        .chunks(width)
        .flat_map(|row| {
            let size = root_mean_square(row);
            let inverse = if size > 0.0 && size.is_finite() {
                size.recip()
            } else {
                0.0
            };
            row.iter()
                .map(|g| g * inverse + random())
                .collect::<Vec<_>>()
        })
        .collect()
}

fn root_mean_square(values: &[f64]) -> f64 {
    let sum: f64 = values.iter().map(|v| v * v).sum();
    (sum / values.len().max(1) as f64).sqrt()
}

fn doubles(tensor: &Tensor) -> Result<Vec<f64>, String> {
    let values = tensor.to_f32().map_err(|e| e.to_string())?;
    Ok(values.iter().map(|v| f64::from(*v)).collect())
}

fn is_coarse(dtype: DType) -> bool {
    !matches!(dtype, DType::F32 | DType::F64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directions_have_a_part_along_the_gradient_and_one_across() {
        let gradient: Vec<f64> = (0..200).map(|i| f64::from(i % 7) - 3.0).collect();
        let direction = directions(&gradient, 100);
        for (g, d) in gradient.chunks(100).zip(direction.chunks(100)) {
            let along: f64 = g.iter().zip(d).map(|(g, d)| g * d).sum();
            let sizes = root_mean_square(g) * root_mean_square(d) * 100.0;
            assert!((0.5..0.9).contains(&(along / sizes)), "{}", along / sizes);
        }
        let still = directions(&[0.0; 4], 4);
        assert!(still.iter().all(|d| d.is_finite() && *d != 0.0));
    }

    #[test]
    fn differences_that_agree_on_something_else_leave_no_doubt() {
        let (off, doubt) = apart(&[0.02, 0.0201, 0.3, 0.0202, 0.0203]);
        assert!((off - 0.02).abs() < 1e-12 && doubt < 4e-4, "{off} {doubt}");
        let (off, doubt) = apart(&[0.02, -0.05, 0.3, 0.1]);
        assert!((off - 0.02).abs() < 1e-12 && (doubt - 0.28).abs() < 1e-12);
        assert_eq!(apart(&[1e-4]), (1e-4, 0.0));
    }

    #[test]
    fn terms_stay_within_the_scores() {
        let target = target(&[2, 1, 2]).unwrap();
        assert_eq!(target.len(), 3);
        assert_eq!(target[0].1.shape(), [2, 3]);
        let labels = |t: &Tensor| {
            t.bytes()
                .as_chunks::<8>()
                .0
                .iter()
                .map(|b| i64::from_le_bytes(*b))
                .collect::<Vec<_>>()
        };
        assert_eq!(labels(&target[0].1), [1, 0, 1, 1, 0, 1]);
        assert_eq!(labels(&target[2].1), [0; 6]);
    }
}
