//! Shapley values by sampled permutations (Castro et al. 2009), as Captum's `ShapleyValueSampling`: a feature's score is the mean, over
//! random orders in which the features join the baseline, of what F changes by when it joins.
//!
//! `sum(scores)` is `F(x) - F(x')` whatever the sample. Coalitions that were met before are not run again, and when enumerating all
//! `2^M` coalitions takes no more rows than the permutations would, the values are exact.

use std::collections::HashMap;

use super::{
    Attributed, Cost, Explanation,
    draw::Draws,
    game::{Coalition, Game},
    smooth::Mean,
};
use crate::engine::EngineError;

/// Permutations that are run together, before the partial answer is told.
const TOGETHER: usize = 4;

/// Options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShapleySampling {
    /// Orders that are drawn.
    pub permutations: usize,
    /// Follow each by its reverse.
    pub antithetic: bool,
}

impl Default for ShapleySampling {
    fn default() -> Self {
        Self {
            permutations: 25,
            antithetic: false,
        }
    }
}

impl ShapleySampling {
    /// Whether all coalitions are fewer than those that would be sampled.
    fn enumerates(self, players: usize) -> bool {
        players < 24 && 1usize << players <= self.permutations.saturating_mul(players)
    }

    pub(super) fn cost(self, players: usize) -> Cost {
        let rows = if self.enumerates(players) {
            1 << players
        } else {
            self.permutations.saturating_mul(players)
        };
        Cost::forward(rows).at_most()
    }
}

pub(super) async fn run(
    options: &ShapleySampling,
    e: &mut Explanation,
) -> Result<Attributed, EngineError> {
    let game = Game::new(e.compared()?, &e.features)?;
    let players = game.players();
    let (mean, exact, baseline_value) = if options.enumerates(players) {
        let (values, baseline) = enumerate(&game, e).await?;
        let mut mean = Mean::new(players);
        mean.add(&values);
        (mean, true, baseline)
    } else {
        let (mean, baseline) = sample(options, &game, e).await?;
        (mean, false, baseline)
    };
    let values = mean.mean();
    let delta = values.iter().sum::<f64>() - (e.value - baseline_value);
    Ok(Attributed {
        scores: game.scores(&values),
        errors: mean.standard_errors().map(|errors| game.scores(&errors)),
        error_kind: if exact { "" } else { "standard_error" },
        seed: (!exact).then_some(e.seed),
        exact,
        baseline_value: Some(baseline_value),
        delta: Some(delta),
        convention: if exact {
            "Shapley values by enumeration of all coalitions".to_owned()
        } else {
            format!(
                "Shapley values by {} permutations{}",
                options.permutations,
                if options.antithetic {
                    ", antithetic"
                } else {
                    ""
                }
            )
        },
        ..Attributed::default()
    })
}

/// Every coalition: `phi_i = sum over S without i of |S|! (M - |S| - 1)! / M! (F(S + i) - F(S))`.
async fn enumerate(game: &Game, e: &mut Explanation) -> Result<(Vec<f64>, f64), EngineError> {
    let players = game.players();
    let all: Vec<Coalition> = (0..1usize << players)
        .map(|bits| (0..players).map(|p| bits >> p & 1 == 1).collect())
        .collect();
    let values = game.values(&mut e.subject, &all).await?;
    Ok((shapley_values(&values, players), values[0]))
}

/// The Shapley values of a game, given by its value for every coalition: bit `p` of the index says whether player `p` is there.
pub fn shapley_values(values: &[f64], players: usize) -> Vec<f64> {
    // |S|! (M - |S| - 1)! / M! = 1 / (M C(M - 1, |S|))
    let mut weights = Vec::with_capacity(players);
    let mut choose = 1.0;
    for size in 0..players {
        weights.push(1.0 / (players as f64 * choose));
        choose *= (players - 1 - size) as f64 / (size + 1) as f64;
    }
    (0..players)
        .map(|p| {
            (0..values.len())
                .filter(|bits| bits >> p & 1 == 0)
                .map(|bits| {
                    weights[bits.count_ones() as usize] * (values[bits | 1 << p] - values[bits])
                })
                .sum()
        })
        .collect()
}

async fn sample(
    options: &ShapleySampling,
    game: &Game,
    e: &mut Explanation,
) -> Result<(Mean, f64), EngineError> {
    let players = game.players();
    let mut draws = Draws::new(e.seed);
    let mut orders = Vec::with_capacity(options.permutations);
    while orders.len() < options.permutations {
        let order = draws.permutation(players);
        if options.antithetic && orders.len() + 1 < options.permutations {
            let mut back = order.clone();
            back.reverse();
            orders.push(order);
            orders.push(back);
        } else {
            orders.push(order);
        }
    }
    let mut known: HashMap<Coalition, f64> = HashMap::new();
    known.insert(vec![true; players], e.value);
    let baseline = game.baseline(&mut e.subject).await?;
    known.insert(vec![false; players], baseline);
    let mut mean = Mean::new(players);
    // The two of an antithetic pair depend on each other: their mean is one draw.
    let draw = if options.antithetic { 2 } else { 1 };
    for orders in orders.chunks(TOGETHER) {
        let mut fresh: Vec<Coalition> = Vec::new();
        for order in orders {
            let mut there = vec![false; players];
            for player in order {
                there[*player] = true;
                if !known.contains_key(&there) {
                    known.insert(there.clone(), f64::NAN);
                    fresh.push(there.clone());
                }
            }
        }
        let values = game.values(&mut e.subject, &fresh).await?;
        for (coalition, value) in fresh.into_iter().zip(values) {
            known.insert(coalition, value);
        }
        for pair in orders.chunks(draw) {
            let mut gains = vec![0.0; players];
            for order in pair {
                let mut there = vec![false; players];
                let mut before = baseline;
                for player in order {
                    there[*player] = true;
                    let now = known[&there];
                    gains[*player] += (now - before) / pair.len() as f64;
                    before = now;
                }
            }
            mean.add(&gains);
        }
        e.subject
            .report(game.scores(&mean.mean()), mean.greatest_error());
    }
    Ok((mean, baseline))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn values_are_complete_and_linear(a in prop::collection::vec(-5.0f64..5.0, 16), b in prop::collection::vec(-5.0f64..5.0, 16)) {
            let of = |game: &[f64]| shapley_values(game, 4);
            let found = of(&a);
            prop_assert!((found.iter().sum::<f64>() - (a[15] - a[0])).abs() < 1e-9);
            let both: Vec<f64> = a.iter().zip(&b).map(|(a, b)| 2.0 * a + b).collect();
            for ((both, a), b) in of(&both).iter().zip(found).zip(of(&b)) {
                prop_assert!((both - (2.0 * a + b)).abs() < 1e-9);
            }
        }
    }

    #[test]
    fn who_changes_nothing_gets_nothing_and_equals_get_the_same() {
        // F = [0 there] * [1 there], whatever 2 does.
        let game: Vec<f64> = (0..8usize)
            .map(|bits| f64::from(u8::from(bits & 3 == 3)))
            .collect();
        let found = shapley_values(&game, 3);
        assert!((found[0] - 0.5).abs() < 1e-12 && (found[1] - 0.5).abs() < 1e-12);
        assert!(found[2].abs() < 1e-12);
    }
}
