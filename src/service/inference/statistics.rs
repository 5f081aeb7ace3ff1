//! Counts and times of inferences by model, since the daemon started. Only models that serve are counted, so there are no more of
//! them than folders in the repository.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dashmap::DashMap;

use crate::{engine::StageTimings, service::wire::inference as pb};

#[derive(Clone, Copy, Default)]
struct Times {
    count: u64,
    total: Duration,
}

impl Times {
    fn add(&mut self, took: Duration) {
        self.count += 1;
        self.total += took;
    }
}

impl From<Times> for pb::StatisticDuration {
    fn from(times: Times) -> Self {
        Self {
            count: times.count,
            ns: u64::try_from(times.total.as_nanos()).unwrap_or(u64::MAX),
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Model {
    last: u64,
    rows: u64,
    success: Times,
    fail: Times,
    queue: Times,
    input: Times,
    infer: Times,
    output: Times,
}

/// See the module.
#[derive(Default)]
pub(in crate::service) struct Statistics {
    models: DashMap<String, Model>,
}

impl Statistics {
    pub(super) fn succeeded(
        &self,
        model: &str,
        rows: usize,
        stages: &StageTimings,
        took: Duration,
    ) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let mut m = self.models.entry(model.to_owned()).or_default();
        m.last = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        m.rows += rows as u64;
        m.success.add(took);
        m.queue.add(stages.queue);
        m.input.add(stages.tokenize);
        m.infer.add(stages.run);
        m.output.add(stages.encode);
    }

    pub(super) fn failed(&self, model: &str, took: Duration) {
        self.models
            .entry(model.to_owned())
            .or_default()
            .fail
            .add(took);
    }

    pub(super) fn of(&self, model: &str, generation: u64) -> pb::ModelStatistics {
        let m = self.models.get(model).map(|m| *m).unwrap_or_default();
        pb::ModelStatistics {
            name: model.to_owned(),
            version: generation.to_string(),
            last_inference: m.last,
            inference_count: m.rows,
            execution_count: m.success.count,
            inference_stats: Some(pb::InferStatistics {
                success: Some(m.success.into()),
                fail: Some(m.fail.into()),
                queue: Some(m.queue.into()),
                compute_input: Some(m.input.into()),
                compute_infer: Some(m.infer.into()),
                compute_output: Some(m.output.into()),
            }),
        }
    }
}
