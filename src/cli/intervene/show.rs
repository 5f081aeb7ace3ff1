//! What an intervention changed, on the terminal and as JSON.

use serde_json::{Value, json};

use super::Answer;
use crate::{
    cli::{
        capture::json::{prediction, summary, token},
        out,
    },
    service::wire::introspect as pb,
};

/// A table for each place of the prediction.
pub(in crate::cli) fn page(answer: &Answer) -> String {
    let mut text = String::new();
    for at in &answer.effect.at {
        if let Some(position) = at.position {
            let token = answer.header.tokens.get(position as usize);
            let token = token.map_or(String::new(), |t| format!(" ({})", out::clean(&t.text)));
            text.push_str(&format!("position {position}{token}\n"));
        }
        let heading = ["", "before", "after", "change", "logit", "after", "change"];
        text.push_str(&out::table(&heading, at.changes.iter().map(row)));
        let flipped = if at.flipped {
            "the prediction is another"
        } else {
            "the prediction stays"
        };
        text.push_str(&format!(
            "  {flipped}; KL {:.4} nats, total variation {:.4}\n",
            at.kl, at.total_variation
        ));
    }
    if answer.effect.at.is_empty() {
        text.push_str("The model predicts nothing here that could change: ask for hook points of both runs over gRPC.\n");
    }
    for note in &answer.summary.notes {
        text.push_str(&format!("  {}\n", out::clean(note)));
    }
    text
}

fn row(change: &pb::Change) -> Vec<String> {
    let name = if change.label.is_empty() {
        change.index.to_string()
    } else {
        out::line(&change.label)
    };
    let (before, after) = (change.probability_before, change.probability_after);
    vec![
        name,
        format!("{before:.4}"),
        format!("{after:.4}"),
        format!("{:+.4}", after - before),
        format!("{:.3}", change.logit_before),
        format!("{:.3}", change.logit_after),
        format!("{:+.3}", change.logit_after - change.logit_before),
    ]
}

/// Everything.
pub(in crate::cli) fn json(answer: &Answer) -> Value {
    let at = answer.effect.at.iter().map(|at| {
        let changes = at.changes.iter().map(|c| {
            json!({
                "index": c.index, "label": c.label,
                "logit_before": c.logit_before, "logit_after": c.logit_after,
                "probability_before": c.probability_before, "probability_after": c.probability_after,
            })
        });
        json!({
            "position": at.position, "kl": at.kl, "total_variation": at.total_variation, "flipped": at.flipped,
            "changes": changes.collect::<Vec<_>>(),
        })
    });
    json!({
        "model": answer.header.model,
        "fingerprint": answer.header.fingerprint,
        "tokens": answer.header.tokens.iter().map(token).collect::<Vec<_>>(),
        "original": answer.original.as_ref().map(prediction),
        "modified": answer.modified.as_ref().map(prediction),
        "effect": at.collect::<Vec<_>>(),
        "summary": summary(&answer.summary),
    })
}
