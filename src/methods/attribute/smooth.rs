//! Gradients at random points: SmoothGrad (Smilkov et al. 2017) around the input, GradientSHAP (Lundberg and Lee 2017, as Captum's
//! `GradientShap` with one baseline) along the way to it.
//!
//! ```text
//!   SmoothGrad:    mean over n of |dF/dx(x + noise_n)|, or of (x + noise_n) dF/dx(x + noise_n)
//!   GradientSHAP:  mean over n of (x + noise_n - x') dF/dx(x' + alpha_n (x + noise_n - x')),  alpha_n uniform in [0, 1]
//! ```
//!
//! Both report the standard error of the mean.

use super::{
    Attributed, Explanation,
    draw::Draws,
    site::{How, Move, Site},
};
use crate::engine::EngineError;

/// What SmoothGrad averages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Smoothed {
    /// The absolute gradient.
    #[default]
    Saliency,
    /// The noisy input times its gradient.
    InputXGradient,
}

/// Options of SmoothGrad.
#[derive(Clone, Debug, PartialEq)]
pub struct SmoothGrad {
    /// Noisy copies.
    pub samples: usize,
    /// Standard deviation of the noise, as a part of the range of the site's values.
    pub noise: f64,
    /// What is averaged.
    pub of: Smoothed,
    /// Where; the token embedding, or the input of images, unless said.
    pub site: Option<String>,
}

impl Default for SmoothGrad {
    fn default() -> Self {
        Self {
            samples: 25,
            noise: 0.15,
            of: Smoothed::Saliency,
            site: None,
        }
    }
}

/// Options of GradientSHAP.
#[derive(Clone, Debug, PartialEq)]
pub struct GradientShap {
    /// Random points.
    pub samples: usize,
    /// Standard deviation of the noise, as a part of the range of the site's values.
    pub noise: f64,
    /// Where; the token embedding, or the input of images, unless said.
    pub site: Option<String>,
}

impl Default for GradientShap {
    fn default() -> Self {
        Self {
            samples: 25,
            noise: 0.0,
            site: None,
        }
    }
}

pub(super) async fn smooth_grad(
    options: &SmoothGrad,
    e: &mut Explanation,
) -> Result<Attributed, EngineError> {
    let site = Site::open(&mut e.subject, options.site.as_deref()).await?;
    let deviation = options.noise * range(&site.x);
    let mut draws = Draws::new(e.seed);
    let noise: Vec<Vec<f32>> = (0..options.samples)
        .map(|_| draws.noise(site.x.len(), deviation))
        .collect();
    let (how, convention) = match options.of {
        Smoothed::Saliency => (
            How::AbsoluteSum,
            "mean absolute gradient of noisy inputs, summed over the width of the site",
        ),
        Smoothed::InputXGradient => (
            How::TimesValue,
            "mean of noisy inputs times their gradients, summed over the width of the site",
        ),
    };
    let variation = |row: usize| Move {
        shift: noise[row].clone(),
        ..site.rest()
    };
    let mean = averaged(e, &site, (options.samples, how), variation).await?;
    Ok(Attributed {
        seed: Some(e.seed),
        site: site.name.clone(),
        convention: convention.to_owned(),
        ..mean.attributed()
    })
}

pub(super) async fn gradient_shap(
    options: &GradientShap,
    e: &mut Explanation,
) -> Result<Attributed, EngineError> {
    let compared = e.compared()?;
    let site = Site::open(&mut e.subject, options.site.as_deref()).await?;
    let baseline = site.baseline(&mut e.subject, &compared).await?;
    let deviation = options.noise * range(&site.x);
    let mut draws = Draws::new(e.seed);
    let drawn: Vec<(f64, Vec<f32>)> = (0..options.samples)
        .map(|_| (draws.uniform(), draws.noise(site.x.len(), deviation)))
        .collect();
    let variation = |row: usize| {
        let (alpha, noise) = &drawn[row];
        let mut there = site.on_path(&baseline, *alpha);
        for (shift, n) in there.shift.iter_mut().zip(noise) {
            *shift += there.scale * n;
        }
        let x = site.x.iter().zip(noise);
        there.direction = x.zip(&baseline).map(|((x, n), b)| x + n - b).collect();
        there
    };
    let mean = averaged(e, &site, (options.samples, How::Along), variation).await?;
    let mut ends = [0.0; 2];
    site.values(
        &mut e.subject,
        2,
        |row| site.on_path(&baseline, if row == 0 { 1.0 } else { 0.0 }),
        |_, row, value| ends[row] = value,
    )
    .await?;
    Ok(Attributed {
        seed: Some(e.seed),
        site: site.name.clone(),
        baseline_value: Some(ends[1]),
        delta: Some(mean.total() - (ends[0] - ends[1])),
        convention: "mean of (x - x') times the gradient at random points of the path, summed over the width of the site".to_owned(),
        ..mean.attributed()
    })
}

/// The range of values.
fn range(values: &[f32]) -> f64 {
    let greatest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let least = values.iter().copied().fold(f32::INFINITY, f32::min);
    f64::from(greatest - least).max(0.0)
}

/// A mean over draws, with its standard error.
#[derive(Clone, Debug)]
pub(super) struct Mean {
    count: usize,
    sums: Vec<f64>,
    squares: Vec<f64>,
    /// Of all units, whatever the features.
    total: f64,
}

impl Mean {
    pub(super) fn new(features: usize) -> Self {
        Self {
            count: 0,
            sums: vec![0.0; features],
            squares: vec![0.0; features],
            total: 0.0,
        }
    }

    pub(super) fn add(&mut self, scores: &[f64]) {
        self.count += 1;
        self.total += scores.iter().sum::<f64>();
        for ((sum, square), score) in self.sums.iter_mut().zip(&mut self.squares).zip(scores) {
            *sum += score;
            *square += score * score;
        }
    }

    pub(super) fn mean(&self) -> Vec<f64> {
        let n = self.count.max(1) as f64;
        self.sums.iter().map(|s| s / n).collect()
    }

    /// `s / sqrt(n)`, with the unbiased estimate of the variance. None of fewer than two draws.
    pub(super) fn standard_errors(&self) -> Option<Vec<f64>> {
        if self.count < 2 {
            return None;
        }
        let n = self.count as f64;
        let both = self.sums.iter().zip(&self.squares);
        Some(
            both.map(|(sum, square)| {
                let variance = (square - sum * sum / n).max(0.0) / (n - 1.0);
                (variance / n).sqrt()
            })
            .collect(),
        )
    }

    fn total(&self) -> f64 {
        self.total / self.count.max(1) as f64
    }

    pub(super) fn attributed(&self) -> Attributed {
        Attributed {
            scores: self.mean(),
            errors: self.standard_errors(),
            error_kind: "standard_error",
            ..Attributed::default()
        }
    }

    pub(super) fn greatest_error(&self) -> Option<f64> {
        let errors = self.standard_errors()?;
        Some(errors.into_iter().fold(0.0, f64::max))
    }
}

async fn averaged(
    e: &mut Explanation,
    site: &Site,
    extent: (usize, How),
    variation: impl Fn(usize) -> Move,
) -> Result<Mean, EngineError> {
    let features = e.features_of(site.units);
    let mut mean = Mean::new(features.len());
    let mut total = 0.0;
    site.gradients(
        &mut e.subject,
        extent,
        variation,
        |subject, _, numbers, _| {
            mean.add(&features.sums(numbers));
            total += numbers.iter().sum::<f64>();
            subject.report(mean.mean(), mean.greatest_error());
        },
    )
    .await?;
    mean.total = total;
    Ok(mean)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_has_the_standard_error_of_its_draws() {
        let mut mean = Mean::new(1);
        assert!(mean.standard_errors().is_none());
        for x in [1.0, 2.0, 3.0, 4.0] {
            mean.add(&[x]);
        }
        assert_eq!(mean.mean(), [2.5]);
        // Variance 5/3 of four draws.
        let expected = (5.0f64 / 3.0 / 4.0).sqrt();
        assert!((mean.standard_errors().unwrap()[0] - expected).abs() < 1e-12);
    }
}
