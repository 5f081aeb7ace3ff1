//! The name of every metric, described once.

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
