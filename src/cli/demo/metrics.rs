//! A few of the metrics, as an operator would scrape them.

use std::{fmt::Write as _, net::SocketAddr};

use crate::{
    cli::{http, out},
    telemetry::names,
};

/// Fetches the page and tells what it says about captures.
pub(super) async fn summary(admin: SocketAddr, model: &str) -> String {
    match http::get(admin, "/metrics").await {
        Ok(page) => told(&page, model),
        Err(e) => format!("  cannot be fetched: {e}\n"),
    }
}

fn told(page: &str, model: &str) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<52} {value}");
    };
    if let Some((count, mean)) = mean(page, names::EXPLANATION_DURATION, &[("model", model)]) {
        line(
            names::EXPLANATION_DURATION,
            format!("{count} answered, {} on average", out::seconds(mean)),
        );
    }
    for stage in ["tokenize", "queue", "build", "run", "reduce", "encode"] {
        let labels = [("model", model), ("stage", stage)];
        if let Some((_, mean)) = mean(page, names::STAGE_DURATION, &labels) {
            line(
                &format!("{}{{stage={stage:?}}}", names::STAGE_DURATION),
                out::seconds(mean),
            );
        }
    }
    for counter in [names::ROWS, names::STREAM_BYTES] {
        if let Some(n) = sum(page, counter, &[]) {
            line(counter, format!("{n}"));
        }
    }
    if text.is_empty() {
        text.push_str("  nothing was counted yet\n");
    }
    text
}

/// Count and mean of a histogram, over all its series with these labels.
fn mean(page: &str, name: &str, labels: &[(&str, &str)]) -> Option<(f64, f64)> {
    let count = sum(page, &format!("{name}_count"), labels)?;
    let total = sum(page, &format!("{name}_sum"), labels)?;
    (count > 0.0).then(|| (count, total / count))
}

/// Sum over the series of a metric that have these labels; nothing where there is none.
fn sum(page: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let mut found = None;
    for line in page.lines() {
        let Some(rest) = line.strip_prefix(name) else {
            continue;
        };
        if !rest.starts_with(['{', ' '])
            || !labels
                .iter()
                .all(|(k, v)| rest.contains(&format!("{k}={v:?}")))
        {
            continue;
        }
        let value = rest.rsplit(' ').next().and_then(|v| v.parse::<f64>().ok());
        if let Some(value) = value {
            *found.get_or_insert(0.0) += value;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "\
# TYPE a_seconds histogram
a_seconds_bucket{model=\"demo\",code=\"OK\",le=\"1\"} 3
a_seconds_sum{model=\"demo\",code=\"OK\"} 0.5
a_seconds_count{model=\"demo\",code=\"OK\"} 1
a_seconds_sum{model=\"demo\",code=\"CANCELLED\"} 0.1
a_seconds_count{model=\"demo\",code=\"CANCELLED\"} 2
a_seconds_sum{model=\"other\",code=\"OK\"} 7
a_seconds_count{model=\"other\",code=\"OK\"} 7
rows_total 12
";

    #[test]
    fn series_of_a_model_are_added_and_others_left_out() {
        let (count, mean) = mean(PAGE, "a_seconds", &[("model", "demo")]).unwrap();
        assert!((count - 3.0).abs() < 1e-9);
        assert!((mean - 0.2).abs() < 1e-9);
        assert_eq!(sum(PAGE, "rows_total", &[]), Some(12.0));
        assert_eq!(sum(PAGE, "rows", &[]), None, "a name is not its prefix");
    }
}
