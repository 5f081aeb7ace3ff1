//! Times of requests by stage and by model, recorded when they end, however they end.

use std::time::{Duration, Instant};

use metrics::histogram;
use tonic::Code;

use super::status;
use crate::{
    engine::{EngineError, StageTimings},
    telemetry::names,
};

/// A request that looks inside a model. Records itself when it is dropped; one that nobody ended was cancelled.
pub(super) struct Explained {
    model: String,
    method: &'static str,
    arrived: Instant,
    code: Code,
}

impl Explained {
    /// Of a model that is in the repository: its name becomes a label.
    pub(super) fn new(model: &str, method: &'static str, arrived: Instant) -> Self {
        Self {
            model: model.to_owned(),
            method,
            arrived,
            code: Code::Cancelled,
        }
    }

    /// It began, or failed to.
    ///
    /// # Errors
    /// The same, recorded.
    pub(super) fn begun<T>(self, begun: Result<T, EngineError>) -> Result<(T, Self), EngineError> {
        match begun {
            Ok(begun) => Ok((begun, self)),
            Err(error) => {
                self.failed(&error);
                Err(error)
            }
        }
    }

    /// It was answered.
    pub(super) fn answered(mut self, timings: &StageTimings) {
        stages(&self.model, self.method, timings);
        self.code = Code::Ok;
    }

    /// It failed.
    pub(super) fn failed(mut self, error: &EngineError) {
        self.code = status::code(error);
    }
}

impl Drop for Explained {
    fn drop(&mut self) {
        let took = self.arrived.elapsed();
        histogram!(
            names::EXPLANATION_DURATION,
            "model" => self.model.clone(), "method" => self.method, "code" => status::name(self.code)
        )
        .record(took);
        if self.code == Code::Ok {
            histogram!(names::KSERVE_EXPLAIN, "model_name" => self.model.clone()).record(took);
        }
    }
}

/// Where the time of a request went. Stages that did not occur are not counted.
pub(super) fn stages(model: &str, method: &'static str, timings: &StageTimings) {
    let stages = [
        ("tokenize", timings.tokenize),
        ("queue", timings.queue),
        ("build", timings.build),
        ("run", timings.run),
        ("reduce", timings.reduce),
        ("encode", timings.encode),
    ];
    for (stage, took) in stages {
        if took > Duration::ZERO {
            histogram!(
                names::STAGE_DURATION,
                "model" => model.to_owned(), "method" => method, "stage" => stage
            )
            .record(took);
        }
    }
}
