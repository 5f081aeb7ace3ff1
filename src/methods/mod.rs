//! One file per method: pure mathematics around rows that the engine runs.
