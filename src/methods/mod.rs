//! What the daemon does with a model: one file per method, pure mathematics apart from the running.
//!
//! A method takes a model handle and a validated question, asks the engine for rows, and reduces what comes back.
//! It knows neither the wire nor how rows are batched.
//!
//! - [`input`]: texts, ids or tensors to the row that the engine runs;
//! - [`select`]: names, aliases, kinds and patterns to the hook points that they mean;
//! - [`reduce`]: pooling, top-k, sparse attention;
//! - [`predict`]: what the model's output says;
//! - [`capture`]: all of these in a row;
//! - [`target`]: a number that the model computes, for methods that explain or watch one;
//! - `subject`: the row that it is computed for, and the one way to run variations of it;
//! - [`attribute`]: what each part of the input contributes to a number that the model computes;
//! - [`intervene`]: parts of the model edited while it runs, for any of these, and what that changes of the answer;
//! - [`rows`]: hook points of a row in passes that fit into memory;
//! - [`heads`]: what attention heads attend to, as numbers;
//! - [`neurons`]: what neurons react to, over a corpus;
//! - [`lens`]: what the model would say if it ended at a layer, what of its answer each part wrote, how its stream grows and turns;
//! - [`probe`]: small models that read a property off a hook point, trained, stored and scored.

pub mod attribute;
pub mod capture;
pub mod heads;
pub mod input;
pub mod intervene;
pub mod lens;
pub mod neurons;
pub mod predict;
pub mod probe;
pub mod reduce;
pub mod rows;
pub mod select;
mod subject;
pub mod target;

pub use subject::{Partial, Spent};

#[cfg(test)]
mod testing;
