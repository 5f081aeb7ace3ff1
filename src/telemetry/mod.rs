//! Tracing, metrics and the admin listener.

pub mod names;
