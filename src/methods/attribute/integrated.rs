//! Integrated gradients (Sundararajan et al. 2017), as Captum's `LayerIntegratedGradients` at a site.
//!
//! ```text
//!   score_i = sum over the width of (x_i - x'_i) * sum_k w_k dF/dx_i(x' + alpha_k (x - x'))
//! ```
//!
//! The product with `x - x'` is summed inside of the graph, so that one number per token leaves the runtime for each point of the path.
//! `sum(scores)` is `F(x) - F(x')` but for the error of the rule; the difference is the delta.
//!
//! Beyond the references: with a tolerance, Clenshaw-Curtis rules of 4, 8, 16, ... intervals, each of which keeps the points of the one
//! before, until the delta is small enough.

use super::{
    Attributed, Cost, Explanation,
    game::Game,
    quadrature::{Node, Quadrature, clenshaw_curtis},
    site::{How, Move, Site},
};
use crate::engine::EngineError;

/// Intervals that adapting begins with.
const FIRST_INTERVALS: usize = 4;

/// Options.
#[derive(Clone, Debug, PartialEq)]
pub struct IntegratedGradients {
    /// Points of the path; when adapting, intervals to begin with.
    pub steps: usize,
    /// Rule.
    pub quadrature: Quadrature,
    /// Adapt until `|delta|` is at most this part of `|F(x) - F(x')|`.
    pub tolerance: Option<f64>,
    /// Most intervals when adapting.
    pub max_steps: usize,
    /// Where; the token embedding, or the input of images, unless said.
    pub site: Option<String>,
}

impl Default for IntegratedGradients {
    fn default() -> Self {
        Self {
            steps: 50,
            quadrature: Quadrature::GaussLegendre,
            tolerance: None,
            max_steps: 512,
            site: None,
        }
    }
}

impl IntegratedGradients {
    /// Adapting to a tolerance.
    pub fn adaptive(tolerance: f64) -> Self {
        Self {
            steps: FIRST_INTERVALS,
            tolerance: Some(tolerance),
            ..Self::default()
        }
    }

    pub(super) fn cost(&self) -> Cost {
        match self.tolerance {
            None => Cost::gradient(self.steps),
            Some(_) => Cost::gradient(self.max_steps + 1).at_most(),
        }
    }
}

/// The path and what was summed up along it.
struct Path<'a> {
    site: &'a Site,
    baseline: &'a [f32],
    difference: Vec<f32>,
}

impl Path<'_> {
    fn at(&self, alpha: f64) -> Move {
        Move {
            direction: self.difference.clone(),
            ..self.site.on_path(self.baseline, alpha)
        }
    }

    /// The gradient times the difference at each point: one number for each unit.
    async fn look(
        &self,
        e: &mut Explanation,
        alphas: &[f64],
        mut each: impl FnMut(usize, &[f64]) -> Option<(Vec<f64>, Option<f64>)>,
    ) -> Result<(), EngineError> {
        let extent = (alphas.len(), How::Along);
        self.site
            .gradients(
                &mut e.subject,
                extent,
                |row| self.at(alphas[row]),
                |subject, row, numbers, _| {
                    if let Some((partial, error)) = each(row, numbers) {
                        subject.report(partial, error);
                    }
                },
            )
            .await
    }
}

pub(super) async fn run(
    options: &IntegratedGradients,
    e: &mut Explanation,
) -> Result<Attributed, EngineError> {
    let compared = e.compared()?;
    let site = Site::open(&mut e.subject, options.site.as_deref()).await?;
    let baseline = site.baseline(&mut e.subject, &compared).await?;
    let difference: Vec<f32> = site.x.iter().zip(&baseline).map(|(x, b)| x - b).collect();
    let path = Path {
        site: &site,
        baseline: &baseline,
        difference,
    };
    let (value, baseline_value) = ends(e, &site, &baseline).await?;
    let change = value - baseline_value;
    let (units, steps, errors) = match options.tolerance {
        None => {
            let nodes = options.quadrature.nodes(options.steps);
            (fixed(&path, e, &nodes).await?, nodes.len(), None)
        }
        Some(tolerance) => adaptive(&path, e, options, (tolerance, change)).await?,
    };
    let delta = units.iter().sum::<f64>() - change;
    let rule = if options.tolerance.is_some() {
        "clenshaw_curtis, refined"
    } else {
        options.quadrature.name()
    };
    Ok(Attributed {
        scores: e.features_of(site.units).sums(&units),
        errors,
        error_kind: if options.tolerance.is_some() {
            "refinement"
        } else {
            ""
        },
        baseline_value: Some(baseline_value),
        delta: Some(delta),
        steps: Some(steps),
        site: site.name.clone(),
        convention: format!("integrated gradients, {rule}, summed over the width of the site"),
        ..Attributed::default()
    })
}

/// F at both ends of the path.
async fn ends(
    e: &mut Explanation,
    site: &Site,
    baseline: &[f32],
) -> Result<(f64, f64), EngineError> {
    if e.subject.nudge.is_none() && !site.is_input() && site.name == super::baseline::EMBED {
        // The ends are inputs of the model: no variant that moves the site needs to be built for them.
        let game = Game::new(e.compared()?, &super::Features::each(site.units))?;
        return Ok((e.value, game.baseline(&mut e.subject).await?));
    }
    let mut values = [e.value, 0.0];
    site.values(
        &mut e.subject,
        2,
        |row| site.on_path(baseline, if row == 0 { 1.0 } else { 0.0 }),
        |_, row, value| values[row] = value,
    )
    .await?;
    Ok((values[0], values[1]))
}

/// All points of a rule.
async fn fixed(
    path: &Path<'_>,
    e: &mut Explanation,
    nodes: &[Node],
) -> Result<Vec<f64>, EngineError> {
    let alphas: Vec<f64> = nodes.iter().map(|n| n.alpha).collect();
    let features = e.features_of(path.site.units);
    let mut sums = vec![0.0; path.site.units];
    let mut seen = 0.0;
    path.look(e, &alphas, |row, numbers| {
        let weight = nodes[row].weight;
        seen += weight;
        for (sum, n) in sums.iter_mut().zip(numbers) {
            *sum += weight * n;
        }
        // As if the rest of the path were like what was seen of it.
        let so_far: Vec<f64> = sums.iter().map(|s| s / seen).collect();
        Some((features.sums(&so_far), None))
    })
    .await?;
    Ok(sums)
}

/// Rules of twice as many intervals each, until the delta is small enough.
async fn adaptive(
    path: &Path<'_>,
    e: &mut Explanation,
    options: &IntegratedGradients,
    (tolerance, change): (f64, f64),
) -> Result<(Vec<f64>, usize, Option<Vec<f64>>), EngineError> {
    let units = path.site.units;
    let mut intervals = options.steps.max(2) & !1;
    // The numbers at every point that was looked at, in the order of the path.
    let mut known: Vec<Vec<f64>> = Vec::new();
    let mut before: Option<Vec<f64>> = None;
    loop {
        let nodes = clenshaw_curtis(intervals);
        let fresh: Vec<usize> = (0..nodes.len())
            .filter(|k| known.is_empty() || k % 2 == 1)
            .collect();
        let alphas: Vec<f64> = fresh.iter().map(|k| nodes[*k].alpha).collect();
        let mut all = vec![Vec::new(); nodes.len()];
        for (k, numbers) in std::mem::take(&mut known).into_iter().enumerate() {
            all[2 * k] = numbers;
        }
        path.look(e, &alphas, |row, numbers| {
            all[fresh[row]] = numbers.to_vec();
            None
        })
        .await?;
        known = all;
        let mut sums = vec![0.0; units];
        for (node, numbers) in nodes.iter().zip(&known) {
            for (sum, n) in sums.iter_mut().zip(numbers) {
                *sum += node.weight * n;
            }
        }
        let delta = (sums.iter().sum::<f64>() - change).abs();
        let scores = e.features_of(units).sums(&sums);
        let errors = before.map(|b: Vec<f64>| {
            let both = scores.iter().zip(&b);
            both.map(|(now, then)| (now - then).abs())
                .collect::<Vec<f64>>()
        });
        let greatest = errors
            .as_ref()
            .map(|e| e.iter().copied().fold(0.0, f64::max));
        e.subject.report(scores.clone(), greatest);
        let enough = delta <= tolerance * change.abs();
        if enough || intervals * 2 > options.max_steps {
            return Ok((sums, nodes.len(), errors));
        }
        before = Some(scores);
        intervals *= 2;
    }
}
