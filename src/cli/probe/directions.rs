//! Directions that were fitted on all examples and judged by none, on the terminal.

use crate::{cli::out, service::wire::introspect as pb};

/// Whether what is stored was judged by nothing.
pub(super) fn unjudged(probe: &pb::Probe) -> bool {
    probe.reports.iter().any(|r| r.direction.is_some())
}

/// A line for each hook point, the best marked.
pub(in crate::cli) fn layers(probe: &pb::Probe) -> String {
    let rows = probe.reports.iter().map(|report| {
        let best = if report.hook == probe.best { "*" } else { "" };
        let direction = report.direction.unwrap_or_default();
        vec![
            format!("{}{best}", report.hook),
            format!("{:.3}", direction.length),
            separation(report).map_or(String::new(), |d| format!("{d:.3}")),
        ]
    });
    let mut text = out::table(&["hook point", "length", "separation"], rows);
    text.push_str(&format!(
        "  {} of {} examples, from {}; separation is in standard deviations of the same examples, * is taken unless another is named\n",
        probe.kind,
        probe.train_examples,
        out::line(&probe.labels.join(" to "))
    ));
    for report in &probe.reports {
        for note in &report.notes {
            text.push_str(&format!("  {}: {}\n", report.hook, out::line(note)));
        }
    }
    text
}

/// How far apart the classes lie along a direction.
pub(in crate::cli) fn separation(report: &pb::ProbeReport) -> Option<f64> {
    report.direction.as_ref()?.separation
}
