//! KernelSHAP (Lundberg and Lee 2017): Shapley values as the solution of a weighted regression over coalitions. Two estimators.
//!
//! As the `shap` package: `sum over coalitions z of w(z) (F(z) - F(x') - phi . z)^2` with `w = (M-1) / (C(M,s) s (M-s))` for `s` of `M`
//! players, subject to `sum phi = F(x) - F(x')`. Sizes are enumerated from both ends as long as the samples reach; the rest are drawn,
//! with their complements. With all `2^M - 2` coalitions this is exact.
//!
//! As Captum: sizes drawn from `p(k) ~ (M-1) / (k (M-k))`, players uniformly; weights one, but `1e6` for nobody and everybody; plain
//! regression with an intercept.

use std::collections::HashMap;

use super::{
    Attributed, Explanation,
    draw::Draws,
    game::{Coalition, Game},
    regression::Data,
};
use crate::engine::EngineError;

/// What the ends of Captum's regression count.
const ENDS: f64 = 1e6;

/// Which estimator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KernelShapVariant {
    /// The `shap` package's.
    #[default]
    Shap,
    /// Captum's.
    Captum,
}

/// Options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelShap {
    /// Coalitions; `2 M + 2048` unless said.
    pub samples: Option<usize>,
    /// Which estimator.
    pub variant: KernelShapVariant,
}

impl KernelShap {
    pub(super) fn rows(self, players: usize) -> usize {
        let asked = self.samples.unwrap_or(2 * players + 2048);
        match self.variant {
            KernelShapVariant::Shap => asked.min(all(players)),
            KernelShapVariant::Captum => asked.max(2),
        }
    }
}

/// Coalitions but the two ends.
fn all(players: usize) -> usize {
    if players < usize::BITS as usize - 1 {
        (1usize << players) - 2
    } else {
        usize::MAX
    }
}

pub(super) async fn run(
    options: &KernelShap,
    e: &mut Explanation,
) -> Result<Attributed, EngineError> {
    let game = Game::new(e.compared()?, &e.features)?;
    let players = game.players();
    let baseline = game.baseline(&mut e.subject).await?;
    let change = e.value - baseline;
    let samples = options.rows(players);
    let mut draws = Draws::new(e.seed);
    let (values, exact) = match options.variant {
        KernelShapVariant::Shap if players == 1 => (vec![change], true),
        KernelShapVariant::Shap => {
            let (coalitions, weights) = sampled(players, samples, &mut draws);
            let played = game.values(&mut e.subject, &coalitions).await?;
            let exact = coalitions.len() == all(players);
            let fit = move || shap_fit(&coalitions, &weights, &played, (baseline, change));
            (away(fit).await?, exact)
        }
        KernelShapVariant::Captum => {
            let coalitions = captum_sampled(players, samples, &mut draws);
            let played = game.values(&mut e.subject, &coalitions).await?;
            (away(move || captum_fit(&coalitions, &played)).await?, false)
        }
    };
    let delta = values.iter().sum::<f64>() - change;
    Ok(Attributed {
        scores: game.scores(&values),
        seed: (!exact).then_some(e.seed),
        exact,
        baseline_value: Some(baseline),
        delta: Some(delta),
        convention: match options.variant {
            KernelShapVariant::Shap => format!("KernelSHAP as shap, {samples} coalitions"),
            KernelShapVariant::Captum => format!("KernelSHAP as Captum, {samples} coalitions"),
        },
        ..Attributed::default()
    })
}

/// A coalition as numbers.
pub(super) fn numbers(coalition: &Coalition) -> Vec<f64> {
    coalition
        .iter()
        .map(|there| f64::from(u8::from(*there)))
        .collect()
}

/// Fits away from the threads that serve.
pub(super) async fn away<T: Send + 'static>(
    fit: impl FnOnce() -> T + Send + 'static,
) -> Result<T, EngineError> {
    tokio::task::spawn_blocking(fit)
        .await
        .map_err(EngineError::internal)
}

/// The Shapley values as the `shap` package's regression finds them, from weighted coalitions and the values of F: of nobody, and what
/// everybody changes.
fn shap_fit(
    coalitions: &[Coalition],
    weights: &[f64],
    played: &[f64],
    (baseline, change): (f64, f64),
) -> Vec<f64> {
    let rows: Vec<Vec<f64>> = coalitions.iter().map(numbers).collect();
    let targets: Vec<f64> = played.iter().map(|v| v - baseline).collect();
    let data = Data {
        rows: &rows,
        targets: &targets,
        weights,
    };
    data.summing_to(change)
}

/// The coefficients of Captum's regression over coalitions and the values of F.
pub fn captum_fit(coalitions: &[Vec<bool>], values: &[f64]) -> Vec<f64> {
    let rows: Vec<Vec<f64>> = coalitions.iter().map(numbers).collect();
    let weights: Vec<f64> = coalitions
        .iter()
        .map(|c| {
            let there = c.iter().filter(|t| **t).count();
            if there == 0 || there == c.len() {
                ENDS
            } else {
                1.0
            }
        })
        .collect();
    let data = Data {
        rows: &rows,
        targets: values,
        weights: &weights,
    };
    data.ridge(0.0).coefficients
}

/// Captum's coalitions: everybody, nobody, then drawn ones.
fn captum_sampled(players: usize, samples: usize, draws: &mut Draws) -> Vec<Coalition> {
    let mut coalitions = vec![vec![true; players], vec![false; players]];
    let weights: Vec<f64> = (1..players)
        .map(|k| (players - 1) as f64 / (k * (players - k)) as f64)
        .collect();
    while coalitions.len() < samples && players > 1 {
        let size = 1 + draws.weighted(&weights);
        coalitions.push(draws.subset(players, size));
    }
    coalitions
}

/// The `shap` package's coalitions of at least two players, and their weights.
fn sampled(players: usize, samples: usize, draws: &mut Draws) -> (Vec<Coalition>, Vec<f64>) {
    let sizes = (players - 1).div_ceil(2);
    // Sizes that differ from that of their complement.
    let paired = (players - 1) / 2;
    let mut weight_of: Vec<f64> = (1..=sizes)
        .map(|s| {
            let weight = (players - 1) as f64 / (s * (players - s)) as f64;
            if s <= paired { 2.0 * weight } else { weight }
        })
        .collect();
    let total: f64 = weight_of.iter().sum();
    for weight in &mut weight_of {
        *weight /= total;
    }
    let mut coalitions: Vec<Coalition> = Vec::new();
    let mut weights = Vec::new();
    let mut remaining = weight_of.clone();
    let mut left = samples as f64;
    let mut full = 0;
    for size in 1..=sizes {
        let subsets = choose(players, size) * if size <= paired { 2.0 } else { 1.0 };
        if left * remaining[size - 1] / subsets < 1.0 - 1e-8 {
            break;
        }
        full = size;
        left -= subsets;
        let share = remaining[size - 1];
        if share < 1.0 {
            for weight in &mut remaining {
                *weight /= 1.0 - share;
            }
        }
        let weight = weight_of[size - 1] / subsets;
        for coalition in subsets_of(players, size) {
            if size <= paired {
                coalitions.push(coalition.iter().map(|t| !t).collect());
                weights.push(weight);
            }
            coalitions.push(coalition);
            weights.push(weight);
        }
    }
    if full == sizes {
        return (coalitions, weights);
    }
    let enumerated = coalitions.len();
    let to_draw = &remaining[full..];
    let mut seen: HashMap<Coalition, usize> = HashMap::new();
    let mut tries = 4 * samples;
    while coalitions.len() < samples && tries > 0 {
        tries -= 1;
        let size = full + 1 + draws.weighted(to_draw);
        let coalition = draws.subset(players, size);
        let complement: Coalition = coalition.iter().map(|t| !t).collect();
        let both = if size <= paired {
            vec![coalition, complement]
        } else {
            vec![coalition]
        };
        for coalition in both {
            match seen.get(&coalition) {
                Some(at) => weights[*at] += 1.0,
                None if coalitions.len() < samples => {
                    seen.insert(coalition.clone(), coalitions.len());
                    coalitions.push(coalition);
                    weights.push(1.0);
                }
                None => {}
            }
        }
    }
    let share: f64 = weight_of[full..].iter().sum();
    let drawn: f64 = weights[enumerated..].iter().sum();
    if drawn > 0.0 {
        for weight in &mut weights[enumerated..] {
            *weight *= share / drawn;
        }
    }
    (coalitions, weights)
}

fn choose(n: usize, k: usize) -> f64 {
    (0..k).fold(1.0, |c, i| c * (n - i) as f64 / (i + 1) as f64)
}

/// Every coalition of a size.
fn subsets_of(players: usize, size: usize) -> Vec<Coalition> {
    let mut found = Vec::new();
    let mut chosen: Vec<usize> = (0..size).collect();
    loop {
        let mut coalition = vec![false; players];
        for at in &chosen {
            coalition[*at] = true;
        }
        found.push(coalition);
        // The next combination in lexical order.
        let Some(at) = (0..size).rev().find(|i| chosen[*i] < players - size + i) else {
            return found;
        };
        chosen[at] += 1;
        for next in at + 1..size {
            chosen[next] = chosen[next - 1] + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::shapley::shapley_values, *};

    fn game(coalition: &Coalition) -> f64 {
        let x = numbers(coalition);
        1.0 + x[0] - 2.0 * x[1] + 3.0 * x[0] * x[1] + x[2] * x[3] * x[0] + 0.5 * x[4]
    }

    #[test]
    fn with_every_coalition_the_values_are_those_of_shapley() {
        let players = 5;
        let (coalitions, weights) = sampled(players, all(players), &mut Draws::new(1));
        assert_eq!(coalitions.len(), all(players));
        let by_bits: Vec<f64> = (0..32usize)
            .map(|bits| game(&(0..5).map(|p| bits >> p & 1 == 1).collect()))
            .collect();
        let played: Vec<f64> = coalitions.iter().map(game).collect();
        let ends = (by_bits[0], by_bits[31] - by_bits[0]);
        let found = shap_fit(&coalitions, &weights, &played, ends);
        for (found, expected) in found.iter().zip(shapley_values(&by_bits, players)) {
            assert!((found - expected).abs() < 1e-9, "{found} {expected}");
        }
    }

    #[test]
    fn what_is_drawn_stays_within_the_samples_and_weights_sum_to_one() {
        for (players, samples) in [(12, 100), (30, 200), (5, 8), (2, 2), (9, 40)] {
            let (coalitions, weights) = sampled(players, samples, &mut Draws::new(3));
            assert!(
                coalitions.len() <= samples.max(2),
                "{players} {samples}: {}",
                coalitions.len()
            );
            assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-9);
            let mut unique = coalitions.clone();
            unique.sort();
            unique.dedup();
            assert_eq!(unique.len(), coalitions.len());
        }
    }
}
