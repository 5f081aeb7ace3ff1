//! What an operator sees of the models' lives. Labels are names of the repository's folders.

use metrics::{counter, gauge};

use crate::telemetry::names;

/// Whether a model serves.
pub(super) fn ready(model: &str, ready: bool) {
    gauge!(names::MODEL_READY, "model" => model.to_owned()).set(f64::from(u8::from(ready)));
}

/// A worker was started in place of one that died.
pub(super) fn restart(model: &str) {
    counter!(names::WORKER_RESTARTS, "model" => model.to_owned()).increment(1);
}
