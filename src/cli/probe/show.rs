//! Probes on the terminal, as JSON, and as a curve.

use serde_json::{Value, json};

use super::directions;
use crate::{
    cli::{
        capture, out,
        picture::curve::{Curve, Point},
    },
    service::wire::introspect as pb,
};

/// Characters of the longest bar.
const BAR: f64 = 24.0;

/// Characters of the classes that a list shows.
const LABELS: usize = 40;

/// A line for each hook point, the best marked.
pub(in crate::cli) fn layers(probe: &pb::Probe) -> String {
    if directions::unjudged(probe) {
        return directions::layers(probe);
    }
    let numbers = probe.labels.is_empty();
    let number = |v: Option<f64>| v.map_or(String::new(), |v| format!("{v:.3}"));
    let coded = probe.reports.iter().filter_map(|r| r.classes.as_ref());
    let coded = coded.clone().any(|m| m.codelength_bits.is_some());
    let rows = probe.reports.iter().map(|report| {
        let point = point(report);
        let best = if report.hook == probe.best { "*" } else { "" };
        let (more, selectivity) = match (&report.classes, &report.numbers) {
            (Some(m), _) => (number(m.auc.or(Some(m.macro_f1))), number(m.selectivity)),
            (None, Some(m)) => (number(Some(m.spearman)), number(m.selectivity)),
            (None, None) => (String::new(), String::new()),
        };
        let interval = point.interval.map_or(String::new(), |(low, high)| {
            format!("{low:.3} to {high:.3}")
        });
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // 0 to BAR
        let length = (point.value.clamp(0.0, 1.0) * BAR).round() as usize;
        let mut row = vec![
            format!("{}{best}", report.hook),
            number(Some(point.value)),
            interval,
            more,
            number(point.control),
            selectivity,
        ];
        if let Some(m) = &report.classes {
            row.push(number(m.calibration_error));
            if coded {
                row.push(
                    m.codelength_bits
                        .map_or(String::new(), |b| format!("{b:.0}")),
                );
                row.push(number(m.compression));
            }
        }
        row.push("█".repeat(length));
        row
    });
    let two = probe.labels.len() == 2;
    let measure = if numbers { "R2" } else { "accuracy" };
    let more = match (numbers, two) {
        (true, _) => "spearman",
        (false, true) => "AUC",
        (false, false) => "macro F1",
    };
    let mut heading = vec![
        "hook point",
        measure,
        "95 %",
        more,
        "control",
        "selectivity",
    ];
    if !numbers {
        heading.push("ECE");
        if coded {
            heading.extend(["bits", "compression"]);
        }
    }
    heading.push("");
    let mut text = out::table(&heading, rows);
    let chance = chance(probe).map_or(String::new(), |c| {
        format!(", {c:.3} by the commonest class")
    });
    text.push_str(&format!(
        "  {} on {} examples, judged by {}{chance}; * is scored unless another is named\n",
        probe.kind, probe.train_examples, probe.test_examples
    ));
    if let Some(learning) = learning(probe) {
        text.push('\n');
        text.push_str(&learning);
    }
    for report in &probe.reports {
        for note in &report.notes {
            text.push_str(&format!("  {}: {}\n", report.hook, out::line(note)));
        }
    }
    text
}

/// The first of the classes and how many there are, in a width that a table bears.
pub(super) fn labels(all: &[String]) -> String {
    let mut text = String::new();
    for (at, label) in all.iter().enumerate() {
        let label = out::line(label);
        let more = if at == 0 { label } else { format!(", {label}") };
        if at > 0 && text.chars().count() + more.chars().count() > LABELS {
            text.push_str(&format!(", ... {} in all", all.len()));
            break;
        }
        let whole = more.chars().count() <= LABELS;
        text.extend(more.chars().take(LABELS));
        text.push_str(if whole { "" } else { "..." });
    }
    text
}

/// Accuracy of guessing.
fn chance(probe: &pb::Probe) -> Option<f64> {
    probe.reports.first()?.classes.as_ref().map(|m| m.majority)
}

fn point(report: &pb::ProbeReport) -> Point {
    let label = short(&report.hook);
    match (&report.classes, &report.numbers) {
        (Some(m), _) => Point {
            label,
            value: m.accuracy,
            interval: Some((m.accuracy_low, m.accuracy_high)),
            control: m.control_accuracy,
        },
        (None, Some(m)) => Point {
            label,
            value: m.r_squared,
            interval: Some((m.r_squared_low, m.r_squared_high)),
            control: m.control_r_squared,
        },
        (None, None) => Point {
            label,
            ..Point::default()
        },
    }
}

/// `5 resid_pre` for `blocks.5.hook_resid_pre`: what tells hook points apart comes first, as pictures cut names.
fn short(hook: &str) -> String {
    let inside = hook
        .strip_prefix("blocks.")
        .and_then(|rest| rest.split_once('.'));
    match inside {
        Some((layer, name)) => format!("{layer} {}", name.replace("hook_", "")),
        None => hook.replace("hook_", ""),
    }
}

/// The learning curve of each hook point, where there is one: a column for each number of examples.
fn learning(probe: &pb::Probe) -> Option<String> {
    let curve = |report: &pb::ProbeReport| -> Vec<pb::CurvePoint> {
        match (&report.classes, &report.numbers) {
            (Some(m), _) => m.learning_curve.clone(),
            (None, Some(m)) => m.learning_curve.clone(),
            (None, None) => Vec::new(),
        }
    };
    let sizes: std::collections::BTreeSet<u64> = probe
        .reports
        .iter()
        .flat_map(|r| curve(r).into_iter().map(|p| p.examples))
        .collect();
    if sizes.is_empty() {
        return None;
    }
    let heading: Vec<String> = std::iter::once("after examples".to_owned())
        .chain(sizes.iter().map(u64::to_string))
        .collect();
    let heading: Vec<&str> = heading.iter().map(String::as_str).collect();
    let rows = probe.reports.iter().map(|report| {
        let points = curve(report);
        let at = |size: &u64| {
            let point = points.iter().find(|p| p.examples == *size);
            point.map_or(String::new(), |p| format!("{:.3}", p.accuracy))
        };
        std::iter::once(report.hook.clone())
            .chain(sizes.iter().map(at))
            .collect()
    });
    Some(out::table(&heading, rows))
}

/// All layers as a curve.
pub(in crate::cli) fn curve(probe: &pb::Probe) -> Curve {
    let name = if probe.name.is_empty() {
        &probe.kind
    } else {
        &probe.name
    };
    Curve {
        title: out::clean(&format!("{}: {name}", probe.model)),
        measure: if probe.labels.is_empty() {
            "R squared".to_owned()
        } else {
            "accuracy".to_owned()
        },
        chance: chance(probe),
        points: probe.reports.iter().map(point).collect(),
    }
}

/// What is known of a probe.
pub(in crate::cli) fn json(probe: &pb::Probe) -> Value {
    json!({
        "name": probe.name,
        "model": probe.model,
        "fingerprint": probe.fingerprint,
        "kind": probe.kind,
        "labels": probe.labels,
        "best": probe.best,
        "pooling": pooling(probe),
        "made_by": probe.made_by,
        "options": probe.options,
        "train_examples": probe.train_examples,
        "test_examples": probe.test_examples,
        "split": probe.split,
        "seed": probe.seed,
        "created": probe.created,
        "reports": probe.reports.iter().map(report).collect::<Vec<_>>(),
    })
}

/// How positions become one vector; `null` where each token is scored.
fn pooling(probe: &pb::Probe) -> Option<&'static str> {
    match probe.pooling() {
        pb::Pooling::Unspecified => None,
        pb::Pooling::Mean => Some("mean"),
        pb::Pooling::Cls => Some("cls"),
        pb::Pooling::Last => Some("last"),
        pb::Pooling::Max => Some("max"),
    }
}

fn report(report: &pb::ProbeReport) -> Value {
    let mut told = json!({
        "hook": report.hook,
        "layer": report.layer,
        "iterations": report.iterations,
        "converged": report.converged,
        "chosen_c": report.chosen_c,
        "seconds": report.seconds,
        "notes": report.notes,
    });
    if let Some(m) = &report.classes {
        told["accuracy"] = m.accuracy.into();
        told["accuracy_interval"] = json!([m.accuracy_low, m.accuracy_high]);
        told["macro_f1"] = m.macro_f1.into();
        told["auc"] = m.auc.into();
        told["majority"] = m.majority.into();
        told["control_accuracy"] = m.control_accuracy.into();
        told["selectivity"] = m.selectivity.into();
        told["calibration_error"] = m.calibration_error.into();
        told["confusion"] = json!(m.confusion);
        told["codelength_bits"] = m.codelength_bits.into();
        told["compression"] = m.compression.into();
        told["learning_curve"] = points(&m.learning_curve);
        told["train_accuracy"] = m.train_accuracy.into();
    }
    if let Some(m) = &report.numbers {
        told["r_squared"] = m.r_squared.into();
        told["r_squared_interval"] = json!([m.r_squared_low, m.r_squared_high]);
        told["mean_squared_error"] = m.mean_squared_error.into();
        told["spearman"] = m.spearman.into();
        told["control_r_squared"] = m.control_r_squared.into();
        told["selectivity"] = m.selectivity.into();
        told["train_r_squared"] = m.train_r_squared.into();
        told["learning_curve"] = points(&m.learning_curve);
    }
    if let Some(d) = &report.direction {
        told["length"] = d.length.into();
        told["separation"] = d.separation.into();
    }
    told
}

fn points(curve: &[pb::CurvePoint]) -> Value {
    let points = curve.iter().map(|p| json!([p.examples, p.accuracy]));
    points.collect()
}

/// What probes say of a text.
pub(in crate::cli) fn scores(answer: &pb::ScoreResponse) -> String {
    let mut rows = Vec::new();
    for scores in &answer.scores {
        let row = |text: String, says: &pb::ProbeScore| {
            let number = |v: Option<f32>| v.map_or(String::new(), |v| format!("{v:.3}"));
            let sure = says.probabilities.iter().copied().reduce(f32::max);
            vec![
                scores.name.clone(),
                scores.hook.clone(),
                text,
                says.label.clone(),
                number(sure),
                number(says.values.first().copied()),
                number(says.projection),
            ]
        };
        if let Some(says) = &scores.input {
            rows.push(row("(all)".to_owned(), says));
        }
        for (at, says) in scores.tokens.iter().enumerate() {
            let text = answer
                .tokens
                .get(at)
                .map_or_else(|| at.to_string(), |t| t.text.clone());
            rows.push(row(text, says));
        }
    }
    let heading = [
        "probe",
        "hook point",
        "of",
        "class",
        "probability",
        "value",
        "projection",
    ];
    let mut shown = out::table(&heading, rows);
    if let Some(prediction) = &answer.prediction {
        shown.push('\n');
        shown.push_str(&capture::show::prediction(prediction, &answer.tokens));
    }
    shown
}

/// The same as JSON.
pub(in crate::cli) fn scores_json(answer: &pb::ScoreResponse) -> Value {
    let says = |s: &pb::ProbeScore| {
        json!({
            "label": s.label, "probabilities": s.probabilities, "values": s.values,
            "margin": s.margin, "projection": s.projection,
        })
    };
    let tokens: Vec<&String> = answer.tokens.iter().map(|t| &t.text).collect();
    let scores: Vec<Value> = answer
        .scores
        .iter()
        .map(|s| {
            json!({
                "name": s.name, "hook": s.hook, "input": s.input.as_ref().map(says),
                "tokens": s.tokens.iter().map(says).collect::<Vec<_>>(),
            })
        })
        .collect();
    let prediction = answer.prediction.as_ref().map(capture::json::prediction);
    json!({ "tokens": tokens, "scores": scores, "prediction": prediction })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_classes_are_shortened() {
        let names = |n: usize| (0..n).map(|i| format!("label{i}")).collect::<Vec<_>>();
        assert_eq!(labels(&names(3)), "label0, label1, label2");
        let many = labels(&names(200));
        assert!(many.starts_with("label0, label1, "), "{many}");
        assert!(many.ends_with(", ... 200 in all"), "{many}");
        assert!(many.chars().count() < 60, "{many}");
        assert_eq!(labels(&["a".repeat(300)]), "a".repeat(40) + "...");
        assert_eq!(labels(&["a\nb".to_owned()]), "a↵b");
    }

    #[test]
    fn short_names_begin_with_what_tells_them_apart() {
        for (hook, expected) in [
            ("blocks.5.hook_resid_pre", "5 resid_pre"),
            (
                "blocks.5.hook_normalized_resid_post",
                "5 normalized_resid_post",
            ),
            ("blocks.11.attn.hook_z", "11 attn.z"),
            ("hook_embed", "embed"),
        ] {
            assert_eq!(short(hook), expected);
        }
    }
}
