//! What an operator sees: the log, the metrics, and the admin listener that serves them.
//!
//! Names and help texts stand in [`names`] only. Labels come from closed sets (models of the repository, RPCs of our
//! descriptors, stages, codes, lanes), so that no client can add a series. Nothing is sent anywhere: metrics are
//! fetched, the log goes to standard error.

pub mod admin;
pub mod log;
pub mod names;
pub mod recorder;
