//! Tracing, metrics and the admin listener.
