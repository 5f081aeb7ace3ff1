//! How good is an explanation?
//!
//! ```text
//!   infidelity         E_S[(sum of scores in S - (F(x) - F(x without S)))^2]     Yeh et al. 2019, perturbations to the baseline
//!   scaled             the same with scores times beta = E[s d] / E[s^2]
//!   sensitivity max    max ||attr(x) - attr(x + e)|| / ||attr(x)||, e uniform in [-0.02, 0.02]    as Captum
//!   comprehensiveness  p(y|x) - p(y|x without the top features)                   DeYoung et al. 2020
//!   sufficiency        p(y|x) - p(y|the top features only)
//! ```
//!
//! The last two at the top 1, 5, 10, 20 and 50 %, and their mean.

use super::{
    Attributed, Explanation, Method, Question, Started, Terms,
    baseline::{Compared, EMBED},
    draw::Draws,
    explain,
    game::{Coalition, Game},
    site::Site,
    start,
};
use crate::{
    engine::{Ctx, EngineError, ModelHandle},
    ipc::spec::Quantity,
};

/// Parts of the features that are on top.
pub const FRACTIONS: [f64; 5] = [0.01, 0.05, 0.1, 0.2, 0.5];
/// How far sensitivity moves the embedding.
const RADIUS: f64 = 0.02;

/// What to evaluate.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// Model, input, target, baseline, features, seed.
    pub question: Question,
    /// The methods.
    pub methods: Vec<Method>,
    /// Perturbations by which infidelity is measured.
    pub infidelity_samples: usize,
    /// Perturbed inputs by which sensitivity is measured; 0 leaves it out.
    pub sensitivity_samples: usize,
}

/// How good one explanation is.
#[derive(Clone, Debug)]
pub struct Evaluated {
    /// The explanation.
    pub attributed: Attributed,
    /// See the module.
    pub infidelity: f64,
    /// See the module.
    pub infidelity_scaled: f64,
    /// None for methods that do not look at embeddings, and where it was left out.
    pub sensitivity_max: Option<f64>,
    /// At each of [`FRACTIONS`]: comprehensiveness and sufficiency.
    pub effects: Vec<(f64, f64)>,
}

impl Evaluated {
    /// Mean over the fractions.
    pub fn comprehensiveness(&self) -> f64 {
        self.effects.iter().map(|e| e.0).sum::<f64>() / self.effects.len().max(1) as f64
    }

    /// Mean over the fractions.
    pub fn sufficiency(&self) -> f64 {
        self.effects.iter().map(|e| e.1).sum::<f64>() / self.effects.len().max(1) as f64
    }
}

/// Makes the question exact, for each method of an evaluation.
///
/// # Errors
/// Those of [`start`].
pub async fn begin(
    handle: &ModelHandle,
    evaluation: &Evaluation,
    terms: Terms,
    ctx: &Ctx,
) -> Result<Vec<Started>, EngineError> {
    let mut all = Vec::with_capacity(evaluation.methods.len());
    for (at, method) in evaluation.methods.iter().enumerate() {
        let question = Question {
            method: method.clone(),
            ..evaluation.question.clone()
        };
        let started = start(handle, question, terms, ctx).await;
        all.push(started.map_err(|e| named(e, at))?);
    }
    Ok(all)
}

/// Which method an error is of.
fn named(error: EngineError, at: usize) -> EngineError {
    match error {
        EngineError::InvalidArgument { field, message } if field.starts_with("method") => {
            EngineError::InvalidArgument {
                field: format!("methods[{at}]{}", field.trim_start_matches("method")),
                message,
            }
        }
        EngineError::InvalidArgument { .. }
        | EngineError::NotFound { .. }
        | EngineError::AlreadyExists { .. }
        | EngineError::FailedPrecondition { .. }
        | EngineError::Storage { .. }
        | EngineError::ResourceExhausted { .. }
        | EngineError::Unavailable { .. }
        | EngineError::DeadlineExceeded
        | EngineError::Cancelled
        | EngineError::DataLoss { .. }
        | EngineError::WorkerDied { .. }
        | EngineError::Internal { .. } => error,
    }
}

/// Explains, and measures how well.
///
/// # Errors
/// Those of the method, and of the runs.
pub async fn evaluate(started: Started, evaluation: &Evaluation) -> Result<Evaluated, EngineError> {
    let Started {
        method, mut run, ..
    } = started;
    if run.compared.is_none() {
        let found = Compared::find(&evaluation.question.baseline, &mut run.subject).await;
        run.compared = Some(found.map_err(|e| e.beneath("baseline"))?);
    }
    let attributed = explain(&method, &mut run).await?;
    let game = Game::new(run.compared()?, &run.features)?;
    let scores: Vec<f64> = (0..game.players())
        .map(|p| attributed.scores[game.feature(p)])
        .collect();
    let (infidelity, infidelity_scaled) =
        measured_infidelity(&game, &scores, &mut run, evaluation.infidelity_samples).await?;
    let effects = effects(&game, &scores, &mut run).await?;
    let sensitivity_max = if evaluation.sensitivity_samples > 0 && method.looks_at_embedding() {
        let count = evaluation.sensitivity_samples;
        Some(sensitivity(&method, &attributed, &mut run, count).await?)
    } else {
        None
    };
    Ok(Evaluated {
        attributed: Attributed {
            spent: run.subject.spent,
            ..attributed
        },
        infidelity,
        infidelity_scaled,
        sensitivity_max,
        effects,
    })
}

/// Infidelity of `sum of scores` against what F changed by, and the same with the best factor.
pub fn infidelity(sums: &[f64], changes: &[f64]) -> (f64, f64) {
    let n = sums.len().max(1) as f64;
    let both = || sums.iter().zip(changes);
    let error = |beta: f64| both().map(|(s, d)| (beta * s - d).powi(2)).sum::<f64>() / n;
    let squares: f64 = sums.iter().map(|s| s * s).sum();
    let beta = if squares > 0.0 {
        both().map(|(s, d)| s * d).sum::<f64>() / squares
    } else {
        1.0
    };
    (error(1.0), error(beta))
}

async fn measured_infidelity(
    game: &Game,
    scores: &[f64],
    run: &mut Explanation,
    samples: usize,
) -> Result<(f64, f64), EngineError> {
    let mut draws = Draws::new(run.seed);
    let coalitions: Vec<Coalition> = (0..samples)
        .map(|_| {
            let gone = 1 + draws.below(game.players());
            let gone = draws.subset(game.players(), gone);
            gone.iter().map(|g| !g).collect()
        })
        .collect();
    let values = game.values(&mut run.subject, &coalitions).await?;
    let sums: Vec<f64> = coalitions
        .iter()
        .map(|c| {
            c.iter()
                .zip(scores)
                .filter(|(there, _)| !**there)
                .map(|(_, s)| s)
                .sum()
        })
        .collect();
    let changes: Vec<f64> = values.iter().map(|v| run.value - v).collect();
    Ok(infidelity(&sums, &changes))
}

/// Comprehensiveness and sufficiency at each fraction. Both are about probabilities, whatever the target's quantity is.
async fn effects(
    game: &Game,
    scores: &[f64],
    run: &mut Explanation,
) -> Result<Vec<(f64, f64)>, EngineError> {
    let players = game.players();
    let mut order: Vec<usize> = (0..players).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let mut coalitions: Vec<Coalition> = vec![vec![true; players]];
    for fraction in FRACTIONS {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        // at most as many as there are
        let top = ((fraction * players as f64).ceil() as usize).clamp(1, players);
        let mut without = vec![true; players];
        for player in &order[..top] {
            without[*player] = false;
        }
        let only = without.iter().map(|t| !t).collect();
        coalitions.extend([without, only]);
    }
    let objective = run.subject.objective.clone();
    if objective.at.is_none() {
        run.subject.objective.quantity = Quantity::Probability;
        run.subject.objective.terms.truncate(1);
    }
    let played = game.values(&mut run.subject, &coalitions).await;
    run.subject.objective = objective;
    let played = played?;
    Ok(played[1..]
        .chunks_exact(2)
        .map(|pair| (played[0] - pair[0], played[0] - pair[1]))
        .collect())
}

async fn sensitivity(
    method: &Method,
    attributed: &Attributed,
    run: &mut Explanation,
    samples: usize,
) -> Result<f64, EngineError> {
    let site = if run.subject.ids_input().is_some() {
        Some(EMBED)
    } else {
        None
    };
    let size = Site::open(&mut run.subject, site).await?.x.len();
    let mut draws = Draws::new(run.seed);
    let mut greatest = 0.0f64;
    for _ in 0..samples {
        #[allow(clippy::cast_possible_truncation)] // noise needs no more
        let nudge = (0..size)
            .map(|_| (RADIUS * (2.0 * draws.uniform() - 1.0)) as f32)
            .collect();
        run.subject.nudge = Some(nudge);
        let moved = explain(method, run).await;
        run.subject.nudge = None;
        greatest = greatest.max(sensitivity_of(&attributed.scores, &moved?.scores));
    }
    Ok(greatest)
}

/// How far an explanation moved: `||attr(x~) - attr(x)|| / ||attr(x)||` (Yeh et al. 2019).
pub fn sensitivity_of(own: &[f64], moved: &[f64]) -> f64 {
    let length =
        |squares: &mut dyn Iterator<Item = f64>| squares.map(|v| v * v).sum::<f64>().sqrt();
    let away = length(&mut moved.iter().zip(own).map(|(a, b)| a - b));
    away / length(&mut own.iter().copied()).max(f64::MIN_POSITIVE)
}

/// Ranks, the mean of those of equal values.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut from = 0;
    while from < order.len() {
        let equal = order[from..]
            .iter()
            .take_while(|i| values[**i] == values[order[from]])
            .count();
        let rank = from as f64 + (equal as f64 - 1.0) / 2.0;
        for at in &order[from..from + equal] {
            ranks[*at] = rank;
        }
        from += equal;
    }
    ranks
}

/// Spearman's rank correlation; 0 where all values of a side are equal.
pub fn spearman(a: &[f64], b: &[f64]) -> f64 {
    let (a, b) = (ranks(a), ranks(b));
    let n = a.len().max(1) as f64;
    let mean = |v: &[f64]| v.iter().sum::<f64>() / n;
    let (ma, mb) = (mean(&a), mean(&b));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(&b) {
        ab += (x - ma) * (y - mb);
        aa += (x - ma) * (x - ma);
        bb += (y - mb) * (y - mb);
    }
    let norms = (aa * bb).sqrt();
    if norms > 0.0 { ab / norms } else { 0.0 }
}

/// Kendall's tau-b; 0 where all values of a side are equal.
pub fn kendall(a: &[f64], b: &[f64]) -> f64 {
    let (mut both, mut only_a, mut only_b) = (0.0, 0.0, 0.0);
    for i in 0..a.len() {
        for j in 0..i {
            let x = a[i].total_cmp(&a[j]) as i32;
            let y = b[i].total_cmp(&b[j]) as i32;
            both += f64::from(x * y);
            only_a += f64::from(x * x);
            only_b += f64::from(y * y);
        }
    }
    let norms: f64 = (only_a * only_b).sqrt();
    if norms > 0.0 { both / norms } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn correlations_are_those_of_scipy() {
        let (a, b) = ([1.0, 2.0, 2.0, 4.0, 7.0], [3.0, 1.0, 4.0, 4.0, 9.0]);
        // scipy.stats.spearmanr, kendalltau
        assert!((spearman(&a, &b) - 0.763_157_894_736_842).abs() < 1e-12);
        assert!((kendall(&a, &b) - 0.666_666_666_666_666_6).abs() < 1e-12);
        assert!((spearman(&a, &a) - 1.0).abs() < 1e-12);
        assert_eq!(spearman(&[1.0, 1.0], &[1.0, 2.0]), 0.0);
        assert_eq!(kendall(&[], &[]), 0.0);
    }

    #[test]
    fn scores_that_foretell_every_change_have_no_infidelity() {
        assert_eq!(infidelity(&[1.0, -2.0], &[1.0, -2.0]), (0.0, 0.0));
        let (raw, scaled) = infidelity(&[1.0, -2.0], &[2.0, -4.0]);
        assert_eq!(raw, 2.5);
        assert!(scaled < 1e-12);
    }
}
