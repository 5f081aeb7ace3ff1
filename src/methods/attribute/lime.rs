//! LIME (Ribeiro et al. 2016): a linear model of F around the input. Two estimators.
//!
//! As the `lime` package explains texts: a uniform number of features, drawn uniformly, is taken out; the distance of a sample is 100
//! times the cosine distance of its mask from the full one, its weight `sqrt(exp(-d^2 / width^2))`; ridge regression. Features are not
//! selected (`feature_selection='none'`).
//!
//! As Captum: every feature stays with probability one half; weight `exp(-d^2 / (2 width^2))` with the cosine distance of the inputs;
//! lasso.

use super::{
    Attributed, Explanation,
    baseline::EMBED,
    draw::Draws,
    game::{Coalition, Game},
    kernel_shap::{away, numbers},
    regression::{Data, Fitted},
    site::Site,
};
use crate::engine::EngineError;

/// Which estimator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LimeVariant {
    /// The `lime` package's, for texts.
    #[default]
    Text,
    /// Captum's.
    Captum,
}

/// Options. What is not said is as the estimator has it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Lime {
    /// Which estimator.
    pub variant: LimeVariant,
    /// Perturbed inputs: 5000 or 25.
    pub samples: Option<usize>,
    /// Width of the kernel: 25 or 1.
    pub kernel_width: Option<f64>,
    /// Strength of the penalty: 1 or 0.01.
    pub alpha: Option<f64>,
}

impl Lime {
    pub(super) fn samples(self) -> usize {
        self.samples.unwrap_or(match self.variant {
            LimeVariant::Text => 5000,
            LimeVariant::Captum => 25,
        })
    }
}

pub(super) async fn run(options: &Lime, e: &mut Explanation) -> Result<Attributed, EngineError> {
    let game = Game::new(e.compared()?, &e.features)?;
    let players = game.players();
    let samples = options.samples();
    let mut draws = Draws::new(e.seed);
    let coalitions: Vec<Coalition> = match options.variant {
        LimeVariant::Text => (0..samples)
            .map(|at| {
                if at == 0 {
                    return vec![true; players];
                }
                let gone = 1 + draws.below(players);
                draws.subset(players, gone).iter().map(|g| !g).collect()
            })
            .collect(),
        LimeVariant::Captum => (0..samples)
            .map(|_| (0..players).map(|_| draws.uniform() < 0.5).collect())
            .collect(),
    };
    let played = game.values(&mut e.subject, &coalitions).await?;
    let fitted = match options.variant {
        LimeVariant::Text => {
            let width = options.kernel_width.unwrap_or(25.0);
            let alpha = options.alpha.unwrap_or(1.0);
            away(move || text_fit(&coalitions, &played, width, alpha)).await?
        }
        LimeVariant::Captum => {
            let embedding = if game.compared().is_embedding() {
                Site::open(&mut e.subject, Some(EMBED)).await?.x
            } else {
                Vec::new()
            };
            let distances: Vec<f64> = coalitions
                .iter()
                .map(|c| {
                    game.compared()
                        .cosine_distance(&embedding, |unit| game.is_gone(c, unit))
                })
                .collect();
            let width = options.kernel_width.unwrap_or(1.0);
            let alpha = options.alpha.unwrap_or(0.01);
            away(move || captum_fit(&coalitions, &played, &distances, width, alpha)).await?
        }
    };
    Ok(Attributed {
        scores: game.scores(&fitted.coefficients),
        seed: Some(e.seed),
        convention: match options.variant {
            LimeVariant::Text => format!("LIME as the lime package (texts), {samples} samples"),
            LimeVariant::Captum => format!("LIME as Captum, {samples} samples"),
        },
        ..Attributed::default()
    })
}

/// The `lime` package's regression over masks and the values of F.
pub fn text_fit(masks: &[Vec<bool>], values: &[f64], width: f64, alpha: f64) -> Fitted {
    let weights: Vec<f64> = masks
        .iter()
        .map(|mask| {
            let there = mask.iter().filter(|t| **t).count() as f64;
            let distance = 100.0 * (1.0 - (there / mask.len().max(1) as f64).sqrt());
            (-(distance * distance) / (width * width)).exp().sqrt()
        })
        .collect();
    let rows: Vec<Vec<f64>> = masks.iter().map(numbers).collect();
    let data = Data {
        rows: &rows,
        targets: values,
        weights: &weights,
    };
    data.ridge(alpha)
}

/// Captum's regression over masks, values of F and distances of the inputs.
pub fn captum_fit(
    masks: &[Vec<bool>],
    values: &[f64],
    distances: &[f64],
    width: f64,
    alpha: f64,
) -> Fitted {
    let weight = |d: &f64| (-(d * d) / (2.0 * width * width)).exp();
    let weights: Vec<f64> = distances.iter().map(weight).collect();
    let rows: Vec<Vec<f64>> = masks.iter().map(numbers).collect();
    let data = Data {
        rows: &rows,
        targets: values,
        weights: &weights,
    };
    data.lasso(alpha)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_game_is_found_again() {
        let mut draws = Draws::new(5);
        let masks: Vec<Vec<bool>> = (0..400)
            .map(|_| (0..4).map(|_| draws.uniform() < 0.5).collect())
            .collect();
        let values: Vec<f64> = masks
            .iter()
            .map(|m| {
                let x = numbers(m);
                2.0 * x[0] - x[1] + 0.25 * x[3] + 7.0
            })
            .collect();
        let fitted = text_fit(&masks, &values, 1e6, 1e-9);
        for (found, expected) in fitted.coefficients.iter().zip([2.0, -1.0, 0.0, 0.25]) {
            assert!((found - expected).abs() < 1e-6);
        }
        let distances = vec![0.0; masks.len()];
        let fitted = captum_fit(&masks, &values, &distances, 1.0, 1e-9);
        assert!((fitted.coefficients[1] + 1.0).abs() < 1e-6);
    }
}
