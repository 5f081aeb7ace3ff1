//! Configuration from flags, environment and file, resolved once.
