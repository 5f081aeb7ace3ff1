//! Conductance (Dhamdhere et al. 2018), as Captum's `LayerConductance`: how much of the change of F flows through a layer while the
//! embedding goes from the baseline to the input.
//!
//! ```text
//!   score_i = sum over the width of sum_k dF/dy_i(alpha_k) * (y_i(alpha_{k+1}) - y_i(alpha_k))
//! ```
//!
//! over the points of a rule with one point more than steps. Of the rule only the points count.

use std::collections::BTreeMap;

use super::{
    Attributed, Explanation,
    baseline::no_hook,
    game::Game,
    quadrature::Quadrature,
    site::{Move, Site},
};
use crate::{
    engine::EngineError,
    ipc::{info::Axis, spec::Reduction},
    methods::subject::{Show, floats},
};

/// Most numbers that are kept of the layer: its values and gradients at every point.
const MOST_NUMBERS: usize = 64 << 20;

/// Options.
#[derive(Clone, Debug, PartialEq)]
pub struct Conductance {
    /// Hook point of the layer.
    pub layer: String,
    /// Points of the path.
    pub steps: usize,
    /// Where they are.
    pub quadrature: Quadrature,
}

pub(super) async fn run(
    options: &Conductance,
    e: &mut Explanation,
) -> Result<Attributed, EngineError> {
    let info = e.subject.handle.info().clone();
    let hook = info
        .hook(&options.layer)
        .ok_or_else(|| no_hook(&info, &options.layer))?;
    let [Axis::Batch, Axis::Pos, _] = hook.axes[..] else {
        return Err(EngineError::invalid(
            "layer",
            format!(
                "\"{}\" has not the axes batch, position and one more",
                hook.name
            ),
        ));
    };
    let layer = hook.name.clone();
    let compared = e.compared()?;
    let site = Site::open(&mut e.subject, None).await?;
    let baseline = site.baseline(&mut e.subject, &compared).await?;
    let game = Game::new(compared, &super::Features::each(site.units))?;
    let baseline_value = game.baseline(&mut e.subject).await?;
    let alphas: Vec<f64> = options
        .quadrature
        .nodes(options.steps + 1)
        .iter()
        .map(|n| n.alpha)
        .collect();
    let points = alphas.len();
    let show = site.show(Show {
        points: BTreeMap::from([(layer.clone(), Reduction::Whole)]),
        expose: [layer.clone()].into(),
        ..Show::default()
    });
    let mut gradients = vec![Vec::new(); points];
    let mut values = vec![Vec::new(); points];
    let mut positions = 0;
    let variation = |row: usize| -> Move { site.on_path(&baseline, alphas[row]) };
    e.subject
        .run(
            &show,
            (points, site.row_bytes()),
            |rows| {
                let moves: Vec<Move> = rows.map(variation).collect();
                site.inputs(&info, &moves)
            },
            |_, rows, tensors| {
                let (gradient, value) = (floats(tensors, 0)?, floats(tensors, 1)?);
                let size = gradient.len() / rows.len().max(1);
                if size.saturating_mul(2 * points) > MOST_NUMBERS {
                    return Err(EngineError::exhausted(
                        format!(
                            "{points} points of {size} numbers are more than are kept: ask for fewer steps"
                        ),
                        None,
                    ));
                }
                let size = size.max(1);
                // `[row, position, width]`, the axis of rows left out where there is one.
                let shape = tensors[0].shape();
                positions = shape.get(shape.len().saturating_sub(2)).copied().unwrap_or(1);
                for (i, row) in rows.enumerate() {
                    gradients[row] = gradient[i * size..(i + 1) * size].to_vec();
                    values[row] = value[i * size..(i + 1) * size].to_vec();
                }
                Ok(())
            },
        )
        .await?;
    let size = values[0].len();
    let width = size / positions.max(1);
    let mut units = vec![0.0; positions];
    for k in 0..points - 1 {
        for at in 0..size {
            let step = f64::from(values[k + 1][at]) - f64::from(values[k][at]);
            units[at / width.max(1)] += f64::from(gradients[k][at]) * step;
        }
    }
    let delta = units.iter().sum::<f64>() - (e.value - baseline_value);
    Ok(Attributed {
        scores: e.features_of(positions).sums(&units),
        baseline_value: Some(baseline_value),
        delta: Some(delta),
        steps: Some(options.steps),
        site: layer,
        convention: format!(
            "conductance, {} points, summed over the width of the layer",
            options.quadrature.name()
        ),
        ..Attributed::default()
    })
}
