//! What the whole-system benches share: the models, a bare session of the runtime, a daemon in processes of its own, the report.
//!
//! Each bench makes its two sides take turns in one run of the program (ours, bare, ours, bare, ...), so that a machine whose
//! speed drifts is slow for both.

#![allow(dead_code)] // every bench uses a part of it

pub mod bare;
pub mod models;
pub mod plain;
pub mod report;
pub mod served;
