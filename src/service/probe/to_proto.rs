//! From probes to wire types.

use super::super::{to_proto::prediction, wire::introspect as pb};
use crate::methods::{
    probe::{
        card::{Card, ClassMetrics, Direction, NumberMetrics, Report},
        score::{Scored, Scores},
        scorer::Says,
    },
    reduce::Pooling,
};

pub(super) fn probe(card: Card) -> pb::Probe {
    pb::Probe {
        name: card.name,
        model: card.model,
        fingerprint: card.fingerprint,
        kind: card.kind.name().to_owned(),
        labels: card.labels,
        pooling: pooling(card.pooling).into(),
        best: card.best,
        reports: card.reports.into_iter().map(report).collect(),
        train_examples: card.train_examples,
        test_examples: card.test_examples,
        split: card.split,
        seed: card.seed,
        created: card.created,
        made_by: card.made_by,
        options: card.options.into_iter().collect(),
    }
}

fn pooling(pooling: Option<Pooling>) -> pb::Pooling {
    match pooling {
        None => pb::Pooling::Unspecified,
        Some(Pooling::Mean) => pb::Pooling::Mean,
        Some(Pooling::Cls) => pb::Pooling::Cls,
        Some(Pooling::Last) => pb::Pooling::Last,
        Some(Pooling::Max) => pb::Pooling::Max,
    }
}

pub(super) fn report(report: Report) -> pb::ProbeReport {
    pb::ProbeReport {
        hook: report.hook,
        layer: report.layer.and_then(|l| u32::try_from(l).ok()),
        classes: report.classes.map(classes),
        numbers: report.numbers.map(numbers),
        direction: report.direction.map(direction),
        iterations: u32::try_from(report.iterations).unwrap_or(u32::MAX),
        converged: report.converged,
        chosen_c: report.chosen_c,
        seconds: report.seconds,
        notes: report.notes,
    }
}

fn direction(d: Direction) -> pb::DirectionMetrics {
    pb::DirectionMetrics {
        length: d.length,
        separation: d.separation,
    }
}

fn classes(m: ClassMetrics) -> pb::ClassMetrics {
    pb::ClassMetrics {
        accuracy: m.accuracy,
        accuracy_low: m.accuracy_low,
        accuracy_high: m.accuracy_high,
        macro_f1: m.macro_f1,
        auc: m.auc,
        majority: m.majority,
        control_accuracy: m.control_accuracy,
        selectivity: m.selectivity,
        calibration_error: m.calibration_error,
        confusion: m.confusion,
        codelength_bits: m.codelength_bits,
        compression: m.compression,
        learning_curve: curve(m.learning_curve),
        train_accuracy: m.train_accuracy,
    }
}

fn numbers(m: NumberMetrics) -> pb::NumberMetrics {
    pb::NumberMetrics {
        r_squared: m.r_squared,
        mean_squared_error: m.mean_squared_error,
        spearman: m.spearman,
        control_r_squared: m.control_r_squared,
        selectivity: m.selectivity,
        train_r_squared: m.train_r_squared,
        r_squared_low: m.r_squared_low,
        r_squared_high: m.r_squared_high,
        learning_curve: curve(m.learning_curve),
    }
}

fn curve(points: Vec<(u64, f64)>) -> Vec<pb::CurvePoint> {
    let point = |(examples, accuracy)| pb::CurvePoint { examples, accuracy };
    points.into_iter().map(point).collect()
}

pub(super) fn scored(scored: Scored, total: std::time::Duration) -> pb::ScoreResponse {
    pb::ScoreResponse {
        scores: scored.scores.into_iter().map(scores).collect(),
        prediction: scored.prediction.map(prediction),
        tokens: scored
            .tokens
            .into_iter()
            .map(super::super::to_proto::token)
            .collect(),
        timings: Some(super::super::to_proto::timings(&scored.timings, total)),
        truncated_tokens: scored.truncated,
    }
}

fn scores(scores: Scores) -> pb::ProbeScores {
    pb::ProbeScores {
        name: scores.name,
        hook: scores.hook,
        input: scores.input.map(says),
        tokens: scores.tokens.into_iter().map(says).collect(),
    }
}

fn says(says: Says) -> pb::ProbeScore {
    pb::ProbeScore {
        label: says.label,
        probabilities: says.probabilities,
        values: says.values,
        margin: says.margin,
        projection: says.projection,
    }
}
