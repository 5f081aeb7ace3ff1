//! introspectd: transformer models as ONNX files, served with what happens inside them.
//!
//! Data flows one way. A request enters at [`service`], becomes a plan of [`methods`], its rows wait in the
//! [`engine`] for a batch, cross by [`ipc`] to the [`worker`] process that holds the model, run there on a
//! graph that [`rewrite`] made from what [`anatomy`] found in the [`onnx`] file, and stream back.

pub mod anatomy;
pub mod cli;
pub mod config;
pub mod engine;
pub mod ipc;
pub mod methods;
pub mod model;
pub mod onnx;
pub mod rewrite;
pub mod service;
pub mod shutdown;
pub mod telemetry;
pub mod tensor;
pub mod worker;
