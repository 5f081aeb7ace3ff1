//! The Prometheus recorder: installed once per process, with every metric described and every histogram given its buckets.

use std::time::Duration;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use super::names::{ALL, Kind};

/// How often histograms are drained while nobody scrapes.
const UPKEEP: Duration = Duration::from_secs(5);

/// Renders the metrics. Clones render the same.
#[derive(Clone, Debug)]
pub struct Recorder {
    handle: PrometheusHandle,
}

impl Recorder {
    /// Makes the process's metrics go here. Fails when something else was installed before.
    pub fn install() -> Result<Self, BuildError> {
        let handle = builder()?.install_recorder()?;
        describe();
        metrics::gauge!(
            super::names::BUILD_INFO,
            "version" => env!("CARGO_PKG_VERSION"),
            "runtime" => env!("INTROSPECTD_ORT_VERSION")
        )
        .set(1.0);
        Ok(Self { handle })
    }

    /// The text that `/metrics` serves.
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Keeps the memory of histograms bounded; runs until it is dropped.
    pub async fn upkeep(self) {
        let mut tick = tokio::time::interval(UPKEEP);
        loop {
            tick.tick().await;
            self.handle.run_upkeep();
        }
    }
}

fn builder() -> Result<PrometheusBuilder, BuildError> {
    let mut builder = PrometheusBuilder::new();
    for metric in ALL {
        if let Kind::Histogram(buckets) = metric.kind {
            builder =
                builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), buckets.0)?;
        }
    }
    Ok(builder)
}

fn describe() {
    for m in ALL {
        match m.kind {
            Kind::Counter => metrics::describe_counter!(m.name, m.unit, m.help),
            Kind::Gauge => metrics::describe_gauge!(m.name, m.unit, m.help),
            Kind::Histogram(_) => metrics::describe_histogram!(m.name, m.unit, m.help),
        }
    }
}
