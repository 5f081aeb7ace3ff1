//! What an intervention changed, on the terminal.

use super::{Answer, pair::Pair};
use crate::{
    cli::{capture::view::spelled, out},
    service::wire::introspect as pb,
};

/// A table for each place of the prediction, and a line for each hook point.
pub(in crate::cli) fn page(answer: &Answer) -> String {
    let mut text = String::new();
    for at in &answer.effect.at {
        if let Some(place) = place(answer, at) {
            text.push_str(&format!("{place}\n"));
        }
        let heading = ["", "before", "after", "change", "logit", "after", "change"];
        text.push_str(&out::table(&heading, at.changes.iter().map(row)));
        text.push_str(&format!("  {}\n", told(at)));
    }
    let predicts = !answer.effect.at.is_empty();
    if !predicts {
        text.push_str("The model predicts nothing here that could change.\n");
    }
    // The table has the scores of a prediction.
    if answer.pairs.len() > usize::from(predicts) {
        let rows = answer.pairs.iter().map(far);
        let heading = ["", "shape", "relative change", "greatest change"];
        text.push_str(&format!("\n{}", out::table(&heading, rows)));
    }
    for note in &answer.summary.notes {
        text.push_str(&format!("  {}\n", out::clean(note)));
    }
    text
}

/// Where a prediction is, unless it is about the whole input.
pub(super) fn place(answer: &Answer, at: &pb::EffectAt) -> Option<String> {
    let position = at.position?;
    let token = spelled(&answer.header.tokens, position as usize);
    let token = token.map_or(String::new(), |t| format!(" ({t})"));
    Some(format!("position {position}{token}"))
}

/// How much changed of a prediction.
pub(super) fn told(at: &pb::EffectAt) -> String {
    let flipped = if at.flipped {
        "the prediction is another"
    } else {
        "the prediction stays"
    };
    format!(
        "{flipped}; KL {:.4} nats, total variation {:.4}",
        at.kl, at.total_variation
    )
}

/// The label or token of a change, or its number.
pub(super) fn name(change: &pb::Change) -> String {
    match out::line(&change.label) {
        label if label.is_empty() => change.index.to_string(),
        label => label,
    }
}

fn row(change: &pb::Change) -> Vec<String> {
    let (before, after) = (change.probability_before, change.probability_after);
    vec![
        name(change),
        format!("{before:.4}"),
        format!("{after:.4}"),
        format!("{:+.4}", after - before),
        format!("{:.3}", change.logit_before),
        format!("{:.3}", change.logit_after),
        format!("{:+.3}", change.logit_after - change.logit_before),
    ]
}

/// How far the changed run is from the other at a hook point.
fn far(pair: &Pair) -> Vec<String> {
    let shape = pair.original.shape().iter().map(ToString::to_string);
    vec![
        pair.name().to_owned(),
        shape.collect::<Vec<_>>().join(" x "),
        format!("{:.4}", pair.relative()),
        format!("{:.4}", pair.greatest()),
    ]
}

/// The same in words.
pub(super) fn distance(pair: &Pair) -> String {
    format!(
        "relative change {:.4}, greatest {:.4}",
        pair.relative(),
        pair.greatest()
    )
}
