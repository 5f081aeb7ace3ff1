//! The model repository: a directory per model, the registry of what is loaded, and who looks after each model.
//!
//! - [`repository`] finds folders and validates names; it opens no model file, only looks at names and metadata.
//! - [`registry`] is what the rest of the daemon sees: [`Registry::get`], load, unload, reload, states.
//! - `supervisor` is a task per model: it alone loads, swaps, drains, restarts and withdraws that model.
//! - [`plan`] decides what a burst of loads and unloads comes down to; [`deaths`] when to restart and when to give up. Both pure.
//!
//! Invariants: operations on a model take effect in the order in which they were accepted; a model that serves goes on serving until its
//! successor is loaded and certified; a failed reload changes nothing but the report of it.

pub mod deaths;
mod observe;
pub mod plan;
pub mod registry;
pub mod repository;
mod supervisor;

pub use registry::{ModelSettings, ModelState, ModelStatus, Registry, Snapshot};
pub use repository::{Found, Repository, Scan, Skipped};
