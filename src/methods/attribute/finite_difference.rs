//! Finite differences: derivatives from values alone, for every model that runs.
//!
//! ```text
//!   forward     (F(x + h v) - F(x)) / h
//!   central     (F(x + h v) - F(x - h v)) / 2h                 = D(h)
//!   Richardson  (4 D(h/2) - D(h)) / 3                          error: |D(h) - D(h/2)|, kinks within the step, rounding
//! ```
//!
//! Along `v_i = x_i - x'_i` of a feature this is `(x - x')` times gradient; integrated over the path from the baseline it is integrated
//! gradients; along random directions of length one, `sqrt(d * mean (D_u F)^2)` estimates the length of the gradient, because
//! `E[(g.u)^2] = |g|^2 / d`; along every dimension it is the gradient itself.

use super::{
    Attributed, Cost, Explanation, Extra,
    draw::Draws,
    quadrature::{Node, Quadrature},
    site::{Move, Site},
    smooth::Mean,
};
use crate::{engine::EngineError, methods::subject::Subject, tensor::Tensor};

/// Rows by which rounding is measured: the point itself, every number moved by less than its last place.
const ROUNDING_ROWS: usize = 8;
/// Standard deviations of rounding that an error allows for.
const DEVIATIONS: f64 = 4.0;

/// How a derivative is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scheme {
    /// One step, and the point itself.
    Forward,
    /// A step each way.
    Central,
    /// Two steps each way, extrapolated.
    #[default]
    Richardson,
}

impl Scheme {
    /// Where F is looked at, in steps, and how much each look counts in the derivative. The point itself counts for what they leave.
    fn looks(self) -> &'static [(f64, f64)] {
        match self {
            Scheme::Forward => &[(1.0, 1.0)],
            Scheme::Central => &[(1.0, 0.5), (-1.0, -0.5)],
            Scheme::Richardson => &[
                (1.0, -1.0 / 6.0),
                (-1.0, 1.0 / 6.0),
                (0.5, 4.0 / 3.0),
                (-0.5, -4.0 / 3.0),
            ],
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Scheme::Forward => "forward",
            Scheme::Central => "central",
            Scheme::Richardson => "Richardson",
        }
    }
}

/// Along what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Directions {
    /// Away from the baseline.
    #[default]
    Baseline,
    /// Random ones of length one.
    Random,
    /// Each dimension.
    Dimensions,
}

/// Options.
#[derive(Clone, Debug, PartialEq)]
pub struct FiniteDifference {
    /// How a derivative is taken.
    pub scheme: Scheme,
    /// Step, relative to the direction; along random directions and dimensions relative to the typical size of the site's values.
    pub step: f64,
    /// Along what.
    pub directions: Directions,
    /// Random directions for each feature.
    pub samples: usize,
    /// Points of the path; 0 takes the derivative at the input.
    pub path_steps: usize,
    /// Where; the token embedding, or the input of images, unless said.
    pub site: Option<String>,
}

impl Default for FiniteDifference {
    fn default() -> Self {
        Self {
            scheme: Scheme::Richardson,
            step: 0.02,
            directions: Directions::Baseline,
            samples: 16,
            path_steps: 0,
            site: None,
        }
    }
}

impl FiniteDifference {
    pub(super) fn cost(&self, features: usize, width: usize) -> Cost {
        let each = match self.directions {
            Directions::Baseline => self.path_steps.max(1),
            Directions::Random => self.samples,
            Directions::Dimensions => width,
        };
        let looks = self.scheme.looks().len();
        let rows = features.saturating_mul(each).saturating_mul(looks);
        Cost::forward(rows.saturating_add(ROUNDING_ROWS)).at_most()
    }
}

/// One derivative: of what, at which point of a path, along what.
struct Derivative {
    feature: usize,
    alpha: f64,
    weight: f64,
    /// Seed of a random direction, or number of a dimension.
    along: usize,
    step: f64,
}

/// A derivative, and how wrong it may be.
#[derive(Clone, Copy, Debug, Default)]
struct Found {
    slope: f64,
    error: f64,
    /// The part of the error that is rounding.
    rounding: f64,
}

pub(super) async fn run(
    options: &FiniteDifference,
    e: &mut Explanation,
) -> Result<Attributed, EngineError> {
    let site = Site::open(&mut e.subject, options.site.as_deref()).await?;
    match options.directions {
        Directions::Baseline => from_baseline(options, &site, e).await,
        Directions::Random => random(options, &site, e).await,
        Directions::Dimensions => dimensions(options, &site, e).await,
    }
}

async fn from_baseline(
    options: &FiniteDifference,
    site: &Site,
    e: &mut Explanation,
) -> Result<Attributed, EngineError> {
    let compared = e.compared()?;
    let baseline = site.baseline(&mut e.subject, &compared).await?;
    let features = e.features_of(site.units);
    let moves: Vec<usize> = (0..features.len())
        .filter(|f| {
            let mut units = features.units()[*f].iter();
            units.any(|u| part(site, *u).any(|at| site.x[at] != baseline[at]))
        })
        .collect();
    let nodes = match options.path_steps {
        0 => vec![Node {
            alpha: 1.0,
            weight: 1.0,
        }],
        steps => Quadrature::GaussLegendre.nodes(steps),
    };
    let wanted: Vec<Derivative> = nodes
        .iter()
        .flat_map(|node| {
            moves.iter().map(|feature| Derivative {
                feature: *feature,
                alpha: node.alpha,
                weight: node.weight,
                along: 0,
                step: options.step,
            })
        })
        .collect();
    let direction = |d: &Derivative| -> Vec<(usize, f32)> {
        let units = features.units()[d.feature].iter();
        let numbers = units.flat_map(|u| part(site, *u));
        numbers.map(|at| (at, site.x[at] - baseline[at])).collect()
    };
    let mut scores = vec![0.0; features.len()];
    let mut errors = vec![0.0; features.len()];
    let mut rounding = 0.0f64;
    let (mut seen, each) = (0.0, 1.0 / moves.len().max(1) as f64);
    differences(
        (options.scheme, site, &baseline),
        e,
        &wanted,
        direction,
        |subject, d, found| {
            scores[d.feature] += d.weight * found.slope;
            errors[d.feature] += d.weight * found.error;
            rounding = rounding.max(found.rounding);
            seen += d.weight * each;
            let so_far = scores.iter().map(|s| s / seen).collect();
            subject.report(
                if options.path_steps > 0 {
                    so_far
                } else {
                    scores.clone()
                },
                None,
            );
        },
    )
    .await?;
    let mut answer = Attributed {
        notes: rounds(options, &errors, rounding),
        site: site.name.clone(),
        steps: (options.path_steps > 0).then_some(options.path_steps),
        convention: format!(
            "{} differences along (x - x'), h = {}{}",
            options.scheme.name(),
            options.step,
            if options.path_steps > 0 {
                ", integrated over the path by gauss_legendre"
            } else {
                ""
            }
        ),
        ..Attributed::default()
    };
    if options.path_steps > 0 {
        let mut ends = [0.0; 2];
        let on_path = |row| site.on_path(&baseline, if row == 0 { 1.0 } else { 0.0 });
        site.values(&mut e.subject, 2, on_path, |_, row, v| ends[row] = v)
            .await?;
        answer.baseline_value = Some(ends[1]);
        answer.delta = Some(scores.iter().sum::<f64>() - (ends[0] - ends[1]));
    }
    Ok(with_errors(answer, options.scheme, scores, errors))
}

async fn random(
    options: &FiniteDifference,
    site: &Site,
    e: &mut Explanation,
) -> Result<Attributed, EngineError> {
    let features = e.features_of(site.units);
    let step = options.step * typical(&site.x);
    let wanted: Vec<Derivative> = (0..features.len())
        .flat_map(|feature| {
            (0..options.samples).map(move |sample| Derivative {
                feature,
                alpha: 1.0,
                weight: 1.0,
                along: feature * options.samples + sample,
                step,
            })
        })
        .collect();
    let seed = e.seed;
    let direction = |d: &Derivative| -> Vec<(usize, f32)> {
        let units = features.units()[d.feature].iter();
        let numbers: Vec<usize> = units.flat_map(|u| part(site, *u)).collect();
        // Each direction has a stream of its own: the rows that it needs may be made at different times.
        let mut draws =
            Draws::new(seed.wrapping_add((d.along as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)));
        numbers
            .iter()
            .copied()
            .zip(draws.direction(numbers.len()))
            .collect()
    };
    let mut squares = vec![Mean::new(1); features.len()];
    differences(
        (options.scheme, site, &[]),
        e,
        &wanted,
        direction,
        |subject, d, found| {
            let units = features.units()[d.feature].len();
            let dimensions = (units * site.width) as f64;
            squares[d.feature].add(&[dimensions * found.slope * found.slope]);
            subject.report(squares.iter().map(|s| s.mean()[0].sqrt()).collect(), None);
        },
    )
    .await?;
    let scores: Vec<f64> = squares.iter().map(|s| s.mean()[0].sqrt()).collect();
    // sd(sqrt(m)) = sd(m) / (2 sqrt(m)), to first order.
    let errors: Option<Vec<f64>> = squares
        .iter()
        .zip(&scores)
        .map(|(s, length)| Some(s.standard_errors()?[0] / (2.0 * length.max(f64::MIN_POSITIVE))))
        .collect();
    Ok(Attributed {
        scores,
        errors,
        error_kind: "standard_error",
        seed: Some(seed),
        site: site.name.clone(),
        convention: format!(
            "length of the gradient (L2), estimated along {} random directions per feature by {} differences, h = {step:.3e}",
            options.samples,
            options.scheme.name()
        ),
        ..Attributed::default()
    })
}

async fn dimensions(
    options: &FiniteDifference,
    site: &Site,
    e: &mut Explanation,
) -> Result<Attributed, EngineError> {
    let step = options.step * typical(&site.x);
    let wanted: Vec<Derivative> = (0..site.x.len())
        .map(|along| Derivative {
            feature: along / site.width.max(1),
            alpha: 1.0,
            weight: 1.0,
            along,
            step,
        })
        .collect();
    let mut gradient = vec![0.0f32; site.x.len()];
    let mut units = vec![0.0; site.units];
    let mut errors = vec![0.0; site.units];
    let mut rounding = 0.0f64;
    let features = e.features_of(site.units);
    differences(
        (options.scheme, site, &[]),
        e,
        &wanted,
        |d| vec![(d.along, 1.0)],
        |subject, d, found| {
            #[allow(clippy::cast_possible_truncation)] // sent in single precision
            {
                gradient[d.along] = found.slope as f32;
            }
            units[d.feature] += found.slope.abs();
            errors[d.feature] += found.error;
            rounding = rounding.max(found.rounding);
            subject.report(features.sums(&units), None);
        },
    )
    .await?;
    let tensor = Tensor::from_f32(vec![site.units, site.width], &gradient);
    let answer = Attributed {
        notes: rounds(options, &errors, rounding),
        site: site.name.clone(),
        convention: format!(
            "absolute gradient, summed over the width of the site, by {} differences along every dimension, h = {step:.3e}",
            options.scheme.name()
        ),
        extras: vec![Extra {
            name: "gradient",
            axes: vec!["pos", "d_model"],
            tensor: tensor.map_err(EngineError::internal)?,
        }],
        ..Attributed::default()
    };
    let (scores, errors) = (features.sums(&units), features.sums(&errors));
    Ok(with_errors(answer, options.scheme, scores, errors))
}

/// Takes derivatives. `direction` says which numbers of the site move, and how far for a step of one.
async fn differences(
    (scheme, site, baseline): (Scheme, &Site, &[f32]),
    e: &mut Explanation,
    wanted: &[Derivative],
    direction: impl Fn(&Derivative) -> Vec<(usize, f32)>,
    mut each: impl FnMut(&Subject, &Derivative, Found),
) -> Result<(), EngineError> {
    let sigma = rounding(e, site).await?;
    let looks = scheme.looks();
    let place = |alpha: f64| {
        if alpha < 1.0 {
            site.on_path(baseline, alpha)
        } else {
            site.rest()
        }
    };
    // F at every point where derivatives are taken.
    let mut alphas: Vec<f64> = wanted.iter().map(|d| d.alpha).collect();
    alphas.sort_by(f64::total_cmp);
    alphas.dedup();
    let mut centres = vec![f64::NAN; alphas.len()];
    let points = centres.len();
    site.values(
        &mut e.subject,
        points,
        |row| place(alphas[row]),
        |_, row, v| centres[row] = v,
    )
    .await?;
    let centre = |d: &Derivative| {
        let found = alphas.binary_search_by(|a| a.total_cmp(&d.alpha));
        found.map_or(f64::NAN, |at| centres[at])
    };
    let mut values = vec![f64::NAN; wanted.len() * looks.len()];
    let mut missing = vec![looks.len(); wanted.len()];
    let variation = |row: usize| -> Move {
        let d = &wanted[row / looks.len()];
        let (steps, _) = looks[row % looks.len()];
        let mut there = place(d.alpha);
        #[allow(clippy::cast_possible_truncation)] // a place in single precision
        let by = (steps * d.step) as f32;
        for (at, v) in direction(d) {
            there.shift[at] += by * v;
        }
        there
    };
    site.values(
        &mut e.subject,
        values.len(),
        variation,
        |subject, row, value| {
            values[row] = value;
            let of = row / looks.len();
            missing[of] -= 1;
            if missing[of] == 0 {
                let seen = &values[of * looks.len()..(of + 1) * looks.len()];
                let d = &wanted[of];
                each(
                    subject,
                    d,
                    derivative(scheme, (centre(d), seen), d.step, sigma),
                );
            }
        },
    )
    .await
}

/// The standard deviation of F by rounding alone: of rows that are the same but for less than the last place of their numbers.
async fn rounding(e: &mut Explanation, site: &Site) -> Result<f64, EngineError> {
    let mut draws = Draws::new(e.seed);
    let rows: Vec<Move> = (0..ROUNDING_ROWS)
        .map(|_| {
            let mut there = site.rest();
            for (shift, x) in there.shift.iter_mut().zip(&site.x) {
                let sign = if draws.uniform() < 0.5 { -0.5 } else { 0.5 };
                *shift = sign * f32::EPSILON * x;
            }
            there
        })
        .collect();
    let mut values = Mean::new(1);
    site.values(
        &mut e.subject,
        rows.len(),
        |row| rows[row].clone(),
        |_, _, value| values.add(&[value]),
    )
    .await?;
    let error = values.standard_errors().map_or(0.0, |e| e[0]);
    Ok(error * (ROUNDING_ROWS as f64).sqrt())
}

/// A derivative from F at the point and the looks that its scheme takes, each of which is off by rounding of a standard deviation.
///
/// The error of Richardson's is how far its two central differences are apart, and what kinks within the step do: the one-sided
/// differences of a smooth function differ by `S(h) = h F''`, so that `S(h) - 2 S(h/2)` is nothing but the jump of a derivative.
fn derivative(scheme: Scheme, (centre, seen): (f64, &[f64]), step: f64, sigma: f64) -> Found {
    let looks = scheme.looks();
    let both = || looks.iter().zip(seen);
    let rest: f64 = looks.iter().map(|(_, w)| w).sum();
    let slope = (both().map(|((_, w), v)| w * v).sum::<f64>() - rest * centre) / step;
    let weights = (looks.iter().map(|(_, w)| w * w).sum::<f64>() + rest * rest).sqrt();
    let rounding = DEVIATIONS * sigma * weights / step;
    let error = match (scheme, seen) {
        (Scheme::Richardson, [far_up, far_down, up, down]) => {
            let (fine, coarse) = ((up - down) / step, (far_up - far_down) / (2.0 * step));
            let bend = |up: f64, down: f64, step: f64| (up - 2.0 * centre + down) / step;
            let kink = bend(*far_up, *far_down, step) - 2.0 * bend(*up, *down, step / 2.0);
            (fine - coarse).abs() + kink.abs() + rounding
        }
        (Scheme::Richardson | Scheme::Forward | Scheme::Central, _) => rounding,
    };
    Found {
        slope,
        error,
        rounding,
    }
}

fn with_errors(
    answer: Attributed,
    scheme: Scheme,
    scores: Vec<f64>,
    errors: Vec<f64>,
) -> Attributed {
    let estimated = scheme == Scheme::Richardson;
    Attributed {
        scores,
        errors: estimated.then_some(errors),
        error_kind: if estimated { "richardson" } else { "" },
        ..answer
    }
}

/// Says when most of the error is rounding, so that a smaller step would make it worse.
fn rounds(options: &FiniteDifference, errors: &[f64], rounding: f64) -> Vec<String> {
    let greatest = errors.iter().copied().fold(0.0, f64::max);
    if options.scheme == Scheme::Richardson && rounding > 0.5 * greatest && greatest > 0.0 {
        return vec![format!(
            "rounding is most of the error: a step larger than {} may be more exact",
            options.step
        )];
    }
    Vec::new()
}

/// The numbers of a unit.
fn part(site: &Site, unit: usize) -> std::ops::Range<usize> {
    unit * site.width..(unit + 1) * site.width
}

/// The typical size of values: their root mean square, one where all are zero.
fn typical(values: &[f32]) -> f64 {
    let squares: f64 = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    let mean = (squares / values.len().max(1) as f64).sqrt();
    if mean > 0.0 { mean } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `F(x)`, and `F(x + s h v)` for every look of a scheme.
    fn seen(scheme: Scheme, step: f64, f: impl Fn(f64) -> f64) -> Found {
        let looks: Vec<f64> = scheme.looks().iter().map(|(s, _)| f(s * step)).collect();
        derivative(scheme, (f(0.0), &looks), step, 0.0)
    }

    #[test]
    fn schemes_are_exact_for_the_polynomials_that_they_should_be() {
        for (scheme, degree) in [
            (Scheme::Forward, 1),
            (Scheme::Central, 2),
            (Scheme::Richardson, 4),
        ] {
            let f = |t: f64| {
                (0..=degree)
                    .map(|k| f64::from(k + 1) * t.powi(k))
                    .sum::<f64>()
            };
            let found = seen(scheme, 0.1, f);
            assert!((found.slope - 2.0).abs() < 1e-12, "{scheme:?}: {found:?}");
        }
    }

    #[test]
    fn the_error_of_richardson_holds_what_is_wrong() {
        let smooth = seen(Scheme::Richardson, 0.2, |t| (2.0 * t).exp());
        assert!((smooth.slope - 2.0).abs() <= smooth.error, "{smooth:?}");
        assert!(smooth.error < 0.1);
        // A kink anywhere within the step, the slope before it two and after it one.
        for at in 0..100 {
            let kink = 0.002 * f64::from(at);
            let found = seen(Scheme::Richardson, 0.1, |t| 2.0 * t - (t - kink).max(0.0));
            let slope = if kink > 0.0 { 2.0 } else { 1.5 };
            assert!(
                (found.slope - slope).abs() <= found.error + 1e-9,
                "{kink}: {found:?}"
            );
        }
    }
}
