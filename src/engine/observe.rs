//! What the engine counts. Labels come from closed sets: model names of the repository, lanes.

use metrics::{counter, gauge, histogram};

use super::request::Lane;
use crate::telemetry::names;

/// Rows that wait in a lane.
pub(super) fn queue_rows(lane: Lane, rows: usize) {
    gauge!(names::QUEUE_ROWS, "lane" => lane.name()).set(as_f64(rows));
}

/// Rows that were answered.
pub(super) fn rows_done(model: &str, lane: Lane, rows: usize) {
    counter!(names::ROWS, "model" => model.to_owned(), "lane" => lane.name())
        .increment(rows as u64);
}

/// Rows that left the queue without having run.
pub(super) fn rows_dropped(rows: usize) {
    if rows > 0 {
        counter!(names::CANCELLED_ROWS).increment(rows as u64);
    }
}

/// A run of so many padded tokens ended.
pub(super) fn run(model: &str, tokens: usize) {
    histogram!(names::BATCH_TOKENS, "model" => model.to_owned()).record(as_f64(tokens));
}

/// Variants that a model holds.
pub(super) fn variants(model: &str, count: usize) {
    gauge!(names::VARIANTS, "model" => model.to_owned()).set(as_f64(count));
}

/// A variant was built, or could not be.
pub(super) fn variant_build(model: &str, built: bool) {
    let outcome = if built { "ok" } else { "error" };
    counter!(names::VARIANT_BUILDS, "model" => model.to_owned(), "outcome" => outcome).increment(1);
}

#[allow(clippy::cast_precision_loss)] // counts are small
fn as_f64(n: usize) -> f64 {
    n as f64
}
