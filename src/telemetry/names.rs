//! The name of every metric, described once: kind, unit, labels, buckets, help.

use metrics::Unit;

/// Histogram, `model`, `method`, `code`: from the arrival of a request that looks inside a model to the end of its answer.
pub const EXPLANATION_DURATION: &str = "introspectd_explanation_duration_seconds";
/// Histogram, `model`, `method`, `stage`: where that time went.
pub const STAGE_DURATION: &str = "introspectd_stage_duration_seconds";
/// Histogram, `model`, `method`: `|sum of scores - (F(x) - F(x'))| / |F(x) - F(x')|` of attributions that promise it to be zero.
pub const COMPLETENESS_RESIDUAL: &str = "introspectd_completeness_residual_ratio";
/// Histogram, `model_name`: the same as [`EXPLANATION_DURATION`] under the name that KServe's dashboards use.
pub const KSERVE_EXPLAIN: &str = "request_explain_seconds";
/// Counter, `method`, `code`: calls that ended.
pub const REQUESTS: &str = "introspectd_requests_total";
/// Histogram, `method`: from the arrival of a call to the end of its answer.
pub const REQUEST_DURATION: &str = "introspectd_request_duration_seconds";
/// Gauge, `method`: calls that are open.
pub const INFLIGHT: &str = "introspectd_inflight_requests";
/// Counter, `method`: bytes of payload in streams of results.
pub const STREAM_BYTES: &str = "introspectd_stream_bytes_total";
/// Counter: streams that were given up because their reader stopped reading.
pub const STALLED_STREAMS: &str = "introspectd_stalled_streams_total";
/// Gauge: open connections.
pub const CONNECTIONS: &str = "introspectd_connections";
/// Gauge, `lane`: rows that wait for a run.
pub const QUEUE_ROWS: &str = "introspectd_queue_rows";
/// Counter, `model`, `lane`: rows that were answered.
pub const ROWS: &str = "introspectd_rows_total";
/// Counter: rows that left the queue without having run, because nobody wanted them any more.
pub const CANCELLED_ROWS: &str = "introspectd_cancelled_rows_total";
/// Histogram, `model`: padded tokens of a run.
pub const BATCH_TOKENS: &str = "introspectd_batch_tokens";
/// Gauge, `model`: graph variants that a model holds.
pub const VARIANTS: &str = "introspectd_variants";
/// Counter, `model`, `outcome`: graph variants that were built, or could not be.
pub const VARIANT_BUILDS: &str = "introspectd_variant_builds_total";
/// Gauge, `model`: 1 while a model serves, 0 otherwise.
pub const MODEL_READY: &str = "introspectd_model_ready";
/// Counter, `model`: workers that were started in place of one that died.
pub const WORKER_RESTARTS: &str = "introspectd_worker_restarts_total";
/// Counter, `model`: labelled examples that trainings of probes ran.
pub const PROBE_EXAMPLES: &str = "introspectd_probe_examples_total";
/// Counter, `model`: bytes that trainings of probes put into temporary files, because memory did not hold them.
pub const PROBE_SPILLED_BYTES: &str = "introspectd_probe_spilled_bytes_total";
/// Gauge, `version`, `runtime`: always 1.
pub const BUILD_INFO: &str = "introspectd_build_info";

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts observations by size.
    Histogram(&'static Buckets),
}

/// Upper bounds of a histogram's buckets.
#[derive(Debug, PartialEq)]
pub struct Buckets(pub &'static [f64]);

impl Eq for Buckets {}

/// Half a millisecond to a minute and a half: a predict of a small model up to a long sweep.
const SECONDS: Buckets = Buckets(&[
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 90.0,
]);
/// Powers of two around the default bound of a run.
const TOKENS: Buckets = Buckets(&[
    8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0,
]);

/// From what single precision can do to an explanation that explains nothing.
const RATIOS: Buckets = Buckets(&[
    1e-6, 1e-5, 1e-4, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0,
]);

/// A metric as it is described to those who scrape it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// One of the constants above.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Base unit.
    pub unit: Unit,
    /// Keys of its labels.
    pub labels: &'static [&'static str],
    /// One sentence.
    pub help: &'static str,
}

const fn metric(
    name: &'static str,
    kind: Kind,
    unit: Unit,
    labels: &'static [&'static str],
    help: &'static str,
) -> Metric {
    Metric {
        name,
        kind,
        unit,
        labels,
        help,
    }
}

/// Every metric that the daemon emits.
pub const ALL: &[Metric] = &[
    metric(
        EXPLANATION_DURATION,
        Kind::Histogram(&SECONDS),
        Unit::Seconds,
        &["model", "method", "code"],
        "From the arrival of a request that looks inside a model to the end of its answer.",
    ),
    metric(
        STAGE_DURATION,
        Kind::Histogram(&SECONDS),
        Unit::Seconds,
        &["model", "method", "stage"],
        "Time of a request by stage: tokenize, queue, build, run, reduce, encode.",
    ),
    metric(
        COMPLETENESS_RESIDUAL,
        Kind::Histogram(&RATIOS),
        Unit::Count,
        &["model", "method"],
        "Convergence delta of attributions, as a part of the output change that they explain.",
    ),
    metric(
        KSERVE_EXPLAIN,
        Kind::Histogram(&SECONDS),
        Unit::Seconds,
        &["model_name"],
        "Latency of explanations, as KServe names it.",
    ),
    metric(
        REQUESTS,
        Kind::Counter,
        Unit::Count,
        &["method", "code"],
        "Calls that ended, by RPC and status code.",
    ),
    metric(
        REQUEST_DURATION,
        Kind::Histogram(&SECONDS),
        Unit::Seconds,
        &["method"],
        "From the arrival of a call to the end of its answer.",
    ),
    metric(
        INFLIGHT,
        Kind::Gauge,
        Unit::Count,
        &["method"],
        "Calls that are open.",
    ),
    metric(
        STREAM_BYTES,
        Kind::Counter,
        Unit::Bytes,
        &["method"],
        "Bytes of payload in streams of results.",
    ),
    metric(
        STALLED_STREAMS,
        Kind::Counter,
        Unit::Count,
        &[],
        "Streams that were given up because their reader stopped reading.",
    ),
    metric(
        CONNECTIONS,
        Kind::Gauge,
        Unit::Count,
        &[],
        "Open connections on the gRPC port.",
    ),
    metric(
        QUEUE_ROWS,
        Kind::Gauge,
        Unit::Count,
        &["lane"],
        "Rows that wait for a run.",
    ),
    metric(
        ROWS,
        Kind::Counter,
        Unit::Count,
        &["model", "lane"],
        "Rows that were answered.",
    ),
    metric(
        CANCELLED_ROWS,
        Kind::Counter,
        Unit::Count,
        &[],
        "Rows that left the queue without having run, because nobody wanted them any more.",
    ),
    metric(
        BATCH_TOKENS,
        Kind::Histogram(&TOKENS),
        Unit::Count,
        &["model"],
        "Padded tokens of a run.",
    ),
    metric(
        VARIANTS,
        Kind::Gauge,
        Unit::Count,
        &["model"],
        "Graph variants that a model holds.",
    ),
    metric(
        VARIANT_BUILDS,
        Kind::Counter,
        Unit::Count,
        &["model", "outcome"],
        "Graph variants that were built, or could not be.",
    ),
    metric(
        MODEL_READY,
        Kind::Gauge,
        Unit::Count,
        &["model"],
        "1 while a model serves, 0 otherwise.",
    ),
    metric(
        WORKER_RESTARTS,
        Kind::Counter,
        Unit::Count,
        &["model"],
        "Workers that were started in place of one that died.",
    ),
    metric(
        PROBE_EXAMPLES,
        Kind::Counter,
        Unit::Count,
        &["model"],
        "Labelled examples that trainings of probes ran.",
    ),
    metric(
        PROBE_SPILLED_BYTES,
        Kind::Counter,
        Unit::Bytes,
        &["model"],
        "Bytes that trainings of probes put into temporary files, because memory did not hold them.",
    ),
    metric(
        BUILD_INFO,
        Kind::Gauge,
        Unit::Count,
        &["version", "runtime"],
        "Always 1; the labels tell what runs.",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_conventions_of_prometheus() {
        for (at, m) in ALL.iter().enumerate() {
            assert!(
                m.name.starts_with("introspectd_") || m.name == KSERVE_EXPLAIN,
                "{}",
                m.name
            );
            assert_eq!(
                m.kind == Kind::Counter,
                m.name.ends_with("_total"),
                "{}",
                m.name
            );
            assert_eq!(
                m.unit == Unit::Seconds,
                m.name.ends_with("_seconds"),
                "{}",
                m.name
            );
            assert!(m.help.ends_with('.') && m.help.len() > 10, "{}", m.name);
            assert!(ALL[..at].iter().all(|o| o.name != m.name), "{}", m.name);
        }
    }

    #[test]
    fn buckets_grow() {
        for m in ALL {
            if let Kind::Histogram(buckets) = m.kind {
                assert!(buckets.0.is_sorted_by(|a, b| a < b), "{}", m.name);
            }
        }
    }

    /// The constants of this file are its only string literals with our prefix; each stands in the table.
    #[test]
    fn every_constant_is_described() {
        let source = include_str!("names.rs");
        let declared: Vec<&str> = source
            .lines()
            .filter(|l| l.starts_with("pub const ") && l.contains(": &str = "))
            .filter_map(|l| l.split('"').nth(1))
            .collect();
        assert!(declared.len() > 10);
        for name in declared {
            assert!(ALL.iter().any(|m| m.name == name), "{name} is not in ALL");
        }
    }
}
