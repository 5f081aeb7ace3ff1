//! What is missing when a feature is gone.
//!
//! ```text
//!   ablation:       F(x) - F(x with the feature replaced by the baseline)     as Captum's `FeatureAblation`
//!   leave one out:  F(x) - F(x without the feature)                           the text becomes shorter
//! ```

use super::{
    Attributed, Explanation,
    game::{Coalition, Game},
};
use crate::{engine::EngineError, methods::input};

pub(super) async fn run(e: &mut Explanation) -> Result<Attributed, EngineError> {
    let game = Game::new(e.compared()?, &e.features)?;
    let players = game.players();
    let without: Vec<Coalition> = (0..players)
        .map(|gone| (0..players).map(|p| p != gone).collect())
        .collect();
    let mut scores = vec![0.0; players];
    let value = e.value;
    game.play(&mut e.subject, &without, |subject, player, without| {
        scores[player] = value - without;
        subject.report(game.scores(&scores), None);
    })
    .await?;
    Ok(Attributed {
        scores: game.scores(&scores),
        convention: "F(x) - F(x with the feature replaced by the baseline)".to_owned(),
        ..Attributed::default()
    })
}

/// Takes the tokens of each feature out.
pub(super) async fn leave_one_out(e: &mut Explanation) -> Result<Attributed, EngineError> {
    let info = e.subject.handle.info().clone();
    if e.subject.ids_input().is_none() {
        return Err(EngineError::precondition(
            "nothing can be left out of an input that is no text: use ablation or occlusion",
        ));
    }
    if info.fixed_length.is_some() && !info.pads {
        return Err(EngineError::precondition(format!(
            "model \"{}\" takes rows of one length only: use ablation",
            info.name
        )));
    }
    let asked = e.subject.tokens.len() - e.subject.objective.asked;
    let tokens = e.subject.tokens.clone();
    let mut rows = Vec::new();
    let mut of = Vec::new();
    let mut notes = Vec::new();
    for (feature, units) in e.features.units().iter().enumerate() {
        let gone: Vec<usize> = units
            .iter()
            .copied()
            .filter(|u| *u < asked && !tokens[*u].special)
            .collect();
        if gone.is_empty() || gone.len() == tokens.len() {
            continue;
        }
        let positions = e.subject.objective.terms.iter().filter_map(|t| t.position);
        if positions.clone().any(|p| gone.contains(&(p as usize))) {
            notes.push(format!(
                "feature {feature} holds the position that is read, and was not left out"
            ));
            continue;
        }
        let left = || (0..tokens.len()).filter(|at| !gone.contains(at));
        let ids: Vec<u32> = left().map(|at| tokens[at].id).collect();
        let types: Vec<u32> = left().map(|at| tokens[at].type_id).collect();
        // What is left out before a position that is read moves it.
        let before = |p: u32| gone.iter().filter(|g| **g < p as usize).count();
        let moved: Vec<u32> = positions
            .map(|p| p - u32::try_from(before(p)).unwrap_or_default())
            .collect();
        rows.push((input::row(&info, &ids, &types)?, moved));
        of.push(feature);
    }
    let mut scores = vec![0.0; e.features.len()];
    let value = e.value;
    e.subject
        .values_of(rows, |subject, row, without| {
            scores[of[row]] = value - without;
            subject.report(scores.clone(), None);
        })
        .await?;
    Ok(Attributed {
        scores,
        notes,
        convention: "F(x) - F(x without the feature), its tokens taken out".to_owned(),
        ..Attributed::default()
    })
}
